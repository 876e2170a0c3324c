"""For CPUs: `scans.ssd` block after block, forward and backward.

Shapes: B batch, T positions, H heads of P channels, N state size, Q steps of a chunk, C chunks,
G sequences at a time.
"""

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

CPU_CHUNK = 32  # the same in `FusedSSD`, where products with the decays count more
BLOCK = 2**18  # numbers of a temporary: small enough for a CPU's cache, large for Python's pace


class FusedSSD(torch.autograd.Function):
    """`ssd` for CPUs: block after block, so that the temporaries of one stay in the cache.

    In float32 (or float64) under autocast too; a must be negative.  Kept for the backward pass are
    the inputs, the output and the states between chunks; all else is computed again.
    ``FusedSSD.apply(x_BTHP, delta_BTH, a_H, b_BTN, c_BTN, skip_H)``.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, delta, a_H, b, c, skip_H):
        y = x.new_empty(x.shape)
        since, enter, left, whole = _decays(delta, a_H)
        left *= delta[..., None]
        starts = x.new_zeros(*whole.shape[:2], *x.shape[2:], b.shape[2])  # states before chunks
        for rows, i, now in _blocks(x):
            x_GQHP, b_GQN, c_GQN, y_GQHP = (v[rows, now] for v in (x, b, c, y))
            weights_GHQQ = _between(since[rows, now]).mul_((c_GQN @ b_GQN.mT)[:, None])
            weights_GHQQ *= delta[rows, now].mT[:, :, None]
            weights_GHQQ.diagonal(dim1=2, dim2=3).add_(skip_H[:, None])
            within_GQHP = (weights_GHQQ @ x_GQHP.transpose(1, 2)).transpose(1, 2)
            before_GQHP = (c_GQN @ starts[rows, i].flatten(1, 2).mT).view_as(x_GQHP)
            torch.addcmul(within_GQHP, before_GQHP, enter[rows, now], out=y_GQHP)
            if i + 1 < starts.shape[1]:
                added_GDN = (x_GQHP * left[rows, now]).flatten(2).mT @ b_GQN
                start, end = starts[rows, i], starts[rows, i + 1]
                torch.addcmul(added_GDN.view_as(start), start, whole[rows, i], out=end)
        ctx.save_for_backward(x, delta, a_H, b, c, skip_H, y, starts)
        return y

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, delta, a_H, b, c, skip_H, y, starts = ctx.saved_tensors
        grad_x, grad_b, grad_c = (v.new_empty(v.shape) for v in (x, b, c))
        # Products over P: of y's gradient with x and with y, of x with that of u = delta x.
        gx, gy, xu = (torch.empty_like(delta) for _ in range(3))
        since, enter, left, whole = _decays(delta, a_H)
        left_driven = left * delta[..., None]
        grad_whole = torch.zeros_like(whole)
        grad_end = None  # of the state after the chunk; nothing reads the last one
        for rows, i, now in reversed(list(_blocks(x))):
            g_GQHP, x_GQHP, b_GQN, c_GQN = (v[rows, now] for v in (grad, x, b, c))
            between_GHQQ = _between(since[rows, now])
            weights_GHQQ = between_GHQQ * (c_GQN @ b_GQN.mT)[:, None]
            g_GHQP = g_GQHP.transpose(1, 2).contiguous()
            grad_u_GQHP = (weights_GHQQ.mT @ g_GHQP).transpose(1, 2)
            # The copy costs less than a batched product with a transposed right side.
            grad_weights_GHQQ = g_GHQP @ x_GQHP.permute(0, 2, 3, 1).contiguous()
            gx[rows, now] = grad_weights_GHQQ.diagonal(dim1=2, dim2=3).mT
            between_GHQQ *= delta[rows, now].mT[:, :, None]
            grad_pairs_GQQ = grad_weights_GHQQ.mul_(between_GHQQ).sum(1)
            grad_b_GQN, grad_c_GQN = grad_pairs_GQQ.mT @ c_GQN, grad_pairs_GQQ @ b_GQN
            if grad_end is not None:
                grad_end_GDN = grad_end.flatten(1, 2)
                after_GQHP = (b_GQN @ grad_end_GDN.mT).view_as(x_GQHP)
                grad_u_GQHP.addcmul_(after_GQHP, left[rows, now])
                grad_b_GQN += (x_GQHP * left_driven[rows, now]).flatten(2) @ grad_end_GDN
                grad_whole[rows, i] = (grad_end * starts[rows, i + 1]).sum((-1, -2), True)
            grad_start = None
            if i:
                entered_GQD = (g_GQHP * enter[rows, now]).flatten(2)
                grad_c_GQN += entered_GQD @ starts[rows, i].flatten(1, 2)
                grad_start = (entered_GQD.mT @ c_GQN).view_as(starts[rows, i])
                if grad_end is not None:
                    grad_start.addcmul_(grad_end, whole[rows, i])
            grad_end = grad_start
            torch.sum(g_GQHP * y[rows, now], -1, out=gy[rows, now])
            torch.sum(grad_u_GQHP * x_GQHP, -1, out=xu[rows, now])
            grad_u_GQHP *= delta[rows, now, :, None]
            torch.addcmul(grad_u_GQHP, g_GQHP, skip_H[:, None], out=grad_x[rows, now])
            grad_b[rows, now], grad_c[rows, now] = grad_b_GQN, grad_c_GQN
        # y_t grows with the log decay up to t, what x_s adds shrinks with the log decay up to s.
        grad_since = gy - skip_H * gx - delta * xu
        full = x.shape[1] // CPU_CHUNK
        grad_since[:, CPU_CHUNK - 1 :: CPU_CHUNK] += grad_whole[:, :full, :, 0, 0]
        chunks = grad_since.split(CPU_CHUNK, 1)
        grad_log = torch.cat([chunk.flip(1).cumsum(1).flip(1) for chunk in chunks], 1)
        grad_delta, grad_a = xu + grad_log * a_H, (grad_log * delta).sum((0, 1))
        return grad_x, grad_delta, grad_a, grad_b, grad_c, gx.sum((0, 1))


def _blocks(x_BTHP: Tensor):
    """(sequences, number of the chunk, its steps) of all blocks, in the order of time."""
    B, T, H, P = x_BTHP.shape
    G = max(1, BLOCK // (CPU_CHUNK * H * P))
    for first in range(0, B, G):
        for i, start in enumerate(range(0, T, CPU_CHUNK)):
            yield slice(first, first + G), i, slice(start, min(start + CPU_CHUNK, T))


def _decays(delta_BTH: Tensor, a_H: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log decay since the start of the chunk; decays from its start, to its end, and of all.

    since_BTH, enter_BTH1, left_BTH1, whole_BCH11.
    """
    chunks = [log.cumsum(1) for log in (delta_BTH * a_H).split(CPU_CHUNK, 1)]
    since_BTH = torch.cat(chunks, 1)
    left_BTH = _exp_(torch.cat([since[:, -1:] - since for since in chunks], 1))
    whole_BCH = _exp_(torch.stack([since[:, -1] for since in chunks], 1))
    enter_BTH = _exp_(since_BTH.clone())
    return since_BTH, enter_BTH[..., None], left_BTH[..., None], whole_BCH[..., None, None]


def _between(since_GQH: Tensor) -> Tensor:
    """Decays between the steps of a chunk: a lower triangle GHQQ."""
    since_GHQ = since_GQH.mT.contiguous()
    return _exp_(since_GHQ[..., :, None] - since_GHQ[..., None, :]).tril_()


def _exp_(log_decay: Tensor) -> Tensor:
    """exp in place, within 1e-26..1: with tinier numbers, once subnormal, a CPU is slow."""
    return log_decay.clamp_(-60, 0).exp_()
