"""The recurrence of the selective state-space layers, in plain and in fast forms.

A state h of N numbers per channel moves by

    h_t = exp(delta_t a) h_{t-1} + delta_t x_t b_t,    y_t = <c_t, h_t> + skip x_t.

In Mamba-1 (arXiv:2312.00752) every channel has its own delta_t and a vector a of N decays; in
Mamba-2 (arXiv:2405.21060) a head of P channels shares one delta_t and one decay, so that a chunk
of steps becomes matrix products ("SSD").  `selective_scan` is the reference of all others.

Shapes: B batch, T positions, D channels (H heads of P in Mamba-2), N state size, Q steps of a
chunk, C chunks, G sequences at a time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

CHUNK = 64  # steps of an SSD chunk
CPU_CHUNK = 32  # the same in `FusedSSD`, where products with the decays count more
SEGMENT = 16  # steps of a chunk of the portable Mamba-1 scan
BLOCK = 2**18  # numbers of a temporary: small enough for a CPU's cache, large for Python's pace


def running_sum(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)``; as a product with a triangle where CUDA must be deterministic.

    CUDA's cumsum of floats has no deterministic form, and PyTorch then refuses to run it.
    """
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(dim)
    n = x.shape[dim]
    return (x.movedim(dim, -1) @ x.new_ones(n, n).triu_()).movedim(-1, dim)


def scan_step(
    h_BDN: Tensor, x_BD: Tensor, delta_BD: Tensor, a_DN: Tensor, b_B1N: Tensor, c_B1N: Tensor,
    skip_D: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of the recurrence: (y_BD, new h_BDN).

    Shapes may broadcast, and D may be two axes: heads share a delta (B, H, 1) and an a (H, 1, 1).
    """
    kept_BDN = torch.exp(delta_BD[..., None] * a_DN) * h_BDN
    h_BDN = torch.addcmul(kept_BDN, (delta_BD * x_BD)[..., None], b_B1N)
    return torch.addcmul((h_BDN * c_B1N).sum(-1), skip_D, x_BD), h_BDN


def selective_scan(
    x_BTD: Tensor, delta_BTD: Tensor, a_DN: Tensor, b_BTN: Tensor, c_BTN: Tensor, skip_D: Tensor
) -> Tensor:
    """y_BTD of the recurrence from h = 0, one step after the other: the reference.

    As in `scan_step`, shapes may broadcast and D may be two axes.
    """
    ones = [1] * (x_BTD.dim() - 2)
    b, c = (v.unflatten(1, (-1, *ones)) for v in (b_BTN, c_BTN))
    h_BDN = x_BTD.new_zeros(x_BTD.shape[0], *x_BTD.shape[2:], b_BTN.shape[-1])
    ys = []
    steps = zip(*(v.unbind(1) for v in (x_BTD, delta_BTD, b, c)), strict=True)
    for x_BD, delta_BD, b_B1N, c_B1N in steps:
        y_BD, h_BDN = scan_step(h_BDN, x_BD, delta_BD, a_DN, b_B1N, c_B1N, skip_D)
        ys.append(y_BD)
    return torch.stack(ys, 1)


def chunked_scan(
    x_BTD: Tensor, delta_BTD: Tensor, a_DN: Tensor, b_BTN: Tensor, c_BTN: Tensor, skip_D: Tensor
) -> Tensor:
    """`selective_scan` for any device: the steps of all segments at once, then segment by segment.

    Takes SEGMENT + T / SEGMENT sequential steps instead of T, and memory for all states.
    """
    B, T, D = x_BTD.shape
    pad = -T % SEGMENT  # delta = 0 keeps the state as it is
    drive, step, b, c = (
        F.pad(v, (0, 0, 0, pad)).unflatten(1, (-1, SEGMENT))
        for v in (delta_BTD * x_BTD, delta_BTD, b_BTN, c_BTN)
    )
    h = x_BTD.new_zeros(B, drive.shape[1], D, b_BTN.shape[2])
    within = []  # states of each segment as if it began with 0
    for i in range(SEGMENT):
        decay = torch.exp(step[:, :, i, :, None] * a_DN)
        h = decay * h + drive[:, :, i, :, None] * b[:, :, i, None]
        within.append(h)
    since = running_sum(step, 2)
    whole = torch.exp(since[:, :, -1, :, None] * a_DN)
    before = [torch.zeros_like(h[:, 0])]
    for j in range(h.shape[1] - 1):
        before.append(whole[:, j] * before[-1] + h[:, j])
    before = torch.stack(before, 1)
    ys = [
        ((within[i] + torch.exp(since[:, :, i, :, None] * a_DN) * before) @ c[:, :, i, :, None])
        for i in range(SEGMENT)
    ]
    return torch.stack(ys, 2)[..., 0].flatten(1, 2)[:, :T] + skip_D * x_BTD


def ssd(
    x_BTHP: Tensor, delta_BTH: Tensor, a_H: Tensor, b_BTN: Tensor, c_BTN: Tensor, skip_H: Tensor
) -> Tensor:
    """The Mamba-2 recurrence as matrix products over chunks: y_BTHP, equal to `selective_scan`.

    Within a chunk y = ((c b^T) * decays) (delta x); between chunks each passes on one state.
    """
    T = x_BTHP.shape[1]
    pad = -T % CHUNK
    x, b, c, delta = x_BTHP, b_BTN, c_BTN, delta_BTH
    if pad:  # delta = 0 keeps the state as it is
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
        b, c, delta = (F.pad(v, (0, 0, 0, pad)) for v in (b, c, delta))
    b_BCQN, c_BCQN = (v.unflatten(1, (-1, CHUNK)) for v in (b, c))
    delta_BHCQ = delta.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2)
    x_BHCQP = x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)
    driven_BHCQP = x_BHCQP * delta_BHCQ[..., None]
    since_BHCQ = running_sum(
        delta_BHCQ * a_H[:, None, None], -1
    )  # log decay from the chunk's start
    total_BHC = since_BHCQ[..., -1]
    within_BHCQQ = _lower_exp(since_BHCQ[..., :, None] - since_BHCQ[..., None, :], 0)
    pairs_BCQQ = c_BCQN @ b_BCQN.mT
    y_BHCQP = (within_BHCQQ * pairs_BCQQ[:, None]) @ driven_BHCQP
    if total_BHC.shape[-1] > 1:
        left_BHCQ = torch.exp(total_BHC[..., None] - since_BHCQ)
        adds_BHCPN = (driven_BHCQP * left_BHCQ[..., None]).mT @ b_BCQN[:, None]
        ends_BHC = running_sum(total_BHC, -1)
        # Not ends - total: its last bit would depend on the bytes of the chunk itself.
        starts_BHC = F.pad(ends_BHC[..., :-1], (1, 0))
        # What chunk j added reaches the start of chunk i decayed by all chunks between.
        carry_BHCC = _lower_exp(starts_BHC[..., :, None] - ends_BHC[..., None, :], -1)
        states_BHCPN = (carry_BHCC @ adds_BHCPN.flatten(-2)).view_as(adds_BHCPN)
        y_BHCQP = y_BHCQP + torch.exp(since_BHCQ)[..., None] * (c_BCQN[:, None] @ states_BHCPN.mT)
    y_BTHP = y_BHCQP.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]
    return y_BTHP + skip_H[:, None] * x_BTHP


def _lower_exp(x: Tensor, diagonal: int) -> Tensor:
    """exp of the lower triangle, 0 above; masked first, for what is above may overflow."""
    keep = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril_(diagonal)
    return torch.exp(x.masked_fill(~keep, -math.inf))


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


def last_state(x_BTD: Tensor, delta_BTD: Tensor, a_DN: Tensor, b_BTN: Tensor) -> Tensor:
    """h_BDN after the last step of `selective_scan`, without its loop."""
    left_BTD, drive_BTD = _after(delta_BTD), delta_BTD * x_BTD
    states = [
        ((left_BTD * a_D).exp_().mul_(drive_BTD) * b_BT1).sum(1)
        for a_D, b_BT1 in zip(a_DN.unbind(1), b_BTN.split(1, 2), strict=True)
    ]
    return torch.stack(states, 2)


def last_state_of_heads(x_BTHP: Tensor, delta_BTH: Tensor, a_H: Tensor, b_BTN: Tensor) -> Tensor:
    """h_BDN after the last step of `ssd`."""
    weights_BTH = torch.exp(_after(delta_BTH) * a_H) * delta_BTH
    return (weights_BTH[..., None] * x_BTHP).flatten(2).mT @ b_BTN


def _after(delta_BTD: Tensor) -> Tensor:
    """Sums of the deltas after each step; from the end, where they are small and must be exact."""
    return running_sum(F.pad(delta_BTD[:, 1:], (0, 0, 0, 1)).flip(1), 1).flip(1)
