"""A real JupyterLab and a real Chromium for the tests in this folder.

They are skipped, with the reason, where there is none (Debian: apt install chromium).
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ARGUMENTS, Notebook, find_chromium, lab_environment, start_lab
from support import ROOT

STEPS, BYTES = 8, 100_000  # of models and data: what they write does not matter here
# What the notebooks would train, in one process: each of theirs imports PyTorch first.
TRAIN = f"""
from bitbyte.workbench import recipes
data = recipes.dataset("stories", n_bytes={BYTES})
counts = {{"prior": "counts"}}
kinds = [counts | {{"family": f, "linear": x}}
         for f in ("ar", "mamba", "diffusion") for x in ("ternary", "dense")]
kinds += [{{"prior": "none", "linear": x}} for x in ("ternary", "dense")]
kinds += [counts | {{"linear": "dense", "n_layer": 0}}]
for kind in kinds:
    recipes.trained(data, preset="nano", steps={STEPS}, batch_size=8, log_every=5, **kind)
"""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> tuple[Path, dict]:
    """(folder with the notebooks, environment of servers): short runs, artifacts of its own."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for path in (folder / "notebooks").glob("*.ipynb"):
        text = re.sub(r"steps: int = \d+", f"steps: int = {STEPS}", path.read_text("utf-8"))
        text = re.sub(r"n_bytes: int = [\d_]+", f"n_bytes: int = {BYTES}", text)
        text = re.sub(r"chain_bytes: int = \d+", "chain_bytes: int = 256", text)
        node = json.loads(text)
        for cell in node["cells"]:  # a stored count or output would pass for a new one
            if cell["cell_type"] == "code":
                cell |= {"execution_count": None, "outputs": []}
        path.write_text(json.dumps(node), "utf-8")
    (folder / "artifacts").mkdir()
    env = lab_environment(folder) | {"BITBYTE_ARTIFACTS": str(folder / "artifacts")}
    subprocess.run([sys.executable, "-c", TRAIN], env=env, check=True)
    return folder, env


@pytest.fixture(scope="session")
def lab(workplace):
    pytest.importorskip("jupyterlab", reason="no JupyterLab: pip install 'bitbyte[workbench]'")
    server = start_lab(*workplace)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium here; on Debian: apt install chromium")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def notebook(browser, lab):
    one = Notebook(browser, lab)
    yield one
    one.close()
