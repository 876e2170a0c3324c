"""Sampling from causal models, one byte at a time, with a cached state.

For models with ``init_state``, ``step``, ``logits`` and ``context``; a ``prefill`` is used if
there is one.  Denoising models have no next byte; `infill` samples from them.

The next-byte distribution passes through filters in a fixed order:
    repetition penalty -> temperature -> top-k -> top-p -> min-p
each working on the output of the one before.  Sources: repetition penalty arXiv:1909.05858, top-p
arXiv:1904.09751, min-p arXiv:2407.01082.

Shapes: B batch, T positions, V the 256 byte values, R the same ranked by probability.
"""

import codecs
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitbyte import face
from bitbyte.config import SamplingConfig
from bitbyte.device import device_of, peak_memory
from bitbyte.files import BitbyteError
from bitbyte.kernels.engine import described
from bitbyte.vocab import N_BYTES, START

SLIDES = ("exact", "block")


def _scores(logits_V: Tensor, config: SamplingConfig, recent: bytes) -> np.ndarray:
    """The logits in float64 after the repetition penalty.  Raises BitbyteError if not finite."""
    scores_V = _float64(logits_V)
    if not np.isfinite(scores_V).all():
        raise BitbyteError(
            "the model gives NaN or infinite logits: its weights are damaged or diverged in "
            "training; sample from an earlier checkpoint"
        )
    recent = recent[max(0, len(recent) - config.repetition_window) :]
    if config.repetition_penalty != 1 and recent:
        seen, penalty = np.unique(np.frombuffer(recent, np.uint8)), config.repetition_penalty
        old, scores_V = scores_V[seen], scores_V.copy()
        scores_V[seen] = np.where(old > 0, old / penalty, old * penalty)
    return scores_V


def _float64(logits_V: Tensor) -> np.ndarray:
    # First to the CPU: Apple GPUs have no float64.
    return logits_V.detach().cpu().double().numpy()


def _softmax(gaps: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of scores that are given as differences from the largest."""
    if temperature < 1e-3:  # dividing may overflow to -inf, whose share is 0
        with np.errstate(over="ignore"):
            gaps, temperature = gaps / temperature, 1.0
    probs = np.exp(gaps / temperature)
    return probs / probs.sum()


def _ranked(logits_V: Tensor, config: SamplingConfig, recent: bytes) -> tuple:
    """(order_R, probs_R, kept): bytes by descending probability, and how many each filter keeps.

    Every filter keeps a prefix of the ranking, so one number each describes it.  Equally likely
    bytes rank by value, so that ties are cut the same way everywhere.
    """
    scores_V = _scores(logits_V, config, recent)
    order_R = np.argsort(-scores_V, kind="stable")
    gaps_R = scores_V[order_R]
    gaps_R = gaps_R - gaps_R[0]  # before dividing, so that no temperature overflows
    if config.temperature == 0:
        return order_R, (gaps_R == 0).astype(np.float64), {"greedy": 1}
    probs_R = _softmax(gaps_R, config.temperature)
    kept = {"top-k": config.top_k or N_BYTES}
    kept["top-p"] = kept["top-k"]
    if config.top_p < 1:
        mass_R = probs_R[: kept["top-k"]].cumsum()
        kept["top-p"] = int(np.searchsorted(mass_R, config.top_p * mass_R[-1])) + 1
    above_R = probs_R[: kept["top-p"]] >= config.min_p * probs_R[0]
    kept["min-p"] = int(above_R.sum())
    return order_R, probs_R, kept


def filtered_probs(logits_V: Tensor, config: SamplingConfig, recent: bytes = b"") -> Tensor:
    """The distribution that is sampled from: probs_V in float64 on the CPU, summing to 1.

    ``logits_V`` may have any float dtype and device; of ``recent`` (all bytes so far) the last
    ``config.repetition_window`` count.  No forward pass: cheap enough to follow a slider.
    Raises BitbyteError on non-finite logits.
    """
    c = config
    if c.temperature > 0 and (c.top_k, c.top_p, c.min_p) == (0, 1, 0):  # no ranking is needed
        scores_V = _scores(logits_V, c, recent)
        return torch.from_numpy(_softmax(scores_V - scores_V.max(), c.temperature))
    order_R, probs_R, kept = _ranked(logits_V, c, recent)
    n = min(kept.values())
    probs_V = np.zeros(N_BYTES)
    probs_V[order_R[:n]] = probs_R[:n] / probs_R[:n].sum()
    return torch.from_numpy(probs_V)


@torch.no_grad()
def next_byte_logits(model, prompt: bytes) -> Tensor:
    """logits_V of the byte after ``prompt``, from which `stream` draws its first byte."""
    return next(_next_logits(model, bytearray(prompt), "exact"))


def next_byte_probs(model, prompt: bytes, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """(before_V, after_V): probabilities of the byte after ``prompt``, unfiltered and filtered."""
    effect = filter_effect(next_byte_logits(model, prompt), config, prompt)
    return effect.before, effect.after


def cut_by(logits_V: Tensor, config: SamplingConfig, recent: bytes = b"") -> list[str]:
    """For each of the 256 bytes the filter that removed it ("top-k", "greedy", ...), "" if kept."""
    order_R, _, kept = _ranked(logits_V, config, recent)
    rules = [""] * N_BYTES
    for rank, byte in enumerate(order_R.tolist()):
        rules[byte] = next((rule for rule, n in kept.items() if rank >= n), "")
    return rules


class FilterEffect(NamedTuple):
    """What the filters do to one distribution."""

    before: Tensor  # (V,) the unfiltered probabilities, float64
    after: Tensor  # (V,) the probabilities that are sampled from
    rules: list[str]  # see `cut_by`
    kept: int  # bytes that can be drawn
    mass: float  # their unfiltered probability
    bits_before: float  # entropies
    bits_after: float


def filter_effect(logits_V: Tensor, config: SamplingConfig, recent: bytes = b"") -> FilterEffect:
    """The probabilities before and after the filters.  Arguments as in `filtered_probs`."""
    after_V = filtered_probs(logits_V, config, recent)
    before_V = logits_V.detach().cpu().double().softmax(0)
    bits = [float(torch.special.entr(p_V).sum()) / math.log(2) for p_V in (before_V, after_V)]
    rules = cut_by(logits_V, config, recent)
    kept_V = after_V > 0
    mass = float(before_V[kept_V].sum())
    return FilterEffect(before_V, after_V, rules, int(kept_V.sum()), mass, *bits)


def _points(seed: int) -> Iterator[float]:
    """Random numbers in [0, 1), the same for a seed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    while True:  # many at once give the same numbers as one by one, faster
        yield from torch.rand(64, dtype=torch.float64, generator=generator).tolist()


def _draw(probs_V: Tensor, point: float) -> int:
    """One byte, by inverting the cumulative distribution; never one of probability 0."""
    mass_V = probs_V.numpy().cumsum()
    return int((mass_V / mass_V[-1]).searchsorted(point, side="right"))


def _next_logits(model, history: bytearray, slide: str) -> Iterator[Tensor]:
    """Yield logits_V after ``history``, to which the caller appends one byte between yields.

    ``held`` counts the bytes of the current window, which also holds one START.
    """
    device, room = device_of(model), model.context - 1

    def window(n: int) -> Tensor:
        ids = [START, *history[len(history) - n :]]
        return torch.tensor([ids], device=device)

    def encode(ids_BT: Tensor) -> tuple[Tensor, object]:
        state = model.init_state(1)
        if hasattr(model, "prefill"):
            return model.prefill(ids_BT, state)
        for t in range(ids_BT.shape[1]):
            logits_BV, state = model.step(ids_BT[:, t], state)
        return logits_BV, state

    held = min(len(history), room)
    logits_BV, state = encode(window(held))
    while True:
        yield logits_BV[0]
        held += 1
        if held <= room:
            ids_B = torch.tensor([history[-1]], device=device)
            logits_BV, state = model.step(ids_B, state)
        elif slide == "exact":
            logits_BV, state = model.logits(window(room))[:, -1], None
        else:
            held = room - room // 2
            logits_BV, state = encode(window(held))


def _drawn(model, history: bytearray, config: SamplingConfig, slide: str) -> Iterator[tuple]:
    """Yield (byte, the logits_V it was drawn from), one after the other, appended to history.

    The native engine draws some bytes ahead, until its window is full.
    """
    points = _points(config.seed)
    yield from _drawn_natively(model, history, config, slide, points)
    for logits_V in _next_logits(model, history, slide):
        byte = _draw(filtered_probs(logits_V, config, history), next(points))
        history.append(byte)
        yield byte, logits_V


def _drawn_natively(
    model, history: bytearray, config: SamplingConfig, slide: str, points: Iterator[float]
) -> Iterator[tuple]:
    """The pairs of `_drawn`, for as long as a native state can draw; none without one."""
    room, left = model.context - 1, config.max_new_tokens
    held = min(len(history), room)
    while hasattr(state := model.init_state(1), "draw"):
        ids = [START, *history[len(history) - held :]]
        model.prefill(torch.tensor([ids]), state)
        n = 1  # the first byte comes at once
        while held < room and left:
            n = min(n, room - held, left)
            points_N = np.fromiter(islice(points, n), float)
            bytes_N, logits_NV = state.draw(points_N, config, bytes(history))
            if not np.isfinite(logits_NV).all():
                filtered_probs(torch.from_numpy(logits_NV[0] * np.nan), config)  # raises
            for byte, logits_V in zip(bytes_N.tolist(), torch.from_numpy(logits_NV), strict=True):
                history.append(byte)
                yield byte, logits_V
            held, left, n = held + n, left - n, min(2 * n, state.draws)
        if left:  # one more byte, which does not fit into the window
            logits_V = state.latest()
            history.append(_draw(filtered_probs(logits_V, config, history), next(points)))
            left -= 1
            yield history[-1], logits_V
        if slide == "exact" or not left:
            return
        held = room - room // 2


class ByteStats(NamedTuple):
    """What is known about a sampled byte."""

    byte: int
    bits: float  # its cost under the unfiltered model
    logits: Tensor  # (V,) the model's logits it was drawn from


def byte_stats(byte: int, logits_V: Tensor) -> ByteStats:
    """`ByteStats` of a byte, drawn or chosen by the user, where the logits were logits_V."""
    scores_V = _float64(logits_V)
    top = scores_V.max()
    nats = math.log(np.exp(scores_V - top).sum()) - (scores_V[byte] - top)
    return ByteStats(byte, float(nats) / math.log(2), logits_V)


def likeliest(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids_Nk, probs_Nk) of the k likeliest bytes under the unfiltered model, likeliest first."""
    top = logits_NV.detach().cpu().double().softmax(1).topk(k, 1)
    return top.indices, top.values


# no_grad, not inference_mode: modules cache tables and quantized weights as they run, and a later
# training step could not use tensors made under inference_mode.
@torch.no_grad()
def stream(
    model,
    prompt: bytes,
    config: SamplingConfig,
    *,
    slide: str = "exact",
    on_stats: Callable[[ByteStats], None] | None = None,
) -> Iterator[int]:
    """Yield ``config.max_new_tokens`` bytes that continue ``prompt`` (any bytes, or none).

    Up to ``model.context`` ids (START and bytes) every byte is one cached step.  Beyond that:

    slide="exact"  each byte is predicted from START and the last context - 1 bytes by a full
                   forward pass: uses the whole context, at the cost of one window per byte;
    slide="block"  a full window is cut to its newer half and refilled by cached steps: costs
                   about one extra position per byte, and uses at least half of the context.

    Draws are made on the CPU in float64, so a seed gives the same bytes on every device as long
    as the logits agree.  ``on_stats`` is called with the `ByteStats` of each byte before it is
    yielded.  Raises BitbyteError on non-finite logits.
    """
    if slide not in SLIDES:
        raise BitbyteError(f"no slide {slide!r}; choose from {', '.join(SLIDES)}")
    if not isinstance(prompt, bytes | bytearray):
        raise BitbyteError("the prompt must be bytes; encode text with .encode()")
    if not hasattr(model, "step"):
        raise BitbyteError(
            f"a {model.config.family} model has no next byte to stream; continue a prompt with "
            "bitbyte.infill.sample"
        )
    drawn = _drawn(model, bytearray(prompt), config, slide)
    for byte, logits_V in islice(drawn, config.max_new_tokens):
        if on_stats:
            on_stats(byte_stats(byte, logits_V))
        yield byte


class Utf8Stream:
    """UTF-8 text from bytes that arrive one by one.

    A character appears once it is complete; bytes that cannot be UTF-8 appear as U+FFFD.  Joined,
    the pieces equal ``data.decode("utf-8", errors="replace")``.
    """

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """The characters that ``data`` completes, if any."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that was never completed, else ""."""
        return self._decoder.decode(b"", final=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished sample."""

    bytes: bytes  # the new bytes, without the prompt
    text: str  # what they add to the decoded prompt
    metrics: dict  # numbers, see `generate`
    engine: str | None = None  # what computed it, see `kernels.engine.described`


def generate(
    model,
    prompt: bytes,
    config: SamplingConfig,
    *,
    slide: str = "exact",
    on_byte: Callable[[int], None] | None = None,
) -> Generation:
    """Run `stream` to its end and measure it; ``on_byte`` is called with every byte.

    Metrics: prompt_bytes, new_bytes, seconds (in all), first_byte_seconds (encoding the prompt
    included), bytes_per_second (new bytes / seconds), peak_memory_bytes (of the GPU during the
    call; on a CPU, of the process so far; None if unknown) and bits_per_byte (mean cost of the
    new bytes under the unfiltered model).
    """
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    new, bits, first = bytearray(), [], math.nan
    begin = time.perf_counter()
    sample = stream(model, prompt, config, slide=slide, on_stats=lambda s: bits.append(s.bits))
    for byte in sample:
        if not new:
            first = time.perf_counter() - begin
        new.append(byte)
        if on_byte:
            on_byte(byte)
    seconds = time.perf_counter() - begin
    metrics = {
        "prompt_bytes": len(prompt),
        "new_bytes": len(new),
        "seconds": seconds,
        "first_byte_seconds": first,
        "bytes_per_second": len(new) / seconds,
        "peak_memory_bytes": peak_memory(device),
        "bits_per_byte": math.fsum(bits) / len(bits),
    }
    decoder = Utf8Stream()
    decoder.push(prompt)  # the first new bytes may complete a character of the prompt
    text = decoder.push(bytes(new)) + decoder.flush()
    engine = described(model) if hasattr(model, "engine") else None
    return Generation(bytes=bytes(new), text=text, metrics=metrics, engine=engine)


__getattr__ = face(__name__, {}, renamed="next_byte_laws:next_byte_probs")
