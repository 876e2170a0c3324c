"""What every byte costs in the mixer, and who saved it: for evaluation, the lens and notebooks.

The cost of a byte is -log2 of the probability that the coder gets for it, from a mixer that has
learnt the bytes before it, exactly as when `mixed` writes a file.  The probabilities of the 256
bytes sum to one, as each is a product over the bits of the byte, whose probabilities do.  The
choice of how to look at a frame (see `mixer.shapes`) costs the bits that a file spends on it, which
are charged to the frame's first byte.  The code in a file is as long as the sum says, to two bytes
a frame and 0.01 %; the file adds its header, checksums and hash.  It is shorter where a frame that
would grow is stored, a long run of one byte is written as its length, or a model that does not help
is left out.

Shapes: T bytes, B = 8 T bits, G groups of experts, V byte values.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np

from bitbyte.compress import frames, segments, streamed
from bitbyte.compress.container import progress_bar
from bitbyte.compress.mixer import choice, codec, coder, shapes, trace
from bitbyte.compress.mixer.tables import ONE, STEPS
from bitbyte.compress.predictors import counts_from_floats
from bitbyte.compress.rans import TOTAL
from bitbyte.evaluate.entropy import COLUMNS, Surprisals, window_logits
from bitbyte.files import BitbyteError

FINAL_MAPS = "final maps"
GROUPS = (*trace.GROUPS, FINAL_MAPS)  # whom `Costs` names as savers


class Meter(codec.Codec):
    """A Codec that keeps no code but says what each bit would have cost."""

    def measure(
        self, data: np.ndarray, shape: shapes.Shape, grouped: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray, trace.Trace]]:
        """(bytes, the model's counts_TV or none, trace) of ``data``, piece by piece."""
        span, nothing = coder.new_span(), np.empty(0, np.uint8)
        numbers = shape.numbers(self._mixer)
        for part, counts_TV in self._parts(data):
            seen = trace.new_trace(len(part), grouped)
            self._code(self._mixer, numbers, span, nothing, part.copy(), False, counts_TV, seen)
            yield part, counts_TV, seen


class Windowed:
    """A model as an expert where it cannot be one of a file: in floats, by PyTorch, on any device.

    Its windows begin anew with a quarter of their bytes, as those of `streamed.Expert`, also for a
    Mamba, whose state streams on there.  So a cost differs a little from that of a file.
    """

    def __init__(self, model):
        self._model, self._window = model, model.config.seq_len
        self.begin()

    def begin(self) -> None:
        """Forget all bytes."""
        self._data = b""

    def known(self, data: np.ndarray) -> Iterator[np.ndarray]:
        """counts_TV (int32) of known bytes, in pieces, in order."""
        start, kept = len(self._data), max(1, self._window // 4)
        self._data += data.tobytes()
        parts, first = [], 0
        while first < len(self._data):
            stop = min(len(self._data), first + self._window - (kept if first else 0))
            if stop > start:
                parts.append((max(0, first - kept), stop, max(first, start)))
            first = stop
        for _, logits_NV in window_logits(self._model, self._data, parts):
            yield counts_from_floats(logits_NV.cpu().numpy()).view(np.int32)


class Faint:
    """An expert of whom the mixer hears only a share; the rest is that all bytes are as likely."""

    def __init__(self, expert, share: float):
        if not 0 <= share <= 1:
            raise BitbyteError(f"the share of the model is {share}; it must be from 0 to 1")
        self._expert, self._share = expert, share

    def begin(self) -> None:
        """Forget all bytes."""
        self._expert.begin()

    def known(self, data: np.ndarray) -> Iterator[np.ndarray]:
        """counts_TV (int32) of known bytes, in pieces, in order."""
        for counts_TV in self._expert.known(data):
            faint_TV = (counts_TV * self._share).astype(np.int32)
            faint_TV += ((TOTAL - faint_TV.sum(1)) // counts_TV.shape[1])[:, None].astype(np.int32)
            faint_TV[:, 0] += (TOTAL - faint_TV.sum(1)).astype(np.int32)
            yield faint_TV


def expert_of(model, meta: dict | None = None):
    """A model as an expert: of a file if it can be (`streamed.Expert`), else `Windowed`.

    Raises BitbyteError if it has no next byte.
    """
    if streamed.problem(model) is None:
        return streamed.Expert(model, meta)
    if model.exact is False:
        raise BitbyteError(f"a {model.config.family} model has no next byte and cannot be mixed")
    return Windowed(model)


def _bit_costs(part: np.ndarray, p_B: np.ndarray) -> np.ndarray:
    """Cost of each bit of the bytes: bits_B."""
    return -np.log2(np.where(np.unpackbits(part), p_B, ONE - p_B) / ONE)


def _pieces(
    data: bytes, expert, memory: int, grouped: bool, fast: bool | None
) -> Iterator[tuple[float, np.ndarray, np.ndarray, trace.Trace]]:
    """(bits of the choice of a shape, then as `Meter.measure`) of the data as a file holds them."""
    if expert is not None:
        expert.begin()
    meter = Meter(*codec.sizes_for(len(data), memory), expert, fast)
    for frame, hint in segments.frames(segments.pieces(BytesIO(data))):
        for part in frames.repeated(*frame) if isinstance(frame, segments.Run) else (frame,):
            values = np.frombuffer(part, np.uint8)
            shape = choice.choose(values, hint, fast)
            told = 8.0 * (1 + len(frames.pack_shape(shape)))
            for piece in meter.measure(shapes.to_mixer(values, shape, fast), shape, grouped):
                yield told, *piece
                told = 0.0


class Mixed:
    """The mixer, alone or with an expert, as a distribution that `scoring.score_stream` takes."""

    exact = True

    def __init__(self, expert=None, *, memory: int = codec.MEMORY, progress: bool = False):
        self._expert, self._memory, self._progress = expert, memory, progress

    def bits(self, data: bytes) -> np.ndarray:
        """Cost of each byte of the whole stream, bits_T."""
        costs = [np.zeros(0)]
        with progress_bar(len(data), "eval", self._progress) as bar:
            for told, part, _, seen in _pieces(data, self._expert, self._memory, False, None):
                costs.append(_bit_costs(part, seen.p_B).reshape(-1, 8).sum(1))
                costs[-1][0] += told
                bar.update(len(part))
        return np.concatenate(costs)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Costs:
    """What each of T bytes cost in the mixer, and what each group of experts saved of 8 bits."""

    data: bytes
    bits: np.ndarray  # (T,) float64
    model_bits: np.ndarray  # (T,) float64: what the model alone would pay; NaN without one
    saved: np.ndarray  # (T, G) float64: they sum to 8 - bits; below 0 if a group misled the mixer
    weights: np.ndarray  # (T, G - 1) float64: mean weight of a group's inputs that said something
    groups: tuple[str, ...] = GROUPS

    @property
    def bpb(self) -> float:
        """Bits per byte; NaN if there are no bytes."""
        return math.fsum(self.bits) / len(self.bits) if len(self.bits) else math.nan

    def saved_by(self) -> dict[str, float]:
        """Bits per byte that each group saved."""
        return dict(zip(self.groups, self.saved.mean(0).tolist(), strict=True))


def read(
    data: bytes, expert=None, *, memory: int = codec.MEMORY, fast: bool | None = None,
    stopped: Callable[[], bool] | None = None, on_part: Callable[[int], object] | None = None,
) -> Costs:  # fmt: skip
    """The costs of ``data``, alone or with an expert (see `expert_of`).

    What a group saved: the mixed prediction is a sum over the inputs, so it is divided in that
    proportion; the rest is what the final maps changed.  ``on_part`` gets the number of bytes done;
    once ``stopped()`` is true only those are returned.
    """
    columns: list[tuple[np.ndarray, ...]] = [(
        np.zeros(0), np.zeros(0), np.zeros((0, len(GROUPS))), np.zeros((0, len(GROUPS) - 1))
    )]  # fmt: skip
    done = 0
    for told, part, counts_TV, seen in _pieces(data, expert, memory, True, fast):
        columns.append(_columns(part, counts_TV, seen))
        columns[-1][0][0] += told
        columns[-1][2][0, -1] -= told
        done += len(part)
        if on_part:
            on_part(done)
        if stopped and stopped():
            break
    bits, model_bits, saved, weights = map(np.concatenate, zip(*columns, strict=True))
    return Costs(
        data=data[:done], bits=bits, model_bits=model_bits, saved=saved, weights=weights
    )  # fmt: skip


def with_mixed(seen: Surprisals, model, meta: dict | None = None, **options) -> Surprisals:
    """The lens's costs of a text and, beside them, those in a mixer that knows nothing before it.

    If it is stopped (see `read` for the options) only the bytes before that are returned.  Raises
    BitbyteError if the model cannot be mixed.
    """
    bits = read(seen.data, expert_of(model, meta), **options).bits
    columns = {name: getattr(seen, name)[: len(bits)] for name in (*COLUMNS, "data")}
    return dataclasses.replace(seen, mixed=bits, **columns)


def _columns(part: np.ndarray, counts_TV: np.ndarray, seen: trace.Trace) -> tuple[np.ndarray, ...]:
    """The columns of `Costs` for T bytes."""
    bits_B, T = _bit_costs(part, seen.p_B), len(part)
    sign_B = 2.0 * np.unpackbits(part) - 1
    nats_B = sign_B * seen.mixed_B / STEPS  # for the right value
    saved_B = 1 - np.logaddexp(0, -nats_B) / math.log(2)  # of one bit, before the final maps
    with np.errstate(invalid="ignore", divide="ignore"):
        # The gain per nat along the way from no opinion to the mixed one.
        slope_B = np.where(nats_B, saved_B / nats_B, 0.5 / math.log(2))
        pull_BG = sign_B[:, None] * seen.pull_BG / (STEPS << trace.WEIGHT_BITS)
        total_B = pull_BG.sum(1)
        # Certain sets of weights are clipped, so the sum may exceed what came of it.
        share_B = np.where(np.abs(total_B) > np.abs(nats_B), np.abs(nats_B / total_B), 1.0)
    saved_BG = pull_BG * (slope_B * share_B)[:, None]
    rest_B = 1 - bits_B - saved_BG.sum(1)
    saved_TG = np.column_stack([saved_BG, rest_B]).reshape(T, 8, -1).sum(1)
    weights_TG = seen.weight_BG.reshape(T, 8, -1).mean(1) / (1 << trace.WEIGHT_BITS)
    model_T = np.full(T, math.nan)
    if len(counts_TV):
        model_T = -np.log2(counts_TV[np.arange(T), part] / TOTAL)
    return bits_B.reshape(T, 8).sum(1), model_T, saved_TG, weights_TG
