"""What a window costs under a masked-diffusion model: a bound, and two codes that can be decoded.

A denoiser has no next byte, so one forward pass does not give the cost of a window.  These three
costs are honest: none looks at a byte before paying for it.  A model with a ``block`` size pays for
each block of a window given the blocks before it, any other for the whole window at once; in the
following S is the number of scored bytes of a block or of the window.

``upper_bound``
    The variational bound in its any-order form, the mean over all orders of what the bytes cost
    when they are revealed in that order, one by one.  It is at least the cost under the model's
    any-order distribution (arXiv:2110.02037, arXiv:2406.07524).  A model of blocks is asked for
    random orders, each in one pass.  For one of whole windows hide k of S bytes, k uniform on 1..S,
    and pay S / k times the nats of the hidden ones, which has the same mean.
``chain_rule:left_to_right`` and ``chain_rule:confidence``
    Reveal the bytes one by one (or ``per_pass`` at a time) in an order that depends on revealed
    bytes alone, and pay for each under the prediction at that moment: the exact length of a code
    that a decoder can follow (arXiv:2603.01367).  Orders that look at hidden bytes give smaller
    numbers but no code, so there are none here.

A model is anything with ``logits(ids_BT) -> logits_BTV`` where id 256 (MASK) means hidden, or with
a ``block`` and ``block_logits``, see `models.BlockDiffusionLM`.
Shapes: B windows, T bytes of a window, S its scored bytes (the last ones), R draws of a window,
G blocks of N bytes, P bytes of a block that see others, V byte values.  Log-probabilities are
computed in float32 on the model's device, as Apple's GPUs have no float64; sums and weights in
float64 on the CPU.
"""

import itertools

import torch
import torch.nn.functional as F
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


def seen_in(rank_GN: Tensor) -> Tensor:
    """seen_GPN, for `models.BlockDiffusionLM`: a byte sees those of its block with lower ranks."""
    return rank_GN[..., None, :] < rank_GN[..., :, None]


def _logits(model, masked_BT: Tensor, ids_BT: Tensor) -> Tensor:
    if not (N := getattr(model, "block", 0)):
        return model.logits(masked_BT)
    hidden_BT = F.pad(masked_BT == MASK, (0, -masked_BT.shape[1] % N), value=True)
    return model.block_logits(ids_BT, seen_in(hidden_BT.long().unflatten(1, (-1, N))))


def upper_bound(
    model, ids_BT: Tensor, n_scored: int, *, draws: int, indices: list[int], seed: int = 0
) -> Tensor:
    """nats_BS (float64, CPU): the mean over ``draws`` orders or masks of the bound on the last S
    bytes.

    The bytes before them are given.  ``indices`` are the numbers of the windows; all that is drawn
    depends on them alone, so the result does not depend on how windows are batched.
    """
    if getattr(model, "block", 0):
        return _in_orders(model, ids_BT, n_scored, draws, indices, seed)
    B, S = len(ids_BT), n_scored
    total_BS = torch.zeros(B, S, dtype=torch.float64)
    masks_RBS = torch.stack([draw_masks(S, draws, index, seed) for index in indices], 1)
    for hidden_BS in masks_RBS:
        masked_BT = ids_BT.clone()
        masked_BT[:, -S:].masked_fill_(hidden_BS.to(ids_BT.device), MASK)
        nats_BS = nats(model.logits(masked_BT)[:, -S:], ids_BT[:, -S:]).cpu().double()
        total_BS += nats_BS * hidden_BS * (S / hidden_BS.sum(1, keepdim=True).double())
    return total_BS / draws


def _in_orders(
    model, ids_BT: Tensor, n_scored: int, draws: int, indices: list[int], seed: int
) -> Tensor:
    """`upper_bound` for a model of blocks: all bytes are paid for in every draw."""
    (B, T), S, N = ids_BT.shape, n_scored, model.block
    rank_RBT = torch.full((draws, B, -(-T // N) * N), N)  # padding is seen by no byte
    rank_RBT[..., : T - S] = -1  # given bytes are seen by all
    for row, index in enumerate(indices):
        noise = torch.Generator().manual_seed((seed * 1_000_003 + index * 7919 + 1) % 2**63)
        for a, b in spans(model, T, S):
            rank_Rn = torch.rand(draws, b - a, generator=noise).argsort(1)
            rank_RBT[:, row, T - S + a : T - S + b] = rank_Rn
    total_BS = torch.zeros(B, S, dtype=torch.float64)
    for rank_BT in rank_RBT.to(ids_BT.device):
        logits_BTV = model.block_logits(ids_BT, seen_in(rank_BT.unflatten(1, (-1, N))))
        total_BS += nats(logits_BTV[:, -S:], ids_BT[:, -S:]).cpu().double()
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
