"""Counted n-grams under a model: features of the bytes before each position.

The `ngrams` tables give, for each of K contexts that end at a position, r numbers about the byte
that follows.  They enter the network through a projection and reach the logits directly through
gates that the network's output sets, one a context; with `matches` the network is also shown what
followed the last occurrence of the newest bytes.  All are functions of bytes already seen, so a
step equals the full forward.

Shapes: B batch, T positions, K contexts, r rank, R rows, F folds, D model width, V byte values,
M match lengths, P ids before the first position.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbyte.ngrams import REACH, context_rows, dequantize
from bitbyte.vocab import N_BYTES, START

MATCHES = (4, 7)  # newest bytes that a match has in common
MATCH_REACH = 1024  # bytes back that a match may lie
PAST = MATCH_REACH + max(MATCHES)  # ids that the features of a position depend on


class Prior(nn.Module):
    """Tables, and the weights through which a model reads them."""

    def __init__(self, config, linear):
        super().__init__()
        c = config
        self.orders, self.rows, self.rank, self.bits = (
            c.prior_orders, c.prior_rows, c.prior_rank, c.prior_bits
        )  # fmt: skip
        K, width = self.orders + 1, self.rank // (8 // self.bits)
        self.register_buffer("codes", torch.zeros(K, self.rows, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(K, self.rank))
        self.fold_codes: Tensor | None = None  # (F, K, R, width), while training
        self.project = linear(K * self.rank, c.d_model)
        self.direct = nn.Parameter(torch.zeros(N_BYTES, K * self.rank))
        self.gate = nn.Parameter(torch.zeros(K, c.d_model))
        self.match = nn.Parameter(torch.zeros(len(MATCHES), N_BYTES + 1, c.d_model))

    def features(self, ids_BT: Tensor, fold_BT: Tensor | None = None) -> Tensor:
        """f_BTKr, what the tables hold for the contexts that end at each position; 0 if unknown.

        With fold_BT the tables are those counted without that fold.
        """
        rows_BTK, known_BTK = context_rows(ids_BT, self.orders, self.rows)
        K = rows_BTK.shape[-1]
        index_BTK = rows_BTK + torch.arange(K, device=ids_BT.device) * self.rows
        codes = self.codes
        if fold_BT is not None:
            codes = self.fold_codes
            index_BTK = index_BTK + fold_BT[..., None] * (K * self.rows)
        # START's features are 0: no context is known there.
        packed = codes.flatten(0, -2)[index_BTK]
        values = dequantize(unpack(packed, self.bits), self.scale)
        return values * known_BTK[..., None]

    def embed(self, ids_BT: Tensor, f_BTKr: Tensor) -> Tensor:
        """What is added to the embedding of each position: (B, T, D)."""
        h_BTD = self.project(f_BTKr.flatten(2))
        for length, table_VD in zip(MATCHES, self.match, strict=True):
            h_BTD = h_BTD + F.embedding(followers(ids_BT, length), table_VD)
        return h_BTD

    def logits(self, f_BTKr: Tensor, normed_BTD: Tensor) -> Tensor:
        """What is added to the logits, the features gated by the network's normed output."""
        gate_BTK = 1 + F.linear(normed_BTD, self.gate)
        return F.linear((f_BTKr * gate_BTK[..., None]).flatten(2), self.direct)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes as bytes (uint8): two a byte for 4 bits, the first in the low half."""
    if bits == 8:
        return codes.view(torch.uint8)
    low, high = (codes.to(torch.uint8) & 15).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes (int8) of `pack`."""
    if bits == 8:
        return packed.view(torch.int8)
    halves = torch.stack((packed << 4, packed), -1).view(torch.int8) >> 4
    return halves.flatten(-2)


def followers(ids_BT: Tensor, length: int) -> Tensor:
    """The id that followed the last earlier occurrence of the ``length`` newest ids; else 256.

    Occurrences more than MATCH_REACH positions back, or with ids that are no bytes, do not count.
    """
    B, T = ids_BT.shape
    none = torch.full_like(ids_BT, START)
    if T <= length:
        return none
    keys = ids_BT.unfold(1, length, 1)  # (B, T - length + 1, length): what ends at length - 1 + i
    weights = torch.tensor([257**i for i in range(length)], device=ids_BT.device)
    key_BN = (keys * weights).sum(-1)
    whole_BN = (keys < N_BYTES).all(-1)
    # Equal keys become neighbours in a stable sort, earlier positions first.
    sorted_BN, order_BN = key_BN.sort(dim=1, stable=True)
    earlier_BN = F.pad(order_BN[:, :-1], (1, 0))
    same_BN = F.pad(sorted_BN[:, 1:] == sorted_BN[:, :-1], (1, 0))
    same_BN = same_BN & (order_BN - earlier_BN <= MATCH_REACH)
    at_BN = torch.empty_like(order_BN).scatter_(1, order_BN, earlier_BN + length)
    found_BN = torch.empty_like(same_BN).scatter_(1, order_BN, same_BN) & whole_BN
    next_BN = ids_BT.gather(1, at_BN.clamp(max=T - 1))
    none[:, length - 1 :] = torch.where(found_BN, next_BN, none[:, length - 1 :])
    return none
