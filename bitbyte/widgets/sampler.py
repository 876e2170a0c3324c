"""The sampler: a widget that shows a model generate byte by byte, and what each slider does.

In a notebook, put `Sampler()` on the last line of a cell.  Without a browser, drive it by its
methods: ``generate(wait=True)``, ``branch(position, byte, wait=True)``.

Sampling runs in a thread that updates the view every 40 ms; a button only starts that thread or
asks it to stop.  The bytes are those of `generate.stream` (or `infill.sample`) for the settings
shown, so the command in the status line reproduces them.

Needs ipywidgets and anywidget: pip install "bitbyte[workbench]".
"""

import contextlib
import dataclasses
import itertools
import math
import random
import time
import warnings
from html import escape
from pathlib import Path

import ipywidgets as W
import numpy as np
import torch

from bitbyte import generate, infill
from bitbyte.config import SamplingConfig
from bitbyte.files import BitbyteError, artifacts
from bitbyte.plots.page import GIVEN, MASKED
from bitbyte.plots.prob_bars import probs_html, sentence
from bitbyte.plots.style import INK, MONO
from bitbyte.vocab import N_BYTES, byte_label
from bitbyte.widgets.base import (
    SLICE,
    Panel,
    StoppedError,
    button,
    control,
    paragraph,
    sized,
    wrapped,
)
from bitbyte.widgets.byteview import STILL, ByteView
from bitbyte.widgets.checkpoints import describe, find_run, list_runs
from bitbyte.widgets.jobs import Job
from bitbyte.widgets.sample import Sample, but_length, progress, sample_command

BARS_SLICE = 0.2  # seconds between two updates of the bars
N_TOP = 10  # alternatives shown for a byte
ENDLESS = 2**40
UNDOS = 50
UNIT = "surprisal"  # the tinting layer, in bits


def slider(kind, name: str, low, high, step, value):
    """A slider that lines up with its neighbors."""
    return control(kind, 390, name, 110, value=value, min=low, max=high, step=step)


class Sampler(Panel):
    """Sample from the checkpoints in a folder, with sliders that say what they do.

    ``run`` is a run's name or path (default: the newest), ``folder`` holds the runs of the
    drop-down (default artifacts/checkpoints), ``device`` is where models are loaded.  ``box`` is
    the widget.  Errors are shown in the status line; methods called with ``wait=True`` also raise
    them.  Raises BitbyteError if ``run`` does not exist.
    """

    def __init__(
        self, run: str | None = None, prompt: str = "Once upon a time", folder: str | None = None,
        device: str = "auto",
    ):  # fmt: skip
        super().__init__(device)
        self._folder = folder
        self._running = self._diffusion = False
        self._stream = None  # the generator of the last bytes, for Continue
        self._model_of_stream = None
        self._pending: list[generate.ByteStats] = []  # drawn but not yet shown
        self._next = None  # (logits_V, bytes before, title) for the bars while no byte is selected
        self._sample, self._before = Sample(), []  # the sample shown, and earlier ones for Undo
        self._bars_shown = -math.inf
        self.sentence = ""
        self._make_controls(prompt)
        self._connect()
        self.refresh(run)
        with contextlib.suppress(Exception):  # a damaged run, say: the status line shows it
            self.wait()

    def _make_controls(self, prompt: str) -> None:
        self.model_choice = control(W.Dropdown, 720, "model")
        choice = self.model_choice.layout
        choice.flex, choice.min_width = "1 1 300px", "0"  # its button stays beside it
        self.prompt = W.Textarea(
            value=prompt, placeholder="prompt (may be empty)", continuous_update=False,
            layout=sized(390, 72),
        )  # fmt: skip
        self.temperature = slider(W.FloatSlider, "temperature", 0, 2, 0.05, 0.8)
        self.top_k = slider(W.IntSlider, "top-k (0 = off)", 0, N_BYTES, 1, 0)
        self.top_p = slider(W.FloatSlider, "top-p (1 = off)", 0.05, 1, 0.01, 1.0)
        self.min_p = slider(W.FloatSlider, "min-p (0 = off)", 0, 0.5, 0.01, 0.0)
        self.repetition_penalty = slider(W.FloatSlider, "repetition", 1, 2, 0.05, 1.0)
        self.length = slider(W.IntSlider, "length", 1, 4096, 1, 256)
        self.seed = control(W.BoundedIntText, 240, "seed", 110, value=0, min=0, max=2**31 - 1)
        self.order = control(W.Dropdown, 240, "order", 110, options=infill.ORDERS)
        self.steps = control(W.BoundedIntText, 140, "steps", value=0, min=0, max=4096)
        self.steps.tooltip = "network passes per block; 0: one per byte"
        self.threshold = slider(W.FloatSlider, "all above (0 = off)", 0, 1, 0.05, 0)
        self.threshold.tooltip = "order confidence: a pass reveals all bytes that are so likely"
        self.denoising = wrapped(self.order, self.steps, self.threshold, display="none")
        self.refresh_button = button("Refresh", "refresh", tooltip="look for checkpoints again")
        self.seed_button = button("New seed", "new-seed")
        self.generate_button = button("Generate", "generate", button_style="primary")
        self.continue_button = button("Continue", "continue")
        self.undo_button = button("Undo", "undo")
        self.bars = W.HTML(layout=sized(435, 290, overflow="hidden"))
        self.sentence_line = W.HTML(layout=W.Layout(min_height="60px"))  # three lines: none jumps
        self.status.layout = W.Layout(height="80px", overflow="hidden")
        self.view = ByteView(height=240)
        self.filters = [
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        ]  # fmt: skip
        for name in (
            "model_choice", "prompt", "temperature", "top_k", "top_p", "min_p",
            "repetition_penalty", "length", "seed", "order", "steps", "threshold", "bars",
            "sentence_line",
        ):  # fmt: skip
            getattr(self, name).add_class(f"bb-{name.removesuffix('_line').replace('_', '-')}")
        settings = [self.prompt, *self.filters, self.length, wrapped(self.seed, self.seed_button)]
        columns = [[*settings, self.denoising], [self.bars, self.sentence_line]]
        half = "1 1 340px"  # side by side if both fit
        columns = [W.VBox(column, layout=W.Layout(flex=half)) for column in columns]
        actions = [self.generate_button, self.stop_button, self.continue_button, self.undo_button]
        self.box = W.VBox(
            [wrapped(self.model_choice, self.refresh_button), wrapped(*columns), wrapped(*actions),
             self.status, self.view],
            layout=W.Layout(max_width="1000px"),
        )  # fmt: skip
        self.box.add_class("bb-sampler")

    def _connect(self) -> None:
        """Connect the controls to their actions."""
        for pressed, action in (
            (self.generate_button, self.generate), (self.continue_button, self.resume),
            (self.undo_button, lambda: self.undo(wait=False)), (self.stop_button, self.stop),
            (self.refresh_button, self.refresh), (self.seed_button, self._new_seed),
        ):  # fmt: skip
            self._on_click(pressed, action)
        for setting in self.filters:
            self._on_change(setting, lambda _: self._show_probs())
        self._on_change(self.prompt, lambda _: self._queue(self._look))
        self._on_change(self.order, self._order_chosen)
        self.model_choice.observe(self._model_chosen, "value")
        self._on_change(self.view, lambda _: self._show_probs(), "cursor")
        self._on_change(self.view, lambda choice: self.branch(*choice[:2]), "choice")

    def __repr__(self) -> str:
        name = self.model_choice.value and Path(self.model_choice.value).name
        return f"Sampler({name or 'no checkpoint'}, {len(self.data)} bytes)"

    def to_html(self) -> str:
        """The bytes shown, and the command that reproduces them."""
        return self.view.to_html(self.command, limit=STILL, tips=False)

    # --- state

    @property
    def config(self) -> SamplingConfig:
        """The settings of the sliders."""
        return SamplingConfig(
            temperature=round(self.temperature.value, 4), top_k=self.top_k.value,
            top_p=round(self.top_p.value, 4), min_p=round(self.min_p.value, 4),
            repetition_penalty=round(self.repetition_penalty.value, 4),
            max_new_tokens=self.length.value, seed=self.seed.value,
        )  # fmt: skip

    @property
    def denoise_options(self) -> dict:
        """How a diffusion model reveals bytes."""
        order = self.order.value
        if order == "causal":
            return {"order": order}
        options = {"order": order, "steps": self.steps.value or None}
        sure = order == "confidence" and self.threshold.value > 0
        return options | ({"threshold": round(self.threshold.value, 4)} if sure else {})

    @property
    def _denoises(self) -> bool:
        """Whether the model is one of diffusion, not asked byte by byte."""
        return self._diffusion and self.order.value != "causal"

    @property
    def prompt_bytes(self) -> bytes:
        return self.prompt.value.encode("utf-8", "replace")

    @property
    def data(self) -> bytes:
        """The bytes made so far, without the prompt."""
        return bytes(self._sample.made)

    @property
    def text(self) -> str:
        """Prompt and made bytes, decoded."""
        return self._sample.whole.decode("utf-8", "replace")

    @property
    def probs_html(self) -> str:
        """The HTML of the bars."""
        return self.bars.value

    @property
    def laws_html(self) -> str:
        """The old name of ``probs_html``."""
        warnings.warn("laws_html is called probs_html now", DeprecationWarning, stacklevel=2)
        return self.probs_html

    @property
    def command(self) -> str:
        """The command that reproduces the bytes shown; if there are none, that does as Generate."""
        sample = self._sample
        if sample.config is None:
            options = self.denoise_options if self._diffusion else {}
            path, start = self.model_choice.value or "RUN", self.prompt_bytes
            sample = Sample(path=path, start=start, config=self.config, denoise_options=options)
        return sample_command(sample)

    # --- actions

    def generate(self, wait: bool = False) -> None:
        """Sample ``length`` bytes that continue the prompt; `undo` brings back the old ones."""
        prompt, config = self.prompt_bytes, self.config
        self._launch(lambda: Sample(prompt=prompt, start=prompt, config=config), wait)

    def resume(self, wait: bool = False) -> None:
        """Generate ``length`` more bytes.

        If the settings are unchanged, they are the bytes that a longer sample would have had.
        """
        prompt, config = self.prompt_bytes, self.config

        def longer() -> Sample:
            old = self._sample
            if old.config is None:
                return Sample(prompt=prompt, start=prompt, config=config)
            sample = old.until(len(old.made))
            if self._stream is None or but_length(old.config) != but_length(config):
                self._stream, sample.start = None, sample.whole
            sample.config = config
            return sample

        self._launch(longer, wait, goes_on=True)

    def branch(self, position: int, byte: int, wait: bool = False) -> None:
        """Put ``byte`` at ``position``, counted from the start of the prompt, and continue from it.

        Earlier bytes stay; as many bytes follow as did before, drawn with the same seed.
        """
        config = self.config

        def other() -> Sample:
            old = self._sample
            n = position - len(old.prompt)
            if not (0 <= n < len(old.made) and 0 <= byte < N_BYTES):
                raise BitbyteError(
                    f"byte {position} cannot be chosen: only generated bytes can, "
                    f"{len(old.prompt)} to {len(old.whole) - 1}; edit the prompt to change it"
                )
            sample = old.until(n)
            known = old.logits[n] is not None
            sample.add(
                *generate.byte_stats(byte, old.logits[n]) if known else (byte, math.nan, None)
            )
            sample.start = sample.whole
            rest = max(1, len(old.made) - n - 1)
            sample.config = dataclasses.replace(config, max_new_tokens=rest)
            return sample

        self._launch(other, wait)

    def undo(self, wait: bool = True) -> None:
        """Show the sample from before the last Generate, Continue or branch."""

        def back(_job: Job) -> None:
            if not self._before:
                raise BitbyteError("there is nothing to undo")
            self._sample, self._stream = self._before.pop(), None
            self._show_sample()
            self._say("undone")

        self._begin(back, wait)

    def refresh(self, run: str | None = None) -> None:
        """Look for checkpoints again and choose ``run``, by default leave the choice as it is."""
        entries, old = list_runs(self._folder), self.model_choice.value
        chosen = old or (entries[0].path if entries else None) if run is None else find_run(run)
        if chosen is not None and chosen not in [entry.path for entry in entries]:
            entries.insert(0, describe(Path(chosen)))
        self.model_choice.unobserve(self._model_chosen, "value")
        self.model_choice.options = [(entry.label, entry.path) for entry in entries]
        self.model_choice.value = chosen
        self.model_choice.observe(self._model_chosen, "value")
        if chosen is None or chosen != old:
            self._model_chosen()
        else:
            self._queue(self._look)  # the run may have gone on, or been trained again

    def _new_seed(self) -> None:
        self.seed.value = random.SystemRandom().randrange(2**31)

    def _model_chosen(self, _change=None) -> None:
        """Switch models: the bytes so far stay, and Continue continues them with the new model."""

        def change() -> None:
            self._stream = self._next = None
            self._enable()
            self.bars.value = self.sentence_line.value = self.sentence = ""
            self._say("loading the model")
            self._look()
            self._say("ready")

        self.stop()
        self._queue(change)

    # --- threads

    def _queue(self, work) -> None:
        self._jobs.start(lambda _: work(), replace=False)

    def _begin(self, change, wait: bool) -> None:
        """Start ``change(job)``, which changes the sample; refused while another one runs."""
        with self._lock:
            if self._running:
                raise BitbyteError("bytes are being generated: press Stop first")
            self._running = True
        self._enable()

        def work(job: Job) -> None:
            try:
                change(job)
            finally:
                self._running = False
                self._enable()
            self._look()

        self._jobs.start(work, replace=False)
        if wait:
            self._jobs.wait()

    def _launch(self, make_sample, wait: bool, goes_on: bool = False) -> None:
        """Start sampling in a thread, from ``make_sample()``."""

        def change(job: Job) -> None:
            self._say("loading the model")
            model = self._model()
            sample = make_sample()
            if not goes_on:
                self._stream = None
            self._before = [*self._before[-UNDOS:], self._sample]
            self._sample, sample.path = sample, self.model_choice.value
            self._show_sample()
            self._say("sampling")
            try:
                (self._denoise if self._denoises else self._draw)(model, job)
            except BaseException:
                self._stream = None
                raise

        self._begin(change, wait)

    def _model(self):
        path = self.model_choice.value
        if path is None:
            where = self._folder or artifacts("checkpoints")
            raise BitbyteError(f"no checkpoint in {where}; train one first: bitbyte train")
        (model,) = self._load([path])
        if model is not self._model_of_stream:  # another run, or a newer step of it
            self._stream, self._model_of_stream = None, model
            self._diffusion = model.config.family == "diffusion"
            self.denoising.layout.display = None if self._diffusion else "none"
            before, blocks = self.order.value, bool(getattr(model, "block", 0))
            orders = (*infill.ORDERS, *("causal",) * blocks)  # these are also causal models
            if self.order.options != orders:
                self.order.options = orders
                self.order.value = before if before in orders else orders[0]
        return model

    def _order_chosen(self, _) -> None:
        self._stream = None
        self._queue(self._look)

    def _draw(self, model, job: Job) -> None:
        """Draw bytes from a causal model and show them as they come."""
        sample, begin, first = self._sample, time.perf_counter(), 0.0
        sample.denoise_options = self.denoise_options if self._diffusion else {}
        length = sample.config.max_new_tokens
        if self._stream is None:
            config = dataclasses.replace(sample.config, max_new_tokens=ENDLESS)
            self._pending.clear()
            self._stream = generate.stream(
                model, sample.whole, config, on_stats=self._pending.append
            )
        shown, drawn, made_before = -math.inf, 0, len(sample.whole) - len(sample.start)
        try:
            for _ in itertools.islice(self._stream, length):
                now, drawn = time.perf_counter(), drawn + 1
                first = first or now - begin
                if now - shown >= SLICE:
                    shown = now
                    self._show_new()
                    self._say(progress("sampling", drawn, now - begin, sample.bits, first))
                if job.stopped():
                    break
        finally:  # even if the model fails midway
            self._show_new()
            made = max(1, made_before + drawn)
            sample.config = dataclasses.replace(sample.config, max_new_tokens=made)
        word = "done" if drawn == length else "stopped"
        self._say(progress(word, drawn, time.perf_counter() - begin, sample.bits, first))

    def _denoise(self, model, job: Job) -> None:
        """Sample from a diffusion model, painting bytes where and when they are revealed."""
        sample, begin = self._sample, time.perf_counter()
        sample.denoise_options = self.denoise_options
        length, offset, shown = sample.config.max_new_tokens, len(sample.whole), begin
        revealed: dict[int, tuple[int, float]] = {}  # position -> byte, bits
        new: list[int] = []
        self.view.append(bytes(length), {UNIT: [math.nan] * length}, flags=[MASKED] * length)

        def paint(word: str) -> None:
            data, bits = bytes(revealed[p][0] for p in new), [revealed[p][1] for p in new]
            self.view.paint(new, data, {UNIT: bits}, [0] * len(new))
            new.clear()
            costs = [bits for _, bits in revealed.values()]
            self._say(progress(word, len(revealed), time.perf_counter() - begin, costs))

        def reveal(position: int, byte: int, bits: float) -> None:
            nonlocal shown
            revealed[position] = byte, bits
            new.append(position)
            if time.perf_counter() - shown >= SLICE:
                paint("sampling")
                shown = time.perf_counter()
            if job.stopped():
                raise StoppedError

        with contextlib.suppress(StoppedError):
            infill.sample(
                model, sample.whole, sample.config, on_reveal=reveal, **sample.denoise_options
            )
        paint("done" if len(revealed) == length else "stopped")
        for position in itertools.takewhile(revealed.__contains__, itertools.count(offset)):
            sample.add(*revealed[position], None)
        self.view.truncate(len(sample.whole))
        lost = offset + len(revealed) - len(sample.whole)
        if lost:
            self._say(f"{self.message}; the {lost} bytes after the first gap are dropped")

    def _look(self) -> None:
        """Compute the next-byte probabilities for the bars."""
        model, sample, prompt = self._model(), self._sample, self.prompt_bytes
        self._next = None
        if not self._denoises:
            same = sample.config is not None and sample.prompt == prompt
            text = sample.whole if same else prompt
            title = f"next byte, after {len(text)} bytes"
            self._next = generate.next_byte_logits(model, text), text, title
        self._show_probs()
        ended = self.message.startswith("error") or not self.message
        self._say("ready" if ended else self.message)

    # --- display

    def _enable(self) -> None:
        running = self.view.locked = self._running
        self.stop_button.disabled = not running
        self.generate_button.disabled = running
        self.continue_button.disabled = running or self._sample.config is None
        self.undo_button.disabled = running or not self._before

    def _show_sample(self) -> None:
        sample = self._sample
        given, n = len(sample.prompt), len(sample.made)
        ids_NK, probs_NK = np.zeros((2, given + n, N_TOP))
        known = [i for i, logits_V in enumerate(sample.logits) if logits_V is not None]
        if known:
            where = given + np.array(known)
            logits_NV = torch.stack([sample.logits[i] for i in known])
            ids_NK[where], probs_NK[where] = generate.likeliest(logits_NV, N_TOP)
        self.view.set(
            sample.whole, {UNIT: [math.nan] * given + sample.bits}, top_ids=ids_NK,
            top_probs=probs_NK, flags=[GIVEN] * given + [0] * n,
        )  # fmt: skip

    def _show_new(self) -> None:
        """Show the bytes drawn since the last call."""
        sample, new = self._sample, self._pending[:]
        self._pending.clear()
        if not new:
            return
        for stats in new:
            sample.add(*stats)
        ids_NK, probs_NK = generate.likeliest(torch.stack(sample.logits[-len(new) :]), N_TOP)
        self.view.append(
            bytes(sample.made[-len(new) :]), {UNIT: sample.bits[-len(new) :]},
            top_ids=ids_NK.numpy(), top_probs=probs_NK.numpy(),
        )  # fmt: skip
        if time.perf_counter() - self._bars_shown >= BARS_SLICE:
            self._bars_shown = time.perf_counter()
            self._next = sample.logits[-1], sample.whole[:-1], "the newest byte was drawn from"
            self._show_probs()

    def _show_probs(self) -> None:
        """Show bars and sentence for the byte at the cursor, else the next one; runs no model."""
        sample, shown = self._sample, self._next
        n = self.view.cursor - len(sample.prompt)
        if 0 <= n < len(sample.logits) and sample.logits[n] is not None:
            byte = sample.made[n]
            title = f"byte {self.view.cursor}, {byte_label(byte)} {byte:02x}, was drawn from"
            shown = sample.logits[n], sample.whole[: self.view.cursor], title
        self.bars.layout.display = "none" if shown is None else None
        if shown is None:
            self.sentence = "this model has no next byte: it decides hidden bytes in any order"
            self.bars.value = ""
        else:
            effect = generate.filter_effect(shown[0], self.config, shown[1])
            self.sentence = sentence(effect, self.config)
            self.bars.value = probs_html(shown[2], effect)
        self.sentence_line.value = paragraph(escape(self.sentence))

    def _status(self, html: str) -> str:
        """The status line, and the command, which one click selects."""
        line = "line-height:20px;height:22px;overflow:hidden;white-space:nowrap"
        code = "margin:0;height:50px;overflow:auto;white-space:pre-wrap"
        code += ";word-break:normal;overflow-wrap:anywhere"  # JupyterLab breaks words elsewhere
        return (
            f'<div role="status" style="{line};text-overflow:ellipsis" '
            f'title="{escape(self.message)}">{html}</div>'
            f'<pre style="color:{INK};font:12px/16px {MONO};{code};user-select:all">'
            f"{escape(self.command)}</pre>"
        )
