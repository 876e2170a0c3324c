"""What the widgets share: controls, a status line, models that stay loaded, work in threads.

Names, texts and errors are untrusted: whatever becomes HTML here is escaped.
"""

import threading
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import ipywidgets as W
import torch

from bitbyte import checkpoint
from bitbyte.device import choose_device
from bitbyte.files import BitbyteError
from bitbyte.plots.style import ALARM, INK
from bitbyte.runs import resolve
from bitbyte.widgets.jobs import Job, Jobs

SLICE = 0.04  # seconds between two updates of a view


class StoppedError(Exception):
    """Raised to leave work that was asked to stop, where a loop has no other way out."""


def sized(width: int, height: int | None = None, **options) -> W.Layout:
    """``width`` by ``height`` pixels; narrower if there is less room."""
    room = "calc(100% - 4px)"  # minus the margins of a widget
    return W.Layout(width=f"{width}px", max_width=room, height=height and f"{height}px", **options)


def control(kind, width: int, description: str = "", label: int | None = None, **options):
    """A control ``width`` pixels wide.

    Its description takes ``label`` pixels, by default as many as it needs.
    """
    style = {"description_width": f"{label}px" if label else "initial"}
    return kind(description=description, style=style, layout=sized(width), **options)


def button(text: str, name: str, **options) -> W.Button:
    """A button with the class ``bb-NAME``, for tests and style sheets."""
    widget = W.Button(description=text, layout=W.Layout(width="auto", min_width="108px"), **options)
    widget.add_class(f"bb-{name}")
    return widget


def wrapped(*widgets: W.Widget, **options) -> W.HBox:
    """Widgets side by side; those that do not fit wrap to the next row."""
    return W.HBox(widgets, layout=W.Layout(flex_flow="row wrap", **options))


def inked(html: str, color: str = INK) -> str:
    """HTML in the theme's text color: a plain HTML widget stays black in a dark theme."""
    return f'<span style="color:{color}">{html}</span>'


def paragraph(html: str) -> str:
    """HTML in the color of the text around it, its lines closer than those of an HTML widget."""
    return f'<div style="color:{INK};line-height:20px;overflow-wrap:anywhere">{html}</div>'


class Panel:
    """Controls, arranged in ``box``, and what they do.

    Callbacks start jobs and return.  Errors are shown in the ``status`` line, as those of a
    callback or a thread would go unseen; `wait` raises them.
    """

    def __init__(self, device: str = "auto"):
        self.device = choose_device(device)  # where models are loaded
        self.message = ""  # text of the status line
        self.box: W.Widget
        self.status = W.HTML()
        self.status.add_class("bb-status")
        self.stop_button = button("Stop", "stop", icon="stop", disabled=True)
        self._models: dict[tuple[Path, str], torch.nn.Module] = {}  # by step, SHA-256 of its meta
        self._lock = threading.RLock()
        self._jobs = Jobs(self._fail)

    def stop(self) -> None:
        """Ask running work to stop soon; results so far stay."""
        self._jobs.stop()

    def wait(self) -> None:
        """Block until all jobs are done; raises the error of the last one."""
        self._jobs.wait()

    def to_html(self) -> str:
        """The current state as HTML without scripts, for readers without a kernel; may be ""."""
        return ""

    def _repr_mimebundle_(self, **options) -> dict:
        still = self.to_html()
        bundle = self.box._repr_mimebundle_(**options) | {"text/plain": repr(self)}
        return bundle | {"text/html": still} if still else bundle

    # For subclasses

    def _on_click(self, pressed: W.Button, action: Callable[[], object]) -> None:
        pressed.on_click(lambda _: self._try(action))

    def _on_change(self, widget, action: Callable[[object], object], name: str = "value") -> None:
        """Call ``action(new value)`` when the trait ``name`` changes."""
        widget.observe(lambda change: self._try(action, change.new), name)

    def _try(self, action: Callable, *arguments) -> None:
        try:
            action(*arguments)
        except Exception as error:
            self._fail(error)

    def _start(self, work: Callable[[Job], None], replace: bool = True) -> None:
        """Run ``work(job)`` in a thread, with the Stop button enabled meanwhile."""

        def run(job: Job) -> None:
            self.stop_button.disabled = False
            try:
                work(job)
            finally:
                self.stop_button.disabled = True

        self._jobs.start(run, replace)

    def _load(self, runs: Iterable[str | Path]) -> list[torch.nn.Module]:
        """The models of these runs; loaded ones are reused, and dropped when no longer listed.

        A run that was trained again has other weights in a folder of the same name, hence the hash.
        """
        keys = [(f, checkpoint.read_meta(f)["sha256"]) for f in map(resolve, runs)]
        self._models = {key: model for key, model in self._models.items() if key in keys}
        for key in keys:
            if key not in self._models:
                self._models[key] = checkpoint.load_model(key[0], device=self.device)[0]
        return [self._models[key] for key in keys]

    def _say(self, text: str, wrong: bool = False) -> None:
        self.message = text
        self.status.value = self._status(inked(escape(text), ALARM if wrong else INK))

    def _status(self, html: str) -> str:
        """The HTML of the status line."""
        return f'<div role="status">{paragraph(html)}</div>'

    def _fail(self, error: BaseException) -> None:
        ours = isinstance(error, BitbyteError | OSError)
        self._say(f"error: {error}" if ours else f"error: {type(error).__name__}: {error}", True)
