"""Numbers that are the same on every machine: exact conversions, tables, square roots, counts.

Portable inference (`predictors.IntegerPredictor`) allows an element-wise operation only if its
result is exact, or if it is a single operation (+ - * /, rounding) that IEEE 754 defines to the
last bit, run as a kernel of its own so that no compiler can fuse it with another.  Subnormal
float32 numbers, which some settings flush to zero, are rounded to zero before they can matter.
Sums and matrix products run only over integers (or integers times one power of two) whose partial
sums all fit the type: below 2^24 in float32, below 2^53 in float64.  Such a sum is exact, so its
order cannot matter.  No exp, sin or other library function ever touches data: those are tables,
made here with integers.

Quantized data is a pair (q, scale): integers, and what one unit of them stands for, up to constants
that the layers fold into their factors.

Shapes: N tokens, T positions, K head width, V byte values, D model width, G matrices of a stacked
weight, O outputs, I inputs.
"""

import decimal
import functools
import hashlib
import math
from fractions import Fraction

import torch
from torch import Tensor

from bitbyte.bitlinear import BitLinear, has_vnni
from bitbyte.compress.rans import TOTAL
from bitbyte.config import NORM_EPS
from bitbyte.files import BitbyteError
from bitbyte.kernels.fixed import WORK_BITS, exact_ternary, fixed_point, rounded
from bitbyte.vocab import N_BYTES

SINGLE, DOUBLE = 24, 53  # bits of the integers that float32 and float64 hold exactly
FRACTION = 12  # fraction bits of the residual stream
LEVELS = (1 << 15) - 1  # largest integer in what is multiplied in float64
LEAST = 2.0**-30  # least scale of a norm's output, far above what could be flushed to zero
SNAP_BITS = 20  # fraction bits of `snapped`
LOGIT_STEPS = 1024  # steps per nat of the table that makes counts
LOGIT_RANGE = 18  # nats; logits further below the largest get the smallest count
COUNT_SCALE = 1 << 28  # of that table; times TOTAL it stays below 2^53


def isqrt(n: Tensor) -> Tensor:
    """Largest integer whose square is at most ``n``; float64 integers from 0 to below 2^53."""
    root = n.sqrt().floor_()
    # Already exact if the machine's square root is; otherwise corrected by one.
    root = root.sub((root * root > n).double())
    return root.add_(((root + 1) * (root + 1) <= n).double())


def power_of_two(x: Tensor) -> Tensor:
    """Largest power of two not above x (float32, x > 0): x with its fraction bits cleared."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def sqrt_float(value: Fraction | int) -> float:
    """Square root in integer arithmetic, rounded once."""
    value = Fraction(value)
    return math.isqrt((value.numerator << 2 * WORK_BITS) // value.denominator) / (1 << WORK_BITS)


@functools.lru_cache(maxsize=8)
def exp_integers(steps: int, n: int) -> list[int]:
    """exp(-i / steps) for i in 0..n-1, as fixed-point integers with WORK_BITS fraction bits."""
    with decimal.localcontext(prec=60):
        rate = fixed_point((-1 / decimal.Decimal(steps)).exp())
    values = [1 << WORK_BITS]
    for _ in range(n - 1):
        values.append(values[-1] * rate >> WORK_BITS)
    return values


@functools.lru_cache(maxsize=8)
def exp_table(steps: int, n: int, scale: int) -> Tensor:
    """round(scale * exp(-i / steps)) for i in 0..n-1, the last one 0; float64 integers (n,)."""
    bits = scale.bit_length() - 1
    values = [rounded(value, bits) for value in exp_integers(steps, n)]
    return torch.tensor([*values[:-1], 0], dtype=torch.float64)


@functools.lru_cache(maxsize=8)
def sigmoid_table(steps: int, n: int, bits: int) -> Tensor:
    """sigmoid(i / steps) for i in -n..n, rounded to ``bits`` fraction bits; float32 (2n + 1,)."""
    one = 1 << WORK_BITS
    upper = [(one << WORK_BITS) // (one + value) for value in exp_integers(steps, n + 1)]
    upper = [rounded(value, bits) for value in upper]
    lower = [(1 << bits) - value for value in upper[:0:-1]]
    return (torch.tensor([*lower, *upper], dtype=torch.float64) / 2.0**bits).float()


def counts_from_logits(logits_NV: Tensor) -> Tensor:
    """Integer counts of the 256 bytes, from logits in steps of 1 / LOGIT_STEPS nats (float64).

    Each row of counts_NV (int32) sums to TOTAL and holds no 0: a byte gets 1 plus its share of the
    rest, rounded down; the remainder goes to the likeliest byte (the first one, in a tie).
    """
    table = exp_table(LOGIT_STEPS, LOGIT_STEPS * LOGIT_RANGE + 1, COUNT_SCALE)
    table = table.to(logits_NV.device)
    top_N1, best_N1 = logits_NV.max(-1, keepdim=True)  # documented: the first one, in a tie
    below = torch.sub(top_N1, logits_NV).round_().clamp_(max=len(table) - 1)
    shares = table.index_select(0, below.flatten().int()).view_as(logits_NV)
    # One division per row, and products below 2^53 that are off by less than one part in 2^51: the
    # shares, rounded down, cannot sum to more than TOTAL - 256.
    free = torch.full_like(top_N1, TOTAL - N_BYTES)
    counts = shares.mul_(free.div_(shares.sum(-1, keepdim=True))).floor_().add_(1)
    rest_N1 = TOTAL - counts.sum(-1, keepdim=True)
    return counts.scatter_add_(-1, best_N1, rest_N1).int()


def quantize(x_ND: Tensor, levels: float = 127.0) -> tuple[Tensor, Tensor]:
    """(q_ND, top_N1): x ~ q * top / levels, top being a row's largest |x|; x is overwritten."""
    top_N1 = x_ND.abs().amax(-1, keepdim=True).clamp_(min=2.0**-60)
    rate_N1 = torch.full_like(top_N1, levels).div_(top_N1)
    return x_ND.mul_(rate_N1).round_(), top_N1


def snapped(x: Tensor, bits: int = SNAP_BITS) -> Tensor:
    """x in multiples of 2^-bits, clamped to +-2^20: neither tiny nor huge."""
    limit = 2.0 ** (20 + bits)
    return x.mul(2.0**bits).round_().clamp_(-limit, limit).mul_(2.0**-bits)


def parameter(weight: Tensor) -> Tensor:
    """A parameter in float32, rounded to multiples of 2^-24."""
    return snapped(weight.detach().float(), 24)


def constants(device: torch.device, *values: Fraction | int) -> Tensor:
    """Exact values, each rounded once to float64."""
    return torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)


class Ternary:
    """A `BitLinear` in integers: ``layer(q_NI)`` is the exact product, not yet times ``scales``."""

    def __init__(self, layer: BitLinear, device: torch.device):
        q_GOI, self.scales = exact_ternary(layer.matrices().detach().cpu())
        if 127 * q_GOI.shape[2] >= 1 << SINGLE:
            raise BitbyteError(f"{q_GOI.shape[2]} inputs are too many for portable inference")
        q_OI = q_GOI.flatten(0, 1)
        self.int8 = device.type == "cpu" and has_vnni()  # both ways are exact: take the faster
        self.kernel = "int8" if self.int8 else "float32"
        self.weight = (q_OI if self.int8 else q_OI.float()).to(device).t()
        self.digest = hashlib.sha256(q_OI.numpy().tobytes()).digest()

    def __call__(self, q_NI: Tensor) -> Tensor:
        """Product with integers from -127 to 127: float32 (N, O)."""
        if self.int8:
            return torch._int_mm(q_NI.to(torch.int8), self.weight).float()
        return q_NI @ self.weight


class Dense:
    """A dense projection of 16-bit integers in float64: ``layer(q_NI, scale_N1)``.

    It projects q * scale * ``factor`` / LEVELS.
    """

    def __init__(self, weight_OI: Tensor, factor: Fraction | int = 1):
        if LEVELS**2 * weight_OI.shape[1] >= 1 << DOUBLE:
            raise BitbyteError("the model is too wide for portable inference")
        weight_OI = weight_OI.detach().double()
        step = Fraction(max(float(weight_OI.abs().max()), 2.0**-60)) / LEVELS
        levels_OI = weight_OI.mul(float(1 / step)).round_().clamp_(-LEVELS, LEVELS)
        self.weight = levels_OI.t().contiguous()
        self.factor = constants(weight_OI.device, step * factor / LEVELS)

    def __call__(self, q_NI: Tensor, scale_N1: Tensor) -> Tensor:
        """Output in float64 (N, O); the product is exact, only the scaling rounds."""
        return (q_NI.double() @ self.weight).mul_(scale_N1.double().mul(self.factor))


class Residual:
    """Arithmetic of a residual stream of width D: float32 integers with FRACTION fraction bits."""

    def __init__(self, D: int):
        # Each number fits into float32, and the sum of D squares into float64.
        self.limit = float(1 << min(SINGLE - 1, (DOUBLE - D.bit_length()) // 2))
        self.eps = float(round(D * Fraction(NORM_EPS) * (1 << 2 * FRACTION)))
        self.root = Fraction(sqrt_float(D))

    def integers(self, x: Tensor) -> Tensor:
        """Float64 values as integers of the residual stream."""
        return torch.round(x * 2.0**FRACTION).clamp_(-self.limit, self.limit).float()

    def length(self, x_ND: Tensor) -> Tensor:
        """Integer square root of the sum of squares, at least 1: float64 (N, 1)."""
        # Squares rounded to float32 are still integers, so their float64 sum is exact.
        squares_N1 = (x_ND * x_ND).sum(-1, keepdim=True, dtype=torch.float64)
        return isqrt(squares_N1.add_(self.eps)).clamp_(min=1)

    def normed(self, x_ND: Tensor, weight_D: Tensor, levels: float) -> tuple[Tensor, Tensor]:
        """(q_ND, scale_N1): RMSNorm of x is q * scale / levels * root; scale is float64."""
        q_ND, top_N1 = quantize(x_ND.mul(weight_D), levels)
        return q_ND, self.scale(top_N1, self.length(x_ND))

    @staticmethod
    def scale(top_N1: Tensor, length_N1: Tensor) -> Tensor:
        """Scale of a norm's output, from the largest |x| and the length of its rows."""
        return top_N1.double().div_(length_N1).clamp_(min=LEAST)

    def add(self, x_ND: Tensor, layer: Ternary, factor: Tensor, q_NI: Tensor, scale_N1: Tensor):
        """x += layer(q) * scale * factor, rounded, in place."""
        y_ND = layer(q_NI).mul_(scale_N1.double().mul(factor).float()).round_()
        x_ND.add_(y_ND).clamp_(-self.limit, self.limit)
