"""Mamba blocks for portable inference: `predictors.IntegerPredictor` runs them.

The recurrence goes position by position, in float32: each product and each sum of two numbers is a
kernel of its own, with the one result that IEEE 754 allows, and the sum over the state is a tree of
such sums (`halved`), so nothing depends on the machine.  exp, softplus and the sigmoid are tables;
exp is refined between table entries, because decays near 1 need all their bits.  Dense projections
are products of 16-bit integers in float64.  On a CPU with numba the recurrence is one kernel
(`portable_scan`) that computes the same bits.

Shapes: S lanes, T positions, M tokens = S T, D inner channels, H heads, N state size, K taps, C
channels of the convolution, R rank of delta's projection.
"""

import decimal
import functools
from fractions import Fraction

import torch
from torch import Tensor

from bitbyte.compress import portable_scan
from bitbyte.compress.exact import (
    FRACTION,
    LEVELS,
    SNAP_BITS,
    WORK_BITS,
    Dense,
    Residual,
    Ternary,
    constants,
    exp_integers,
    isqrt,
    parameter,
    quantize,
    sigmoid_table,
    snapped,
)
from bitbyte.config import NORM_EPS
from bitbyte.files import BitbyteError
from bitbyte.kernels import jit

STEPS = 256  # per unit, of the tables of sigmoid and softplus
DECAY_STEPS = 1024  # per nat, of the table of decays
GATE_RANGE = 16  # beyond this the sigmoid is constant
DELTA_RANGE = 16  # of softplus's input, in the table
DECAY_RANGE = 20  # nats; what decays by more is as good as forgotten
SHRINK = 2.0**-70  # smaller states become 0, so that no product is ever subnormal
SNAP = {"snap": 2.0**SNAP_BITS, "limit": 2.0 ** (20 + SNAP_BITS)}  # `exact.snapped`, for kernels
SQUARE_BITS = 36  # fraction bits of a mean square; it stays below 2^16


@functools.lru_cache(maxsize=1)
def softplus_table() -> Tensor:
    """ln(1 + exp(i / STEPS)) for i in -n..n, with n = STEPS * DELTA_RANGE; float32."""
    n = STEPS * DELTA_RANGE
    values = []
    with decimal.localcontext(prec=40):
        one = decimal.Decimal(1 << WORK_BITS)
        for i, power in enumerate(exp_integers(STEPS, n + 1)):
            low = (1 + power / one).ln()
            values.append((float(low), float(low + decimal.Decimal(i) / STEPS)))
    lower, upper = zip(*values, strict=True)
    return torch.tensor([*lower[:0:-1], *upper], dtype=torch.float64).float()


@functools.lru_cache(maxsize=1)
def decay_table() -> Tensor:
    """exp(-i / DECAY_STEPS) up to DECAY_RANGE nats, and a 0 at the end; float32."""
    values = exp_integers(DECAY_STEPS, DECAY_STEPS * DECAY_RANGE)
    values = [value / (1 << WORK_BITS) for value in values]
    return torch.tensor([*values, 0.0], dtype=torch.float64).float()


def look_up(table: Tensor, x: Tensor, limit: int, kernel: str, times: bool = False) -> Tensor:
    """A table of -limit..limit, STEPS per unit, at the entry nearest to x; ``times``: times x."""
    span = STEPS * limit
    if kernel == "numba":
        return portable_scan.look_up(table, x, STEPS, span, times)
    index = x.mul(STEPS).round_().clamp_(-span, span).add_(span).int()
    values = table.index_select(0, index.flatten()).view_as(x)
    return values.mul_(x) if times else values


def halved(x_SND: Tensor) -> Tensor:
    """Sum over N, in place: the upper half is added to the lower one until one is left."""
    n = x_SND.shape[1]
    while n > 1:
        half = n // 2
        x_SND[:, :half].add_(x_SND[:, n - half : n])
        n -= half
    return x_SND[:, 0]


def recurrence_for(kernel: str, device: torch.device) -> str:
    """The recurrence for a mixer whose scan is ``kernel`` (of `mamba.SCANS`): numba or reference.

    Raises BitbyteError if the fast one was asked for by name and numba does not work.
    """
    if kernel == "reference" or device.type != "cpu":
        return "reference"
    problem = jit.problem()
    if problem is None:
        return "numba"
    if kernel == "fast":
        raise BitbyteError(f"the fast recurrence needs numba: {problem}; or use --scan auto")
    return "reference"


class IntegerMamba:
    """The blocks of a Mamba model; ``body(x_MD, states, start, (S, T))`` works in place."""

    tokens = 2048  # at a time

    def __init__(self, config, stack, device: torch.device):
        self.device = device
        self.residual = Residual(config.d_model)
        self.sigmoid = sigmoid_table(STEPS, STEPS * GATE_RANGE, 24).to(device)
        self.softplus = softplus_table().to(device)
        self.decay = decay_table().to(device)
        kind = {"mamba1": Layer1, "mamba2": Layer2}[config.ssm]
        self.layers = [kind(self, config, block) for block in stack.blocks]

    @property
    def kernels(self) -> dict[str, str]:
        """Which code computes the parts that have several forms, for records."""
        layer = next(iter(self.layers), None)
        return {"linear": layer.in_proj.kernel, "scan": layer.kernel} if layer else {}

    def constants(self) -> list:
        """All that the arithmetic depends on: tensors and `Ternary` layers."""
        return [self.sigmoid, self.softplus, self.decay] + [
            part for layer in self.layers for part in layer.constants()
        ]

    def state(self, n_lanes: int) -> list[tuple[Tensor, Tensor]]:
        """The zero state: (the convolution's last inputs, the recurrence's h_SND) per layer."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(n_lanes, *shape, device=self.device)

        return [
            (zeros(layer.taps - 1, layer.conv_width), zeros(layer.d_state, layer.d_inner))
            for layer in self.layers
        ]

    def __call__(self, x_MD: Tensor, states: list, start: int, shape: tuple[int, int]) -> None:
        for layer, state in zip(self.layers, states, strict=True):
            layer(x_MD, state, shape)

    def exp(self, x: Tensor) -> Tensor:
        """exp(-x / DECAY_STEPS) for x >= 0, to about the last bit of float32; x is overwritten."""
        nearest = x.clamp_(max=len(self.decay) - 1).round()
        table = self.decay.index_select(0, nearest.flatten().int()).view_as(x)
        # exp(-r) = 1 - r for a rest r of at most half a step: r^2 / 2 is about the last bit.
        return x.sub_(nearest).mul_(-1 / DECAY_STEPS).add_(1).mul_(table)


class Layer:
    """What the blocks of Mamba-1 and Mamba-2 share."""

    def __init__(self, body: IntegerMamba, config, block):
        self.body, self.residual = body, body.residual
        mixer, device = block.mixer, body.device
        self.kernel = recurrence_for(mixer.kernel, device)
        self.d_inner, self.d_state = mixer.d_inner, mixer.d_state
        self.norm_D = parameter(block.norm.weight)
        self.in_proj = Ternary(mixer.in_proj, device)
        self.out_proj = Ternary(mixer.out_proj, device)
        self.conv_width, self.taps = mixer.conv_weight.shape
        self.conv_KC = parameter(mixer.conv_weight).t().contiguous()
        self.conv_bias_C = parameter(mixer.conv_bias)
        root = self.residual.root
        self.in_factors = constants(device, *(s * root / 127 for s in self.in_proj.scales))
        self.out_factor = constants(device, self.out_proj.scales[0] * Fraction(1 << FRACTION, 127))
        self.skip_D = parameter(mixer.skip)
        rates = mixer.a_log.detach().double().cpu()
        with decimal.localcontext(prec=30):
            rates = [
                float(decimal.Decimal(a).exp()) for a in rates.clamp_(-20, 20).flatten().tolist()
            ]
        rates = torch.tensor(rates, dtype=torch.float64).clamp_(2.0**-20, 2.0**20)
        rates = rates.mul_(DECAY_STEPS).float()
        self.rates = rates.view(mixer.a_log.shape).to(device)  # of decay, steps per unit of delta
        self.dt_bias = parameter(mixer.dt_bias)

    def constants(self) -> list:
        parts = []
        for part in vars(self).values():
            if isinstance(part, Dense):
                parts += [part.weight, part.factor]
            elif isinstance(part, Tensor | Ternary):
                parts.append(part)
        return parts

    def __call__(self, x_MD: Tensor, state: tuple[Tensor, Tensor], shape: tuple) -> None:
        residual, D = self.residual, self.d_inner
        y_MD = x_MD.mul(self.norm_D)
        length_M1 = residual.length(x_MD)
        fine_MD, top_M1 = quantize(y_MD.clone(), float(LEVELS))
        scale_M1 = residual.scale(top_M1, length_M1)
        factors_MG = (scale_M1 * self.in_factors).float()
        zx = self.in_proj(quantize(y_MD)[0])
        z_MD, x_MD_inner = zx[:, :D] * factors_MG[:, :1], zx[:, D:] * factors_MG[:, 1:]
        y_STD = self.mix(x_MD_inner.view(*shape, D), fine_MD, scale_M1, state)
        gated_MD = y_STD.reshape(-1, D).mul_(self.silu(z_MD))
        residual.add(x_MD, self.out_proj, self.out_factor, *self.out(gated_MD))

    def silu(self, x: Tensor) -> Tensor:
        return look_up(self.body.sigmoid, x, GATE_RANGE, self.kernel, times=True)

    def convolve(self, x_STC: Tensor, kept_SKC: Tensor) -> Tensor:
        """silu of the causal convolution, its products added from the oldest tap on."""
        T = x_STC.shape[1]
        window = torch.cat((kept_SKC, x_STC), 1)
        kept_SKC.copy_(window[:, T:])
        if self.kernel == "numba":
            return portable_scan.convolve(
                window, self.conv_KC, self.conv_bias_C, self.body.sigmoid, steps=STEPS,
                span=STEPS * GATE_RANGE, **SNAP,
            )  # fmt: skip
        y_STC = window[:, :T] * self.conv_KC[0]
        for k in range(1, self.taps):
            y_STC.add_(window[:, k : k + T] * self.conv_KC[k])
        return snapped(self.silu(y_STC.add_(self.conv_bias_C)))

    def delta(self, dt: Tensor) -> Tensor:
        return look_up(self.body.softplus, dt.add_(self.dt_bias), DELTA_RANGE, self.kernel)

    def scan(self, h_SND, x_STD, delta_STD, b_STN, c_STN, decay_STD=None) -> Tensor:
        """The recurrence h = decay h + delta x b, y = h c + skip x; h is updated in place.

        ``decay_STD`` holds one decay for all states of a channel (Mamba-2); without it each state
        has its own, from delta and ``rates`` (Mamba-1).
        """
        if self.kernel == "numba":
            return portable_scan.scan(
                h_SND, x_STD, delta_STD, decay_STD, self.rates, self.body.decay, b_STN, c_STN,
                self.skip_D, step=-1 / DECAY_STEPS, shrink=SHRINK, **SNAP,
            )  # fmt: skip
        input_STD = x_STD * delta_STD
        y_STD = x_STD * self.skip_D
        work_SND = torch.empty_like(h_SND)
        for t in range(x_STD.shape[1]):
            if decay_STD is None:
                decay = self.body.exp(delta_STD[:, t, None] * self.rates)
            else:
                decay = decay_STD[:, t, None]
            torch.mul(input_STD[:, t, None], b_STN[:, t, :, None], out=work_SND)
            work_SND.add_(h_SND.mul_(decay))
            torch.hardshrink(work_SND, SHRINK, out=h_SND)
            torch.mul(h_SND, c_STN[:, t, :, None], out=work_SND)
            y_STD[:, t].add_(halved(work_SND))
        return snapped(y_STD)


class Layer1(Layer):
    """A Mamba-1 block."""

    def __init__(self, body: IntegerMamba, config, block):
        super().__init__(body, config, block)
        self.rank = block.mixer.dt_weight.shape[1]
        self.x_proj = Dense(block.mixer.x_proj.weight)
        self.dt_proj = Dense(block.mixer.dt_weight)
        self.rates = self.rates.t().contiguous()  # (N, D)

    def mix(self, x_STD: Tensor, fine_MD, scale_M1, state: tuple[Tensor, Tensor]) -> Tensor:
        R, N = self.rank, self.d_state
        S, T, D = x_STD.shape
        x_STD = self.convolve(x_STD, state[0])
        mixed = self.x_proj(*quantize(x_STD.reshape(-1, D).clone(), float(LEVELS))).float()
        dt_MR, b, c = mixed.split((R, N, N), dim=-1)
        b, c = snapped(b), snapped(c)
        dt_MD = self.dt_proj(*quantize(dt_MR.clone(), float(LEVELS))).float()
        delta_STD = self.delta(dt_MD).view(S, T, D)
        return self.scan(state[1], x_STD, delta_STD, b.view(S, T, N), c.view(S, T, N))

    def out(self, gated_MD: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(gated_MD)


class Layer2(Layer):
    """A Mamba-2 block."""

    def __init__(self, body: IntegerMamba, config, block):
        super().__init__(body, config, block)
        mixer = block.mixer
        self.bcdt_proj = Dense(mixer.bcdt_proj.weight, self.residual.root)
        self.head_width = self.d_inner // mixer.n_head
        self.skip_D = self.skip_D.repeat_interleave(self.head_width)
        self.inner_norm_D = parameter(mixer.norm.weight)
        D = self.d_inner
        self.square_factor = constants(body.device, Fraction(1 << SQUARE_BITS, LEVELS * LEVELS * D))
        self.square_eps = float(round(Fraction(NORM_EPS) * (1 << SQUARE_BITS)))

    def mix(self, x_STD: Tensor, fine_MD, scale_M1, state: tuple[Tensor, Tensor]) -> Tensor:
        N, P = self.d_state, self.head_width
        S, T, D = x_STD.shape
        mixed = snapped(self.bcdt_proj(fine_MD, scale_M1).float()).view(S, T, -1)
        x_STC = torch.cat((x_STD, mixed[..., : 2 * N]), -1)
        x_STD, b_STN, c_STN = self.convolve(x_STC, state[0]).split((D, N, N), dim=-1)
        delta_STH = self.delta(mixed[..., 2 * N :].contiguous())
        decay_STD = self.body.exp(delta_STH * self.rates).repeat_interleave(P, -1)
        delta_STD = delta_STH.repeat_interleave(P, -1)
        return self.scan(state[1], x_STD, delta_STD, b_STN, c_STN, decay_STD)

    def out(self, gated_MD: Tensor) -> tuple[Tensor, Tensor]:
        """RMSNorm of the gated output, quantized."""
        fine_MD, top_M1 = quantize(gated_MD.clone(), float(LEVELS))
        squares_M1 = fine_MD.double().square_().sum(-1, keepdim=True)
        scale_M1 = top_M1.double().square_().mul_(self.square_factor)
        mean_M1 = squares_M1.mul_(scale_M1).floor_().add_(self.square_eps).clamp_(max=2.0**52)
        root_M1 = isqrt(mean_M1).clamp_(min=1).mul_(2.0 ** -(SQUARE_BITS // 2))
        q_MD, top_M1 = quantize(gated_MD.mul_(self.inner_norm_D))
        return q_MD, self.residual.scale(top_M1, root_M1)
