"""What a window costs under a masked-diffusion model: a bound, and two codes that can be decoded.

A denoiser has no next byte, so one forward pass does not give the cost of a window.  These three
costs are honest: none looks at a byte before paying for it.  A model with a ``block`` size pays for
each block of a window given the blocks before it, any other for the whole window at once; in the
following S is the number of scored bytes of a block or of the window.

``upper_bound``
    The variational bound in its any-order form: hide k of S bytes, k uniform on 1..S, and pay
    S / k times the nats of the hidden ones.  Its mean over masks is at least the cost under the
    model's any-order distribution (arXiv:2110.02037, arXiv:2406.07524).
``chain_rule:left_to_right`` and ``chain_rule:confidence``
    Reveal the bytes one by one (or ``per_pass`` at a time) in an order that depends on revealed
    bytes alone, and pay for each under the prediction at that moment: the exact length of a code
    that a decoder can follow (arXiv:2603.01367).  Orders that look at hidden bytes give smaller
    numbers but no code, so there are none here.

A model is anything with ``logits(ids_BT) -> logits_BTV`` where id 256 (MASK) means hidden, or with
a ``block`` and ``block_logits``, see `models.BlockDiffusionLM`.
Shapes: B windows, T bytes of a window, S its scored bytes (the last ones), R draws of a window,
V byte values.  Log-probabilities are computed in float32 on the model's device, as Apple's GPUs
have no float64; sums and weights in float64 on the CPU.
"""

import itertools

import torch
from torch import Tensor

from bitbyte.files import BitbyteError
from bitbyte.vocab import MASK

ORDERS = ("left_to_right", "confidence")
GOLDEN = 0.6180339887498949  # its multiples modulo 1 are spread evenly, however many are taken


def nats(logits_BNV: Tensor, ids_BN: Tensor) -> Tensor:
    """nats_BN of the bytes under these logits, in float32 or better."""
    wide = torch.promote_types(logits_BNV.dtype, torch.float32)
    logprobs_BNV = logits_BNV.to(wide).log_softmax(-1)
    return -logprobs_BNV.gather(-1, ids_BN[..., None])[..., 0]


def draw_masks(n_scored: int, draws: int, index: int, seed: int) -> Tensor:
    """hidden_RS for window number ``index``: a pure function of its arguments.

    The number of hidden bytes is uniform on 1..S in every draw, but spread evenly over the draws
    of a window and over windows, so that it adds little noise of its own.
    """
    shift = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = torch.Generator().manual_seed((seed * 1_000_003 + index * 7919 + 1) % 2**63)
    level_R = (shift + GOLDEN * index + torch.arange(draws, dtype=torch.float64) / draws) % 1
    k_R = (level_R * n_scored).long().clamp_(max=n_scored - 1) + 1
    rank_RS = torch.rand(draws, n_scored, generator=noise).argsort(1).argsort(1)
    return rank_RS < k_R[:, None]


def spans(model, T: int, n_scored: int) -> list[tuple[int, int]]:
    """(start, stop) of the scored bytes of each block, or of all, as offsets from the first one."""
    first, size = T - n_scored, getattr(model, "block", 0) or T
    cuts = [first, *range((first // size + 1) * size, T, size), T]
    return [(a - first, b - first) for a, b in itertools.pairwise(cuts)]


def _logits(model, masked_BT: Tensor, ids_BT: Tensor) -> Tensor:
    if getattr(model, "block", 0):
        return model.block_logits(masked_BT, ids_BT)
    return model.logits(masked_BT)


def upper_bound(
    model, ids_BT: Tensor, n_scored: int, *, draws: int, indices: list[int], seed: int = 0
) -> Tensor:
    """nats_BS (float64, CPU): the mean over ``draws`` masks of the bound on the last S bytes.

    The bytes before them are given.  ``indices`` are the numbers of the windows; masks depend on
    them alone, so the result does not depend on how windows are batched.
    """
    B, S, parts = len(ids_BT), n_scored, spans(model, ids_BT.shape[1], n_scored)
    total_BS = torch.zeros(B, S, dtype=torch.float64)
    hidden_RBS = torch.empty(draws, B, S, dtype=torch.bool)
    weight_RBS = torch.empty(draws, B, S, dtype=torch.float64)
    for row, index in enumerate(indices):
        for i, (a, b) in enumerate(parts):
            hidden_Rn = draw_masks(b - a, draws, index * len(parts) + i, seed)
            hidden_RBS[:, row, a:b] = hidden_Rn
            weight_RBS[:, row, a:b] = (b - a) / hidden_Rn.sum(1, keepdim=True).double()
    for hidden_BS, weight_BS in zip(hidden_RBS, weight_RBS, strict=True):
        masked_BT = ids_BT.clone()
        masked_BT[:, -S:].masked_fill_(hidden_BS.to(ids_BT.device), MASK)
        logits_BSV = _logits(model, masked_BT, ids_BT)[:, -S:]
        total_BS += nats(logits_BSV, ids_BT[:, -S:]).cpu().double() * hidden_BS * weight_BS
    return total_BS / draws


def chain_rule(model, ids_BT: Tensor, n_scored: int, *, order: str, per_pass: int = 1) -> Tensor:
    """nats_BS (float64, CPU): what the last S bytes cost when revealed one after the other.

    ``confidence`` next reveals the position where the two likeliest bytes differ most in
    probability, on ties the first.  The ``per_pass`` bytes of one pass do not see each other:
    fewer passes, more nats.  The blocks of a window advance side by side, as each is given the
    others.
    """
    if order not in ORDERS:
        raise BitbyteError(f"no order {order!r}; choose from {', '.join(ORDERS)}")
    if per_pass < 1:
        raise BitbyteError(f"per_pass is {per_pass}; it must be at least 1")
    S, parts = n_scored, spans(model, ids_BT.shape[1], n_scored)
    masked_BT = ids_BT.clone()
    masked_BT[:, -S:] = MASK
    shown_BS = masked_BT[:, -S:]  # a view
    total_BS = torch.zeros(shown_BS.shape, dtype=torch.float64)
    for _ in range(0, max(b - a for a, b in parts), per_pass):
        logits_BSV = _logits(model, masked_BT, ids_BT)[:, -S:]
        rank_BS = torch.arange(S, device=ids_BT.device).expand_as(shown_BS)
        if order == "confidence":
            top_BS2 = logits_BSV.softmax(-1).topk(2, dim=-1).values
            margin_BS = top_BS2[..., 0] - top_BS2[..., 1]
            rank_BS = margin_BS.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        hidden_BS = shown_BS == MASK
        rank_BS = rank_BS + S * ~hidden_BS  # what is shown comes last
        chosen_BS = [rank_BS[:, a:b].argsort(1).argsort(1) < per_pass for a, b in parts]
        chosen_BS = torch.cat(chosen_BS, 1) & hidden_BS
        nats_BS = nats(logits_BSV, ids_BT[:, -S:])
        total_BS += torch.where(chosen_BS, nats_BS, torch.zeros_like(nats_BS)).cpu().double()
        shown_BS.copy_(torch.where(chosen_BS, ids_BT[:, -S:], shown_BS))
    return total_BS
