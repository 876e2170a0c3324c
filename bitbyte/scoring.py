"""Bits of every byte of a file under a model: one pass for all families.

The bytes are cut into windows of ``window`` bytes.  With ``stride`` = window they do not overlap;
with a smaller stride each window scores only its last ``stride`` bytes (the first window all of
them), so that every byte is scored once, with at least window - stride bytes of context except in
the first window.  No model of any family sees a byte outside its window.

Kinds of numbers, never averaged with each other: ``exact`` (causal models), ``upper_bound``,
``chain_rule:left_to_right`` and ``chain_rule:confidence`` (masked diffusion, see `bounds`).
Diffusion in blocks has all of them.
"""

import dataclasses
import math
import time
import types
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice

import numpy as np
import torch
from tqdm import tqdm

from bitbyte import bounds
from bitbyte.device import device_of
from bitbyte.files import BitbyteError, RunError
from bitbyte.vocab import N_BYTES

CHAIN_RULE = "chain_rule:"
KINDS = ("exact", "upper_bound", *(CHAIN_RULE + order for order in bounds.ORDERS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Result of scoring a byte range; all sums in float64."""

    bits: float
    n_bytes: int
    block_bits: np.ndarray  # (n_windows,) bits of each window's scored bytes
    block_bytes: np.ndarray  # (n_windows,) number of scored bytes
    position_bits: np.ndarray  # (window,) mean bits by position in the window; NaN = not scored
    seconds: float

    @property
    def bpb(self) -> float:
        return self.bits / self.n_bytes


def windows(n_bytes: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored byte) of each window: every byte is scored exactly once."""
    scored = 0
    while scored < n_bytes:
        stop = min(n_bytes, scored + (window if scored == 0 else stride))
        yield max(0, stop - window), stop, scored
        scored = stop


def window_and_stride(model, window: int | None, stride: int | None) -> tuple[int, int]:
    """(window, stride) with defaults filled in.  BitbyteError if the model cannot score them."""
    longest = model.config.seq_len
    window = longest if window is None else window
    if not 1 <= window <= longest:
        raise BitbyteError(f"window is {window}; this model scores windows of 1 to {longest}")
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise BitbyteError(f"stride is {stride}; it must be between 1 and the window, {window}")
    return window, stride


def batches(
    read: Callable[[int, int], np.ndarray], parts: Iterable[tuple[int, int, int]],
    batch_size: int, device: torch.device,
) -> Iterator[tuple[list[tuple[int, int, int]], torch.Tensor]]:  # fmt: skip
    """Batches of ``parts`` (see `windows`): (parts of the batch, ids_BT int64 of their bytes).

    A batch is up to ``batch_size`` neighboring windows of one length T with equally many scored
    bytes; ``read(start, stop)`` returns their bytes.  BitbyteError if ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise BitbyteError(f"batch_size is {batch_size}; it must be at least 1")
    for _, alike in groupby(parts, lambda part: (part[1] - part[0], part[1] - part[2])):
        while batch := list(islice(alike, batch_size)):
            rows = np.stack([read(start, stop) for start, stop, _ in batch])
            yield batch, torch.from_numpy(rows).to(device, torch.int64)


def nats_function(model, kind: str | None, draws: int, per_pass: int, seed: int) -> Callable:
    """The function (ids_BT, scored bytes S, window numbers) -> nats_BS for a kind of number.

    ``kind`` None is the family's default: exact, or the upper bound.  Raises BitbyteError if the
    family has no such number.
    """
    kind = kind_of(model, kind)
    if draws < 1:
        raise BitbyteError(f"draws is {draws}; it must be at least 1")
    if kind == "exact":
        return lambda ids_BT, S, indices: model(ids_BT)[:, -S:]
    if kind == "upper_bound":
        return lambda ids_BT, S, indices: bounds.upper_bound(
            model, ids_BT, S, draws=draws, indices=indices, seed=seed
        )
    order = kind.removeprefix(CHAIN_RULE)
    return lambda ids_BT, S, indices: bounds.chain_rule(
        model, ids_BT, S, order=order, per_pass=per_pass
    )


def kinds_of(model) -> tuple[str, ...]:
    """The kinds of numbers that this model has, the default first."""
    if getattr(model, "block", 0):
        return KINDS
    return {True: KINDS[:1], False: KINDS[1:], None: KINDS}[model.exact]


def kind_of(model, kind: str | None = None) -> str:
    """The kind of number that ``kind`` means for this model; None is the family's default."""
    kinds = kinds_of(model)
    if kind is None:
        return kinds[0]
    if kind not in KINDS:
        raise BitbyteError(f"no kind {kind!r}; choose from {', '.join(KINDS)}")
    if kind not in kinds:
        raise BitbyteError(f"this model's family has no {kind} cost; it has: {', '.join(kinds)}")
    return kind


# Not inference_mode: a later training step could not use tables cached under it.
@torch.no_grad()
def surprisal(
    model, data, *, window: int | None = None, stride: int | None = None, batch_size: int = 32,
    dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None, progress=False,
    kind: str | None = None, draws: int = 16, per_pass: int = 1, seed: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Bits of each byte of ``data.read(start, stop)``, in order: yields (context_bytes, bits).

    ``data`` has ``n_bytes`` and ``read(start, stop)``.  ``bits`` (float64) has one value per scored
    byte of a window, ``context_bytes`` is the number of bytes in the window before those.
    ``draws`` and ``seed`` apply to the upper bound, ``per_pass`` to the chain rules.
    """
    cost = nats_function(model, kind, draws, per_pass, seed)
    window, stride = window_and_stride(model, window, stride)
    stop = data.n_bytes if stop is None else min(stop, data.n_bytes)
    if stop <= start:
        raise BitbyteError("there are no bytes to score")
    device = device_of(model)
    model.eval()
    bar = tqdm(
        total=stop - start, unit="B", unit_scale=True, desc="eval",
        disable=None if progress else True,
    )  # fmt: skip
    index, cuts = 0, windows(stop - start, window, stride)
    with bar:
        for batch, ids_BT in batches(
            lambda a, b: data.read(start + a, start + b), cuts, batch_size, device
        ):
            a, b, first = batch[0]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                nats_BS = cost(ids_BT, b - first, range(index, index + len(batch)))
            index += len(batch)
            for nats_S in nats_BS.cpu().double().numpy():
                yield first - a, nats_S / math.log(2)
            bar.update(len(batch) * (b - first))


def score(model, data, *, window: int | None = None, stride: int | None = None, **options) -> Score:
    """Score all bytes of ``data``, or ``start`` to ``stop``.  Options as in `surprisal`."""
    clock = time.perf_counter()
    window, stride = window_and_stride(model, window, stride)
    parts = surprisal(model, data, window=window, stride=stride, **options)
    return _summed(parts, window, clock)


def score_stream(
    oracle, data, *, window: int | None = None, stride: int | None = None, start: int = 0,
    stop: int | None = None,
) -> Score:  # fmt: skip
    """`score` for a known distribution: ``oracle.bits(bytes) -> bits_n`` gets the whole stream.

    Windows (default 1024 bytes) do not limit its context; they only group the sums.
    """
    clock = time.perf_counter()
    stop = data.n_bytes if stop is None else min(stop, data.n_bytes)
    bits_n = oracle.bits(data.read(0, stop).tobytes())[start:]
    window = window or 1024
    cuts = windows(len(bits_n), window, stride or window)
    return _summed(((first - a, bits_n[first:b]) for a, b, first in cuts), window, clock)


def _summed(parts: Iterable[tuple[int, np.ndarray]], window: int, clock: float) -> Score:
    """The score of parts as `surprisal` yields them; ``clock`` is when scoring began."""
    block_bits, block_bytes = [], []
    totals, counts = np.zeros(window), np.zeros(window)
    for context, bits in parts:
        block_bits.append(bits.sum())
        block_bytes.append(len(bits))
        where = slice(context, context + min(len(bits), window - context))
        totals[where] += bits[: window - context]
        counts[where] += 1
    block_bits, block_bytes = np.array(block_bits), np.array(block_bytes)
    if not np.isfinite(block_bits).all():
        raise RunError("the model gives costs that are not finite numbers; its weights are broken")
    with np.errstate(invalid="ignore"):
        by_position = totals / counts
    return Score(
        bits=math.fsum(block_bits), n_bytes=int(block_bytes.sum()), block_bits=block_bits,
        block_bytes=block_bytes, position_bits=by_position, seconds=time.perf_counter() - clock,
    )  # fmt: skip


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Bits per byte, from the total cost in nats of ``n_bytes`` bytes."""
    return nats / math.log(2) / n_bytes


class Uniform(torch.nn.Module):
    """Every byte equally likely: exactly 8 bits per byte, in every kind of number."""

    exact = None  # has all kinds of numbers

    def __init__(self, seq_len: int = 256):
        super().__init__()
        self.config = types.SimpleNamespace(family="uniform", seq_len=seq_len)

    def forward(self, ids_BT, noise_B=None, fold_BT=None):
        return torch.full(ids_BT.shape, math.log(N_BYTES), dtype=torch.float64)

    def logits(self, ids_BT):
        return torch.zeros(*ids_BT.shape, N_BYTES, dtype=torch.float64)
