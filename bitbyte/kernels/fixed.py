"""Constants that are the same on every machine, made with integers.

A mean or a cosine of a library may differ in its last bit from one machine to the next, and with it
everything that is computed from a model.

Shapes: G matrices of a stacked weight, O outputs, I inputs, T positions, K head width.
"""

import decimal
import functools
import math
from fractions import Fraction

import torch
from torch import Tensor

from bitbyte.bitlinear import EPS
from bitbyte.files import BitbyteError

WORK_BITS = 128  # fraction bits that tables are computed with, before they are rounded once


def exact_ternary(w_GOI: Tensor) -> tuple[Tensor, list[Fraction]]:
    """`bitlinear.quantize_ternary` in integers: (q_GOI int8, the scale of each matrix).

    The float version's mean depends on the order of summation, and so do weights on the edge
    between 0 and 1.  Raises BitbyteError on weights too large to sum.
    """
    n = w_GOI[0].numel()
    top = float(w_GOI.abs().max())
    bits = min(40, 61 - n.bit_length() - max(0, math.frexp(top)[1]))
    if bits < 24:
        raise BitbyteError(f"{n} weights of up to {top:g} are too many to sum exactly")
    w = torch.round(w_GOI.double() * 2.0**bits).long()
    q, scales = torch.zeros_like(w_GOI, dtype=torch.int8), []
    for g, matrix in enumerate(w):
        total = int(matrix.abs().sum())
        scale = max(Fraction(total, n << bits), Fraction(EPS))
        # |w| / scale rounds to 1 or more if |w| > scale / 2; exactly one half rounds to the even 0.
        edge = math.floor(scale * 2**bits / 2)
        q[g] = ((matrix > edge).to(torch.int8)) - ((matrix < -edge).to(torch.int8))
        scales.append(scale)
    return q, scales


def ternary_weight(w_GOI: Tensor) -> tuple[Tensor, Tensor]:
    """(q_OI int8, scale_O float32) by `exact_ternary`, the matrices stacked.

    Of weights that are not finite, the scale is NaN.
    """
    if w_GOI.isfinite().all():
        q_GOI, scales = exact_ternary(w_GOI)
        scale_G = torch.tensor([float(scale) for scale in scales])
    else:
        q_GOI, scale_G = (
            torch.zeros_like(w_GOI, dtype=torch.int8),
            torch.full(w_GOI.shape[:1], math.nan),
        )
    return q_GOI.flatten(0, 1), scale_G.repeat_interleave(w_GOI.shape[1])


def fixed_point(value: decimal.Decimal) -> int:
    """A Decimal as a fixed-point integer with WORK_BITS fraction bits."""
    with decimal.localcontext(prec=80):
        return int((value * (1 << WORK_BITS)).to_integral_value(decimal.ROUND_HALF_EVEN))


def rounded(value: int, bits: int) -> int:
    """A fixed-point integer rounded from WORK_BITS to ``bits`` fraction bits, halves up."""
    drop = WORK_BITS - bits
    return (value + (1 << drop - 1)) >> drop


@functools.lru_cache(maxsize=8)
def rope_tables(length: int, width: int, theta: float, bits: int = 20) -> tuple[Tensor, Tensor]:
    """`transformer.rope_cos_sin` for positions 0..length-1, rounded to ``bits`` fraction bits.

    (cos_TK, sin_TK) in float32; the two halves of K are equal.
    """
    cosines, sines = [], []
    for k in range(0, width, 2):
        with decimal.localcontext(prec=60):
            exponent = -decimal.Decimal(k) / decimal.Decimal(width)
            angle = fixed_point((decimal.Decimal(theta).ln() * exponent).exp())
        cos_1, sin_1 = _cos_sin(angle)
        cos, sin = 1 << WORK_BITS, 0
        columns: tuple[list, list] = [], []
        for _ in range(length):
            columns[0].append(rounded(cos, bits))
            columns[1].append(rounded(sin, bits))
            cos, sin = (
                (cos * cos_1 - sin * sin_1) >> WORK_BITS,
                (sin * cos_1 + cos * sin_1) >> WORK_BITS,
            )
        cosines.append(columns[0])
        sines.append(columns[1])
    cos_TK, sin_TK = (
        torch.tensor(columns, dtype=torch.float64).t().div(2.0**bits).repeat(1, 2).float()
        for columns in (cosines, sines)
    )
    return cos_TK.contiguous(), sin_TK.contiguous()


def _cos_sin(angle: int) -> tuple[int, int]:
    """Cosine and sine of a fixed-point angle from 0 to 1, by their Taylor series."""
    sums, term, i = [0, 0], 1 << WORK_BITS, 0
    while term:
        sums[i % 2] += -term if i % 4 > 1 else term
        i += 1
        term = (term * angle >> WORK_BITS) // i
    return sums[0], sums[1]
