"""`transformer.plain_attention` for CPUs: blocks of queries, forward and backward.

Shapes: B batch, T positions, S keys, H heads, K head width.
"""

import math

import torch
from torch import Tensor

CHUNK = 128  # queries per block


class ChunkedAttention(torch.autograd.Function):
    """Attention for CPUs: blocks of queries against exactly the keys they may see.

    With ``causal``, the half of the scores above the diagonal is skipped.  The probabilities are
    kept for the backward pass instead of being computed again.
    ``ChunkedAttention.apply(q_BHTK, k_BHTK, v_BHTK, causal)``.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
        B, H, T, K = q.shape
        q, k, v = (x.reshape(B * H, T, K) for x in (q, k, v))
        q = q * (1 / math.sqrt(K))  # here, as the scores are many more
        out = torch.empty_like(q)
        kept = []
        for start in range(0, T, CHUNK):
            stop = min(start + CHUNK, T)
            seen = stop if causal else T
            scores = torch.bmm(q[:, start:stop], k[:, :seen].transpose(1, 2))
            if causal:
                future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu_(1)
                scores[:, :, start:].masked_fill_(future, -math.inf)
            probs = scores.softmax(-1)  # computed in float32, whatever the dtype
            torch.bmm(probs, v[:, :seen], out=out[:, start:stop])
            kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(B, H, T, K)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        q, k, v, *kept = ctx.saved_tensors
        B, H, T, K = grad.shape
        grad = grad.reshape(B * H, T, K).to(v.dtype)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, probs in zip(range(0, T, CHUNK), kept, strict=True):
            stop, seen = min(start + CHUNK, T), probs.shape[-1]
            g = grad[:, start:stop]
            grad_probs = torch.bmm(g, v[:, :seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            torch.bmm(grad_scores, k[:, :seen], out=grad_q[:, start:stop])
            grad_k[:, :seen] += torch.bmm(grad_scores.transpose(1, 2), q[:, start:stop])
            grad_v[:, :seen] += torch.bmm(probs.transpose(1, 2), g)
        grad_q *= 1 / math.sqrt(K)
        return *(x.view(B, H, T, K) for x in (grad_q, grad_k, grad_v)), None
