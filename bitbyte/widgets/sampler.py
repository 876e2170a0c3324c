"""The sampler: a widget that shows how a model goes on, byte by byte, and what each slider does.

In a notebook `Sampler()` is the last line of a cell.  Without a browser the same object is driven
by its methods: ``generate(wait=True)``, ``branch(position, byte, wait=True)``.

Sampling runs in a thread and shows what it made every 40 ms; a button only starts that
thread or sets a flag.  The bytes are those of `generate.stream` (or `infill.sample`) for the
settings shown, so the command in the status line makes them again.  Run names, prompts and errors
are strangers' text: everything is escaped.

Needs ipywidgets and anywidget: pip install "bitbyte[workbench]".
"""

import contextlib
import dataclasses
import html
import itertools
import math
import random
import shlex
import threading
import time
from pathlib import Path

import ipywidgets as W
import numpy as np
import torch

from bitbyte import checkpoint, generate, infill
from bitbyte.config import SamplingConfig
from bitbyte.device import choose_device
from bitbyte.files import BitbyteError, artifacts
from bitbyte.generate import FilterEffect
from bitbyte.plots.page import GIVEN, MASKED
from bitbyte.plots.prob_bars import INK, MONO, probs_html
from bitbyte.process import StopEvent
from bitbyte.vocab import N_BYTES, byte_label, printable
from bitbyte.widgets.byteview import ByteView
from bitbyte.widgets.checkpoints import describe, find_run, list_runs
from bitbyte.widgets.jobs import Jobs


@dataclasses.dataclass
class Sample:
    """Bytes that continue ``prompt``, and the laws they were drawn from."""

    prompt: bytes = b""
    made: bytearray = dataclasses.field(default_factory=bytearray)
    bits: list = dataclasses.field(default_factory=list)  # cost of each under the model's own law
    logits: list = dataclasses.field(default_factory=list)  # (V,) each; None: not known
    path: str = ""  # of the model that made the last bytes
    start: bytes = b""  # after these bytes, `config` makes all the others; a command can say that
    config: SamplingConfig | None = None
    denoise_options: dict = dataclasses.field(default_factory=dict)  # order and steps, if any

    @property
    def whole(self) -> bytes:
        return self.prompt + bytes(self.made)

    def until(self, n: int) -> "Sample":
        """A copy with the first n made bytes."""
        parts = {name: getattr(self, name)[:n] for name in ("made", "bits", "logits")}
        return dataclasses.replace(self, **parts)

    def add(self, byte: int, bits: float, logits_V) -> None:
        self.made.append(byte)
        self.bits.append(bits)
        # A copy: the model's tensor may be a row of all positions' logits.
        self.logits.append(None if logits_V is None else logits_V.detach().cpu().clone())


def but_length(config: SamplingConfig) -> SamplingConfig:
    return dataclasses.replace(config, max_new_tokens=1)


def progress(word: str, n: int, seconds: float, bits: list[float], first: float = 0.0) -> str:
    """One line about a sample; ``first``: seconds to its first byte."""
    known = [b for b in bits if not math.isnan(b)]
    facts = [f"{n} bytes", f"{n / seconds:,.0f} bytes/s"]
    facts += [f"first byte after {1000 * first:.0f} ms"] if first else []
    facts += [f"{math.fsum(known) / len(known):.2f} bits/byte"] if known else []
    return f"{word}: {', '.join(facts)}"


def sample_command(sample: Sample) -> str:
    """The line for a shell that makes the bytes after ``sample.start`` again."""
    config = sample.config
    run = Path(sample.path)
    run = run.name if run.parent == artifacts("checkpoints").resolve() else sample.path
    words = ["bitbyte sample", shlex.quote(run), _prompt_option(sample.start)]
    defaults = SamplingConfig()
    for name in (
        "max_new_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
        "repetition_window",
    ):  # fmt: skip
        value = getattr(config, name)
        if name in ("max_new_tokens", "seed", "temperature") or value != getattr(defaults, name):
            words.append(f"--{name} {value}")
    words += [f"--{name} {value}" for name, value in sample.denoise_options.items() if value]
    return " ".join(words)


def _prompt_option(prompt: bytes) -> str:
    if b"\0" in prompt:
        return "--prompt_file FILE_WITH_THE_PROMPT"  # no word of a command can hold a zero byte
    plain = prompt.translate(None, b"\n\t")
    if printable(plain).encode() == plain:
        quoted = shlex.quote(prompt.decode())
    else:  # what a terminal would not show as it is
        bodies = (chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in prompt)
        quoted = f"$'{''.join(bodies)}'"
    return f"--prompt{'=' if prompt.startswith(b'-') else ' '}{quoted}"


def status_html(message: str, command: str) -> str:
    """A line of news, and the command: one click selects it all."""
    return (
        f'<div role="status" style="color:{INK};line-height:20px;height:22px;overflow:hidden;'
        f'white-space:nowrap;text-overflow:ellipsis" title="{html.escape(message)}">'
        f"{html.escape(message)}</div>"
        f'<pre style="color:{INK};font:12px/16px {MONO};margin:0;height:50px;overflow:auto;'
        f'white-space:pre-wrap;overflow-wrap:anywhere;user-select:all">{html.escape(command)}</pre>'
    )


def sentence(effect: FilterEffect, config: SamplingConfig) -> str:
    """What the settings do to a law, in words."""
    words = (
        f"keeps {effect.kept} of {N_BYTES} bytes, {100 * effect.mass:.1f} % of the probability, "
        f"entropy {effect.bits_before:.2f} to {effect.bits_after:.2f} bits"
    )
    return f"greedy, always the likeliest byte: {words}" if config.temperature == 0 else words


def _sized(width: int, height: int | None = None, **options) -> W.Layout:
    return W.Layout(width=f"{width}px", height=height and f"{height}px", **options)


def _slider(kind, name: str, low, high, step, value):
    return kind(
        value=value, min=low, max=high, step=step, description=name,
        style={"description_width": "110px"}, layout=_sized(390),
    )  # fmt: skip


def _button(text: str, name: str, **options) -> W.Button:
    button = W.Button(description=text, layout=_sized(108), **options)
    button.add_class(f"bb-{name}")
    return button


class Controls:
    """Widgets as attributes, all together in ``box``."""

    def __init__(self, prompt: str):
        self.model_choice = W.Dropdown(
            description="model", style={"description_width": "initial"}, layout=_sized(720)
        )
        self.prompt = W.Textarea(
            value=prompt, placeholder="prompt (may be empty)", continuous_update=False,
            layout=_sized(390, 72),
        )  # fmt: skip
        self.temperature = _slider(W.FloatSlider, "temperature", 0, 2, 0.05, 0.8)
        self.top_k = _slider(W.IntSlider, "top-k (0 = off)", 0, N_BYTES, 1, 0)
        self.top_p = _slider(W.FloatSlider, "top-p (1 = off)", 0.05, 1, 0.01, 1.0)
        self.min_p = _slider(W.FloatSlider, "min-p (0 = off)", 0, 0.5, 0.01, 0.0)
        self.repetition_penalty = _slider(W.FloatSlider, "repetition", 1, 2, 0.05, 1.0)
        self.length = _slider(W.IntSlider, "length", 1, 4096, 1, 256)
        self.seed = W.BoundedIntText(
            value=0, min=0, max=2**31 - 1, description="seed",
            style={"description_width": "110px"}, layout=_sized(240),
        )  # fmt: skip
        self.order = W.Dropdown(
            options=infill.ORDERS, description="order",
            style={"description_width": "110px"}, layout=_sized(240),
        )  # fmt: skip
        self.steps = W.BoundedIntText(
            value=0, min=0, max=4096, description="steps",
            style={"description_width": "initial"}, layout=_sized(140),
        )  # fmt: skip
        self.steps.tooltip = "passes of the network a block; 0: one for each byte"
        self.denoising = W.HBox([self.order, self.steps], layout=W.Layout(display="none"))
        self.refresh_button = _button("Refresh", "refresh", tooltip="look for checkpoints again")
        self.seed_button = _button("New seed", "new-seed")
        self.generate_button = _button("Generate", "generate", button_style="primary")
        self.stop_button = _button("Stop", "stop")
        self.continue_button = _button("Continue", "continue")
        self.undo_button = _button("Undo", "undo")
        self.bars = W.HTML(layout=_sized(435, 290, overflow="hidden"))
        self.sentence_line = W.HTML(layout=_sized(435, 60))
        self.status = W.HTML(layout=W.Layout(height="80px", overflow="hidden"))
        self.view = ByteView(height=300)
        self.law_sliders = [
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        ]  # fmt: skip
        for name in (
            "model_choice", "prompt", "temperature", "top_k", "top_p", "min_p",
            "repetition_penalty", "length", "seed", "order", "steps", "bars",
            "sentence_line", "status",
        ):  # fmt: skip
            getattr(self, name).add_class(f"bb-{name.removesuffix('_line').replace('_', '-')}")
        seed = W.HBox([self.seed, self.seed_button])
        settings = [self.prompt, *self.law_sliders, self.length, seed, self.denoising]
        actions = [self.generate_button, self.stop_button, self.continue_button, self.undo_button]
        rows = [
            W.HBox([self.model_choice, self.refresh_button]),
            W.HBox([W.VBox(settings), W.VBox([self.bars, self.sentence_line])]),
            W.HBox(actions),
            self.status,
            self.view,
        ]
        self.box = W.VBox(rows, layout=W.Layout(max_width="1000px"))
        self.box.add_class("bb-sampler")

    @property
    def config(self) -> SamplingConfig:
        """The settings as the sliders stand."""
        return SamplingConfig(
            temperature=round(self.temperature.value, 4), top_k=self.top_k.value,
            top_p=round(self.top_p.value, 4), min_p=round(self.min_p.value, 4),
            repetition_penalty=round(self.repetition_penalty.value, 4),
            max_new_tokens=self.length.value, seed=self.seed.value,
        )  # fmt: skip

    @property
    def denoise_options(self) -> dict:
        """Order and steps of a diffusion model."""
        return {"order": self.order.value, "steps": self.steps.value or None}

    @property
    def prompt_bytes(self) -> bytes:
        return self.prompt.value.encode("utf-8", "replace")


SLICE = 0.04  # seconds between two updates of the view
BARS_SLICE = 0.2  # and of the bars
N_TOP = 10  # alternatives shown for a byte
ENDLESS = 2**40
UNDOS = 50
UNIT = "surprisal"  # the layer that tints, in bits


class _StoppedError(Exception):
    """Leaves a denoising loop, which has no other way out."""


class Sampler(Controls):
    """Sample from the checkpoints in a folder, with sliders that say what they do.

    ``run`` is a run's name or path (default: the newest one), ``folder`` where the drop-down looks
    (default artifacts/checkpoints).  ``box`` is the widget.  What goes wrong stands in the status
    line; a method called with ``wait=True`` also raises it.  Raises BitbyteError for a ``run``
    that is not there.
    """

    def __init__(
        self, run: str | None = None, prompt: str = "Once upon a time", folder: str | None = None
    ):
        self._folder = folder
        self._lock = threading.Lock()
        self._jobs = Jobs(self._fail)
        self._stop, self._running, self._denoises = StopEvent(), False, False
        self._loaded: tuple = (None, None)  # path, model
        self._stream = None  # where the last bytes came from, for Continue
        self._pending: list[generate.ByteStats] = []  # drawn, not yet shown
        self._next = None  # (logits_V, bytes before, title): the law shown with no byte chosen
        self._sample, self._before = Sample(), []  # what is shown, and what Undo brings back
        self._bars_shown = -math.inf
        self.message = self.sentence = ""
        super().__init__(prompt)
        self._wire()
        self.refresh(run)
        self.wait()

    def _wire(self) -> None:
        """Tell each control what it does."""
        for button, action in (
            (self.generate_button, self.generate), (self.continue_button, self.resume),
            (self.undo_button, lambda: self.undo(wait=False)), (self.stop_button, self.stop),
            (self.refresh_button, self.refresh), (self.seed_button, self._new_seed),
        ):  # fmt: skip
            button.on_click(lambda _, action=action: self._told(action))
        for slider in self.law_sliders:
            slider.observe(lambda _: self._told(self._show_law), "value")
        self.prompt.observe(lambda _: self._queue(self._look), "value")
        self.model_choice.observe(self._model_chosen, "value")
        self.view.observe(lambda _: self._told(self._show_law), "cursor")
        self.view.observe(
            lambda change: self._told(lambda: self.branch(*change["new"][:2])), "choice"
        )

    def __repr__(self) -> str:
        name = self.model_choice.value and Path(self.model_choice.value).name
        return f"Sampler({name or 'no checkpoint'}, {len(self.data)} bytes)"

    def _repr_mimebundle_(self, **options) -> dict:
        return self.box._repr_mimebundle_(**options) | {"text/plain": repr(self)}

    # --- what it holds

    @property
    def data(self) -> bytes:
        """The bytes made so far, without the prompt."""
        return bytes(self._sample.made)

    @property
    def text(self) -> str:
        """Prompt and made bytes, decoded."""
        return self._sample.whole.decode("utf-8", "replace")

    @property
    def laws_html(self) -> str:
        """The bars as they are shown."""
        return self.bars.value

    @property
    def command(self) -> str:
        """The command line that makes the bytes shown; before there are any, what Generate does."""
        sample = self._sample
        if sample.config is None:
            options = self.denoise_options if self._denoises else {}
            path, start = self.model_choice.value or "RUN", self.prompt_bytes
            sample = Sample(path=path, start=start, config=self.config, denoise_options=options)
        return sample_command(sample)

    # --- what it does

    def generate(self, wait: bool = False) -> None:
        """Sample ``length`` bytes that continue the prompt; `undo` brings back what was shown."""
        prompt, config = self.prompt_bytes, self.config
        self._launch(lambda: Sample(prompt=prompt, start=prompt, config=config), wait)

    def resume(self, wait: bool = False) -> None:
        """Go on with ``length`` more bytes.

        With the settings unchanged, they are the ones that a longer sample would have had.
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
        """Put ``byte`` at ``position`` of prompt and made bytes together, and go on from there.

        What stood before it stays; as many bytes follow as did before, drawn with the same seed.
        """
        config = self.config

        def other() -> Sample:
            old = self._sample
            n = position - len(old.prompt)
            if not (0 <= n < len(old.made) and 0 <= byte < N_BYTES):
                raise BitbyteError(
                    f"byte {position} cannot be chosen: only bytes that were made can, "
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
        """Show again what was there before the last Generate, Continue or branch."""

        def back() -> None:
            if not self._before:
                raise BitbyteError("there is nothing to undo")
            self._sample, self._stream = self._before.pop(), None
            self._show_sample()
            self._say("undone")

        self._begin(back, wait)

    def stop(self) -> None:
        """End the sampling; what was made stays."""
        self._stop.set()

    def wait(self) -> None:
        """Return when nothing runs any more."""
        self._jobs.wait()

    def refresh(self, run: str | None = None) -> None:
        """Look for checkpoints again and choose ``run``, or leave the choice as it is."""
        found, old = list_runs(self._folder), self.model_choice.value
        chosen = old or (found[0].path if found else None) if run is None else find_run(run)
        if chosen is not None and chosen not in [entry.path for entry in found]:
            found.insert(0, describe(Path(chosen)))
        self.model_choice.unobserve(self._model_chosen, "value")
        self.model_choice.options = [(entry.label, entry.path) for entry in found]
        self.model_choice.value = chosen
        self.model_choice.observe(self._model_chosen, "value")
        if chosen is None or chosen != old:
            self._model_chosen()

    def _new_seed(self) -> None:
        self.seed.value = random.SystemRandom().randrange(2**31)

    def _model_chosen(self, _change=None) -> None:
        """Another model: what was made stays, and Continue goes on from there with this one."""

        def change() -> None:
            self._stream = self._next = None
            self._enable()
            self.bars.value = self.sentence_line.value = self.sentence = ""
            self._say("loading the model")
            self._look()
            self._say("ready")

        self._stop.set()
        self._queue(change)

    # --- threads

    def _told(self, action) -> None:
        """Run a callback's ``action``; an error there would reach nobody."""
        try:
            action()
        except Exception as error:
            self._fail(error)

    def _queue(self, work) -> None:
        self._jobs.start(lambda _: work(), replace=False)

    def _begin(self, job, wait: bool) -> None:
        """Start a job that changes the sample; refused while another one runs."""
        with self._lock:
            if self._running:
                raise BitbyteError("bytes are being made: press Stop first")
            self._running = True
        self._stop.clear()
        self._enable()

        def work() -> None:
            try:
                job()
            finally:
                self._running = False
                self._enable()
            self._look()

        self._queue(work)
        if wait and (error := self._jobs.wait()):
            raise error

    def _launch(self, make_sample, wait: bool, goes_on: bool = False) -> None:
        """Sample after ``make_sample()``, in a thread."""

        def job() -> None:
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
                (self._denoise if self._denoises else self._draw)(model)
            except BaseException:
                self._stream = None
                raise

        self._begin(job, wait)

    def _model(self):
        path = self.model_choice.value
        if path is None:
            where = self._folder or artifacts("checkpoints")
            raise BitbyteError(f"no checkpoint in {where}; train one first: bitbyte train")
        if self._loaded[0] != path:
            self._loaded = path, checkpoint.load_model(path, device=choose_device("auto"))[0]
            self._denoises = self._loaded[1].config.family == "diffusion"
            self.denoising.layout.display = "" if self._denoises else "none"
        return self._loaded[1]

    def _draw(self, model) -> None:
        """Bytes of a causal model, shown as they come."""
        sample, begin, first = self._sample, time.perf_counter(), 0.0
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
                if self._stop.is_set():
                    break
        finally:  # also where the model fails on the way
            self._show_new()
            made = max(1, made_before + drawn)
            sample.config = dataclasses.replace(sample.config, max_new_tokens=made)
        word = "done" if drawn == length else "stopped"
        self._say(progress(word, drawn, time.perf_counter() - begin, sample.bits, first))

    def _denoise(self, model) -> None:
        """Bytes of a diffusion model, painted where and when they are revealed."""
        sample, begin = self._sample, time.perf_counter()
        sample.denoise_options = self.denoise_options
        length, offset, shown = sample.config.max_new_tokens, len(sample.whole), begin
        found: dict[int, tuple[int, float]] = {}  # position -> byte, bits
        new: list[int] = []
        self.view.append(bytes(length), {UNIT: [math.nan] * length}, flags=[MASKED] * length)

        def paint(word: str) -> None:
            data, bits = bytes(found[p][0] for p in new), [found[p][1] for p in new]
            self.view.paint(new, data, {UNIT: bits}, [0] * len(new))
            new.clear()
            costs = [bits for _, bits in found.values()]
            self._say(progress(word, len(found), time.perf_counter() - begin, costs))

        def reveal(position: int, byte: int, bits: float) -> None:
            nonlocal shown
            found[position] = byte, bits
            new.append(position)
            if time.perf_counter() - shown >= SLICE:
                paint("sampling")
                shown = time.perf_counter()
            if self._stop.is_set():
                raise _StoppedError

        with contextlib.suppress(_StoppedError):
            infill.sample(
                model, sample.whole, sample.config, on_reveal=reveal, **sample.denoise_options
            )
        paint("done" if len(found) == length else "stopped")
        for position in itertools.takewhile(found.__contains__, itertools.count(offset)):
            sample.add(*found[position], None)
        self.view.truncate(len(sample.whole))
        lost = offset + len(found) - len(sample.whole)
        if lost:
            self._say(f"{self.message}; the {lost} bytes after the first gap are dropped")

    def _look(self) -> None:
        """Ask the model for the law of the next byte, for the bars."""
        model, sample, prompt = self._model(), self._sample, self.prompt_bytes
        self._next = None
        if not self._denoises:
            same = sample.config is not None and sample.prompt == prompt
            text = sample.whole if same else prompt
            title = f"next byte, after {len(text)} bytes"
            self._next = generate.next_byte_logits(model, text), text, title
        self._show_law()
        ended = self.message.startswith("error") or not self.message
        self._say("ready" if ended else self.message)

    # --- what it shows

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
        """Show what was drawn since the last time."""
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
            self._show_law()

    def _show_law(self) -> None:
        """Bars and sentence of the byte at the cursor, or of the next one; no model is asked."""
        sample, law = self._sample, self._next
        n = self.view.cursor - len(sample.prompt)
        if 0 <= n < len(sample.logits) and sample.logits[n] is not None:
            byte = sample.made[n]
            title = f"byte {self.view.cursor}, {byte_label(byte)} {byte:02x}, was drawn from"
            law = sample.logits[n], sample.whole[: self.view.cursor], title
        if law is None:
            self.sentence = "no law of the next byte: this model decides hidden bytes in any order"
            self.bars.value = ""
        else:
            effect = generate.filter_effect(law[0], self.config, law[1])
            self.sentence = sentence(effect, self.config)
            self.bars.value = probs_html(law[2], effect)
        self.sentence_line.value = f'<span style="color:{INK}">{html.escape(self.sentence)}</span>'

    def _say(self, text: str) -> None:
        self.message = text
        self.status.value = status_html(text, self.command)

    def _fail(self, error: BaseException) -> None:
        ours = isinstance(error, BitbyteError | OSError)
        self._say(f"error: {error}" if ours else f"error: {type(error).__name__}: {error}")
