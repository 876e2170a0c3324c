"""Servers that are waited for, and pages that are watched.

A busy machine may take minutes for what takes an idle one a second.  So everything here waits for a
state, with a limit that only a fault reaches, and nothing sleeps for a guessed while.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from support import ROOT

PATIENCE = 600  # seconds: the limit of whatever computes
IDLE = ".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status='idle']"
PROMPTS = """() => [...document.querySelectorAll(".jp-CodeCell .jp-InputArea-prompt")]
  .map(prompt => prompt.textContent.trim())"""
# JupyterLab shows an error as it shows what a cell writes to stderr: a traceback, or our one line.
ERROR = re.compile(r"^\w+(Error|Exception|Interrupt)\b", re.MULTILINE)
SCREENS = Path(os.environ.get("BITBYTE_SCREENS") or ROOT / "artifacts" / "reports" / "screens")


CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def lab_environment(folder: Path) -> dict:
    """Environment of a JupyterLab whose settings are in ``folder``, not the user's."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    settings = folder / "CONFIG" / "lab" / "user-settings" / "@jupyterlab"
    # Without windowing the page holds all cells, also an error that is out of sight.
    for name, values in (
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
        ("notebook-extension/tracker", {"windowingMode": "none"}),
    ):
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return env | {"IPYTHONDIR": str(folder / "ipython")}


def write_notebook(folder: Path, name: str, *cells: str) -> str:
    """Write a notebook of these cells into ``folder``/notebooks; its name."""
    node = {
        "cells": [
            {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": source,
             "outputs": [], "execution_count": None}
            for i, source in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "nbformat": 4, "nbformat_minor": 5,
    }  # fmt: skip
    (folder / "notebooks" / f"{name}.ipynb").write_text(json.dumps(node))
    return name


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """A child process that serves ``url``; its output is in ``log``."""

    def __init__(self, command: list[str], folder: Path, env: dict, url: str, token: str):
        self.url, self.token, self.log, self.env = url, token, folder / "server.log", env
        with open(self.log, "wb") as log:
            self.child = subprocess.Popen(
                command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, path: str, seconds: float = PATIENCE) -> None:
        """Return once anything answers there."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}{path}?token={self.token}", timeout=60):
                    return
            except urllib.error.HTTPError:
                return  # it answers
            except (urllib.error.URLError, OSError):
                alive = self.child.poll() is None
                if not alive or time.monotonic() > deadline:
                    raise AssertionError(self.log.read_text(errors="replace")) from None
                time.sleep(0.2)

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        """What the server's REST interface answers."""
        request = urllib.request.Request(
            f"{self.url}{path}", method=method, data=json.dumps(body).encode() if body else None,
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read() or b"{}")

    def stop(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


def start_lab(folder: Path, env: dict) -> Server:
    """A JupyterLab for the notebooks in ``folder``, which answers."""
    port, token = free_port(), secrets.token_hex(8)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--allow-root",
    ]  # fmt: skip
    server = Server(command, folder, env, f"http://127.0.0.1:{port}", token)
    try:
        server.wait("/api/status")
    except BaseException:
        server.stop()
        raise
    return server


class Watched:
    """A page whose requests and console errors are kept."""

    def __init__(self, browser, allowed: str):
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.errors: list[str] = []
        self.abroad: list[str] = []
        self.page.set_default_timeout(1000 * PATIENCE)

        def asked(request) -> None:
            local = (allowed, allowed.replace("http", "ws", 1), "data:", "blob:", "about:")
            if not request.url.startswith(local):
                self.abroad.append(request.url)

        def refused(request) -> None:  # by the page's own policy, before it left the browser
            if request.failure == "csp" and request.url in self.abroad:
                self.abroad.remove(request.url)

        self.page.on("request", asked)
        self.page.on("requestfailed", refused)
        self.page.on("console", lambda said: self._note(said.type, said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, kind: str, text: str) -> None:
        if kind == "error":
            self.errors.append(text)

    def screen(self, name: str) -> None:
        SCREENS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENS / f"{name}.png")

    def close(self) -> None:
        self.page.close()


class Notebook(Watched):
    """A notebook in JupyterLab, with a kernel that ends with it."""

    def __init__(self, browser, server: Server):
        super().__init__(browser, server.url)
        self.server, self.session = server, None

    def open(self, name: str) -> None:
        """Start a kernel for the notebook and show it.

        JupyterLab takes the session that is there.  Left to itself it asks which kernel to use
        where it has not heard in time which there are, and loses what is run before it has one.
        """
        path, kernel = f"notebooks/{name}.ipynb", {"name": "python3"}
        body = {"path": path, "name": name, "type": "notebook", "kernel": kernel}
        self.session = self.server.ask("POST", "/api/sessions", body)["id"]
        url = f"{self.server.url}/lab/tree/{path}?token={self.server.token}&reset"
        self.page.goto(url, wait_until="domcontentloaded")
        named = self.page.locator(".jp-NotebookPanel .jp-KernelName", has_text="Python 3")
        named.first.wait_for()
        self.page.wait_for_selector(IDLE)

    def run_all(self) -> None:
        """Run All Cells, until each code cell has its number and nothing runs any more."""
        page, deadline = self.page, time.monotonic() + PATIENCE
        failed = page.locator(".jp-RenderedText[data-mime-type$='err']", has_text=ERROR)
        failed = failed.or_(page.locator(".jp-RenderedText[data-mime-type$='error']")).first
        prompts = page.evaluate(PROMPTS)
        assert prompts and set(prompts) == {"[ ]:"}, prompts
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        while not all(re.fullmatch(r"\[\d+\]:", prompt) for prompt in page.evaluate(PROMPTS)):
            assert not failed.is_visible(), failed.inner_text()
            if time.monotonic() > deadline:
                self.screen("too_late")
                raise AssertionError(page.locator(".jp-Notebook").first.inner_text())
            page.wait_for_timeout(200)
        assert not failed.is_visible(), failed.inner_text()
        page.wait_for_selector(IDLE)

    def close(self) -> None:
        super().close()
        if self.session:
            self.server.ask("DELETE", f"/api/sessions/{self.session}")
