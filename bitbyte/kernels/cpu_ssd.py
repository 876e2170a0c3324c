"""`scans.ssd` for CPUs, one block after another, forward and backward.

A block is one chunk of Q steps of G sequences.  Within a chunk the recurrence is a product with a
lower triangle, weights_ts = decay(s..t) * (c_t . b_s) * delta_s; between chunks only the state is
handed on (Dao and Gu, arXiv:2405.21060, section 6).

Shapes: B batch, T positions, H heads of P channels (D in all), N state size, Q steps of a chunk,
C chunks, G sequences at a time.
"""

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

CPU_CHUNK = 32  # steps; shorter than `scans.CHUNK`, as the Q x Q weights cost more here
BLOCK = 2**18  # numbers in a temporary: few enough for the cache, enough to hide Python's overhead


class FusedSSD(torch.autograd.Function):
    """`ssd` for CPUs, one block after another, so that a block's temporaries stay in the cache.

    In float32 (or float64) even under autocast; a must be negative.  The inputs, the output and the
    states between chunks are kept for the backward pass; all else is computed again.
    ``FusedSSD.apply(x_BTHP, delta_BTH, a_H, b_BTN, c_BTN, skip_H)``.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, delta, a_H, b, c, skip_H):
        y = x.new_empty(x.shape)
        log_decay, from_start, to_end, total = _decays(delta, a_H)
        to_end *= delta[..., None]
        starts = x.new_zeros(*total.shape[:2], *x.shape[2:], b.shape[2])  # states before chunks
        for rows, i, steps in _blocks(x):
            x_GQHP, b_GQN, c_GQN, y_GQHP = (v[rows, steps] for v in (x, b, c, y))
            weights_GHQQ = _between(log_decay[rows, steps]).mul_((c_GQN @ b_GQN.mT)[:, None])
            weights_GHQQ *= delta[rows, steps].mT[:, :, None]
            weights_GHQQ.diagonal(dim1=2, dim2=3).add_(skip_H[:, None])  # skip * x
            intra_GQHP = (weights_GHQQ @ x_GQHP.transpose(1, 2)).transpose(1, 2)
            inter_GQHP = (c_GQN @ starts[rows, i].flatten(1, 2).mT).view_as(x_GQHP)
            torch.addcmul(intra_GQHP, inter_GQHP, from_start[rows, steps], out=y_GQHP)
            if i + 1 < starts.shape[1]:
                added_GDN = (x_GQHP * to_end[rows, steps]).flatten(2).mT @ b_GQN
                start, end = starts[rows, i], starts[rows, i + 1]
                torch.addcmul(added_GDN.view_as(start), start, total[rows, i], out=end)
        ctx.save_for_backward(x, delta, a_H, b, c, skip_H, y, starts)
        return y

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, delta, a_H, b, c, skip_H, y, starts = ctx.saved_tensors
        grad_x, grad_b, grad_c = (v.new_empty(v.shape) for v in (x, b, c))
        # Sums over P: of y's gradient times x and times y, of x times the gradient of u = delta x.
        gx, gy, xu = (torch.empty_like(delta) for _ in range(3))
        log_decay, from_start, to_end, total = _decays(delta, a_H)
        to_end_delta = to_end * delta[..., None]
        grad_total = torch.zeros_like(total)
        grad_end = None  # of the state at the end of the chunk; nothing reads the last one
        for rows, i, steps in reversed(list(_blocks(x))):
            g_GQHP, x_GQHP, b_GQN, c_GQN = (v[rows, steps] for v in (grad, x, b, c))
            between_GHQQ = _between(log_decay[rows, steps])
            weights_GHQQ = between_GHQQ * (c_GQN @ b_GQN.mT)[:, None]
            # Inside the chunk: y = weights u, with weights = decays * (c b^T).
            g_GHQP = g_GQHP.transpose(1, 2).contiguous()
            grad_u_GQHP = (weights_GHQQ.mT @ g_GHQP).transpose(1, 2)
            # The copy costs less than a batched product with a transposed right side.
            grad_weights_GHQQ = g_GHQP @ x_GQHP.permute(0, 2, 3, 1).contiguous()
            gx[rows, steps] = grad_weights_GHQQ.diagonal(dim1=2, dim2=3).mT
            between_GHQQ *= delta[rows, steps].mT[:, :, None]
            grad_pairs_GQQ = grad_weights_GHQQ.mul_(between_GHQQ).sum(1)
            grad_b_GQN, grad_c_GQN = grad_pairs_GQQ.mT @ c_GQN, grad_pairs_GQQ @ b_GQN
            # Through the state at the end, to which u adds to_end * u b^T ...
            if grad_end is not None:
                grad_end_GDN = grad_end.flatten(1, 2)
                after_GQHP = (b_GQN @ grad_end_GDN.mT).view_as(x_GQHP)
                grad_u_GQHP.addcmul_(after_GQHP, to_end[rows, steps])
                grad_b_GQN += (x_GQHP * to_end_delta[rows, steps]).flatten(2) @ grad_end_GDN
                grad_total[rows, i] = (grad_end * starts[rows, i + 1]).sum((-1, -2), True)
            # ... and through the state at the start, of which y reads from_start * c h.
            grad_start = None
            if i:
                g_from_start_GQD = (g_GQHP * from_start[rows, steps]).flatten(2)
                grad_c_GQN += g_from_start_GQD @ starts[rows, i].flatten(1, 2)
                grad_start = (g_from_start_GQD.mT @ c_GQN).view_as(starts[rows, i])
                if grad_end is not None:
                    grad_start.addcmul_(grad_end, total[rows, i])
            grad_end = grad_start
            torch.sum(g_GQHP * y[rows, steps], -1, out=gy[rows, steps])
            torch.sum(grad_u_GQHP * x_GQHP, -1, out=xu[rows, steps])
            grad_u_GQHP *= delta[rows, steps, :, None]
            torch.addcmul(grad_u_GQHP, g_GQHP, skip_H[:, None], out=grad_x[rows, steps])
            grad_b[rows, steps], grad_c[rows, steps] = grad_b_GQN, grad_c_GQN
        # All decays are exp of differences of log_decay.  y_t (but for its skip) has a factor
        # exp(log_decay_t), and what u_s adds to anything a factor exp(-log_decay_s), so their
        # gradients are y . g and -u . grad_u, without another Q x Q product; the total decay of a
        # chunk is a factor of the state that is handed on.
        grad_log_decay = gy - skip_H * gx - delta * xu
        full = x.shape[1] // CPU_CHUNK
        grad_log_decay[:, CPU_CHUNK - 1 :: CPU_CHUNK] += grad_total[:, :full, :, 0, 0]
        chunks = grad_log_decay.split(CPU_CHUNK, 1)
        # log_decay is a running sum within each chunk; its transpose is a running sum from the end.
        grad_log = torch.cat([chunk.flip(1).cumsum(1).flip(1) for chunk in chunks], 1)
        grad_delta, grad_a = xu + grad_log * a_H, (grad_log * delta).sum((0, 1))
        return grad_x, grad_delta, grad_a, grad_b, grad_c, gx.sum((0, 1))


def _blocks(x_BTHP: Tensor):
    """(sequences, index of the chunk, its steps) of every block, each sequence in time order."""
    B, T, H, P = x_BTHP.shape
    G = max(1, BLOCK // (CPU_CHUNK * H * P))
    for first in range(0, B, G):
        for i, start in enumerate(range(0, T, CPU_CHUNK)):
            yield slice(first, first + G), i, slice(start, min(start + CPU_CHUNK, T))


def _decays(delta_BTH: Tensor, a_H: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log decays from the start of the chunk; decays from its start, to its end, and of all of it.

    log_decay_BTH, from_start_BTH1, to_end_BTH1, total_BCH11.
    """
    chunks = [log.cumsum(1) for log in (delta_BTH * a_H).split(CPU_CHUNK, 1)]
    log_decay_BTH = torch.cat(chunks, 1)
    end_BTH = _exp_(torch.cat([chunk[:, -1:] - chunk for chunk in chunks], 1))
    total_BCH = _exp_(torch.stack([chunk[:, -1] for chunk in chunks], 1))
    start_BTH = _exp_(log_decay_BTH.clone())
    return log_decay_BTH, start_BTH[..., None], end_BTH[..., None], total_BCH[..., None, None]


def _between(log_decay_GQH: Tensor) -> Tensor:
    """Decays between any two steps of a chunk: a lower triangle GHQQ."""
    log_decay_GHQ = log_decay_GQH.mT.contiguous()
    return _exp_(log_decay_GHQ[..., :, None] - log_decay_GHQ[..., None, :]).tril_()


def _exp_(log_decay: Tensor) -> Tensor:
    """exp in place, clamped to 1e-26..1: CPUs are slow with the subnormals that would follow."""
    return log_decay.clamp_(-60, 0).exp_()
