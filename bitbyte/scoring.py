"""Bits of every byte of a file under a model: one pass for all families.

The bytes are cut into windows of ``window`` bytes.  With ``stride`` = window they do not overlap;
with a smaller stride each window scores only its last ``stride`` bytes (the first one all of its
bytes), so that every byte is scored once with at least window - stride bytes of context.  No
model of any family sees a byte outside of its window.

Kinds of numbers, never mixed in one column: ``exact`` (causal models), ``upper_bound``,
``chain_rule:left_to_right`` and ``chain_rule:confidence`` (masked diffusion, see `bounds`).
"""

import dataclasses
import math
import time
import types
from collections.abc import Callable, Iterator

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
    """What a pass over the bytes gave; all sums in float64."""

    bits: float
    n_bytes: int
    block_bits: np.ndarray  # (n_windows,) bits of each window's scored bytes
    block_bytes: np.ndarray  # (n_windows,) how many these are
    position_bits: np.ndarray  # (window,) mean bits by position in the window; nan = not scored
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


def nats_function(model, kind: str | None, draws: int, per_pass: int, seed: int) -> Callable:
    """(ids_BT, scored bytes S, window numbers) -> nats_BS, for a kind of number.

    ``kind`` None is the family's own: exact, or the upper bound.  Raises BitbyteError where the
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


def kind_of(model, kind: str | None = None) -> str:
    """The kind of number that ``kind`` means for this model; None is the family's own."""
    if kind is None:
        return "upper_bound" if model.exact is False else "exact"
    if kind not in KINDS:
        raise BitbyteError(f"no kind {kind!r}; choose from {', '.join(KINDS)}")
    if model.exact not in (None, kind == "exact"):
        other = "exact" if model.exact else ", ".join(KINDS[1:])
        raise BitbyteError(f"this model's family has no {kind} cost; it has: {other}")
    return kind


# Not inference_mode: tables cached under it could not be used by a training step that follows.
@torch.no_grad()
def surprisal(
    model, data, *, window: int, stride: int | None = None, batch_size: int = 32,
    dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None, progress=False,
    kind: str | None = None, draws: int = 16, per_pass: int = 1, seed: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Bits of each byte of ``data.read(start, stop)``, in order: yields (context_bytes, bits).

    ``data`` has ``n_bytes`` and ``read(start, stop)``.  ``bits`` is float64, one value a byte of
    one window's scored part, and ``context_bytes`` the bytes of the window before that part.
    ``draws`` and ``seed`` belong to the upper bound, ``per_pass`` to the chain rules.
    """
    cost = nats_function(model, kind, draws, per_pass, seed)
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise BitbyteError(f"stride is {stride}; it must be between 1 and the window, {window}")
    if batch_size < 1:
        raise BitbyteError(f"batch_size is {batch_size}; it must be at least 1")
    stop = data.n_bytes if stop is None else min(stop, data.n_bytes)
    if stop <= start:
        raise BitbyteError("there are no bytes to score")
    device = device_of(model)
    model.eval()
    bar = tqdm(
        total=stop - start, unit="B", unit_scale=True, desc="eval",
        disable=None if progress else True,
    )  # fmt: skip
    index = 0
    with bar:
        for group in _groups(windows(stop - start, window, stride), batch_size):
            rows = np.stack([data.read(start + a, start + b) for a, b, _ in group])
            ids_BT = torch.from_numpy(rows).to(device, torch.int64)
            a, b, first = group[0]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                nats_BS = cost(ids_BT, b - first, range(index, index + len(group)))
            index += len(group)
            for nats_S in nats_BS.cpu().double().numpy():
                yield first - a, nats_S / math.log(2)
            bar.update(len(group) * (b - first))


def _groups(items: Iterator[tuple], size: int) -> Iterator[list[tuple]]:
    """Batches of up to ``size`` windows of one length and one scored part."""
    group: list[tuple] = []
    for a, b, first in items:
        same = group and (b - a, b - first) == (
            group[0][1] - group[0][0],
            group[0][1] - group[0][2],
        )
        if group and (len(group) == size or not same):
            yield group
            group = []
        group.append((a, b, first))
    if group:
        yield group


def score(model, data, *, window: int | None = None, stride: int | None = None, **options) -> Score:
    """Score all bytes of ``data`` (or ``start`` to ``stop``).  Options as in `surprisal`.

    A model with ``bits(data) -> bits_n`` instead of ``forward`` is an oracle: it gets the whole
    stream at once and takes no windows.
    """
    clock = time.perf_counter()
    if hasattr(model, "bits"):
        start, stop = options.get("start", 0), options.get("stop")
        stop = data.n_bytes if stop is None else stop
        stop = min(stop, data.n_bytes)
        stream = model.bits(data.read(0, stop).tobytes())[start:]
        window = window or 1024
        cut = windows(len(stream), window, stride or window)
        parts = ((first - a, stream[first:b]) for a, b, first in cut)
    else:
        context = model.config.seq_len
        window = context if window is None else window
        if not 1 <= window <= context:
            raise BitbyteError(f"window is {window}; this model scores windows of 1 to {context}")
        parts = surprisal(model, data, window=window, stride=stride, **options)
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
    """Total cost in nats of ``n_bytes`` bytes -> bits per byte."""
    return nats / math.log(2) / n_bytes


class Uniform(torch.nn.Module):
    """Every byte equally likely: exactly 8 bits per byte, in every kind of number."""

    exact = None  # it has all kinds

    def __init__(self, seq_len: int = 256):
        super().__init__()
        self.config = types.SimpleNamespace(family="uniform", seq_len=seq_len)

    def forward(self, ids_BT, generator=None):
        return torch.full(ids_BT.shape, math.log(N_BYTES), dtype=torch.float64)

    def logits(self, ids_BT):
        return torch.zeros(*ids_BT.shape, N_BYTES, dtype=torch.float64)
