"""Servers that are waited for, and pages that are watched."""

import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
IDLE = ".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status='idle']"
SCREENS = Path(os.environ.get("BITBYTE_SCREENS") or ROOT / "artifacts" / "reports" / "screens")


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

    def wait(self, path: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}{path}?token={self.token}", timeout=5):
                    return
            except urllib.error.HTTPError:
                return  # it answers
            except (urllib.error.URLError, OSError):
                alive = self.child.poll() is None
                if not alive or time.monotonic() > deadline:
                    raise AssertionError(self.log.read_text(errors="replace")) from None
                time.sleep(0.2)

    def stop(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()


class Watched:
    """A page whose requests and console errors are kept."""

    def __init__(self, browser, allowed: str):
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.errors: list[str] = []
        self.abroad: list[str] = []
        self.page.set_default_timeout(60_000)

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


class Notebook(Watched):
    """A notebook in JupyterLab."""

    def open(self, server: Server, name: str) -> None:
        url = f"{server.url}/lab/tree/notebooks/{name}.ipynb?token={server.token}&reset"
        self.page.goto(url, wait_until="domcontentloaded")
        self.page.wait_for_selector(IDLE)

    def run_all(self, last: str, seconds: float = 240) -> None:
        """Run All Cells until the text ``last`` is in an output."""
        page = self.page
        started = page.locator(".jp-InputPrompt", has_text=re.compile(r"\[[*0-9]+\]"))
        for _ in range(10):  # a click before the kernel is there does nothing, or asks for one
            try:
                dialog = page.locator("dialog.jp-Dialog").first
                if dialog.is_visible():
                    print("answering a dialog:", dialog.inner_text())
                    dialog.locator(".jp-mod-accept").click(timeout=4000)
                page.get_by_role("menuitem", name="Run", exact=True).click(timeout=4000)
                run_all = page.get_by_role("menuitem", name="Run All Cells", exact=True)
                run_all.click(timeout=4000)
                started.first.wait_for(timeout=4000)
                break
            except Exception:  # playwright has its own TimeoutError
                continue
        done = page.locator(".jp-OutputArea-output", has_text=last).first
        failed = page.locator(".jp-RenderedText[data-mime-type*='error']").first
        try:
            done.or_(failed).first.wait_for(timeout=1000 * seconds)
        except Exception as error:
            self.screen("too_late")
            seen = page.locator(".jp-Notebook").first.inner_text()
            raise AssertionError(f"no {last!r} after {seconds} s; the page says: {seen}") from error
        assert not failed.is_visible(), failed.inner_text()
        page.wait_for_selector(IDLE, timeout=1000 * seconds)
