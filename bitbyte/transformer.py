"""Transformer blocks: RMSNorm, RoPE, attention, SwiGLU, over ternary or dense projections.

Llama-shaped: pre-norm, half-split rotary positions, no biases, heads of any even size.  The causal
and the bidirectional model use the same block.  Sources: RMSNorm arXiv:1910.07467, RoPE
arXiv:2104.09864, SwiGLU arXiv:2002.05202.

Shapes: B batch, T positions, D model width, H heads, K head width, F feed-forward width,
S cached positions.
"""

import functools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitbyte import face
from bitbyte.bitlinear import compute_dtype, fused, layer_maker
from bitbyte.config import NORM_EPS
from bitbyte.files import BitbyteError
from bitbyte.kernels.cpu_attention import ChunkedAttention
from bitbyte.kernels.cpu_norm import FusedRMSNorm

ATTENTION = ("auto", "sdpa", "chunked", "plain")
CHUNKED_LIMIT = 2048  # positions; chunked keeps T^2 / 2 probabilities per head, so SDPA beyond


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis.

    Under autocast the result has autocast's dtype on a CPU, and float32 on a GPU.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        if fused(x):
            return FusedRMSNorm.apply(x, self.weight, compute_dtype(x))
        return F.rms_norm(x, self.weight.shape, self.weight, eps=NORM_EPS)


@functools.lru_cache(maxsize=16)
def _rope_tables(length: int, width: int, theta: float, device: torch.device) -> tuple:
    # In float64 on the CPU: Apple GPUs have none, and so the tables are the same everywhere.
    rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles_TK = torch.outer(torch.arange(length, dtype=torch.float64), rates)
    angles_TK = torch.cat((angles_TK, angles_TK), dim=-1)
    return angles_TK.cos().float().to(device), angles_TK.sin().float().to(device)


def rope_cos_sin(start: int, stop: int, width: int, theta: float, device: torch.device) -> tuple:
    """(cos_TK, sin_TK) in float32 for positions start..stop-1; both halves of K are equal.

    Tables are cached up to the next power of two of positions, so that decoding reuses them.
    """
    cos, sin = _rope_tables(1 << (stop - 1).bit_length(), width, theta, device)
    return cos[start:stop], sin[start:stop]


def apply_rotary_emb(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary position embedding in half-split form."""
    first, second = x_BHTK.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHTK * cos_TK.to(x_BHTK.dtype) + turned * sin_TK.to(x_BHTK.dtype)


def plain_attention(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, causal: bool, limit_BT: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, written out: the reference for the other kernels.

    With T < S the queries are the last T of the S positions (cached decoding).  Query t
    of window b sees the keys up to position limit_BT[b, t], if given.
    """
    scores_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2) / math.sqrt(q_BHTK.shape[-1])
    T, S = scores_BHTS.shape[-2:]
    if limit_BT is not None:
        scores_BHTS = scores_BHTS.masked_fill(~within(limit_BT, S), -math.inf)
    elif causal:
        future = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).triu(S - T + 1)
        scores_BHTS = scores_BHTS.masked_fill(future, -math.inf)
    return scores_BHTS.float().softmax(-1).to(v_BHSK.dtype) @ v_BHSK


def within(limit_BT: Tensor, S: int) -> Tensor:
    """seen (B, 1, T, S): the keys up to each query's limit, for all heads."""
    return (torch.arange(S, device=limit_BT.device) <= limit_BT[..., None])[:, None]


def attention_for(kernel: str, device: torch.device, T: int, S: int, compiled: bool = False) -> str:
    """Which attention runs for T queries over S keys: "plain", "sdpa" or "chunked".

    ``compiled``: under torch.compile.  Raises BitbyteError for chunked where it cannot run.
    """
    if kernel == "plain":
        return "plain"
    if kernel == "chunked" and (device.type != "cpu" or compiled):
        place = "not under torch.compile" if compiled else f"not on {device}"
        raise BitbyteError(f"chunked attention runs on a CPU only, {place}; use auto or sdpa")
    # Cached decoding has fewer queries than keys.
    chunkable = T == S and device.type == "cpu" and not compiled
    if chunkable and (kernel == "chunked" or (kernel == "auto" and S <= CHUNKED_LIMIT)):
        return "chunked"
    return "sdpa"


class CausalSelfAttention(nn.Module):
    """Multi-head attention with rotary positions; ``causal=False`` makes it bidirectional."""

    def __init__(self, d_model: int, n_head: int, theta: float, causal: bool, linear, gain: float):
        super().__init__()
        self.n_head, self.theta, self.causal = n_head, theta, causal
        self.kernel = "auto"
        self.qkv = linear(d_model, 3 * d_model, groups=3)
        self.out = linear(d_model, d_model, gain=gain)

    def forward(
        self, x_BTD: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0,
        limit_BT: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend within x, or, with ``cache`` = (k_BHSK, v_BHSK), also to positions < ``start``.

        The cache is written in place at positions start .. start + T.  With ``limit_BT`` the second
        half of x are queries at the positions of the first half, whose keys they see up to their
        limits, as the first half does itself (see `models.BlockDiffusionLM`).
        """
        B, T, D = x_BTD.shape
        n = T if limit_BT is None else T // 2  # positions that have keys
        qkv = self.qkv(x_BTD).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each BHTK
        stop = start + n
        cos, sin = rope_cos_sin(start, stop, D // self.n_head, self.theta, x_BTD.device)
        k, v = apply_rotary_emb(k[:, :, :n], cos, sin), v[:, :, :n]
        q = apply_rotary_emb(q, cos.repeat(T // n, 1), sin.repeat(T // n, 1))
        if cache is not None:
            k_all, v_all = cache
            k_all[:, :, start:stop], v_all[:, :, start:stop] = k, v
            k, v = k_all[:, :, :stop].to(q.dtype), v_all[:, :, :stop].to(q.dtype)
        compiled = torch.compiler.is_compiling()
        kernel = attention_for(self.kernel, q.device, n, k.shape[2], compiled)
        if kernel == "chunked":
            y = ChunkedAttention.apply(q, k, v, self.causal, limit_BT)
        elif kernel == "plain" or (limit_BT is None and self.causal and 1 < T < k.shape[2]):
            # SDPA aligns its mask to the first key.
            y = plain_attention(q, k, v, self.causal, limit_BT)
        elif limit_BT is not None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=within(limit_BT, k.shape[2]))
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and T > 1)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_ff: int, linear, gain: float):
        super().__init__()
        self.gate_up = linear(d_model, 2 * d_ff, groups=2)
        self.down = linear(d_ff, d_model, gain=gain)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, d_model, d_ff, n_head, theta, causal, linear, gain):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.attn = CausalSelfAttention(d_model, n_head, theta, causal, linear, gain)
        self.mlp = MLP(d_model, d_ff, linear, gain)

    def forward(self, x_BTD: Tensor, cache=None, start: int = 0, limit_BT=None) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), cache, start, limit_BT)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Stack(nn.Module):
    """Blocks in sequence: h_BTD -> h_BTD.  Embedding, final norm and head live in `models`.

    ``caches`` is None, or holds each block's state after the ``start`` positions it has seen.
    ``view`` is passed on to the blocks: for transformers the limits of `CausalSelfAttention`.
    """

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpoint = False

    def forward(
        self, h_BTD: Tensor, caches: list | None = None, start: int = 0, *view: Tensor
    ) -> Tensor:
        for i, block in enumerate(self.blocks):
            if self.grad_checkpoint and self.training and torch.is_grad_enabled():
                h_BTD = checkpoint(block, h_BTD, None, start, *view, use_reentrant=False)
            else:
                h_BTD = block(h_BTD, caches[i] if caches else None, start, *view)
        return h_BTD


class Transformer(Stack):
    """A stack of transformer blocks.  ``config`` is a `config.TransformerConfig`."""

    def __init__(self, config, causal: bool):
        c, make = config, layer_maker(config.linear, config.act_quant)
        gain = 1 / math.sqrt(
            2 * max(1, c.n_layer)
        )  # keeps the residual sum at the scale of one block
        super().__init__(
            Block(c.d_model, c.d_ff, c.n_head, c.rope_theta, causal, make, gain)
            for _ in range(c.n_layer)
        )


__getattr__ = face(__name__, {}, renamed="rope:rope_cos_sin rotate:apply_rotary_emb")
