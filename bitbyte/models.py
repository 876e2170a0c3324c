"""The model families and the contract they share.

Every family maps a window of bytes to the cost of each byte:

``forward(ids_BT, noise_B=None, fold_BT=None) -> nats_BT``
    float32 nats; the training loss is their mean, bits per byte their sum / ln 2 / bytes.  noise_B
    (int64, a number for each window) determines what a denoiser hides; causal families ignore it.
    fold_BT (int64) is the part of the training data that each byte lies in.  A model with a prior
    needs it in training, to read tables that did not count that byte (see `prior`).
``logits(ids_BT) -> logits_BTV``
    V = 256.  Position t predicts the byte after ids[0..t] in a causal family; in diffusion it
    predicts byte t from the bytes that are not MASK.  Diffusion in blocks is causal here, and also
    has ``block``, ``block_logits`` and ``fill``.
``exact``
    True if the nats are the cost itself, False if they are a noisy upper bound.

Causal families add ``context`` (longest window of ids, START included), ``init_state(batch)``,
``prefill(ids_BT, state)`` and ``step(ids_B, state)``, which equal the full forward.

Windows are independent.  In a causal family START (id 256) precedes each one, so all of its bytes
are scored, the first one without context.

Shapes: B batch, T bytes of a window, D model width, V byte values.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbyte.bitlinear import KERNELS, BitLinear
from bitbyte.bounds import seen_in
from bitbyte.config import (
    DiffusionConfig,
    MambaConfig,
    ModelConfig,
    TransformerConfig,
)
from bitbyte.device import device_of
from bitbyte.files import BitbyteError
from bitbyte.kernels.engine import engine_for, forget
from bitbyte.mamba import SCANS, Mamba, Mixer, scan_for
from bitbyte.ngrams import REACH
from bitbyte.prior import PAST, Prior, matches, where_visible
from bitbyte.transformer import (
    ATTENTION,
    CausalSelfAttention,
    RMSNorm,
    Stack,
    Transformer,
    attention_for,
    rope_cos_sin,
)
from bitbyte.vocab import MASK, N_BYTES, START, VOCAB_SIZE

# 2^64 / golden ratio as int64: multiples of it, as fractions of 2^64, are spread evenly.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64


class State(NamedTuple):
    """What a causal model remembers of the ids it was fed."""

    caches: list[tuple[Tensor, Tensor]]  # per layer; keys and values, or a Mamba mixer's state
    position: int  # ids fed so far
    past_BP: Tensor | None = None  # noqa: N815 - the last ids fed, with a prior


class ByteModel(nn.Module):
    """What all families share: an embedding of 257 ids, a body, and a tied head of 256 bytes.

    Without gradients, logits and steps come from the native engine where there is one for the
    model (see `kernels.engine`).
    """

    exact: bool  # whether the nats are the cost itself or a bound on it
    engine = "auto"  # how to predict without gradients, see `kernels.engine`
    threads = 1  # that the native engine may use for one step
    body: Stack
    norm: nn.Module

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.empty(VOCAB_SIZE, config.d_model))
        nn.init.normal_(self.embed, std=0.02)
        self.prior = Prior(config) if config.prior != "none" else None

    def train(self, mode: bool = True):
        if mode:
            forget(self)  # fused optimizers change weights without bumping their versions
        return super().train(mode)

    def logits(self, ids_BT: Tensor, fold_BT: Tensor | None = None) -> Tensor:
        """Logits of a byte at each position, as the module docstring defines them; ids 0..256."""
        native = engine_for(self) if fold_BT is None else None
        if native:
            return native.logits(ids_BT)
        ids_BT = ids_BT.long()
        h_BTD, f_BTKr = self.embedded(ids_BT), None
        if self.prior:
            past_BT = self.before(ids_BT)
            f_BTKr = self.prior.features(past_BT, fold_BT)
            next_MBT = matches(past_BT, past_BT.shape[1])
            h_BTD = h_BTD + self.prior.embed(f_BTKr, next_MBT)
        return self._head(self.body(h_BTD), f_BTKr)

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """What the first layer gets of the ids themselves (B, T, D)."""
        return F.embedding(ids_BT, self.embed)

    def before(self, ids_BT: Tensor) -> Tensor:
        """The newest id that the prior may look at, at each position."""
        return ids_BT

    def _head(self, h_BTD: Tensor, f_BTKr: Tensor | None) -> Tensor:
        h_BTD = self.norm(h_BTD)
        logits_BTV = F.linear(h_BTD, self.embed[:N_BYTES])  # tied; START is never predicted
        return logits_BTV if f_BTKr is None else logits_BTV + self.prior.logits(f_BTKr, h_BTD)  # pyright: ignore

    def costs(self, ids_BT: Tensor, targets_BT: Tensor, fold_BT: Tensor | None = None) -> Tensor:
        """Cost of the targets, in nats (float32), under the model's logits for ``ids_BT``."""
        logits_NV = self.logits(ids_BT, fold_BT).float().flatten(0, 1)
        nats_N = F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none")
        return nats_N.view_as(targets_BT)


class CausalModel(ByteModel):
    """Next-byte prediction over a causal body."""

    exact = True
    empty_state: Callable[[int], State]  # of so many streams, for PyTorch

    @property
    def context(self) -> int:
        return self.config.seq_len

    def forward(
        self, ids_BT: Tensor, noise_B: Tensor | None = None, fold_BT: Tensor | None = None
    ) -> Tensor:
        """Cost of every byte in nats (float32); ids are 0..255, ``noise_B`` is not used."""
        ids_BT = only_bytes(ids_BT)
        return self.costs(preceding(ids_BT), ids_BT, fold_BT)

    def init_state(self, batch: int):
        """What ``batch`` streams remember that have been fed nothing, for `prefill` and `step`."""
        native = engine_for(self)
        return native.state(batch) if native else self.empty_state(batch)

    def prefill(self, ids_BT: Tensor, state) -> tuple:
        """Feed T ids at once; returns (logits_BV of the byte after them, new state)."""
        stop = state.position + ids_BT.shape[1]
        if stop > self.context:
            raise BitbyteError(f"{stop} ids do not fit into the model's context of {self.context}")
        if not isinstance(state, State):
            return state.feed(ids_BT), state
        ids_BT, T = ids_BT.long(), ids_BT.shape[1]
        h_BTD, f_BTKr, past_BP = F.embedding(ids_BT, self.embed), None, state.past_BP
        if self.prior:
            if past_BP is None:  # START: no context reaches across it
                past_BP = torch.full((len(ids_BT), PAST), START, device=ids_BT.device)
            all_BP = torch.cat((past_BP, ids_BT), 1)
            f_BTKr = self.prior.features(all_BP[:, -T - REACH :])[:, -T:]
            h_BTD = h_BTD + self.prior.embed(f_BTKr, matches(all_BP, T))
            past_BP, f_BTKr = all_BP[:, -PAST:], f_BTKr[:, -1:]
        h_BTD = self.body(h_BTD, state.caches, state.position)
        logits_BV = self._head(h_BTD[:, -1:], f_BTKr)[:, 0]
        return logits_BV, State(state.caches, stop, past_BP)

    def step(self, ids_B: Tensor, state) -> tuple:
        """Feed one id per stream; equals the last position of the full forward.

        The state is updated in place, so the old one must not be used again.
        """
        return self.prefill(ids_B[:, None], state)


class BitByteLM(CausalModel):
    """Causal transformer: predicts each byte from the bytes before it in the window."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.transformer = Transformer(config, causal=True)
        self.norm = RMSNorm(config.d_model)

    @property
    def body(self) -> Stack:
        return self.transformer

    def empty_state(self, batch: int) -> State:
        """Empty key-value cache for ``batch`` streams of up to ``context`` ids."""
        c = self.config
        shape = (batch, c.n_head, c.seq_len, c.d_model // c.n_head)
        new = self.embed.new_empty
        return State([(new(shape), new(shape)) for _ in range(c.n_layer)], 0)


class MambaLM(CausalModel):
    """Mamba: predicts the next byte from a state of fixed size.

    It is trained on windows of ``seq_len`` bytes but can be fed any number of ids.
    """

    context = sys.maxsize  # pyright: ignore

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.mamba = Mamba(config)
        self.norm = RMSNorm(config.d_model)

    @property
    def body(self) -> Stack:
        return self.mamba

    def empty_state(self, batch: int) -> State:
        """State of ``batch`` streams that have been fed nothing."""
        return State([block.mixer.init_state(batch) for block in self.mamba.blocks], 0)  # pyright: ignore


class MaskedDiffusionLM(ByteModel):
    """Bidirectional transformer that predicts hidden bytes from the visible ones.

    Training minimizes the continuous-time bound on the cost of a window (arXiv:2406.07524) in its
    low-variance any-order form (arXiv:2110.02037): hide exactly k of T bytes, weight the hidden
    ones by T / k.  With ``diffusion_steps`` it minimizes the loss of the earlier fixed-step scheme,
    which bounds nothing.  The noise level is not an input: the number of masks reveals it.
    """

    exact = False
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        self.transformer = Transformer(config, causal=False)
        self.norm = RMSNorm(config.d_model)
        if config.around:
            rank, places = config.block_rank, 2 * config.around + 1
            self.inside = nn.Parameter(torch.empty(N_BYTES, rank))
            nn.init.normal_(self.inside, std=rank**-0.5)
            self.around = nn.Parameter(torch.empty(config.d_model, rank, places))
            nn.init.normal_(self.around, std=0.02)

    @property
    def body(self) -> Stack:
        return self.transformer

    @property
    def context(self) -> int:
        return self.config.seq_len

    def embedded(self, ids_BT: Tensor) -> Tensor:
        h_BTD = super().embedded(ids_BT)
        if not self.config.around:
            return h_BTD
        code_BTr = F.embedding(ids_BT.clamp(max=N_BYTES - 1), self.inside)
        code_BTr = code_BTr * (ids_BT < N_BYTES)[..., None]  # hidden bytes say nothing
        return h_BTD + F.conv1d(code_BTr.mT, self.around, padding=self.config.around).mT

    def before(self, ids_BT: Tensor) -> Tensor:
        return preceding(ids_BT)  # the byte at a position may be the one to be predicted

    def forward(
        self, ids_BT: Tensor, noise_B: Tensor | None = None, fold_BT: Tensor | None = None
    ) -> Tensor:
        """Nats of hidden bytes, weighted so that their mean is the training loss; 0 elsewhere.

        With ``diffusion_steps`` 0 the sum over a window is an unbiased draw of the bound on its
        cost, over uniform ``noise_B`` (see `hide`); `bounds.upper_bound` scores windows.  With
        steps the weights depend on how many bytes of the whole batch are hidden.
        """
        ids_BT = only_bytes(ids_BT)
        B, T = ids_BT.shape
        if noise_B is None:
            first = torch.randint(2**62, (), device=ids_BT.device)
            noise_B = first + torch.arange(B, device=ids_BT.device)
        hidden_BT = self.hide(noise_B, T)
        nats_BT = self.costs(ids_BT.masked_fill(hidden_BT, MASK), ids_BT, fold_BT)
        hidden_B1 = hidden_BT.sum(1, keepdim=True)
        weight = T / hidden_B1
        if self.config.diffusion_steps:
            weight = ids_BT.numel() / hidden_B1.sum()
        return nats_BT * hidden_BT * weight

    def hide(self, noise_B: Tensor, T: int) -> Tensor:
        """hidden_BT, at least one byte per window: a function of each window's number alone.

        So the same bytes are hidden on every device and however a batch is divided.
        """
        c = self.config
        if c.diffusion_steps == 0:
            return hide_some(noise_B, T)
        level_B, order_BT = _level_and_order(noise_B, T)
        step_B = (level_B * c.diffusion_steps).long() + 1
        rate_B = step_B / c.diffusion_steps * (c.max_mask_prob - c.min_mask_prob)
        hidden_BT = _unit(order_BT) < c.min_mask_prob + rate_B[:, None]
        return hidden_BT | (order_BT == order_BT.amin(1, keepdim=True))


class BlockDiffusionLM(BitByteLM):
    """A causal transformer that also fills blocks of hidden bytes, with the same weights.

    A window is cut into blocks of N bytes.  A byte is predicted from all bytes before its block and
    from those of the block that are shown to it, whichever these are, so the bytes of a block may
    be revealed in any order, or several at once (arXiv:2503.09573).

    The text itself passes through the network as in `BitByteLM`, whose methods all mean the same
    here.  Beside it goes a query for each byte.  Its input is the last visible byte before it, as
    in a causal model, how far away that is, and what a small table says of each visible byte up to
    N places to either side.  It attends to the text up to the first byte of its block that it may
    not see.  Queries do not see each other, so each can be shown something else: in training every
    byte is predicted once, after those that a random order of its block puts before it, and one
    pass gives the cost of a window in any given order.  A prior acts on visible bytes only.

    Shapes: N bytes of a block, G blocks of a window, P queries of a block, M = 2 N bytes of a block
    and before it, r numbers for a byte in the small table.
    """

    config: DiffusionConfig  # pyright: ignore

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        N, rank = config.block, config.block_rank
        self.block = N  # in training it may be smaller for a while
        self.inside = nn.Parameter(torch.empty(N_BYTES, rank))
        nn.init.normal_(self.inside, std=rank**-0.5)
        # -N .. -1 and 1 .. N - 1 places from the query
        self.around = nn.Parameter(torch.empty(2 * N - 1, rank, config.d_model))
        nn.init.normal_(self.around, std=0.02)
        self.apart = nn.Parameter(torch.zeros(N, config.d_model))

    def forward(
        self, ids_BT: Tensor, noise_B: Tensor | None = None, fold_BT: Tensor | None = None
    ) -> Tensor:
        """Nats of every byte, given those before it; with ``noise_B``, the training loss.

        That is ``ar_share`` of the same plus the rest of the nats in a random order of each block,
        whose sum over a window is an unbiased draw of the bound on its cost.
        """
        if noise_B is None:
            return super().forward(ids_BT, None, fold_BT)
        if self.block == 1:  # both streams would predict next bytes; all parameters take part
            unused = 0 * (self.inside.sum() + self.around.sum() + self.apart.sum())
            return super().forward(ids_BT, None, fold_BT) + unused
        ids_BT, share = only_bytes(ids_BT), self.config.ar_share
        h_BQD, f_BQKr = self._twice(ids_BT, seen_in(self.orders(noise_B, ids_BT.shape[1])), fold_BT)
        logits_NV = self._head(h_BQD, f_BQKr).float().flatten(0, 1)
        targets_BQ = ids_BT.repeat(1, 2)
        nats_N = F.cross_entropy(logits_NV, targets_BQ.flatten(), reduction="none")
        next_BT, filled_BT = nats_N.view_as(targets_BQ).chunk(2, 1)
        return share * next_BT + (1 - share) * filled_BT

    def orders(self, noise_B: Tensor, T: int) -> Tensor:
        """rank_BGN: a random order of the bytes of each block, a function of the numbers alone."""
        number_BT = noise_B[:, None] * T + torch.arange(T, device=noise_B.device)
        return _mix(number_BT * GOLDEN).unflatten(1, (-1, self.block)).argsort(-1).argsort(-1)

    def block_logits(self, ids_BT: Tensor, seen_BGPN: Tensor) -> Tensor:
        """logits_BTV of every byte, given the blocks before its own and what it sees of that.

        seen_BGPN: whether byte P of a block sees byte N; none sees itself.  The last block may be
        cut off by the end of the window: missing bytes must not be marked as seen.
        """
        T = ids_BT.shape[1]
        ids_BT = F.pad(ids_BT.long(), (0, -T % self.block))
        h_BQD, f_BQKr = self._twice(ids_BT, seen_BGPN, None)
        first = ids_BT.shape[1]
        f_BQKr = None if f_BQKr is None else f_BQKr[:, first : first + T]
        return self._head(h_BQD[:, first : first + T], f_BQKr)

    def _twice(self, ids_BT: Tensor, seen_BGPN: Tensor, fold_BT: Tensor | None) -> tuple:
        """(h_BQD, f_BQKr) of the text and, after it, of the queries: Q = 2 T."""
        N, before_BT, counts = self.block, preceding(ids_BT), None
        if self.prior:
            features_BTKr = self.prior.features(before_BT, fold_BT)
            counts = features_BTKr, matches(before_BT, ids_BT.shape[1])
        ids_BGM = F.pad(ids_BT, (N, 0), value=START).unfold(1, 2 * N, N)  # START before the text
        return self._beside(before_BT, ids_BGM, seen_BGPN, counts)

    def _beside(
        self, before_BT: Tensor, ids_BGM: Tensor, seen_BGPN: Tensor, counts: tuple | None,
        caches: list | None = None, start: int = 0,
    ) -> tuple:  # fmt: skip
        """`_twice` of T ids that begin with position ``start``, the prior's features given."""
        B, T, N = *before_BT.shape, self.block
        h_BTD, f_BQKr = F.embedding(before_BT, self.embed), None
        h_queries_BTD = self._embed_queries(ids_BGM, seen_BGPN).flatten(1, 2)
        if counts:
            f_BTKr, next_MBT = counts
            h_BTD = h_BTD + self.prior.embed(f_BTKr, next_MBT)  # pyright: ignore
            run_BT = visible_before(seen_BGPN).flatten(1)
            f_query_BTKr, next_MBT = where_visible(f_BTKr, next_MBT, run_BT)
            h_queries_BTD = h_queries_BTD + self.prior.embed(f_query_BTKr, next_MBT)  # pyright: ignore
            f_BQKr = torch.cat((f_BTKr, f_query_BTKr), 1)
        at_T = torch.arange(T, device=before_BT.device)
        limit_BT = (at_T[::N, None] + visible_prefix(seen_BGPN)).flatten(1)
        limit_BQ = start + torch.cat((at_T.expand(B, T), limit_BT), 1)
        h_BQD = self.body(torch.cat((h_BTD, h_queries_BTD), 1), caches, start, limit_BQ)
        return h_BQD, f_BQKr

    def _embed_queries(self, ids_GM: Tensor, seen_GPN: Tensor) -> Tensor:
        """h_GPD: the inputs of a block's queries, from what they see of it and all before it."""
        N, M, far = self.block, 2 * self.block, self.config.block
        at_M = torch.arange(M, device=ids_GM.device)
        at_P1 = at_M[N:, None]
        bytes_GPM = (ids_GM < N_BYTES)[..., None, :]
        near_PN = at_P1 - at_M[:N] <= far
        seen_GPM = torch.cat((near_PN.expand_as(seen_GPN), seen_GPN), -1) & bytes_GPM
        left_GP = torch.where(seen_GPN & (at_M[:N] < at_P1 - N), at_M[N:], N - 1).amax(-1)
        h_GPD = F.embedding(ids_GM.gather(-1, left_GP), self.embed)
        h_GPD = h_GPD + F.embedding(at_P1[:, 0] - 1 - left_GP, self.apart)
        place_PM = at_M - at_P1
        place_PM = place_PM + torch.where(place_PM < 0, far, far - 1)
        table_PMrD = self.around[place_PM.clamp(0, 2 * far - 2)]
        codes_GMr = F.embedding(ids_GM.clamp(max=N_BYTES - 1), self.inside)
        shown_PGMr = (
            (codes_GMr[..., None, :, :] * seen_GPM[..., None]).flatten(0, -4).transpose(0, 1)
        )
        around_PGD = torch.bmm(shown_PGMr.flatten(2), table_PMrD.flatten(1, 2))
        return h_GPD + around_PGD.transpose(0, 1).view_as(h_GPD)

    def fill(self, ids_BM: Tensor, state: State) -> Tensor:
        """logits_BNV of a block after what ``state`` was fed, which does not change.

        ids_BM are the N bytes before the block (START where there are none) and those of the block,
        with MASK for hidden ones.  The last byte before the block must not have been fed yet.
        ``state`` is one of `empty_state`.  Equals `block_logits`.
        """
        N, counts = self.block, None
        before_BN, shown_BN = ids_BM[:, N - 1 : -1], ids_BM[:, N:]
        if self.prior:
            past_BP = state.past_BP
            if past_BP is None:
                past_BP = torch.full((len(ids_BM), PAST), START, device=ids_BM.device)
            all_BP = torch.cat((past_BP, before_BN), 1)
            features_BNKr = self.prior.features(all_BP[:, -N - REACH :])[:, -N:]
            counts = features_BNKr, matches(all_BP, N)
        seen_BGPN = seen_in((shown_BN == MASK).long())[:, None]
        h_BQD, f_BQKr = self._beside(
            before_BN, ids_BM[:, None], seen_BGPN, counts, state.caches, state.position
        )
        return self._head(h_BQD[:, N:], None if f_BQKr is None else f_BQKr[:, N:])


def visible_prefix(seen_GPN: Tensor) -> Tensor:
    """How many bytes each sees from the start of the block on, without a gap."""
    return seen_GPN.long().cumprod(-1).sum(-1)


def visible_before(seen_GPN: Tensor) -> Tensor:
    """How many bytes right before itself each sees: `PAST` and more if all back to the start."""
    N = seen_GPN.shape[-1]
    at_N = torch.arange(N, device=seen_GPN.device)
    hidden_GPN = ~seen_GPN & (at_N < at_N[:, None])
    return at_N - 1 - torch.where(hidden_GPN, at_N, -PAST - 1).amax(-1)


def hide_some(noise_B: Tensor, T: int) -> Tensor:
    """hidden_BT: k random ones of T bytes, where k is uniform on 1..T; see `_level_and_order`."""
    level_B, order_BT = _level_and_order(noise_B, T)
    last_B1 = (level_B * T).long()[:, None]  # k - 1, from 0 to T - 1
    return order_BT <= order_BT.sort(1).values.gather(1, last_B1)


def _level_and_order(noise_B: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """(level_B in [0, 1), order_BT: random int64), both functions of each number alone.

    Multiples of the golden ratio spread the levels of consecutive numbers evenly.
    """
    number_BT = noise_B[:, None] * T + torch.arange(T, device=noise_B.device)
    return _unit(noise_B * GOLDEN), _mix(number_BT * GOLDEN)


def _mix(z: Tensor) -> Tensor:
    """The finalizer of splitmix64 in int64: every input bit affects every output bit."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & (2**33 - 1))


def _unit(z: Tensor) -> Tensor:
    """float32 in [0, 1) from the top 24 bits of an int64."""
    return ((z >> 40) & (2**24 - 1)).float() / 2**24


def preceding(ids_BT: Tensor) -> Tensor:
    """The id before each byte of a window: START, then all bytes but the last."""
    return F.pad(ids_BT[:, :-1], (1, 0), value=START)


def only_bytes(ids_BT: Tensor) -> Tensor:
    """The ids as int64.  Raises BitbyteError if one is outside 0..255.

    uint8 input skips the check, and with it a GPU sync.
    """
    known = ids_BT.dtype == torch.uint8 or not ids_BT.numel()
    if not known and (ids_BT.min() < 0 or ids_BT.max() >= N_BYTES):
        raise BitbyteError(
            "a window to score has ids outside 0..255; id 256 (MASK or START) cannot be data"
        )
    return ids_BT.long()


def _diffusion(config: DiffusionConfig) -> ByteModel:
    return (BlockDiffusionLM if config.block else MaskedDiffusionLM)(config)


FAMILIES: dict[str, Callable[..., ByteModel]] = {
    "ar": BitByteLM,
    "mamba": MambaLM,
    "diffusion": _diffusion,
}


def build(config, seed: int = 0) -> ByteModel:
    """A freshly initialized model; the global random state is preserved."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds every device
        return FAMILIES[config.family](config)


def use_kernels(
    model: ByteModel, attention: str = "auto", linear: str = "auto", scan: str = "auto",
    compiled: bool = False,
) -> dict:  # fmt: skip
    """Choose how attention, ternary layers and scans are computed; returns what will run.

    attention: auto | sdpa | chunked | plain.  linear: auto | reference | int8.  scan: auto |
    reference | fast | mamba_ssm.  The result, for the run's record, holds for the device the model
    is on.  ``compiled``: torch.compile, which sees into plain PyTorch only, will be applied.
    A choice by name, like compiling, also takes inference away from the native engine.
    Raises BitbyteError for a kernel that is unknown or cannot run there.
    """
    for kind, name, known in (
        ("attention", attention, ATTENTION), ("linear", linear, KERNELS), ("scan", scan, SCANS),
    ):  # fmt: skip
        if name not in known:
            raise BitbyteError(f"no {kind} kernel {name!r}; choose from {', '.join(known)}")
    if compiled:
        if linear == "int8":
            raise BitbyteError("the int8 kernel cannot be compiled; drop --compile or the kernel")
        linear = "reference"
        for function in (rope_cos_sin, scan_for):  # their results are constants of a compiled graph
            torch.compiler.assume_constant_result(function)
    if compiled or {attention, linear, scan} != {"auto"}:
        model.engine = "torch"
    device = device_of(model)
    chosen: dict[str, str] = {"compile": "inductor"} if compiled else {}
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.kernel = attention
            T = model.config.seq_len
            chosen["attention"] = attention_for(attention, device, T, T, compiled)
        elif isinstance(module, Mixer):
            module.kernel = scan
            chosen["scan"] = scan_for(scan, module.ssm, device, compiled)
        elif isinstance(module, BitLinear):
            module.kernel = linear
            if linear == "int8":
                module.check_int8(device)
            ran = {chosen.get("linear"), module.kernel_for(device)} - {None}
            chosen["linear"] = "+".join(sorted(set("+".join(ran).split("+"))))
    return chosen


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the packed weights: 5 trits per byte, an fp32 scale per matrix, the rest in bf16.

    A prior's tables are included in full.
    """
    tables = sum(m.table_bytes for m in model.modules() if isinstance(m, Prior))
    ternary_layers = [m for m in model.modules() if isinstance(m, BitLinear)]
    in_layers = sum(m.weight.numel() for m in ternary_layers)
    rest = sum(p.numel() for p in model.parameters()) - in_layers
    trits = sum(-(-m.weight.numel() // 5) + 4 * m.groups for m in ternary_layers)
    return trits + 2 * rest + tables
