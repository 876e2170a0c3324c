"""Draws bytes without leaving native code: a draw, a step, the next draw.

Shapes: N draws, V bytes, R the same ranked by probability.
"""

import numpy as np

from bitbyte.kernels.native.machine import CONTEXT
from bitbyte.kernels.native.vector import (
    F32,
    F64,
    I32,
    I64,
    LANES,
    exp_float64,
    maximum,
    minimum,
    select,
)
from bitbyte.vocab import N_BYTES

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_window")
NEVER = -(1 << 40)  # place of a byte that was not seen


def settings(config) -> np.ndarray:
    """What `draw` needs of a `SamplingConfig`, as float64 numbers."""
    numbers = np.array([getattr(config, name) for name in SETTINGS], np.float64)
    if config.temperature == 0:
        numbers[:2] = 1, 1  # the likeliest byte
    elif config.top_k == 0:
        numbers[1] = N_BYTES
    return numbers


def places(recent: bytes) -> np.ndarray:
    """Where each byte value was last in ``recent``, and last the length of it: int64 (V + 1)."""
    last = np.full(N_BYTES + 1, NEVER)
    last[np.frombuffer(recent, np.uint8)] = np.arange(len(recent))
    last[-1] = len(recent)
    return last


def draw(
    k, start, drawn, ids, context, logits, points, chosen, kept, settings, seen, scores, mass,
    ranks, ranked,
):  # fmt: skip
    """Choose a byte as `generate` does, and make it the next id.

    Draw n uses points_N[n] (float64, from 0 to 1); the byte goes to chosen_N (int64), the logits it
    was drawn from to kept_NV.  ``settings`` and ``seen`` are the addresses of what `settings` and
    `places` return; scores, mass and ranked are room for V float64, ranks for V
    int32.  The operations that follow feed the byte: the first one at ``start``.
    """
    heat, top_k, top_p, min_p, penalty, window = (
        k.load(F64, settings + 8 * i) for i in range(len(SETTINGS))
    )
    now = k.load(I64, seen + 8 * N_BYTES)
    copy, oldest = kept + drawn * (4 * N_BYTES), now - window.to(I64)

    def penalize(i, most):
        logit = k.load(F32.x16, logits + 4 * i)
        k.store(logit, copy + 4 * i)
        score = logit.to(F64)
        less = select(score > 0.0, score / penalty, score * penalty)
        score = select(k.load(I64.x16, seen + 8 * i) > oldest - 1, less, score)
        k.store(score, scores + 8 * i)
        return maximum(most, score)

    top = k.loop(N_BYTES, penalize, k.constant(F64.x16, -1e300), step=LANES).max()

    def weigh(i):
        gap = (k.load(F64.x16, scores + 8 * i) - top) / heat
        k.store(select(gap > -700.0, exp_float64(gap), 0.0), mass + 8 * i)

    k.loop(N_BYTES, weigh, step=LANES)
    filtered = (top_k < N_BYTES) | (top_p < 1.0) | (min_p > 0.0)
    with k.when(filtered):
        _filter(k, top_k.to(I64), top_p, min_p, scores, mass, ranks, ranked)

    def accumulate(i, total):
        total = total + k.load(F64, mass + 8 * i)
        k.store(total, mass + 8 * i)
        return total

    total = k.loop(N_BYTES, accumulate, k.constant(F64, 0))
    point = k.load(F64, points + 8 * drawn)

    def below(i, count):
        share = k.load(F64.x16, mass + 8 * i) / total
        return count + select(share > point, k.constant(I32.x16, 0), 1)

    count = k.loop(N_BYTES, below, k.constant(I32.x16, 0), step=LANES).sum().to(I64)
    byte = minimum(count, N_BYTES - 1)
    k.store(byte, chosen + 8 * drawn)
    k.store(byte, ids)
    k.store(now, seen + 8 * byte)
    k.store(now + 1, seen + 8 * N_BYTES)
    later = select(drawn > 0, k.constant(I64, 1), 0)
    k.store(start + later, context + CONTEXT.index("start") * 8)
    k.store(drawn + 1, context + CONTEXT.index("drawn") * 8)


def _filter(k, top_k, top_p, min_p, scores, mass, ranks, ranked):
    """Clear the mass of the bytes that a filter removes; each keeps a prefix of the ranking.

    Of equally likely bytes the first one ranks first.
    """

    def rank(i):
        score = k.load(F64, scores + 8 * i)

        def ahead(j, count):
            other = k.load(F64.x16, scores + 8 * j)
            earlier = other.equals(score) & (k.count() + j.to(I32) < i.to(I32))
            return count + select((other > score) | earlier, k.constant(I32.x16, 1), 0)

        place = k.loop(N_BYTES, ahead, k.constant(I32.x16, 0), step=LANES).sum()
        k.store(place, ranks + 4 * i)
        k.store(k.load(F64, mass + 8 * i), ranked + 8 * place.to(I64))

    k.loop(N_BYTES, rank)
    zero = k.constant(F64, 0)
    total = k.loop(top_k, lambda r, sum: sum + k.load(F64, ranked + 8 * r), zero)
    enough = top_p * total

    def needed(r, sum, n):
        sum = sum + k.load(F64, ranked + 8 * r)
        return sum, n + select(sum < enough, k.constant(I64, 1), 0)

    _, n = k.loop(top_k, needed, zero, k.constant(I64, 1))
    n = select(top_p < 1.0, n, top_k)
    least = min_p * k.load(F64, ranked)

    def likely(r, n):
        return n + select(k.load(F64, ranked + 8 * r) < least, k.constant(I64, 0), 1)

    n = k.loop(n, likely, k.constant(I64, 0)).to(I32)

    def clear(i):
        out = k.load(I32.x16, ranks + 4 * i) < n
        k.store(select(out, k.load(F64.x16, mass + 8 * i), 0.0), mass + 8 * i)

    k.loop(N_BYTES, clear, step=LANES)


KERNELS = [draw]
