"""The recurrence of the selective state-space layers, in plain and fast forms.

A state h of N numbers per channel evolves as

    h_t = exp(delta_t a) h_{t-1} + delta_t x_t b_t,    y_t = <c_t, h_t> + skip x_t.

In Mamba-1 (arXiv:2312.00752) every channel has its own delta_t and a vector a of N decays; in
Mamba-2 (arXiv:2405.21060) a head of P channels shares one delta_t and one decay, so that a chunk
of steps becomes matrix products ("SSD").  `selective_scan` is the reference for all others.

Shapes: B batch, T positions, D channels (H heads of P in Mamba-2), N state size, Q steps of a
chunk, C chunks, G sequences at a time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # steps of an SSD chunk
SEGMENT = 16  # steps of a chunk of the portable Mamba-1 scan


def running_sum(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)``, by `_triangular_sum` where an accelerator must be deterministic.

    CUDA's cumsum of floats has no deterministic form, so PyTorch would refuse to run it.
    """
    if x.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(dim)
    return _triangular_sum(x, dim)


def _triangular_sum(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)`` as a product with a triangular matrix."""
    n = x.shape[dim]
    return (x.movedim(dim, -1) @ x.new_ones(n, n).triu_()).movedim(-1, dim)


def scan_step(
    h_BDN: Tensor, x_BD: Tensor, delta_BD: Tensor, a_DN: Tensor, b_B1N: Tensor, c_B1N: Tensor,
    skip_D: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of the recurrence: (y_BD, new h_BDN).

    Shapes may broadcast, and D may be two axes: a head has one delta (B, H, 1) and one a (H, 1, 1).
    """
    kept_BDN = torch.exp(delta_BD[..., None] * a_DN) * h_BDN
    h_BDN = torch.addcmul(kept_BDN, (delta_BD * x_BD)[..., None], b_B1N)
    return torch.addcmul((h_BDN * c_B1N).sum(-1), skip_D, x_BD), h_BDN


def selective_scan(
    x_BTD: Tensor, delta_BTD: Tensor, a_DN: Tensor, b_BTN: Tensor, c_BTN: Tensor, skip_D: Tensor
) -> Tensor:
    """y_BTD of the recurrence from h = 0, one step at a time: the reference.

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
    """`selective_scan` for any device: step by step in all segments at once, then across segments.

    Takes SEGMENT + T / SEGMENT sequential steps instead of T, and memory for all states.
    """
    B, T, D = x_BTD.shape
    pad = -T % SEGMENT  # delta = 0 keeps the state as it is
    drive, step, b, c = (
        F.pad(v, (0, 0, 0, pad)).unflatten(1, (-1, SEGMENT))
        for v in (delta_BTD * x_BTD, delta_BTD, b_BTN, c_BTN)
    )
    h = x_BTD.new_zeros(B, drive.shape[1], D, b_BTN.shape[2])
    states = []  # of each segment as if it started from 0
    for i in range(SEGMENT):
        decay = torch.exp(step[:, :, i, :, None] * a_DN)
        h = decay * h + drive[:, :, i, :, None] * b[:, :, i, None]
        states.append(h)
    delta_sum = running_sum(step, 2)  # from the start of the segment
    total_decay = torch.exp(delta_sum[:, :, -1, :, None] * a_DN)
    start = [torch.zeros_like(h[:, 0])]  # the true state at the start of each segment
    for j in range(h.shape[1] - 1):
        start.append(total_decay[:, j] * start[-1] + h[:, j])
    start = torch.stack(start, 1)
    ys = [
        ((states[i] + torch.exp(delta_sum[:, :, i, :, None] * a_DN) * start) @ c[:, :, i, :, None])
        for i in range(SEGMENT)
    ]
    return torch.stack(ys, 2)[..., 0].flatten(1, 2)[:, :T] + skip_D * x_BTD


def ssd(
    x_BTHP: Tensor, delta_BTH: Tensor, a_H: Tensor, b_BTN: Tensor, c_BTN: Tensor, skip_H: Tensor
) -> Tensor:
    """The Mamba-2 recurrence as matrix products over chunks: y_BTHP, equal to `selective_scan`.

    Within a chunk y = ((c b^T) * decays) (delta x); only one state is passed between chunks.
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
    # Log of the decay from the start of the chunk to each step.
    log_BHCQ = running_sum(delta_BHCQ * a_H[:, None, None], -1)
    total_BHC = log_BHCQ[..., -1]
    decay_BHCQQ = _lower_exp(log_BHCQ[..., :, None] - log_BHCQ[..., None, :], 0)
    pairs_BCQQ = c_BCQN @ b_BCQN.mT
    y_BHCQP = (decay_BHCQQ * pairs_BCQQ[:, None]) @ driven_BHCQP
    if total_BHC.shape[-1] > 1:
        to_end_BHCQ = torch.exp(total_BHC[..., None] - log_BHCQ)
        adds_BHCPN = (driven_BHCQP * to_end_BHCQ[..., None]).mT @ b_BCQN[:, None]
        ends_BHC = running_sum(total_BHC, -1)
        # Not ends - total: its last bit would depend on the bytes of the chunk itself.
        starts_BHC = F.pad(ends_BHC[..., :-1], (1, 0))
        # What chunk j added reaches the start of chunk i, decayed by the chunks in between.
        carry_BHCC = _lower_exp(starts_BHC[..., :, None] - ends_BHC[..., None, :], -1)
        states_BHCPN = (carry_BHCC @ adds_BHCPN.flatten(-2)).view_as(adds_BHCPN)
        y_BHCQP = y_BHCQP + torch.exp(log_BHCQ)[..., None] * (c_BCQN[:, None] @ states_BHCPN.mT)
    y_BTHP = y_BHCQP.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]
    return y_BTHP + skip_H[:, None] * x_BTHP


def _lower_exp(x: Tensor, diagonal: int) -> Tensor:
    """exp of the lower triangle, 0 above; masked first, as the entries above may overflow."""
    keep = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril_(diagonal)
    return torch.exp(x.masked_fill(~keep, -math.inf))


def last_state(x_BTD: Tensor, delta_BTD: Tensor, a_DN: Tensor, b_BTN: Tensor) -> Tensor:
    """h_BDN after the last step of `selective_scan`, without its loop."""
    rest_BTD, drive_BTD = _after(delta_BTD), delta_BTD * x_BTD
    states = [
        ((rest_BTD * a_D).exp_().mul_(drive_BTD) * b_BT1).sum(1)
        for a_D, b_BT1 in zip(a_DN.unbind(1), b_BTN.split(1, 2), strict=True)
    ]
    return torch.stack(states, 2)


def last_state_of_heads(x_BTHP: Tensor, delta_BTH: Tensor, a_H: Tensor, b_BTN: Tensor) -> Tensor:
    """h_BDN after the last step of `ssd`."""
    weights_BTH = torch.exp(_after(delta_BTH) * a_H) * delta_BTH
    return (weights_BTH[..., None] * x_BTHP).flatten(2).mT @ b_BTN


def _after(delta_BTD: Tensor) -> Tensor:
    """Sum of the deltas after each step, from the end: small sums matter most and must be exact."""
    return running_sum(F.pad(delta_BTD[:, 1:], (0, 0, 0, 1)).flip(1), 1).flip(1)
