"""Draws bytes without leaving native code: a draw, a step, the next draw.

Shapes: N draws, V bytes.
"""

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


def draw(k, start, drawn, ids, context, logits, points, chosen, kept, mass, temperature):
    """Choose a byte as `generate` does without filters, and make it the next id.

    Draw n uses points_N[n] (float64, from 0 to 1); the byte goes to chosen_N (int64), the logits it
    was drawn from to kept_NV.  ``mass`` is room for V float64; ``temperature`` is the address of
    one.  The operations that follow feed the byte: the first one at ``start``.
    """
    copy, heat = kept + drawn * (4 * N_BYTES), k.load(F64, temperature)

    def largest(i, most):
        logit = k.load(F32.x16, logits + 4 * i)
        k.store(logit, copy + 4 * i)
        return maximum(most, logit)

    most = k.loop(N_BYTES, largest, k.constant(F32.x16, -3e38), step=LANES)
    top = most.max().to(F64)

    def weigh(i):
        gap = (k.load(F32.x16, copy + 4 * i).to(F64) - top) / heat
        k.store(select(gap > -700.0, exp_float64(gap), 0.0), mass + 8 * i)

    k.loop(N_BYTES, weigh, step=LANES)

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
    later = select(drawn > 0, k.constant(I64, 1), 0)
    k.store(start + later, context + CONTEXT.index("start") * 8)
    k.store(drawn + 1, context + CONTEXT.index("drawn") * 8)


KERNELS = [draw]
