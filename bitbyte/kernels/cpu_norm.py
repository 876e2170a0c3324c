"""`transformer.RMSNorm` and `mamba.gated_norm` for CPUs, in fewer passes over memory.

Shapes: B batch, T positions, D channels, N tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitbyte.config import NORM_EPS
from bitbyte.kernels.cpu_ssd import BLOCK


class FusedRMSNorm(torch.autograd.Function):
    """RMSNorm for CPUs, in half the passes over memory that autograd would make."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rate = norm.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()
        ctx.save_for_backward(x, weight_D, rate)
        return (x * rate).mul_(weight_D).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, rate = ctx.saved_tensors
        unit = x * rate
        product_ND = (grad * unit).flatten(0, -2)
        grad_weight_D = product_ND.sum(0)
        along = (product_ND @ weight_D).view_as(rate) / x.shape[-1]
        grad_x = torch.addcmul(grad * weight_D, unit, along, value=-1).mul_(rate)
        return grad_x, grad_weight_D, None


def _spans(x_BTD: Tensor) -> list[slice]:
    """Slices of T so short that a slice of x stays in the cache."""
    B, T, D = x_BTD.shape
    step = max(16, BLOCK // (B * D))
    return [slice(start, min(start + step, T)) for start in range(0, T, step)]


class FusedGatedNorm(torch.autograd.Function):
    """`gated_norm` for CPUs, some positions at a time, with the result in ``dtype``.

    ``FusedGatedNorm.apply(y_BTD, z_BTD, weight_D, dtype)``.
    """

    @staticmethod
    def forward(ctx, y, z, weight_D, dtype):
        out = y.new_empty(y.shape, dtype=dtype)
        rate = y.new_empty(*y.shape[:-1], 1)
        for span in _spans(y):
            gated = F.silu(z[:, span]) * y[:, span]
            norm = torch.linalg.vector_norm(gated, dim=-1, keepdim=True)
            norm.square_().div_(y.shape[-1]).add_(NORM_EPS)
            gated *= torch.rsqrt(norm, out=rate[:, span])
            torch.mul(gated, weight_D, out=out[:, span])
        ctx.save_for_backward(y, z, weight_D, rate)
        return out

    @staticmethod
    def backward(ctx, grad):
        y, z, weight_D, rate = ctx.saved_tensors
        grad_y, grad_z = y.new_empty(y.shape), z.new_empty(z.shape)
        grad_weight_D = torch.zeros_like(weight_D)
        for span in _spans(y):
            gate, rate_BS1 = F.silu(z[:, span]), rate[:, span]
            gated = gate * y[:, span]
            product_ND = (grad[:, span] * gated).flatten(0, 1)
            grad_weight_D += rate_BS1.flatten() @ product_ND
            along = (product_ND @ weight_D).view_as(rate_BS1) * rate_BS1.square() / y.shape[-1]
            g = (grad[:, span] * weight_D).addcmul_(gated, along, value=-1).mul_(rate_BS1)
            torch.mul(g, gate, out=grad_y[:, span])
            g = g.mul_(y[:, span]).to(z.dtype)
            torch.ops.aten.silu_backward(g, z[:, span], grad_input=grad_z[:, span])
        return grad_y, grad_z, grad_weight_D, None
