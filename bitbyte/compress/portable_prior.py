"""A prior of n-grams in integer arithmetic, with the same results on every machine.

The tables are integers already; `exact` explains how the rest stays exact.  Features are integers
with FEATURE_BITS fraction bits.  They enter the residual stream through a ternary product and reach
the logits through gates that are rounded to GATE_BITS fraction bits.

Shapes: N tokens, S lanes, P ids, T positions, K contexts, r rank, D model width, V byte values.
"""

from fractions import Fraction

import torch
from torch import Tensor

from bitbyte.bitlinear import BitLinear
from bitbyte.compress import exact
from bitbyte.compress.exact import (
    FRACTION,
    LEVELS,
    LOGIT_STEPS,
    Dense,
    Residual,
    Ternary,
    quantize,
    snapped,
)
from bitbyte.ngrams import context_rows, unpack
from bitbyte.prior import PAST, Prior
from bitbyte.vocab import START

FEATURE_BITS = 10
GATE_BITS = 16
LARGEST_GATE = 64.0


class IntegerPrior:
    """Reads the tables of a ternary model's `Prior`."""

    def __init__(self, prior: Prior, residual: Residual, device: torch.device):
        self.residual, self.device = residual, device
        self.orders, self.rows, self.bits = prior.orders, prior.rows, prior.bits
        self.codes = prior.codes.to(device).flatten(0, 1)
        assert isinstance(prior.project, BitLinear)
        self.project = Ternary(prior.project, device)
        unit = 1 << FEATURE_BITS
        factor = self.project.scales[0] * (1 << FRACTION) / (127 * unit)
        self.factor = exact.constants(device, factor)
        # round(unit (code scale)^2), one rounding at each step.
        self.square_Kr = prior.scale.detach().double().square().mul(unit).to(device)
        self.match = residual.integers(prior.match.detach().double())
        self.gate = Dense(prior.gate, residual.root)
        self.direct = Dense(prior.direct, Fraction(LOGIT_STEPS, unit))

    def constants(self) -> list:
        """Everything the arithmetic depends on: tensors and `Ternary` layers."""
        dense = [(d.weight, d.factor) for d in (self.gate, self.direct)]
        return [
            self.codes, self.square_Kr, self.project, self.factor, self.match,
            *(part for pair in dense for part in pair),
        ]  # fmt: skip

    def nothing(self, n_lanes: int) -> Tensor:
        """past_SP before the first id."""
        return torch.full((n_lanes, PAST), START, device=self.device)

    def features(self, ids_SP: Tensor, T: int) -> Tensor:
        """f_NKr, float32 integers, of the last T positions of each lane."""
        rows_SPK, known_SPK = context_rows(ids_SP, self.orders, self.rows)
        K = rows_SPK.shape[-1]
        index = rows_SPK[:, -T:] + torch.arange(K, device=self.device) * self.rows
        codes = unpack(self.codes[index], self.bits).double()
        values = codes.mul(codes.abs()).mul_(self.square_Kr).round_()
        return values.mul_(known_SPK[:, -T:, :, None]).float().flatten(0, 1)

    def embed(self, x_ND: Tensor, next_MST: Tensor, f_NKr: Tensor) -> None:
        """Add the features' and the matches' terms to the residual stream, in place."""
        self.residual.add(x_ND, self.project, self.factor, *quantize(f_NKr.flatten(1).clone()))
        for next_ST, table_VD in zip(next_MST, self.match, strict=True):
            x_ND.add_(table_VD[next_ST.flatten()])
        x_ND.clamp_(-self.residual.limit, self.residual.limit)

    def logits(self, f_NKr: Tensor, q_ND: Tensor, scale_N1: Tensor) -> Tensor:
        """The term added to the logits, in steps of 1 / LOGIT_STEPS nats: float64 (N, V)."""
        gate_NK = snapped(self.gate(q_ND, scale_N1).add_(1), GATE_BITS)
        gate_NK.clamp_(-LARGEST_GATE, LARGEST_GATE)
        gated = f_NKr.double().mul_(gate_NK[..., None]).flatten(1)
        return self.direct(*quantize(gated, float(LEVELS)))
