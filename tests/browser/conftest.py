"""A real JupyterLab and a real Chromium for the tests in this folder.

They are skipped, with the reason, where there is none (Debian: apt install chromium).
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Notebook, Server, free_port
from support import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
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
    env = os.environ | {"BITBYTE_ARTIFACTS": str(folder / "artifacts"), "OMP_NUM_THREADS": "1"}
    env |= {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env |= {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT)}
    settings = folder / "CONFIG" / "lab" / "user-settings" / "@jupyterlab"
    # Without windowing the page holds all cells, also an error that is out of sight.
    for name, values in (
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
        ("notebook-extension/tracker", {"windowingMode": "none"}),
    ):
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    subprocess.run([sys.executable, "-c", TRAIN], env=env, check=True)
    return folder, env


@pytest.fixture(scope="session")
def lab(workplace):
    pytest.importorskip("jupyterlab", reason="no JupyterLab: pip install 'bitbyte[workbench]'")
    folder, env = workplace
    port, token = free_port(), secrets.token_hex(8)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--allow-root",
    ]  # fmt: skip
    server = Server(command, folder, env, f"http://127.0.0.1:{port}", token)
    try:
        server.wait("/api/status")
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, NAMES)), None)
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
