"""Edited files and unreadable ones: an error, and never wrong bytes."""

import ctypes
import os
import subprocess
import sys

import pytest

pytest.importorskip("llvmlite")

from support import ROOT
from tools import edit_rounds

EDITS = int(os.environ.get("BITBYTE_EDITS", "1500"))


def test_edits_give_an_error_or_the_original(tmp_path):
    """At random, half of them under a right checksum; BITBYTE_EDITS=10000 for more."""
    ends = edit_rounds.rounds(EDITS, EDITS, tmp_path)
    assert sum(ends.values()) == EDITS
    for name in ("text", "sound", "archive", "model", "zeros", "one"):
        assert ends[f"{name}, refused"] >= 0.9 * EDITS / 6


def test_wrong_bytes_would_be_found(tmp_path, monkeypatch):
    """A decoder that ignores the hash is caught."""

    class Blind:
        def digest(self):
            return bytes(32)

        def update(self, data):
            pass

    monkeypatch.setattr("bitbyte.compress.frames._new_digest", Blind)
    with pytest.raises(AssertionError, match=r"edit \d+ of"):
        edit_rounds.rounds(300, 1, tmp_path)


def no_powers():
    """In a child that runs as root: it may read only what the modes of files allow."""
    for capability in (1, 2):  # DAC_OVERRIDE, DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="modes and capabilities of Linux")
def test_files_that_may_not_be_read(tmp_path):
    (tmp_path / "open").write_bytes(b"x")
    (tmp_path / "d" / "inner").mkdir(parents=True)
    (tmp_path / "shut").write_bytes(b"secret")
    (tmp_path / "shut").chmod(0)
    (tmp_path / "d" / "inner").chmod(0)
    before = sorted(tmp_path.rglob("*"))
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    try:
        for words, said in (
            ("compress none shut o", "shut"), ("compress none d o", "d/inner"),
            ("compress none open shut o", "shut"), ("decompress shut o", "shut"),
            ("test shut", "shut"),
        ):  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", "bitbyte", *words.split()], check=False, capture_output=True,
                text=True, cwd=tmp_path, env=env,
                preexec_fn=no_powers if os.geteuid() == 0 else None,
            )  # fmt: skip
            assert (done.returncode, done.stdout) == (1, ""), done.stderr
            assert done.stderr == f"failed: Permission denied: {said}\n"
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        (tmp_path / "d" / "inner").chmod(0o755)
