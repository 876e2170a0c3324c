"""Selective state-space layers: Mamba-1 (arXiv:2312.00752) and Mamba-2 (arXiv:2405.21060).

Both move a state by the recurrence of `bitbyte.scans`, with delta, b and c computed from the
input.  The recurrence, the convolution and their parameters stay in float32.

Shapes: B batch, T positions, D inner channels (H heads of P in Mamba-2), N state size, K taps of
the convolution, M model width.
"""

import functools
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbyte.bitlinear import Linear, compute_dtype, fused, layer_maker
from bitbyte.config import NORM_EPS
from bitbyte.files import BitbyteError
from bitbyte.kernels import jit, numba_scan
from bitbyte.kernels.cpu_conv import FusedConv
from bitbyte.kernels.cpu_norm import FusedGatedNorm
from bitbyte.kernels.cpu_ssd import FusedSSD
from bitbyte.scans import (
    CHUNK,
    chunked_scan,
    last_state,
    last_state_of_heads,
    scan_step,
    selective_scan,
    ssd,
)
from bitbyte.transformer import RMSNorm, Stack

SCANS = ("auto", "reference", "fast", "mamba_ssm")


def scan_for(kernel: str, ssm: str, device: torch.device, compiled: bool = False) -> str:
    """Which scan runs: "reference", "numba", "chunked", "ssd" or "mamba_ssm".

    "auto" takes mamba_ssm on CUDA where its kernels for this ssm work, else the fast form of this
    package, and the reference only for Mamba-1 on a CPU where numba does not work.  ``compiled`` is
    about torch.compile, which cannot see into numba.  Raises BitbyteError if a scan chosen by name
    cannot run.
    """
    if kernel not in SCANS:
        raise BitbyteError(f"no scan {kernel!r}; choose from {', '.join(SCANS)}")
    if kernel == "mamba_ssm" or (kernel == "auto" and device.type == "cuda"):
        cuda = device.type == "cuda"
        problem = mamba_ssm_problem(ssm) if cuda else f"it runs on CUDA, not on {device}"
        if problem is None:
            return "mamba_ssm"
        if kernel == "mamba_ssm":
            raise BitbyteError(f"the scan mamba_ssm cannot run here: {problem}; or use --scan auto")
    if kernel == "reference":
        return kernel
    if ssm == "mamba2":
        return "ssd"
    if device.type != "cpu" or (compiled and kernel == "auto"):
        return "chunked"
    if compiled:
        raise BitbyteError("torch.compile cannot take the numba scan; use --scan auto")
    problem = jit.problem()
    if problem is None:
        return "numba"
    if kernel == "auto":
        return "reference"
    raise BitbyteError(f"the fast scan on a CPU needs numba: {problem}; or use --scan auto")


@functools.cache
def mamba_ssm_problem(ssm: str) -> str | None:
    """Why mamba-ssm's kernels for this ssm do not work here; None if they do.

    Since July 2026 pip installs the package without its CUDA extension, which Mamba-1 needs.
    """
    build = "MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation"
    name = "triton.ssd_combined" if ssm == "mamba2" else "selective_scan_interface"
    module = f"mamba_ssm.ops.{name}"
    if problem := jit.import_problem(module, f"{build} mamba-ssm"):
        return problem
    if ssm == "mamba1" and getattr(sys.modules[module], "selective_scan_cuda", None) is None:
        return f"it was installed without its CUDA extension ({build} mamba-ssm)"
    return None


def _mamba1_scan(kernel: str, x, delta, a_DN, b, c, skip) -> Tensor:
    if kernel == "numba":
        return numba_scan.FusedScan.apply(x, delta, a_DN, b, c, skip)
    if kernel == "mamba_ssm":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        turned = (v.transpose(1, 2).contiguous() for v in (x, delta))
        turned = (*turned, a_DN, *(v.transpose(1, 2).contiguous() for v in (b, c)), skip)
        return selective_scan_fn(*turned).transpose(1, 2)
    scan = chunked_scan if kernel == "chunked" else selective_scan
    return scan(x, delta, a_DN, b, c, skip)


def _mamba2_scan(kernel: str, x_BTHP, delta_BTH, a_H, b, c, skip_H) -> Tensor:
    if kernel == "ssd":
        return (FusedSSD.apply if fused(x_BTHP) else ssd)(x_BTHP, delta_BTH, a_H, b, c, skip_H)
    if kernel == "mamba_ssm":
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        groups = (v[:, :, None] for v in (b, c))
        return mamba_chunk_scan_combined(
            x_BTHP, delta_BTH, a_H, *groups, chunk_size=CHUNK, D=skip_H
        )
    return selective_scan(x_BTHP, delta_BTH[..., None], a_H[:, None, None], b, c, skip_H[:, None])


def causal_conv(x_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    """silu of a causal depthwise convolution; tap K - 1 is the current position."""
    T, K = x_BTD.shape[1], weight_DK.shape[1]
    padded = F.pad(x_BTD, (0, 0, K - 1, 0))
    y = torch.addcmul(bias_D, padded[:, :T], weight_DK[:, 0])
    for k in range(1, K):
        y = torch.addcmul(y, padded[:, k : k + T], weight_DK[:, k])
    return F.silu(y)


def gated_norm(y_BTD: Tensor, z_BTD: Tensor, weight_D: Tensor) -> Tensor:
    """RMSNorm of y * silu(z)."""
    return F.rms_norm(y_BTD * F.silu(z_BTD), weight_D.shape, weight_D, eps=NORM_EPS)


class Mixer(nn.Module):
    """What Mamba-1 and Mamba-2 share: projections, convolution, gate, and the state of decoding.

    ``in_proj`` produces the gate z and the recurrence's input x, ``out_proj`` maps back to the
    model's width; these two are ternary or dense.  All that produces delta, b and c is dense.
    ``conv_width`` channels are convolved.  A state is (conv_BKC, h_BDN): the last K - 1 inputs of
    the convolution and the state of the recurrence.
    """

    ssm = ""
    select: Callable  # Mamba-1 and Mamba-2 differ in these five
    scan: Callable
    step: Callable
    last: Callable
    gated: Callable

    def __init__(self, config, linear, gain: float, conv_width: int):
        super().__init__()
        self.d_inner, self.d_state = config.d_inner, config.d_state
        self.kernel = "auto"
        self.in_proj = linear(config.d_model, 2 * self.d_inner, groups=2)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, config.d_conv))
        bound = 1 / math.sqrt(config.d_conv)
        nn.init.uniform_(self.conv_weight, -bound, bound)
        self.conv_bias = nn.Parameter(torch.zeros(conv_width))
        self.out_proj = linear(self.d_inner, config.d_model, gain=gain)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """The state before the first position: zeros."""
        width, taps = self.conv_weight.shape
        new = self.conv_weight.new_zeros
        return new(batch, taps - 1, width), new(batch, self.d_inner, self.d_state)

    def scan_kernel(self, device: torch.device) -> str:
        """The scan that runs on ``device``, see `scan_for`."""
        return scan_for(self.kernel, self.ssm, device, torch.compiler.is_compiling())

    def convolve(self, parts: list[Tensor], state: tuple | None, start: int) -> list[Tensor]:
        """`causal_conv` of x_BTC, given as parts of C; advances the state, if there is one."""
        widths = [part.shape[2] for part in parts]
        weight_CK = self.conv_weight
        if state is not None:
            window_BTC = torch.cat((state[0], torch.cat(parts, 2)), 1)
            state[0].copy_(window_BTC[:, parts[0].shape[1] :])
            if start:
                y_B1C = F.silu((window_BTC * weight_CK.t()).sum(1, keepdim=True) + self.conv_bias)
                return list(y_B1C.split(widths, 2))
        conv = FusedConv.apply if fused(weight_CK) else causal_conv
        pieces = zip(parts, weight_CK.split(widths), self.conv_bias.split(widths), strict=True)
        return [conv(part.to(weight_CK.dtype), *rest) for part, *rest in pieces]

    def forward(self, u_BTM: Tensor, state: tuple | None = None, start: int = 0) -> Tensor:
        """Mix along T.  A state, which has seen ``start`` positions, is advanced in place by T.

        Only an empty state takes many positions at once; otherwise they are fed one by one.
        """
        if start and u_BTM.shape[1] > 1:
            return torch.cat([self(u_B1M, state, start) for u_B1M in u_BTM.split(1, 1)], 1)
        z_BTD, x_BTD = self.in_proj(u_BTM).chunk(2, dim=-1)
        values = self.select(u_BTM, x_BTD, state, start)
        if start:
            y_BTD = self.step(state[1], *values)  # pyright: ignore
        else:
            with torch.autocast(u_BTM.device.type, enabled=False):
                y_BTD = self.scan(self.scan_kernel(u_BTM.device), *values)
                if state is not None:
                    state[1].copy_(self.last(*values))
        return self.out_proj(self.gated(y_BTD, z_BTD))


class Mamba1(Mixer):
    """Mamba-1 mixer: a delta and N decays per channel."""

    ssm = "mamba1"

    def __init__(self, config, linear, gain: float):
        super().__init__(config, linear, gain, config.d_inner)
        D, N, R = config.d_inner, config.d_state, config.dt_rank
        self.x_proj = Linear(D, R + 2 * N)
        self.dt_weight = nn.Parameter(torch.empty(D, R).uniform_(-(R**-0.5), R**-0.5))
        self.dt_bias = nn.Parameter(_initial_dt(D))
        self.a_log = nn.Parameter(torch.arange(1.0, N + 1).log().expand(D, N).clone())
        self.skip = nn.Parameter(torch.ones(D))

    def select(self, u_BTM: Tensor, x_BTD: Tensor, state: tuple | None, start: int) -> tuple:
        N, R = self.d_state, self.dt_weight.shape[1]
        (x_BTD,) = self.convolve([x_BTD], state, start)
        mixed = self.x_proj(x_BTD).to(x_BTD.dtype)
        dt_BTR, b_BTN, c_BTN = mixed.split((R, N, N), dim=-1)
        with torch.autocast(x_BTD.device.type, enabled=False):
            delta_BTD = F.softplus(F.linear(dt_BTR, self.dt_weight, self.dt_bias))
        return x_BTD, delta_BTD, -self.a_log.exp(), b_BTN, c_BTN, self.skip

    def scan(self, kernel: str, *values: Tensor) -> Tensor:
        return _mamba1_scan(kernel, *values)

    def last(self, x_BTD, delta_BTD, a_DN, b_BTN, c_BTN, skip_D) -> Tensor:
        return last_state(x_BTD, delta_BTD, a_DN, b_BTN)

    def step(self, h_BDN, x_B1D, delta_B1D, a_DN, b_B1N, c_B1N, skip_D) -> Tensor:
        now = (x_B1D[:, 0], delta_B1D[:, 0], a_DN, b_B1N, c_B1N, skip_D)
        y_BD, new_BDN = scan_step(h_BDN, *now)
        h_BDN.copy_(new_BDN)
        return y_BD[:, None]

    def gated(self, y_BTD: Tensor, z_BTD: Tensor) -> Tensor:
        return y_BTD.to(z_BTD.dtype) * F.silu(z_BTD)


class Mamba2(Mixer):
    """Mamba-2 mixer: one delta and one decay per head of P channels; all heads share b and c."""

    ssm = "mamba2"

    def __init__(self, config, linear, gain: float):
        D, N, H = config.d_inner, config.d_state, config.n_head
        super().__init__(config, linear, gain, D + 2 * N)
        self.n_head = H
        self.bcdt_proj = Linear(config.d_model, 2 * N + H)
        self.dt_bias = nn.Parameter(_initial_dt(H))
        self.a_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(H))
        self.norm = RMSNorm(D)

    def select(self, u_BTM: Tensor, x_BTD: Tensor, state: tuple | None, start: int) -> tuple:
        N, H = self.d_state, self.n_head
        b_c, dt_BTH = self.bcdt_proj(u_BTM).split((2 * N, H), dim=-1)
        x_BTD, b_c = self.convolve([x_BTD, b_c], state, start)
        b_BTN, c_BTN = b_c.chunk(2, dim=-1)
        delta_BTH = F.softplus(dt_BTH + self.dt_bias)
        x_BTHP = x_BTD.unflatten(-1, (H, -1))
        return x_BTHP, delta_BTH, -self.a_log.exp(), b_BTN, c_BTN, self.skip

    def scan(self, kernel: str, *values: Tensor) -> Tensor:
        return _mamba2_scan(kernel, *values).flatten(2)

    def last(self, x_BTHP, delta_BTH, a_H, b_BTN, c_BTN, skip_H) -> Tensor:
        return last_state_of_heads(x_BTHP, delta_BTH, a_H, b_BTN)

    def step(self, h_BDN, x_B1HP, delta_B1H, a_H, b_B1N, c_B1N, skip_H) -> Tensor:
        h_BHPN = h_BDN.unflatten(1, x_B1HP.shape[2:])
        y_BHP, new_BHPN = scan_step(
            h_BHPN, x_B1HP[:, 0], delta_B1H.mT, a_H[:, None, None], b_B1N[:, None], c_B1N[:, None],
            skip_H[:, None],
        )  # fmt: skip
        h_BHPN.copy_(new_BHPN)
        return y_BHP.flatten(1)[:, None]

    def gated(self, y_BTD: Tensor, z_BTD: Tensor) -> Tensor:
        if fused(y_BTD) and y_BTD.requires_grad:  # its gain is in the backward pass
            return FusedGatedNorm.apply(y_BTD, z_BTD, self.norm.weight, compute_dtype(y_BTD))
        return gated_norm(y_BTD, z_BTD, self.norm.weight)


MIXERS = {"mamba1": Mamba1, "mamba2": Mamba2}


def _initial_dt(n: int) -> Tensor:
    """Biases whose softplus is log-uniform from 0.001 to 0.1 (arXiv:2312.00752)."""
    dt = torch.exp(torch.empty(n).uniform_(math.log(1e-3), math.log(0.1)))
    return dt + torch.log(-torch.expm1(-dt))


class MambaBlock(nn.Module):
    """Pre-norm residual block around one mixer."""

    def __init__(self, config, linear, gain: float):
        super().__init__()
        self.norm = RMSNorm(config.d_model)
        self.mixer = MIXERS[config.ssm](config, linear, gain)

    def forward(self, x_BTM: Tensor, state: tuple | None = None, start: int = 0) -> Tensor:
        return x_BTM + self.mixer(self.norm(x_BTM), state, start)


class Mamba(Stack):
    """A stack of Mamba blocks: h_BTM -> h_BTM.  ``config`` is a `config.MambaConfig`."""

    def __init__(self, config):
        make = layer_maker(config.linear, config.act_quant)
        gain = 1 / math.sqrt(
            max(1, config.n_layer)
        )  # keeps the residual sum at the scale of one block
        super().__init__(MambaBlock(config, make, gain) for _ in range(config.n_layer))
