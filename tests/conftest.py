"""Every test session works on an artifacts folder of its own, with one thread a process."""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest

# Before torch is imported: tiny tensors are faster so, and sums have one order on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
ARTIFACTS = tempfile.mkdtemp(prefix="bitbyte-tests-")
os.environ["BITBYTE_ARTIFACTS"] = ARTIFACTS
os.environ.pop("BITBYTE_RUN", None)


# The files that take longest, started first: else one of them runs alone at the end.
LONGEST = ("test_train", "test_compress", "test_batch", "test_integer", "test_papers")


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def _seeded():
    """Global random numbers of PyTorch do not depend on which tests ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def small_disk(request, tmp_path):
    """A tmpfs, of 1 MB or mounted as a parameter says."""
    from support import mount  # after the environment is set

    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", getattr(request, "param", "size=1m"), "none", place)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    shutil.rmtree(ARTIFACTS, ignore_errors=True)
