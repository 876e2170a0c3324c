"""What a window costs under a masked-diffusion model: a bound, and two codes that can be decoded.

A denoiser has no next byte, so one forward pass does not give the cost of a window.  These three
costs are honest: none looks at a byte before paying for it.

``upper_bound``
    The variational bound in its any-order form: hide k of S bytes, k uniform on 1..S, and pay
    S / k times the nats of the hidden ones.  Its mean over masks is at least the cost under the
    model's any-order distribution (arXiv:2110.02037, arXiv:2406.07524).
``chain_rule:left_to_right`` and ``chain_rule:confidence``
    Reveal the bytes one by one (or ``per_pass`` at a time) in an order that depends on revealed
    bytes alone, and pay for each under the prediction at that moment: the exact length of a code
    that a decoder can follow (arXiv:2603.01367).  Orders that look at hidden bytes give smaller
    numbers but no code, so there are none here.

A model is anything with ``logits(ids_BT) -> logits_BTV`` where id 256 (MASK) means hidden.
Shapes: B windows, T bytes of a window, S its scored bytes (the last ones), R draws of a window,
V byte values.  Log-probabilities are computed in float32 on the model's device, as Apple's GPUs
have no float64; sums and weights in float64 on the CPU.
"""

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


def upper_bound(
    model, ids_BT: Tensor, n_scored: int, *, draws: int, indices: list[int], seed: int = 0
) -> Tensor:
    """nats_BS (float64, CPU): the mean over ``draws`` masks of the bound on the last S bytes.

    The bytes before them are given.  ``indices`` are the numbers of the windows; masks depend on
    them alone, so the result does not depend on how windows are batched.
    """
    B, S = len(ids_BT), n_scored
    total_BS = torch.zeros(B, S, dtype=torch.float64)
    for hidden_BS in torch.stack([draw_masks(S, draws, i, seed) for i in indices], 1):
        masked_BT = ids_BT.clone()
        masked_BT[:, -S:].masked_fill_(hidden_BS.to(ids_BT.device), MASK)
        nats_BS = nats(model.logits(masked_BT)[:, -S:], ids_BT[:, -S:]).cpu().double()
        total_BS += nats_BS * hidden_BS * (S / hidden_BS.sum(1, keepdim=True).double())
    return total_BS / draws


def chain_rule(model, ids_BT: Tensor, n_scored: int, *, order: str, per_pass: int = 1) -> Tensor:
    """nats_BS (float64, CPU): what the last S bytes cost when revealed one after the other.

    ``confidence`` next reveals the position where the two likeliest bytes differ most in
    probability, on ties the first.  The ``per_pass`` bytes of one pass do not see each other:
    fewer passes, more nats.
    """
    if order not in ORDERS:
        raise BitbyteError(f"no order {order!r}; choose from {', '.join(ORDERS)}")
    if per_pass < 1:
        raise BitbyteError(f"per_pass is {per_pass}; it must be at least 1")
    B, S = len(ids_BT), n_scored
    targets_BS = ids_BT[:, -S:]
    masked_BT = ids_BT.clone()
    masked_BT[:, -S:] = MASK
    shown_BS = masked_BT[:, -S:]  # a view
    places, costs = [], []  # of each pass: positions of its bytes, and what they cost
    for done in range(0, S, per_pass):
        n = min(per_pass, S - done)
        logits_BSV = model.logits(masked_BT)[:, -S:]
        if order == "left_to_right":
            where_Bn = torch.arange(done, done + n, device=ids_BT.device).expand(B, n)
        else:
            top_BS2 = logits_BSV.softmax(-1).topk(2, dim=-1).values
            margin_BS = top_BS2[..., 0] - top_BS2[..., 1]
            margin_BS = margin_BS.masked_fill(shown_BS != MASK, -1)
            where_Bn = margin_BS.sort(dim=1, descending=True, stable=True).indices[:, :n]
        true_Bn = targets_BS.gather(1, where_Bn)
        chosen_BnV = logits_BSV.gather(1, where_Bn[..., None].expand(-1, -1, logits_BSV.shape[-1]))
        places.append(where_Bn)
        costs.append(nats(chosen_BnV, true_Bn))
        shown_BS.scatter_(1, where_Bn, true_Bn)
    costs_BS = torch.cat(costs, 1)
    return torch.zeros_like(costs_BS).scatter(1, torch.cat(places, 1), costs_BS).cpu().double()
