"""`mamba.causal_conv` for CPUs, by oneDNN's depthwise convolution, forward and backward.

Shapes: B batch, T positions, D channels, K taps, S positions of a span.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

CONV_SPAN = 32  # positions at a time in the gradient of the convolution


class FusedConv(torch.autograd.Function):
    """`causal_conv` for CPUs; oneDNN's depthwise kernel gives the output and the input's gradient.

    ``FusedConv.apply(x_BTD, weight_DK, bias_D)``.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, weight_DK, bias_D):
        sums = _depthwise(x, weight_DK, bias_D)[:, : x.shape[1]]
        ctx.save_for_backward(x, weight_DK, sums)
        return F.silu(sums)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, weight_DK, sums = ctx.saved_tensors
        B, T, D = x.shape
        K = weight_DK.shape[1]
        grad = torch.ops.aten.silu_backward(grad, sums)
        grad_x = _depthwise(grad, weight_DK.flip(1), None)[:, K - 1 :]
        # Sum the products over the spans first, then over the positions within a span.
        products_KBSD = x.new_zeros(K, B, min(CONV_SPAN, T), D)
        for start in range(0, T, CONV_SPAN):
            stop = min(start + CONV_SPAN, T)
            for lag in range(K):
                first = max(start, lag)
                sum_BSD = products_KBSD[K - 1 - lag, :, : max(0, stop - first)]
                sum_BSD.addcmul_(grad[:, first:stop], x[:, first - lag : max(0, stop - lag)])
        return grad_x, products_KBSD.sum((1, 2)).t(), grad.flatten(0, 1).sum(0)


def _depthwise(x_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor | None) -> Tensor:
    """y_BSD of S = T + K - 1: the convolution with K - 1 zeros on both sides of x."""
    image = x_BTD.transpose(1, 2)[:, :, None]  # D is last in memory, as oneDNN prefers
    D, K = weight_DK.shape
    y = F.conv2d(image, weight_DK[:, None, None], bias_D, padding=(0, K - 1), groups=D)
    return y[:, :, 0].transpose(1, 2)
