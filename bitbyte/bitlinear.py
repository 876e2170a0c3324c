"""Ternary linear layers: absmean weights, absmax int8 activations, straight-through gradients.

The plain formulas are the reference (BitNet b1.58, arXiv:2402.17764).  The int8 path computes the
same layer with integer matrix products; it is chosen at call time, and its values and gradients
are tested against the reference.  Packing (5 trits a byte) is for storage.

Shapes: M tokens, I inputs, O outputs, G matrices of equal size stacked in one weight (q, k, v or
gate, up), so that one product serves them all while each keeps its own scale.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbyte import face
from bitbyte.files import BitbyteError

EPS = 1e-5  # smallest scale, so that an all-zero matrix or token does not divide by zero
KERNELS = ("auto", "reference", "int8")
CUDA_ROWS = 32  # the int8 product of a GPU refuses fewer than 17 rows


def quantize_ternary(w_GOI: Tensor) -> tuple[Tensor, Tensor]:
    """Round each matrix to {-1, 0, 1} times its mean absolute value.

    Returns (q_GOI of the input's dtype, scale_G11); the quantized matrix is ``q * scale``.
    """
    scale_G11 = w_GOI.abs().mean(dim=(-2, -1), keepdim=True).clamp_(min=EPS)
    return (w_GOI / scale_G11).round_().clamp_(-1, 1), scale_G11


class TernaryQuantSTE(torch.autograd.Function):
    """Ternary values forward, identity backward: ``TernaryQuantSTE.apply(w_GOI)``."""

    @staticmethod
    def forward(ctx, w_GOI: Tensor) -> Tensor:
        q_GOI, scale_G11 = quantize_ternary(w_GOI)
        return q_GOI.mul_(scale_G11)

    @staticmethod
    def backward(ctx, grad_GOI: Tensor) -> Tensor:
        return grad_GOI


def quantize_int8_per_token(x_MI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale per token: (q_MI of the input's dtype, scale_M1), x ~ q * scale.

    The largest absolute value of a token becomes 127.
    """
    scale_M1 = x_MI.abs().amax(dim=-1, keepdim=True).float().clamp_(min=EPS).div_(127)
    return (x_MI / scale_M1).round_(), scale_M1


class _ActQuantSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MI: Tensor) -> Tensor:
        q_MI, scale_M1 = quantize_int8_per_token(x_MI)
        return (q_MI * scale_M1).to(x_MI.dtype)

    @staticmethod
    def backward(ctx, grad_MI: Tensor) -> Tensor:
        return grad_MI


def act_quant_per_token(x_MI: Tensor) -> Tensor:
    """Round activations to int8 steps, with a straight-through gradient."""
    if torch.compiler.is_compiling():
        q_MI, scale_M1 = quantize_int8_per_token(x_MI.detach())
        return _straight_through((q_MI * scale_M1).to(x_MI.dtype), x_MI)
    return _ActQuantSTE.apply(x_MI)


def ternary_ste(w_GOI: Tensor) -> Tensor:
    """Quantize full-precision matrices to ternary ones, with a straight-through gradient."""
    if torch.compiler.is_compiling():
        q_GOI, scale_G11 = quantize_ternary(w_GOI.detach())
        return _straight_through(q_GOI * scale_G11, w_GOI)
    return TernaryQuantSTE.apply(w_GOI)


def _straight_through(value: Tensor, x: Tensor) -> Tensor:
    """``value``, exactly (x - x is 0), with the gradient of ``x``.

    For compiled graphs; `fused` says why they use no autograd.Function.
    """
    return value + (x - x.detach())


class Linear(nn.Module):
    """Dense projection without bias: the control for `BitLinear`, with the same parameters.

    ``weight`` is (out, in) as in ``nn.Linear``, a stack of ``groups`` matrices of equal size.
    Initial values are N(0, gain^2 / in).
    """

    def __init__(self, in_features: int, out_features: int, groups: int = 1, gain: float = 1.0):
        super().__init__()
        if out_features % groups:
            raise BitbyteError(f"{out_features} outputs do not divide into {groups} matrices")
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=gain / math.sqrt(in_features))

    def forward(self, x_MI: Tensor) -> Tensor:
        return F.linear(x_MI, self.weight)

    def matrices(self) -> Tensor:
        """The weight as (G, O, I), sharing memory."""
        return self.weight.view(self.groups, -1, self.weight.shape[1])


class BitLinear(Linear):
    """Linear layer with ternary weights and, unless ``act_quant=False``, int8 activations.

    Training keeps the full-precision weight and quantizes it at each use.  ``kernel`` is "auto",
    "reference" (fake quantization, any device) or "int8" (integer products).  On a CPU, with
    quantized activations, "auto" is int8: in eval mode always, because its sums are exact
    whatever the batch; in training where it is faster (VNNI and at least 384 inputs).
    """

    def __init__(
        self, in_features: int, out_features: int, groups: int = 1, gain: float = 1.0,
        act_quant: bool = True,
    ):  # fmt: skip
        super().__init__(in_features, out_features, groups, gain)
        self.act_quant = act_quant
        self.kernel = "auto"
        self._kept: tuple = (None, None)  # (version of the weight, its int8 form): the cache

    def kernel_for(self, device: torch.device) -> str:
        """Which path runs on ``device``: "reference" or "int8"."""
        if self.kernel != "auto":
            return self.kernel
        faster = has_vnni() and self.weight.shape[1] >= 384
        possible = device.type == "cpu" and self.act_quant
        return "int8" if possible and (faster or not self.training) else "reference"

    def check_int8(self, device: torch.device) -> None:
        """Raise BitbyteError if the int8 kernel cannot compute this layer on ``device``."""
        if not self.act_quant:
            raise BitbyteError("the int8 kernel needs quantized activations (act_quant)")
        if device.type == "cuda":
            _check_widths(self.weight)

    def forward(self, x_MI: Tensor) -> Tensor:
        if self.kernel_for(x_MI.device) == "int8":
            self.check_int8(x_MI.device)
            return _Int8Product.apply(x_MI, self.weight, *self.int8_weight())
        x_MI = act_quant_per_token(x_MI) if self.act_quant else x_MI
        return F.linear(x_MI, ternary_ste(self.matrices()).flatten(0, 1))

    def train(self, mode: bool = True):
        self._kept = (None, None)
        return super().train(mode)

    def int8_weight(self) -> tuple[Tensor, Tensor]:
        """(q_OI int8, scale_O float32), cached between uses in eval mode.

        Not in training: fused optimizers change a weight without bumping its version.
        """
        version = (self.weight._version, self.weight.data_ptr())
        if self.training or self._kept[0] != version:
            with torch.no_grad():
                q_GOI, scale_G11 = quantize_ternary(self.matrices())
                scale_O = scale_G11.expand(-1, q_GOI.shape[1], 1).flatten().float()
                self._kept = (version, (q_GOI.flatten(0, 1).to(torch.int8), scale_O))
        return self._kept[1]


def layer_maker(linear: str, act_quant: bool):
    """The class of a model's projections; ``act_quant`` applies to ternary ones only."""
    return functools.partial(BitLinear, act_quant=act_quant) if linear == "ternary" else Linear


class _Int8Product(torch.autograd.Function):
    """y = (q_x q_w^T) * scales: forward in int8 -> int32, backward as in the reference.

    Both quantized operands are exact small integers, so only the final scaling of the forward
    rounds.  dX = g W_q and dW = g^T X_q, in the dtype of the output.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor, qw_OI: Tensor, scale_O: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        x_MI = x.reshape(-1, x.shape[-1])
        qx_MI, scale_M1 = quantize_int8_per_token(x_MI)
        qx_MI = qx_MI.to(torch.int8)
        product_MO = int8_product(qx_MI, qw_OI)
        # Scale in float32, then cast: in-place products of mixed dtypes take three times as long.
        y_MO = (product_MO * scale_M1).mul_(scale_O).to(dtype)
        ctx.save_for_backward(qx_MI, scale_M1, qw_OI, scale_O)
        ctx.input_dtype = x.dtype
        return y_MO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        qx_MI, scale_M1, qw_OI, scale_O = ctx.saved_tensors
        g_MO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_w = None
        # The scales go into the smaller operands, in place: fewer passes over memory.
        if ctx.needs_input_grad[0]:
            w_OI = qw_OI.to(g_MO.dtype).mul_(scale_O[:, None].to(g_MO.dtype))
            grad_x = (g_MO @ w_OI).to(ctx.input_dtype).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            x_MI = qx_MI.to(g_MO.dtype).mul_(scale_M1.to(g_MO.dtype))
            grad_w = (g_MO.t() @ x_MI).float()
        return grad_x, grad_w, None, None


def int8_product(x_MI: Tensor, w_OI: Tensor) -> Tensor:
    """Exact x w^T of int8 matrices, as int32.  Raises BitbyteError for widths a GPU cannot take.

    cuBLAS wants more than 16 rows, which are padded, and widths that are multiples of 8.
    """
    if not x_MI.is_cuda:
        return torch._int_mm(x_MI, w_OI.t())
    _check_widths(w_OI)
    return torch._int_mm(_padded(x_MI), w_OI.t())[: len(x_MI)]


def _check_widths(w_OI: Tensor) -> None:
    if any(width % 8 for width in w_OI.shape):
        raise BitbyteError(
            "the int8 kernel on a GPU needs widths that are multiples of 8, not "
            f"{' and '.join(map(str, w_OI.shape))}; use --linear_kernel reference"
        )


def _padded(x_MI: Tensor) -> Tensor:
    """The matrix with rows of zeros below, so that it has at least CUDA_ROWS."""
    return F.pad(x_MI, (0, 0, 0, max(0, CUDA_ROWS - len(x_MI))))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype if it is on for this device, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def fused(x: Tensor) -> bool:
    """Whether to use this package's fused CPU code for x: on a CPU, and not under torch.compile.

    torch.compile fuses the plain code itself, and for an autograd.Function that works in place
    torch 2.11 silently compiles a backward pass without gradients.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@functools.cache
def has_vnni() -> bool:
    """Whether this CPU multiplies int8 in hardware (AVX512-VNNI)."""
    return torch.cpu._is_vnni_supported()


TRITS = 5  # per byte: 3^5 = 243 <= 256, so 1.6 bits a value
POWERS = [3**i for i in range(TRITS)]


def pack_trits(q: Tensor) -> Tensor:
    """Pack int8 values in {-1, 0, 1} five to a byte: uint8 of ceil(n / 5), first value lowest."""
    q = q.flatten().to(torch.int16)
    if q.numel() and (q.min() < -1 or q.max() > 1):
        raise BitbyteError("only the values -1, 0 and 1 can be packed")
    q = F.pad(q + 1, (0, -q.numel() % TRITS), value=1).view(-1, TRITS)
    return (q * torch.tensor(POWERS, dtype=torch.int16)).sum(1).to(torch.uint8)


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_trits`: the first ``n`` values, int8.  BitbyteError on bytes > 242."""
    if packed.numel() != -(-n // TRITS):
        raise BitbyteError(f"{n} ternary values need {-(-n // TRITS)} bytes, not {packed.numel()}")
    if packed.numel() and packed.max() >= 3**TRITS:
        raise BitbyteError(f"byte {int(packed.max())} does not hold {TRITS} ternary values")
    values = packed.to(torch.int16)[:, None] // torch.tensor(POWERS, dtype=torch.int16)
    return (values % 3).flatten()[:n].to(torch.int8) - 1


OLD_NAMES = "ternary:quantize_ternary int8_per_token:quantize_int8_per_token"
__getattr__ = face(__name__, {}, renamed=OLD_NAMES)
