"""The infiller: a widget that hides bytes of a text and lets models of any family fill them in.

    Infiller(text="Once upon a \u25a1\u25a1\u25a1\u25a1 there was")

A hidden byte is written as a white square, `infill.SIGN`, several as a number in white square
brackets (U+27E6, U+27E7); bytes can also be hidden by selecting them.  Every model fills the same
holes; what it decided when, and how sure it was, is stored and can be replayed without the model.
Picking an alternative at a hidden byte fixes that byte, and the others are filled again.

Without a browser: ``fill(wait=True)``, ``mask``, ``unmask``, ``force``, ``replay.value``.
"""

import contextlib
import hashlib
import math
import re
import time
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets as W
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitbyte import infill
from bitbyte.config import SamplingConfig
from bitbyte.files import BitbyteError
from bitbyte.plots.page import GIVEN, LOCKED, MASKED
from bitbyte.runs import resolve, short_name
from bitbyte.vocab import MASK, N_BYTES, START, byte_label
from bitbyte.widgets.base import SLICE, Panel, StoppedError, button, control, paragraph, wrapped
from bitbyte.widgets.byteview import STILL, ByteView
from bitbyte.widgets.checkpoints import list_runs
from bitbyte.widgets.jobs import Job

TEXT = "Once upon a \u25a1\u25a1\u25a1\u25a1 there was"
N_TOP = 8  # alternatives shown for a hidden byte
MANY = re.compile("\u27e6(\\d{1,4})\u27e7")  # a number of hidden bytes


class Reveal(NamedTuple):
    """How one hidden byte was decided."""

    position: int
    byte: int
    bits: float  # its cost to the model
    step: int  # number of the network call (diffusion), or of the byte (causal)
    top_ids: list[int]  # likeliest bytes under the prediction that decided it
    top_probs: list[float]


class _Watched:
    """Wraps a model: stops with its job, counts calls and keeps the last logits."""

    def __init__(self, model, job: Job):
        self.model, self.job, self.calls, self.logits_TV = model, job, 0, None

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        self.check_stopped()
        return self.model(ids_BT)

    def check_stopped(self) -> None:
        if self.job.stopped():
            raise StoppedError

    def logits(self, ids_BT: Tensor) -> Tensor:
        logits_BTV = self.model.logits(ids_BT)
        self.calls, self.logits_TV = self.calls + 1, logits_BTV[0]
        return logits_BTV

    def fill(self, ids_BN: Tensor, state) -> Tensor:
        self.check_stopped()
        self.calls += 1
        return self.model.fill(ids_BN, state)

    def step(self, ids_B: Tensor, state):
        self.check_stopped()
        return self.model.step(ids_B, state)


def parse(text: str) -> Tensor:
    """ids_T (long) of typed text: expands numbers in brackets to signs for `infill.parse_mask`."""
    sign = infill.SIGN.decode()
    return infill.parse_mask(MANY.sub(lambda many: sign * int(many[1]), text).encode())


def top(logits_V: Tensor) -> tuple[list[int], list[float]]:
    """(bytes, probabilities) of the likeliest bytes."""
    probs_K, ids_K = logits_V.detach().cpu().double().softmax(0).topk(N_TOP)
    return ids_K.tolist(), probs_K.tolist()


def digest(ids_T: Tensor, given_T: Tensor) -> str:
    """First hex digits of the SHA-256 of the bytes of ``ids_T`` where ``given_T`` is true."""
    return hashlib.sha256(bytes(ids_T[given_T].tolist())).hexdigest()[:8]


class Infiller(Panel):
    """Hide bytes of ``text`` and fill them with the models of ``runs``; ``box`` is the widget.

    ``runs`` is a name or path, or a list of them (default: the newest run of each family),
    ``device`` is where they are loaded.  ``results`` and ``trajectories`` are keyed by run;
    ``trajectory`` is that of the first.  ``ids_T`` is the text with MASK at the hidden bytes.
    Errors are shown in the status line; with ``wait=True`` they are raised.
    """

    def __init__(
        self, runs: str | Path | list | None = None, text: str = TEXT,
        temperature: float = 0.8, seed: int = 0, device: str = "auto",
    ):  # fmt: skip
        super().__init__(device)
        self.results: dict[str, infill.Infilled]
        self.trajectories: dict[str, list[Reveal]]
        self.judged: dict[str, float]  # bits per byte of the whole text, by one causal model
        self.forced: set[int] = set()
        self.views: dict[str, ByteView] = {}
        self._captions: dict[str, W.HTML] = {}
        known = [run for run in list_runs() if run.saved]
        newest = {run.family: run.name for run in reversed(known)}
        if runs is None:
            runs = [newest[family] for family in ("diffusion", "ar", "mamba") if family in newest]
        runs = [short_name(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
        list(map(resolve, runs))  # raises if one does not exist
        options = [(run.label, run.name) for run in known]
        options += [(run, run) for run in runs if run not in [name for _, name in options]]
        self._make_controls(options, runs, text)
        self._connect()
        self.temperature.value, self.seed.value = temperature, seed
        self._read()

    def _make_controls(self, options: list, runs: list[str], text: str) -> None:
        self.text = control(W.Textarea, 320, value=text)
        self.text.tooltip = "hidden bytes: \u25a1\u25a1 or \u27e62\u27e7"
        self.model_choice = control(W.SelectMultiple, 500, options=options, value=runs)
        self.text.layout.flex, self.model_choice.layout.flex = "1 1 320px", "1 1 500px"
        self.text.layout.height = self.model_choice.layout.height = "110px"
        self.order = control(W.Dropdown, 170, "order", options=infill.ORDERS)
        self.steps = control(W.BoundedIntText, 110, "steps", max=4096)
        self.steps.tooltip = "network calls of a diffusion model; 0: one for each hidden byte"
        self.temperature = control(W.FloatSlider, 210, "temperature", max=2, step=0.05)
        self.temperature.layout.flex = "1 1 210px"
        self.candidates = control(W.BoundedIntText, 126, "candidates", value=8, min=1, max=256)
        self.candidates.tooltip = "fills that a causal model compares"
        self.seed = control(W.BoundedIntText, 110, "seed", max=2**53 - 1)
        self.fill_button = button("Fill", "fill", icon="play", button_style="primary")
        self.mask_button = button("Mask selection", "mask")
        self.unmask_button = button("Unmask", "unmask", tooltip="the selection, or everything")
        tints = [("how sure (bits)", "surprisal"), ("when (step)", "step"), ("none", "none")]
        self.tint = control(W.Dropdown, 190, "tint", options=tints)
        self.play = W.Play(max=0, interval=150)
        self.replay = control(W.IntSlider, 420, "replay", max=0)
        self.replay.add_class("bb-replay")
        W.jslink((self.play, "value"), (self.replay, "value"))
        self.moment = W.HTML()
        self.moment.layout.min_height = self.status.layout.min_height = "44px"  # two lines
        self.source = ByteView(height=110, controls=False)
        self.results_box = W.VBox()
        buttons = [self.fill_button, self.stop_button, self.mask_button, self.unmask_button]
        self.box = W.VBox([
            wrapped(self.text, self.model_choice),
            wrapped(self.order, self.steps, self.temperature, self.candidates, self.seed),
            wrapped(*buttons, self.tint), self.status, self.source, wrapped(self.play, self.replay),
            self.moment, self.results_box,
        ])  # fmt: skip
        self.box.add_class("bb-infiller")

    def _connect(self) -> None:
        self._on_change(self.text, lambda _: self._read())
        self._on_click(self.fill_button, self.fill)
        self._on_click(self.stop_button, self.stop)
        self._on_click(self.mask_button, lambda: self.mask(*self._selection()))
        self._on_click(self.unmask_button, lambda: self.unmask(*self._selection()))
        self._on_change(self.replay, self._replay)
        self._on_change(self.tint, lambda _: self._tint())

    def _read(self) -> None:
        """Use the typed text."""
        self.ids_T = parse(self.text.value)
        self._typed_T = self.ids_T.clone()
        self.forced.clear()
        self._changed()

    def _changed(self) -> None:
        """Show the text as it is now, and drop older fills."""
        with self._lock:
            self._jobs.stop(replace=True)
            self._forget()
            self.results_box.children = ()
            self._show_source()
            n = int((self.ids_T == MASK).sum())
            self._say(f"{n} of {len(self.ids_T)} bytes are hidden")

    def _forget(self) -> None:
        self.results, self.trajectories, self.judged = {}, {}, {}
        self.replay.value = self.replay.max = self.play.max = 0
        self.moment.value = ""

    def _show_source(self) -> None:
        for view in (self.source, *self.views.values()):
            view.selection = (0, 0)
        self.source.set(**self._view(self.ids_T))

    def _view(self, ids_T: Tensor) -> dict:
        """Arguments of `ByteView.set`: bytes (0 where they are hidden) and flags."""
        flags_T = np.where(ids_T.numpy() == MASK, MASKED, GIVEN).astype(np.uint8)
        flags_T[sorted(self.forced)] |= LOCKED
        return {"data": bytes(ids_T.masked_fill(ids_T == MASK, 0).tolist()), "flags": flags_T}

    def _selection(self) -> tuple[int, int]:
        """(start, stop) of the selection in the text, else in a result, else (0, 0)."""
        views = [self.source, *self.views.values()]
        return next((v.selection for v in views if v.selection[1] > v.selection[0]), (0, 0))

    def mask(self, start: int, stop: int) -> None:
        """Hide the bytes from ``start`` to ``stop``."""
        if stop <= start:
            self._say("select bytes in the text first, with the mouse or Shift and arrow keys")
            return
        self.ids_T[start:stop] = MASK
        self.forced -= set(range(start, stop))
        self._changed()

    def unmask(self, start: int = 0, stop: int = 0) -> None:
        """Undo hiding and forcing, from ``start`` to ``stop`` or everywhere.

        Bytes that were typed as hidden stay hidden.
        """
        stop = stop or len(self.ids_T)
        self.ids_T[start:stop] = self._typed_T[start:stop]
        self.forced -= set(range(start, stop))
        self._changed()

    def force(self, position: int, byte: int, wait: bool = False) -> None:
        """Fix a hidden byte and fill the others again.

        Raises BitbyteError if it is not hidden or there is no such byte.
        """
        if not 0 <= position < len(self.ids_T) or self.ids_T[position] != MASK:
            raise BitbyteError(f"byte {position} is not hidden; mask it first")
        if not 0 <= byte < N_BYTES:
            raise BitbyteError(f"byte is {byte}; it must be from 0 to {N_BYTES - 1}")
        self.ids_T[position] = byte
        self.forced.add(position)
        if (self.ids_T == MASK).any():
            self._show_source()
            self.fill(wait)
        else:
            self._changed()

    def fill(self, wait: bool = False) -> None:
        """Fill the hidden bytes with every chosen model, in a thread; ``wait`` until it is done."""
        with self._lock:
            ids_T, chosen = self.ids_T.clone(), list(self.model_choice.value)
            self._start(lambda job: self._work(ids_T, chosen, job))
        if wait:
            self.wait()

    @contextlib.contextmanager
    def _still(self, job: Job):
        """Hold the lock, or raise StoppedError if this job was stopped."""
        with self._lock:
            if job.stopped():
                raise StoppedError
            yield

    def _work(self, ids_T: Tensor, chosen: list[str], job: Job) -> None:
        try:
            if not chosen:
                raise BitbyteError("choose a model; if there is none, train one first")
            if not (ids_T == MASK).any():
                raise BitbyteError("nothing is masked: select bytes and press Mask selection")
            config = SamplingConfig(temperature=self.temperature.value, seed=self.seed.value)
            with self._still(job):
                self._forget()
                self._lay_out(chosen, ids_T)
                self._say("loading the models")
            models = dict(zip(chosen, self._load(chosen), strict=True))
            for run, model in models.items():
                try:
                    self._fill_one(run, _Watched(model, job), ids_T, config)
                except BitbyteError as error:
                    raise BitbyteError(f"{run}: {error}") from error
            judge, judged = self._judge(models)
            with self._still(job):
                self.judged = judged
                self.replay.max = self.play.max = int((ids_T == MASK).sum())
                self.replay.value = self.replay.max
                words = "; ".join(f"{run} {bits:.3f}" for run, bits in judged.items())
                self._say(f"whole text, bits per byte under {judge}: {words}" if words else "done")
        except StoppedError:
            if not job.replaced():  # else the status line belongs to a newer job
                self._say("stopped")

    def _fill_one(self, run: str, model: _Watched, ids_T: Tensor, config: SamplingConfig) -> None:
        self._say(f"{run} fills the hidden bytes")
        diffusion = model.config.family == "diffusion"
        trail, painted = [], 0.0

        def reveal(position: int, byte: int, bits: float) -> None:
            nonlocal painted
            with self._still(model.job):
                known = model.logits_TV is not None  # not while blocks are filled
                likeliest = top(model.logits_TV[position]) if known else ([], [])
                step = model.calls if diffusion else len(trail) + 1
                trail.append(Reveal(position, byte, bits, step, *likeliest))
                self.trajectories[run] = trail
                if time.monotonic() - painted > SLICE:
                    self._paint(run, len(trail))
                    painted = time.monotonic()

        result = infill.infill(
            model, ids_T, config, order=self.order.value, steps=self.steps.value or None,
            candidates=None if diffusion else self.candidates.value, on_reveal=reveal,
        )  # fmt: skip
        if not diffusion:  # one pass over the filled text, for the logits at each byte
            before_BT = F.pad(result.ids_T[None, :-1], (1, 0), value=START)
            with torch.no_grad():
                model.logits(before_BT.to(next(model.parameters()).device))
        with self._still(model.job):
            if not diffusion:
                trail[:] = [Reveal(*one[:4], *top(model.logits_TV[one.position])) for one in trail]
            self.results[run] = result
            self._paint(run, len(trail))
            self._captions[run].value = caption(run, model.config.family, ids_T, result)

    @torch.no_grad()
    def _judge(self, models: dict[str, torch.nn.Module]) -> tuple[str, dict[str, float]]:
        """(name, bits per byte of every whole text under it) of the first causal model, if any.

        Costs under each model's own probabilities cannot be compared; those under one model can.
        """
        judge = next((run for run, model in models.items() if model.exact), None)
        if judge is None:
            return "", {}
        model = models[judge]
        device = next(model.parameters()).device
        texts = {run: self.results[run].ids_T[None].to(device) for run in models}
        nats = {run: model(ids_BT).cpu().double().mean().item() for run, ids_BT in texts.items()}
        return judge, {run: value / math.log(2) for run, value in nats.items()}

    def _lay_out(self, chosen: list[str], ids_T: Tensor) -> None:
        """Make a caption and a view for every model."""
        none = np.full(len(ids_T), np.nan, np.float32)
        for run in chosen:
            if run not in self.views:
                self.views[run] = ByteView(height=110, controls=False)
                self._on_change(self.views[run], lambda choice: self.force(*choice[:2]), "choice")
                self._captions[run] = W.HTML(layout=W.Layout(min_height="44px"))
            layers = {"surprisal": none, "step": none}
            self.views[run].set(layers=layers, **self._view(ids_T))
            self._captions[run].value = paragraph(f"<b>{escape(run)}</b>")
        self._tint()
        self.results_box.layout.min_height = f"{160 * len(chosen)}px"  # no jump when emptied
        self.results_box.children = [w for r in chosen for w in (self._captions[r], self.views[r])]

    def _paint(self, run: str, n: int) -> None:
        """Show the first ``n`` bytes that ``run`` decided and hide the later ones again."""
        trail = self.trajectories[run]
        shown = trail[:n]
        later = len(trail) - len(shown)
        layers = {
            "surprisal": [step.bits for step in shown] + [math.nan] * later,
            "step": [step.step for step in shown] + [math.nan] * later,
        }
        tops = {}  # alternatives stay, even for bytes that are hidden again
        if trail[0].top_ids:
            tops["top_ids"] = [step.top_ids for step in trail]
            tops["top_probs"] = [step.top_probs for step in trail]
        data = bytes(step.byte for step in shown) + bytes(later)
        where, flags = [step.position for step in trail], [0] * len(shown) + [MASKED] * later
        self.views[run].paint(where, data, layers, flags, **tops)

    def _replay(self, n: int) -> None:
        """Show the state after ``n`` decisions, from the stored trajectories."""
        with self._lock:
            steps = []
            for run, trail in self.trajectories.items():
                self._paint(run, n)
                if 0 < n <= len(trail):
                    step = trail[n - 1]
                    what = f"byte {step.position} = {byte_label(step.byte)}, {step.bits:.2f} bits"
                    steps.append(f"{escape(run)}: {escape(what)}")
            self.moment.value = paragraph(" &middot; ".join(steps))

    def _tint(self) -> None:
        for view in self.views.values():
            view.layer = self.tint.value

    @property
    def trajectory(self) -> list[tuple[int, int, float]]:
        """(position, byte, bits) as the first chosen model decided them."""
        trails = list(self.trajectories.values())
        return [step[:3] for step in trails[0]] if trails else []

    def __repr__(self) -> str:
        hidden = int((self.ids_T == MASK).sum())
        return f"Infiller({len(self.ids_T)} bytes, {hidden} hidden, {len(self.results)} fills)"

    def to_html(self) -> str:
        """The text with its holes, or as each model filled them."""
        views = {run: self.views[run] for run in self.results} or {"": self.source}
        shown = (view.to_html(run, limit=STILL, tips=False) for run, view in views.items())
        return "".join(shown)


def caption(run: str, family: str, ids_T: Tensor, result: infill.Infilled) -> str:
    """What a model did, in words; the hashes cover the bytes that were given."""
    given_T = ids_T != MASK
    before, after = digest(ids_T, given_T), digest(result.ids_T, given_T)
    kept = f"given bytes unchanged: sha256 {before} before and after"
    if before != after:
        kept = f"given bytes CHANGED: sha256 {before} before, {after} after"
    done = (
        f"{family}, {result.method}: {result.bits_per_byte:.2f} bits per filled byte, "
        f"{result.passes} network calls, {result.seconds:.2f} s"
    )
    return paragraph(f"<b>{escape(run)}</b>: {escape(done)}<br>{kept}")
