"""The blocks of a ternary transformer as integers, with the same answer on every machine.

`exact` says how exactness is ensured; `predictors` turns the result into counts.  What each part of
a transformer becomes:

residual stream   fixed point with FRACTION fraction bits in float32, saturating
RMSNorm           an exact sum of squares and an integer square root; the root only enters the
                  factor that undoes the quantization, since int8 drops the scale of its input
ternary product   int8 x ternary, exact, in int8 or float32 arithmetic, whichever is faster
queries, keys     integers of 8 to 9 bits times one power of two per head and position, so that
                  their products are exact in float32
softmax           scores in steps of 1 / SCORE_STEPS nats, a table of exp, integer probabilities
                  that sum to about 2^14; values of 10 bits with one step size per layer
SwiGLU            a table of the sigmoid

Shapes: S lanes, T positions, N = S T, D model width, H heads, K head width, F feed-forward width,
G matrices of a stacked weight.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from bitbyte.compress.exact import (
    FRACTION,
    SINGLE,
    Residual,
    Ternary,
    constants,
    exp_table,
    parameter,
    power_of_two,
    quantize,
    sigmoid_table,
    sqrt_float,
)
from bitbyte.kernels.fixed import rope_tables

SCORE_STEPS = 256  # steps per nat of the attention's table of exp
SCORE_RANGE = 16  # nats; keys further below the best get no weight
GATE_STEPS = 128  # steps per unit of the sigmoid's table
GATE_RANGE = 16  # beyond this the sigmoid is constant
VALUE_RANGE = 16  # largest value, in units of its typical size; with D = 256 none is larger
CHUNK = 128  # queries at a time


class Layer(NamedTuple):
    """One block: ternary layers, norm weights, and the factors that convert between integers."""

    qkv: Ternary
    out: Ternary
    gate_up: Ternary
    down: Ternary
    attn_norm: Tensor
    mlp_norm: Tensor
    qkv_factors: Tensor  # float64: q to score steps, k to units, v to value steps
    out_factor: Tensor  # float64: to steps of the residual stream
    gate_up_factors: Tensor  # float64: to units
    down_factor: Tensor


class IntegerTransformer:
    """The blocks of a causal transformer; ``body(x_ND, caches, start, (S, T))`` works in place.

    The last ``queries`` of the T stand beside those before them, at the same positions, and see
    what they see, but nothing sees them.
    """

    tokens = 1024  # at a time: the temporaries for them fit into a cache

    def __init__(self, config, stack, device: torch.device):
        self.device, self.window = device, config.seq_len
        self.n_head, self.width = config.n_head, config.d_model // config.n_head
        self.residual = Residual(config.d_model)
        self._measures()
        rope = rope_tables(self.window, self.width, config.rope_theta)
        self.cos_TK, self.sin_TK = (t.to(device) for t in rope)
        self.exp = exp_table(SCORE_STEPS, SCORE_STEPS * SCORE_RANGE + 1, self.exp_scale)
        self.exp = self.exp.float().to(device)
        self.sigmoid = sigmoid_table(GATE_STEPS, GATE_STEPS * GATE_RANGE, 20).to(device)
        self.layers = [self._layer(block) for block in stack.blocks]

    def _measures(self) -> None:
        """Sizes that keep every sum exact."""
        T, K = self.window, self.width
        room = SINGLE - (K - 1).bit_length()
        self.qk_scales = (float(1 << room // 2 - 1), float(1 << (room - room // 2) - 1))
        self.exp_scale = 1 << min(16, SINGLE - T.bit_length())  # T of them sum exactly in float32
        self.mass = float(max(1 << 14, 16 << (T - 1).bit_length()))  # sum of a row of probabilities
        self.value_levels = float(((1 << SINGLE) - 1) // int(self.mass + T // 2 + 1))

    def _layer(self, block) -> Layer:
        dev, root = self.device, self.residual.root
        layers = (block.attn.qkv, block.attn.out, block.mlp.gate_up, block.mlp.down)
        qkv, out, gate_up, down = (Ternary(layer, dev) for layer in layers)
        attn_D, mlp_D = parameter(block.attn_norm.weight), parameter(block.mlp_norm.weight)
        normed = root / 127  # see Residual.normed
        steps_q = SCORE_STEPS / Fraction(sqrt_float(self.width))
        typical = qkv.scales[2] * root * max(Fraction(1, 1 << 10), _rms(attn_D.cpu()))
        value_steps = Fraction(int(self.value_levels)) / (VALUE_RANGE * typical)
        kinds = zip(qkv.scales, (steps_q, 1, value_steps), strict=True)
        mixed = (1 << FRACTION) / (127 * Fraction(self.mass) * value_steps)
        return Layer(
            qkv, out, gate_up, down, attn_D, mlp_D,
            constants(dev, *(scale * normed * factor for scale, factor in kinds)),
            constants(dev, out.scales[0] * mixed),
            constants(dev, *(scale * normed for scale in gate_up.scales)),
            constants(dev, down.scales[0] * Fraction(1 << FRACTION, 127)),
        )  # fmt: skip

    @property
    def kernels(self) -> dict[str, str]:
        """Which code computes the parts that have several forms, for records."""
        return {"linear": self.layers[0].qkv.kernel} if self.layers else {}

    def constants(self) -> list:
        """All that the arithmetic depends on: tensors and `Ternary` layers."""
        tables = [self.exp, self.sigmoid, self.cos_TK, self.sin_TK]
        return tables + [part for layer in self.layers for part in layer]

    def state(self, n_lanes: int) -> list[tuple[Tensor, Tensor]]:
        """Empty keys and values, (k_SHTK, v_SHTK) per layer."""
        shape = (n_lanes, self.n_head, self.window, self.width)

        def new() -> Tensor:
            return torch.empty(shape, device=self.device)

        return [(new(), new()) for _ in self.layers]

    def __call__(
        self, x_ND: Tensor, caches: list, start: int, shape: tuple[int, int], queries: int = 0
    ) -> None:
        residual = self.residual
        for layer, cache in zip(self.layers, caches, strict=True):
            q_ND, scale_N1 = residual.normed(x_ND, layer.attn_norm, 127.0)
            mixed_ND = self._attend(layer, q_ND, scale_N1, cache, start, shape, queries)
            residual.add(x_ND, layer.out, layer.out_factor, *quantize(mixed_ND))
            q_ND, scale_N1 = residual.normed(x_ND, layer.mlp_norm, 127.0)
            hidden_NF = self._gated(layer, q_ND, scale_N1)
            residual.add(x_ND, layer.down, layer.down_factor, *quantize(hidden_NF))

    def _gated(self, layer: Layer, q_ND: Tensor, scale_N1: Tensor) -> Tensor:
        """silu(gate) * up in units, float32 (N, F)."""
        factors_NG = (scale_N1 * layer.gate_up_factors).float()
        gate_NF, up_NF = layer.gate_up(q_ND).chunk(2, dim=-1)
        gate_NF = gate_NF * factors_NG[:, :1]
        span = GATE_STEPS * GATE_RANGE
        index = gate_NF.mul(GATE_STEPS).round_().clamp_(-span, span).add_(span).int()
        hidden_NF = self.sigmoid.index_select(0, index.flatten()).view_as(gate_NF)
        return hidden_NF.mul_(gate_NF).mul_(up_NF).mul_(factors_NG[:, 1:])

    def _attend(
        self, layer, q_ND, scale_N1, cache, start: int, shape: tuple, queries: int
    ) -> Tensor:
        """Attention over the cached and the new positions (cached here): float32 integers (N, D).

        ``out_factor`` undoes the sum of a row's probabilities and the step size of the values.
        """
        S, T = shape
        H, K, n = self.n_head, self.width, T - queries
        stop, at_T = start + n, torch.arange(T, device=self.device)
        at_T[n:] -= queries
        factors_NG = (scale_N1 * layer.qkv_factors).float()
        qkv = layer.qkv(q_ND).view(S, T, 3, H, K)
        qkv.mul_(factors_NG.view(S, T, 3, 1, 1))
        q, k = self._turned(qkv[:, :, :2], start + at_T).unbind(2)  # each STHK
        k, v = k[:, :n], qkv[:, :n, 2].round_().clamp_(-self.value_levels, self.value_levels)
        # `_measures` chose the sizes below so that both products are exact sums of integers in
        # float32: queries and keys are small integers times a power of two, probabilities and
        # values small integers.
        k_all, v_all = cache
        k_all[:, :, start:stop] = to_blocks(k, self.qk_scales[1]).transpose(1, 2)
        v_all[:, :, start:stop] = v.transpose(1, 2)
        q = to_blocks(q, self.qk_scales[0]).transpose(1, 2)
        mixed = torch.empty(S, T, H, K, device=self.device)
        for a in range(0, T, CHUNK):
            b = min(a + CHUNK, T)
            seen = start + min(b, n)
            scores = q[:, :, a:b] @ k_all[:, :, :seen].transpose(-1, -2)
            if b - a > 1:
                first = min(a, n - queries)
                future = torch.arange(first, min(b, n), device=self.device) > at_T[a:b, None]
                scores[..., start + first :].masked_fill_(future, -math.inf)
            probs = self._softmax(scores)
            mixed[:, a:b] = (probs @ v_all[:, :, :seen]).transpose(1, 2)
        return mixed.view(S * T, H * K)

    def _turned(self, x_STGHK: Tensor, at_T: Tensor) -> Tensor:
        """Rotary embedding; every product and every sum is rounded on its own."""
        K = x_STGHK.shape[-1]
        cos, sin = (t[at_T][:, None, None] for t in (self.cos_TK, self.sin_TK))
        first, second = x_STGHK.split(K // 2, dim=-1)
        turned = torch.cat((second.neg(), first), dim=-1).mul_(sin)
        return turned.add_(x_STGHK * cos)

    def _softmax(self, scores: Tensor) -> Tensor:
        """Integer probabilities, summing to ~mass, of rows of scores (in steps; -inf if masked)."""
        below = scores.sub_(scores.amax(-1, keepdim=True)).round_()
        below = below.clamp_(min=1.0 - len(self.exp)).neg_().int()
        weights = self.exp.index_select(0, below.flatten()).view_as(scores)
        sums = weights.sum(-1, keepdim=True)
        return weights.mul_(torch.full_like(sums, self.mass).div_(sums)).round_()


def to_blocks(x: Tensor, scale: float) -> Tensor:
    """x as integers of at most 2 * scale, times one power of two per row; float32."""
    top = power_of_two(x.abs().amax(-1, keepdim=True).clamp_(min=2.0**-30))
    rate = torch.full_like(top, scale).div_(top)  # powers of two: exact
    return (x * rate).round_().mul_(top.mul_(1 / scale))


def _rms(weight_D: Tensor) -> Fraction:
    """Root mean square of float32 values, by integers with 20 fraction bits."""
    values = torch.round(weight_D.double() * 2.0**20).long().tolist()
    return Fraction(sqrt_float(Fraction(sum(v * v for v in values), len(values)))) / (1 << 20)
