"""The check before a causal model's result is written: no cost may depend on what it must not.

The cost of a byte may depend on the bytes before it in its window and on nothing else: not on
later bytes, other windows of the batch or the length of the window.  Feeding the window step by
step, where the model cannot see what it has not been fed, must give the same costs.

There are two kinds of comparison.  Between batches of the same shape every sum is taken in the
same order, so honest models agree to the last bit, and a tight limit finds the smallest leak.
Between different shapes floats are summed in different orders; in a ternary model that can flip
the rounding of an int8 activation and so change everything after it.  Such noise has either sign,
so the limit on the mean signed difference, which is what shifts a BPB, is far tighter than the
limit on single bytes.

Shapes: R windows (rows) of T bytes, B and N: some of these windows and bytes, V byte values.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitbyte.bounds import seen_in
from bitbyte.device import device_of
from bitbyte.files import RunError
from bitbyte.models import preceding

ROWS = 4  # windows checked, in one batch
CHUNK = 64  # attention and scans work in chunks of this size or multiples of it
BORDERS = 8  # number of chunk borders that are cuts
RANDOM_CUTS = 2  # minimum number of cuts elsewhere
STEPS = 64  # ids fed one by one from the start; half as many after a prefill


class Limits(NamedTuple):
    """Allowed differences in bits.  The means are over the bytes of one comparison."""

    drift: float  # mean of the signed differences
    mean: float  # mean of the absolute differences
    largest: float  # of any byte; one byte may have that much on top of either mean


# Largest seen in honest models: transformers of 2 to 12 layers and Mamba of 2; ternary, dense and
# without act_quant; fresh and trained; text and random bytes; all kernels.  |drift|, mean, largest:
#   same shape                       0, 0, 0
#   other shape, float32             0.0005, 0.017, 0.1  (dense: 1e-6, 1e-5, 5e-5)
#   other shape, bfloat16 autocast   0.011, 0.06, 0.47   (trained: 0.004, 0.026, 0.3)
SAME_SHAPE = Limits(1e-3, 1e-3, 1e-3)
OTHER_SHAPE = {
    torch.float32: Limits(0.01, 0.05, 0.5),
    torch.bfloat16: Limits(0.03, 0.15, 1.0),
    torch.float16: Limits(0.03, 0.15, 1.0),
}


class Comparison(NamedTuple):
    """Two sets of costs in bits, both (B, N), that must be equal."""

    what: str  # what was changed: ends the sentence "byte 5 changes its cost by 1 bit ..."
    got: Tensor
    want: Tensor
    same_shape: bool = False  # both come from batches of one shape
    first: int = 0  # position in the window of the first of the N bytes


@torch.no_grad()
def check(model, data_BT_rows: np.ndarray, *, dtype: torch.dtype = torch.float32, seed=0) -> dict:
    """Check a causal model on up to `ROWS` windows (uint8) of the data it is scored on.

    Returns the largest difference that each check saw, in bits: ``batch``, ``perturbed_future``,
    ``truncated`` (absent for windows of one byte, which cannot be cut short), ``cached``, and for
    diffusion in blocks ``hidden``.  Raises
    RunError naming the check, the position in the window (from 0) and the size of a leak.  The
    model runs in eval mode; its mode is restored afterwards.
    """
    rows_RT = np.resize(data_BT_rows[:ROWS], (ROWS, data_BT_rows.shape[1]))  # repeated if too few
    device = device_of(model)
    generator = np.random.default_rng(seed)
    largest: dict[str, float] = {}
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            want_RT = _bits(model, rows_RT)
            if not want_RT.isfinite().all():
                raise RunError("the model gives costs that are not finite; its weights are broken")
            blocks = (_hidden,) if getattr(model, "block", 0) else ()
            for comparisons in (_batch, _perturbed_future, _truncated, _cached, *blocks):
                name = comparisons.__name__.removeprefix("_")
                for pair in comparisons(model, rows_RT, want_RT, generator):
                    limits = SAME_SHAPE if pair.same_shape else OTHER_SHAPE[dtype]
                    largest[name] = max(largest.get(name, 0.0), _compare(name, pair, limits))
    finally:
        model.train(training)
    return largest


def _compare(name: str, pair: Comparison, limits: Limits) -> float:
    """The largest difference.  Raises RunError if it is NaN or a limit is exceeded."""
    gap_BN = pair.got - pair.want
    n, index = gap_BN.numel(), int(gap_BN.abs().argmax())  # argmax finds a NaN, too
    worst, total, absolute = gap_BN.flatten()[index].item(), gap_BN.sum(), gap_BN.abs().sum()
    if (
        abs(worst) <= limits.largest
        and abs(total) <= limits.largest + limits.drift * n
        and absolute <= limits.largest + limits.mean * n
    ):
        return abs(worst)
    raise RunError(
        f"leak check {name}: byte {pair.first + index % gap_BN.shape[1]} of a window changes its "
        f"cost by {worst:+.3g} bits (mean of {n} bytes {total / n:+.2g}) {pair.what}; "
        "no record is written"
    )


def _batch(model, rows_RT, want_RT, generator) -> Iterator[Comparison]:
    """A window costs the same whatever the other windows and whatever its place in the batch."""
    for changed in (slice(0, None, 2), slice(1, None, 2)):
        changed_RT = rows_RT.copy()
        changed_RT[changed] = _other_bytes(rows_RT[changed], generator)
        kept = slice(1 - changed.start, None, 2)
        got_BT = _bits(model, changed_RT)[kept]
        yield Comparison("when other windows of the batch change", got_BT, want_RT[kept], True)
    for alone in (slice(0, 1), slice(ROWS - 1, ROWS)):
        yield Comparison("when scored alone", _bits(model, rows_RT[alone]), want_RT[alone])
    got_RT = _bits(model, rows_RT[::-1].copy()).flip(0)
    yield Comparison("when the order of the batch is reversed", got_RT, want_RT)


def _perturbed_future(model, rows_RT, want_RT, generator) -> Iterator[Comparison]:
    """With all bytes after a cut replaced, the bytes up to the cut cost the same.

    The prediction of the byte after the cut must not change either: one that sees its own byte is
    exposed by what the old byte costs in the place of the new one.
    """
    T = rows_RT.shape[1]
    by_logits_RT = _bits_by_logits(model, rows_RT, rows_RT)
    for cuts_R in _cuts(T, generator):
        after_RT = np.arange(T) - cuts_R[:, None]
        changed_RT = np.where(after_RT <= 0, rows_RT, _other_bytes(rows_RT, generator))
        # Flip all bits of the next byte, so that a leak of any one of them shows.
        changed_RT = np.where(after_RT == 1, ~rows_RT, changed_RT)
        pairs = (
            (1, "", _bits(model, changed_RT), want_RT),
            (2, ", by its logits", _bits_by_logits(model, changed_RT, rows_RT), by_logits_RT),
        )
        for more, by, got_RT, base_RT in pairs:
            for cut, got_T, base_T in zip(cuts_R, got_RT, base_RT, strict=True):
                what = f"when byte {cut + 1} and those after it change{by}"
                kept = slice(0, cut + more)
                if kept.stop:
                    yield Comparison(
                        f"{what}: it sees the bytes it should predict",
                        got_T[None, kept], base_T[None, kept], same_shape=True,
                    )  # fmt: skip


def _truncated(model, rows_RT, want_RT, generator) -> Iterator[Comparison]:
    """The first n bytes of a window cost the same alone, so a stride changes context only."""
    T = rows_RT.shape[1]
    for n in sorted({1, CHUNK, CHUNK + 1, T // 2, T - 1} & set(range(1, T))):
        what = f"when the window ends with byte {n - 1}"
        yield Comparison(what, _bits(model, rows_RT[:, :n].copy()), want_RT[:, :n])


def _cached(model, rows_RT, want_RT, generator) -> Iterator[Comparison]:
    """Logits computed at once, step by step, and after a prefill give the same costs."""
    T = rows_RT.shape[1]
    ids_RT = _ids(model, rows_RT)
    before_RT = preceding(ids_RT)
    yield Comparison("under its own logits", _bits_by_logits(model, rows_RT, rows_RT), want_RT)
    stop = min(T, STEPS)
    got_RN = _cost(_walk(model, before_RT[:, :stop], 0), ids_RT[:, :stop])
    yield Comparison("when fed step by step", got_RN, want_RT[:, :stop])
    if T > 1 and hasattr(model, "prefill"):
        half = T // 2  # the prefill predicts byte half - 1
        bytes_N = slice(half - 1, half + STEPS // 2)
        got_RN = _cost(_walk(model, before_RT[:, : bytes_N.stop], half), ids_RT[:, bytes_N])
        what = f"when fed step by step after a prefill of {half} ids"
        yield Comparison(what, got_RN, want_RT[:, bytes_N], first=half - 1)


def _hidden(model, rows_RT, want_RT, generator) -> Iterator[Comparison]:
    """What is predicted in a block depends only on what it sees of it, and on no later block."""
    T, size = rows_RT.shape[1], model.block
    blocks = -(-T // size)
    place_T = np.arange(T) // size
    for own in {0, blocks - 1, *generator.integers(0, blocks, RANDOM_CUTS).tolist()}:
        # In an order with ties: what comes together does not see each other.
        rank_RT = generator.integers(0, size, (ROWS, blocks * size))
        last_R1 = generator.integers(0, size, (ROWS, 1))  # that may be predicted
        late_RT = (place_T > own) | ((place_T == own) & (rank_RT[:, :T] >= last_R1))
        kept_RT = (place_T < own) | ((place_T == own) & (rank_RT[:, :T] <= last_R1))
        changed_RT = np.where(late_RT, _other_bytes(rows_RT, generator), rows_RT)
        seen_RGPN = seen_in(_ids(model, rank_RT).unflatten(1, (-1, size)))
        got_RT, base_RT = (
            _cost(model.block_logits(_ids(model, some_RT), seen_RGPN), _ids(model, rows_RT))
            for some_RT in (changed_RT, rows_RT)
        )
        kept_RT = torch.from_numpy(kept_RT)
        what = f"when hidden bytes of block {own} and those after it change"
        yield Comparison(what, got_RT * kept_RT, base_RT * kept_RT, same_shape=True)


def _walk(model, ids_RT: Tensor, prefilled: int) -> Tensor:
    """Logits (R, N, V) after the prefilled ids, if any, and after each id that follows."""
    state, steps = model.init_state(len(ids_RT)), []
    if prefilled:
        logits_RV, state = model.prefill(ids_RT[:, :prefilled], state)
        steps.append(logits_RV)
    for ids_R in ids_RT[:, prefilled:].unbind(1):
        logits_RV, state = model.step(ids_R, state)
        steps.append(logits_RV)
    return torch.stack(steps, 1)


def _cuts(T: int, generator) -> np.ndarray:
    """Positions of the last kept byte (-1: none), (passes, ROWS)."""
    powers = [(1 << i) - 1 for i in range(T.bit_length())]
    borders = [at - back for at in range(CHUNK, CHUNK * BORDERS + 1, CHUNK) for back in (0, 1, 2)]
    possible = np.arange(-1, max(0, T - 1))
    fixed = np.intersect1d([-1, *powers, *borders, T - 3, T - 2], possible)
    free = generator.permutation(np.setdiff1d(possible, fixed))
    size = -(-(len(fixed) + RANDOM_CUTS) // ROWS) * ROWS
    # In random order, so that the cuts of one pass are far apart.
    cuts = generator.permutation([*fixed, *free[: size - len(fixed)]]).astype(int)
    return np.resize(cuts, (-(-len(cuts) // ROWS), ROWS))


def _other_bytes(array: np.ndarray, generator) -> np.ndarray:
    """Random bytes, each different from the one it replaces."""
    return array ^ generator.integers(1, 256, array.shape, dtype=np.uint8)


def _bits(model, rows_BT: np.ndarray) -> Tensor:
    """Cost of every byte in bits, as the model gives it; float64 on the CPU."""
    return model(_ids(model, rows_BT)).cpu().double() / math.log(2)


def _bits_by_logits(model, rows_BT: np.ndarray, scored_BT: np.ndarray) -> Tensor:
    """Cost of ``scored_BT``, each byte predicted from the bytes of ``rows_BT`` before it."""
    return _cost(model.logits(preceding(_ids(model, rows_BT))), _ids(model, scored_BT))


def _cost(logits_BNV: Tensor, ids_BN: Tensor) -> Tensor:
    """Bits of the bytes under these logits, float64 on the CPU."""
    nats_BNV = -logits_BNV.float().log_softmax(-1)
    return nats_BNV.gather(-1, ids_BN[..., None])[..., 0].cpu().double() / math.log(2)


def _ids(model, rows_BT: np.ndarray) -> Tensor:
    return torch.from_numpy(rows_BT).to(device_of(model), torch.int64)
