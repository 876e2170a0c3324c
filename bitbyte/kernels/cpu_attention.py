"""`transformer.plain_attention` for CPUs: chunks of queries, forward and backward.

Shapes: B batch, T positions, S keys, H heads, K head width.
"""

import math

import torch
from torch import Tensor

CHUNK = 128  # queries per chunk
LIMIT_CHUNK = 64  # the same where each query has a limit of its own


def _chunks(T: int, S: int, causal: bool, limit_BT: Tensor | None) -> list[tuple]:
    """(queries, how many keys they see between them, what is hidden of the last of these) of each
    chunk.
    """
    size = CHUNK if limit_BT is None else LIMIT_CHUNK
    every = [slice(a, min(a + size, T)) for a in range(0, T, size)]
    if limit_BT is not None:
        chunks = []
        for queries in every:
            limit_BT1 = limit_BT[:, queries, None]
            low, high = int(limit_BT1.min()) + 1, int(limit_BT1.max()) + 1
            at = torch.arange(low, high, device=limit_BT.device)
            chunks.append((queries, high, (at > limit_BT1)[:, None]))
        return chunks
    if not causal:
        return [(queries, S, None) for queries in every]
    future = torch.ones(size, size, dtype=torch.bool).triu_(1)
    sizes = [queries.stop - queries.start for queries in every]
    return [(q, q.stop, future[:n, :n]) for q, n in zip(every, sizes, strict=True)]


class ChunkedAttention(torch.autograd.Function):
    """Attention for CPUs: chunks of queries against exactly the keys they may see.

    With ``causal``, the half of the scores above the diagonal is skipped; with ``limit_BT``, which
    may be of more queries than there are keys, what lies after each query's limit.  The
    probabilities are kept for the backward pass instead of being computed again.
    ``ChunkedAttention.apply(q_BHTK, k_BHSK, v_BHSK, causal, limit_BT)``.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, limit: Tensor | None = None
    ) -> Tensor:
        B, H, T, K = q.shape
        S = k.shape[2]
        q, k, v = (x.reshape(B * H, -1, K) for x in (q, k, v))
        q = q * (1 / math.sqrt(K))  # here, as the scores are many more
        out = torch.empty_like(q)
        ctx.chunks, kept = _chunks(T, S, causal, limit), []
        for queries, stop, hidden in ctx.chunks:
            scores = torch.bmm(q[:, queries], k[:, :stop].transpose(1, 2))
            if hidden is not None:
                last = scores.view(B, H, -1, stop)[..., stop - hidden.shape[-1] :]
                last.masked_fill_(hidden, -math.inf)
            probs = scores.softmax(-1)  # computed in float32, whatever the dtype
            torch.bmm(probs, v[:, :stop], out=out[:, queries])
            kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(B, H, T, K)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        q, k, v, *kept = ctx.saved_tensors
        B, H, T, K = grad.shape
        grad = grad.reshape(B * H, T, K).to(v.dtype)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, stop, _), probs in zip(ctx.chunks, kept, strict=True):
            g = grad[:, queries]
            grad_probs = torch.bmm(g, v[:, :stop].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            torch.bmm(grad_scores, k[:, :stop], out=grad_q[:, queries])
            grad_k[:, :stop] += torch.bmm(grad_scores.transpose(1, 2), q[:, queries])
            grad_v[:, :stop] += torch.bmm(probs.transpose(1, 2), g)
        grad_q *= 1 / math.sqrt(K)
        return *(x.view(B, H, -1, K) for x in (grad_q, grad_k, grad_v)), None, None
