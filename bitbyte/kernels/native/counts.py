"""Turns logits into the integer counts that a coder works with.

Shapes: M rows, V bytes.
"""

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


def count(k, rows, logits, mass, out, total):
    """out_MV (int32): a byte gets 1 plus its share of ``total`` - V, rounded down.

    The remainder goes to the likeliest byte, the first one in a tie, so a row sums to ``total``.
    Where a logit is NaN or +inf, counts are 0.  ``mass`` is room for V float64.
    """

    def row(m):
        source, target = logits + m * (4 * N_BYTES), out + m * (4 * N_BYTES)
        most = k.loop(
            N_BYTES,
            lambda i, most: maximum(most, k.load(F32.x16, source + 4 * i)),
            k.constant(F32.x16, -3e38),
            step=LANES,
        )
        top = most.max()

        def weigh(i, sums, first):
            logit = k.load(F32.x16, source + 4 * i)
            gap = logit.to(F64) - top.to(F64)
            weight = select(gap > -700.0, exp_float64(gap), 0.0)
            weight = select(logit < 3e38, weight, k.constant(F64.x16, float("nan")))
            k.store(weight, mass + 8 * i)
            place = k.count() + i.to(I32)
            here = select(logit.equals(top), place, N_BYTES - 1)
            return sums + weight, minimum(first, here)

        start = k.constant(F64.x16, 0), k.constant(I32.x16, N_BYTES - 1)
        sums, first = k.loop(N_BYTES, weigh, *start, step=LANES)
        likeliest = first.fold(minimum)
        rate = (total - N_BYTES).to(F64) / sums.sum()

        def share(i, left):
            part = k.load(F64.x16, mass + 8 * i) * rate
            part = select(part > -1.0, part, -1.0).to(I32) + 1  # NaN gives 0
            k.store(part, target + 4 * i)
            return left - part

        left = k.loop(N_BYTES, share, k.constant(I32.x16, 0), step=LANES).sum() + total.to(I32)
        place = target + likeliest.to(I64) * 4
        k.store(k.load(I32, place) + left, place)

    k.loop(rows, row)


KERNELS = [count]
