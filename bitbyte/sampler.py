"""The sampler: a widget that shows how a model goes on, byte by byte, and what each slider does.

In a notebook `Sampler()` is the last line of a cell.  Without a browser the same object is driven
by its methods: ``generate(wait=True)``, ``branch(position, byte, wait=True)``.

Sampling runs in a thread and shows what it made every 40 ms; a button only starts that
thread or sets a flag.  The bytes are those of `generate.stream` (or `infill.sample`) for the
settings shown, so the command in the status line makes them again.

Needs ipywidgets and anywidget: pip install "bitbyte[workbench]".
"""

import contextlib
import dataclasses
import html
import itertools
import math
import random
import threading
import time
from pathlib import Path

import numpy as np
import torch

from bitbyte import checkpoint, generate, infill
from bitbyte.byteview import GIVEN, MASKED
from bitbyte.dist import choose_device
from bitbyte.files import BitbyteError, artifacts
from bitbyte.hooks import Halt
from bitbyte.jobs import Jobs
from bitbyte.listing import describe, find_checkpoints, find_run
from bitbyte.sampler_controls import Controls
from bitbyte.sampler_parts import (
    INK,
    Sample,
    but_length,
    law_html,
    progress,
    sample_command,
    sentence,
    status_html,
)
from bitbyte.vocab import N_BYTES, byte_label

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
        self._stop, self._running, self._denoises = Halt(), False, False
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
        found, old = find_checkpoints(self._folder), self.model_choice.value
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
            self.bars.value = law_html(law[2], effect)
        self.sentence_line.value = f'<span style="color:{INK}">{html.escape(self.sentence)}</span>'

    def _say(self, text: str) -> None:
        self.message = text
        self.status.value = status_html(text, self.command)

    def _fail(self, error: BaseException) -> None:
        ours = isinstance(error, BitbyteError | OSError)
        self._say(f"error: {error}" if ours else f"error: {type(error).__name__}: {error}")
