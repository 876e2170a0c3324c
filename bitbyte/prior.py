"""Tables of n-grams under a model: what usually follows the bytes before each position.

For each of K contexts that end at a position, the tables of `ngrams` yield an r-vector about the
next byte.  It enters the network through a projection and the logits through another, scaled by one
gate per context computed from the final hidden state.  The network also sees which byte followed
the last occurrence of the newest 4 and 7 bytes.  All of this depends on earlier bytes alone, so a
step equals the full forward.

The tables are counted once, before training.  In training, a byte's contexts are looked up in
tables that did not count the part of the data it lies in (its fold).  Tables can also be trained:
from zero (prior "learned"), or from what was counted; then the tables of all folds are changed
by the same amounts.

Shapes: B batch, T positions, K contexts, r rank, R rows, F folds, D model width, V byte values,
M match lengths, P ids that end with those of the T positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbyte.bitlinear import layer_maker
from bitbyte.config import MATCHES
from bitbyte.ngrams import (
    REACH,
    codes_of,
    context_rows,
    dequantize,
    pack,
    scale_for,
    unpack,
)
from bitbyte.vocab import N_BYTES, START

MATCH_REACH = 1024  # how many bytes back a match may lie
PAST = MATCH_REACH + max(MATCHES)  # ids that the features of a position depend on


class Prior(nn.Module):
    """The tables and the weights through which a model reads them."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.orders, self.rows, self.bits = c.prior_orders, c.prior_rows, c.prior_bits
        K, rank = c.prior_orders + 1, c.prior_rank
        width = rank * c.prior_bits // 8
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", torch.zeros(K, self.rows, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(K, rank))
        self.fold_codes: Tensor | None = None  # (F, K, R, width), in training
        self.counted: tuple[Tensor, Tensor] | None = None  # codes and scale, in training
        self.trained: Tensor | None = None  # (K R, r) float32, what training adds to them
        self.project = layer_maker(c.linear, c.act_quant)(K * rank, c.d_model)
        self.direct = nn.Parameter(torch.zeros(N_BYTES, K * rank))
        self.gate = nn.Parameter(torch.zeros(K, c.d_model))
        self.match = nn.Parameter(torch.zeros(len(MATCHES), N_BYTES + 1, c.d_model))

    def fill(self, codes: Tensor, scale: Tensor) -> None:
        """Take a training run's tables, (F + 1, K, R, width); the last one counts all data."""
        codes, scale = codes.to(self.codes.device), scale.to(self.codes.device)
        self.fold_codes, self.counted = codes[:-1], (codes[-1], scale)
        if self.trained is None:
            self.codes.copy_(codes[-1])
            self.scale.copy_(scale)
        else:  # `settle` writes the codes
            self.scale.copy_(torch.maximum(self.scale, scale))

    def train_tables(self) -> Tensor:
        """Make the tables trainable; returns the leaf (K R, r), which gets sparse gradients.

        Learned tables are the leaf itself; to counted ones, which `fill` gives, it is added.
        """
        K, rank = self.scale.shape
        self.trained = torch.zeros(
            K * self.rows, rank, device=self.scale.device, requires_grad=True
        )
        return self.trained

    @torch.no_grad()
    def keep_tables(self) -> None:
        """Begin training with the tables as they are, and not as they were counted."""
        assert self.trained is not None
        for k, trained_Rr in enumerate(self.trained.unflatten(0, (-1, self.rows))):
            now_Rr = dequantize(unpack(self.codes[k], self.bits), self.scale[k])
            trained_Rr.copy_(now_Rr - self._counted(k))

    @torch.no_grad()
    def settle(self) -> None:
        """Store trained tables as codes, for everything but training."""
        if self.trained is None:
            return
        for k, trained_Rr in enumerate(self.trained.unflatten(0, (-1, self.rows))):
            codes = codes_of(self._counted(k) + trained_Rr, self.scale[k], self.bits)
            self.codes[k] = pack(codes, self.bits)

    def _counted(self, k: int) -> Tensor | float:
        """What was counted for context k, (R, r)."""
        if self.counted is None:
            return 0.0
        codes, scale = self.counted
        return dequantize(unpack(codes[k], self.bits), scale[k])

    def _with_trained(self, values_BTKr: Tensor | float, row_BTK: Tensor) -> Tensor:
        """Counted values with what training added, rounded as `settle` does; gradients pass."""
        assert self.trained is not None
        values_BTKr = values_BTKr + F.embedding(row_BTK, self.trained, sparse=True)
        with torch.no_grad():
            reach_Kr = scale_for(values_BTKr.abs().amax((0, 1)), self.bits)
            self.scale.copy_(torch.maximum(self.scale, reach_Kr))
            held_BTKr = dequantize(codes_of(values_BTKr, self.scale, self.bits), self.scale)
        return values_BTKr + (held_BTKr - values_BTKr).detach()

    @property
    def table_bytes(self) -> int:
        """Size of the tables and their scales in bytes."""
        return self.codes.numel() + 4 * self.scale.numel()

    def features(self, ids_BT: Tensor, fold_BT: Tensor | None = None) -> Tensor:
        """f_BTKr: table rows of the contexts that end at each position; 0 for unknown contexts.

        With fold_BT they come from the tables counted without that fold.
        """
        rows_BTK, known_BTK = context_rows(ids_BT, self.orders, self.rows)
        K = rows_BTK.shape[-1]
        row_BTK = rows_BTK + torch.arange(K, device=ids_BT.device) * self.rows
        if self.trained is None or not self.training:
            values_BTKr = self._stored(row_BTK, self.scale, fold_BT)
        else:
            counted = 0.0
            if self.counted is not None:
                counted = self._stored(row_BTK, self.counted[1], fold_BT)
            values_BTKr = self._with_trained(counted, row_BTK)
        return values_BTKr * known_BTK[..., None]

    def _stored(self, row_BTK: Tensor, scale: Tensor, fold_BT: Tensor | None) -> Tensor:
        codes = self.codes
        if fold_BT is not None:
            assert self.fold_codes is not None, "only a model in training has folds"
            codes = self.fold_codes
            row_BTK = row_BTK + fold_BT[..., None] * len(self.codes.flatten(0, -2))
        return dequantize(unpack(codes.flatten(0, -2)[row_BTK], self.bits), scale)

    def embed(self, f_BTKr: Tensor, next_MBT: Tensor) -> Tensor:
        """The term added to the embeddings: (B, T, D)."""
        h_BTD = self.project(f_BTKr.flatten(2))
        for next_BT, table_VD in zip(next_MBT, self.match, strict=True):
            h_BTD = h_BTD + F.embedding(next_BT, table_VD)
        return h_BTD

    def logits(self, f_BTKr: Tensor, normed_BTD: Tensor) -> Tensor:
        """The term added to the logits: features, gated by the network's normed output."""
        gate_BTK = 1 + F.linear(normed_BTD, self.gate)
        return F.linear((f_BTKr * gate_BTK[..., None]).flatten(2), self.direct)


def matches(ids_BP: Tensor, T: int) -> Tensor:
    """next_MBT: what followed the matches that end at the last T ids, see `followers`."""
    return torch.stack([followers(ids_BP, length)[:, -T:] for length in MATCHES])


def where_visible(f_BTKr: Tensor, next_MBT: Tensor, visible_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Both without what depends on hidden bytes.

    visible_BT is how many bytes right before a position are visible, at least ``PAST`` if none
    is hidden.  A context counts if its bytes are among them, and a match if no byte is hidden.
    """
    K = f_BTKr.shape[2]
    reach_K = torch.arange(1, K + 1, device=f_BTKr.device)
    reach_K[-1] = REACH  # of the word
    known_BTK = visible_BT[..., None] >= reach_K
    f_BTKr = torch.where(known_BTK[..., None], f_BTKr, torch.zeros_like(f_BTKr))
    return f_BTKr, next_MBT.masked_fill(visible_BT < PAST, START)


def followers(ids_BT: Tensor, length: int) -> Tensor:
    """The id after the last earlier occurrence of the ``length`` newest ids; START if none.

    Occurrences more than MATCH_REACH positions back, or with ids that are not bytes, are ignored.
    """
    T = ids_BT.shape[1]
    none_BT = torch.full_like(ids_BT, START)
    if length >= T:
        return none_BT
    keys = ids_BT.unfold(1, length, 1)  # (B, N, length): what ends at position length - 1 + n
    whole_BN = (keys < N_BYTES).all(-1)
    powers = torch.tensor([(N_BYTES + 1) ** i for i in range(length)], device=ids_BT.device)
    # A stable sort makes equal keys neighbors, earlier positions first.
    sorted_BN, order_BN = (keys * powers).sum(-1).sort(dim=1, stable=True)
    earlier_BN = F.pad(order_BN[:, :-1], (1, 0))
    same_BN = F.pad(sorted_BN[:, 1:] == sorted_BN[:, :-1], (1, 0))
    same_BN = same_BN & (order_BN - earlier_BN <= MATCH_REACH)
    at_BN = torch.empty_like(order_BN).scatter_(1, order_BN, earlier_BN + length)
    found_BN = torch.empty_like(same_BN).scatter_(1, order_BN, same_BN) & whole_BN
    next_BN = ids_BT.gather(1, at_BN.clamp(max=T - 1))
    none_BT[:, length - 1 :] = torch.where(found_BN, next_BN, none_BT[:, length - 1 :])
    return none_BT
