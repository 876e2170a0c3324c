"""`transformer.plain_attention` for CPUs: chunks of queries, forward and backward.

Shapes: B batch, T positions, S keys, H heads, K head width.
"""

import functools
import math

import torch
from torch import Tensor

CHUNK = 128  # queries per chunk
BLOCK_CHUNK = 64  # the same for block diffusion, whose late chunks see few of the late keys


def block_mask(T: int, block: int, device: torch.device) -> Tensor:
    """visible (2T, 2T): which keys (columns) each query sees in block diffusion.

    Of 2T positions the first T are the text itself and causal.  The last T are the same text in
    blocks, some bytes hidden: a position sees its whole block, and of the text itself what lies
    before the block.
    """
    at_T = torch.arange(T, device=device)
    start_T1 = (at_T // block * block)[:, None]
    own_TT = start_T1 == start_T1.T
    clean_T2 = torch.cat((at_T[:, None] >= at_T, torch.zeros_like(own_TT)), 1)
    return torch.cat((clean_T2, torch.cat((at_T < start_T1, own_TT), 1)))


@functools.lru_cache(maxsize=16)
def _chunks(T: int, causal: bool, block: int) -> list[tuple[slice, list[slice], Tensor | None]]:
    """(queries, keys they see between them, what is hidden of the last of these) of each chunk."""
    size = BLOCK_CHUNK if block else CHUNK
    every = [slice(a, min(a + size, T)) for a in range(0, T, size)]
    if not causal:
        return [(queries, [slice(0, T)], None) for queries in every]
    if not block:
        future = torch.ones(size, size, dtype=torch.bool).triu_(1)
        sizes = [queries.stop - queries.start for queries in every]
        return [(q, [slice(0, q.stop)], future[:n, :n]) for q, n in zip(every, sizes, strict=True)]
    visible, chunks = block_mask(T // 2, block, torch.device("cpu")), []
    for queries in every:
        seen = visible[queries].any(0).nonzero().flatten()
        runs = seen.tensor_split((seen.diff() > 1).nonzero().flatten() + 1)
        keys = [slice(int(run[0]), int(run[-1]) + 1) for run in runs]
        chunks.append((queries, keys, ~visible[queries][:, seen]))
    return chunks


def _taken(x: Tensor, keys: list[slice]) -> Tensor:
    parts = [x[:, run] for run in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class ChunkedAttention(torch.autograd.Function):
    """Attention for CPUs: chunks of queries against exactly the keys they may see.

    With ``causal``, the half of the scores above the diagonal is skipped; with ``block`` as well,
    `block_mask` says what is seen.  The probabilities are kept for the backward pass instead of
    being computed again.  ``ChunkedAttention.apply(q_BHTK, k_BHTK, v_BHTK, causal, block)``.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, block: int = 0
    ) -> Tensor:
        B, H, T, K = q.shape
        q, k, v = (x.reshape(B * H, T, K) for x in (q, k, v))
        q = q * (1 / math.sqrt(K))  # here, as the scores are many more
        out = torch.empty_like(q)
        ctx.chunks, kept = _chunks(T, causal, block), []
        for queries, keys, hidden in ctx.chunks:
            scores = torch.bmm(q[:, queries], _taken(k, keys).transpose(1, 2))
            if hidden is not None:
                scores[..., -hidden.shape[1] :].masked_fill_(hidden, -math.inf)
            probs = scores.softmax(-1)  # computed in float32, whatever the dtype
            torch.bmm(probs, _taken(v, keys), out=out[:, queries])
            kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(B, H, T, K)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        q, k, v, *kept = ctx.saved_tensors
        B, H, T, K = grad.shape
        grad = grad.reshape(B * H, T, K).to(v.dtype)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys, _), probs in zip(ctx.chunks, kept, strict=True):
            g = grad[:, queries]
            grad_probs = torch.bmm(g, _taken(v, keys).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            torch.bmm(grad_scores, _taken(k, keys), out=grad_q[:, queries])
            sizes = [run.stop - run.start for run in keys]
            for total, part in (
                (grad_k, torch.bmm(grad_scores.transpose(1, 2), q[:, queries])),
                (grad_v, torch.bmm(probs.transpose(1, 2), g)),
            ):
                for run, piece in zip(keys, part.split(sizes, 1), strict=True):
                    total[:, run] += piece
        grad_q *= 1 / math.sqrt(K)
        return *(x.view(B, H, T, K) for x in (grad_q, grad_k, grad_v)), None, None
