"""The model families and the contract they share.

Every family maps a window of bytes to the cost of each byte:

``forward(ids_BT, noise_B=None, fold_BT=None) -> nats_BT``
    float32 nats; the training loss is their mean, bits per byte their sum / ln 2 / bytes.  noise_B
    (int64, a number for each window) determines what a denoiser hides; causal families ignore it.
    fold_BT (int64) is the part of the training data that each byte lies in.  A model with a prior
    needs it in training, to read tables that did not count that byte (see `prior`).
``logits(ids_BT) -> logits_BTV``
    V = 256.  Position t predicts the byte after ids[0..t] in a causal family; in diffusion it
    predicts byte t from the bytes that are not MASK.  Diffusion in blocks is causal here, and has
    ``block``, ``block_logits`` and ``fill`` besides.
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
from bitbyte.config import (
    DiffusionConfig,
    MambaConfig,
    ModelConfig,
    TransformerConfig,
)
from bitbyte.device import device_of
from bitbyte.files import BitbyteError
from bitbyte.kernels.engine import engine_for
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

    def logits(self, ids_BT: Tensor, fold_BT: Tensor | None = None) -> Tensor:
        """Logits of a byte at each position, as the module docstring defines them; ids 0..256."""
        native = engine_for(self) if fold_BT is None else None
        if native:
            return native.logits(ids_BT)
        ids_BT = ids_BT.long()
        h_BTD, f_BTKr = F.embedding(ids_BT, self.embed), None
        if self.prior:
            past_BT = self.before(ids_BT)
            f_BTKr = self.prior.features(past_BT, fold_BT)
            next_MBT = matches(past_BT, past_BT.shape[1])
            h_BTD = h_BTD + self.prior.embed(f_BTKr, next_MBT)
        return self._head(self.body(h_BTD), f_BTKr)

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

    @property
    def body(self) -> Stack:
        return self.transformer

    @property
    def context(self) -> int:
        return self.config.seq_len

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

    A window is cut into blocks of N bytes.  A block is predicted from all bytes before it and from
    those of its own bytes that are not hidden, so its bytes may be revealed in any order, or
    several at once (arXiv:2503.09573).  Position t predicts byte t: its input is the last visible
    byte before it, as in a causal model, plus the first visible byte of the block from t on, each
    with how far away it is.  Without the second term and with causal attention this is `BitByteLM`,
    and all its methods mean the same here.  (Bytes live on their neighbors: where a hidden byte's
    input says nothing but that, a shallow network has to find them by attention first.)

    In training a window passes through the network twice at once: the bytes themselves, causal, and
    the bytes with some of each block hidden (see `kernels.cpu_attention.block_mask`).  A prior acts
    on visible bytes only.

    Shapes: N bytes of a block, G blocks of a window.
    """

    config: DiffusionConfig  # pyright: ignore

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        self.block = config.block  # in training it may be smaller for a while
        self.inside = nn.Parameter(torch.empty(VOCAB_SIZE, config.d_model))
        nn.init.normal_(self.inside, std=0.02)
        self.apart = nn.Parameter(torch.zeros(2, config.block, config.d_model))

    def forward(
        self, ids_BT: Tensor, noise_B: Tensor | None = None, fold_BT: Tensor | None = None
    ) -> Tensor:
        """Nats of every byte, given those before it; with ``noise_B``, the training loss.

        That is ``ar_share`` of the same plus the rest of the nats of hidden bytes, weighted so that
        their sum over a window is an unbiased draw of the bound on its cost.
        """
        if noise_B is None:
            return super().forward(ids_BT, None, fold_BT)
        if self.block == 1:  # both streams would predict next bytes; all parameters take part
            unused = 0 * (self.inside.sum() + self.apart.sum())
            return super().forward(ids_BT, None, fold_BT) + unused
        ids_BT, share = only_bytes(ids_BT), self.config.ar_share
        hidden_BT = self.hide(noise_B, ids_BT.shape[1])
        weight_BGN = hidden_BT.unflatten(1, (-1, self.block)).float()
        weight_BGN = weight_BGN / weight_BGN.mean(-1, keepdim=True)
        h_BTD, f_BTKr = self._twice(ids_BT, ids_BT.masked_fill(hidden_BT, MASK), fold_BT)
        logits_NV = self._head(h_BTD, f_BTKr).float().flatten(0, 1)
        targets_BT = ids_BT.repeat(1, 2)
        nats_BT = F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none")
        next_BT, hidden_nats_BT = nats_BT.view_as(targets_BT).chunk(2, 1)
        return share * next_BT + (1 - share) * hidden_nats_BT * weight_BGN.flatten(1)

    def hide(self, noise_B: Tensor, T: int) -> Tensor:
        """hidden_BT: k bytes of each block, k spread evenly over 1..N; see `models.hide_some`."""
        blocks = T // self.block
        noise_BG = noise_B[:, None] * blocks + torch.arange(blocks, device=noise_B.device)
        return hide_some(noise_BG.flatten(), self.block).view(-1, T)

    def block_logits(self, shown_BT: Tensor, ids_BT: Tensor) -> Tensor:
        """logits_BTV of every byte, given the blocks before its own and what is shown of that.

        shown_BT has MASK for hidden bytes, ids_BT all bytes.  A block that is cut off by the end of
        the window counts as one whose other bytes are hidden.
        """
        T = ids_BT.shape[1]
        more = -T % self.block
        shown_BT, ids_BT = F.pad(shown_BT, (0, more), value=MASK), F.pad(ids_BT, (0, more))
        h_BTD, f_BTKr = self._twice(ids_BT.long(), shown_BT.long(), None)
        shown = slice(T + more, 2 * T + more)
        f_BTKr = None if f_BTKr is None else f_BTKr[:, shown]
        return self._head(h_BTD[:, shown], f_BTKr)

    def _twice(self, ids_BT: Tensor, shown_BT: Tensor, fold_BT: Tensor | None) -> tuple:
        """(h_BTD, f_BTKr) of the text and, after it, of what is shown of its blocks."""
        T, before_BT = ids_BT.shape[1], preceding(ids_BT)
        h_BTD, f_BTKr = F.embedding(before_BT, self.embed), None
        shown_BGN = shown_BT.unflatten(1, (-1, self.block))
        first_BG1 = before_BT.unflatten(1, (-1, self.block))[..., :1]
        h_shown_BTD = self._embed_block(torch.cat((first_BG1, shown_BGN), 2)).flatten(1, 2)
        if self.prior:
            f_BTKr = self.prior.features(before_BT, fold_BT)
            next_MBT = matches(before_BT, T)
            h_BTD = h_BTD + self.prior.embed(f_BTKr, next_MBT)
            run_BT = visible_before(shown_BGN).flatten(1)
            f_shown_BTKr, next_MBT = where_visible(f_BTKr, next_MBT, run_BT)
            h_shown_BTD = h_shown_BTD + self.prior.embed(f_shown_BTKr, next_MBT)
            f_BTKr = torch.cat((f_BTKr, f_shown_BTKr), 1)
        return self.body(torch.cat((h_BTD, h_shown_BTD), 1), None, 0, self.block), f_BTKr

    def _embed_block(self, ids_GM: Tensor) -> Tensor:
        """h_GND (..., N, D) of a block's positions, see `neighbors`."""
        before_GN, gap_GN, after_GN, distance_GN = neighbors(ids_GM)
        h_GND = F.embedding(before_GN, self.embed) + F.embedding(gap_GN, self.apart[0])
        return h_GND + F.embedding(after_GN, self.inside) + F.embedding(distance_GN, self.apart[1])

    def fill(self, ids_BN: Tensor, state: State) -> Tensor:
        """logits_BNV of a block after what ``state`` was fed, which does not change.

        ids_BN is the byte before the block (START if there is none), which must not have been fed
        yet, then the block's bytes with MASK for hidden ones: N + 1 ids, N logits.  ``state`` is
        one of `empty_state`.  Equals `block_logits`.
        """
        before_BN, shown_BN, N = ids_BN[:, :-1], ids_BN[:, 1:], ids_BN.shape[1] - 1
        h_BND, f_BNKr = self._embed_block(ids_BN), None
        if self.prior:
            past_BP = state.past_BP
            if past_BP is None:
                past_BP = torch.full((len(ids_BN), PAST), START, device=ids_BN.device)
            all_BP = torch.cat((past_BP, before_BN), 1)
            f_BNKr, next_MBN = where_visible(
                self.prior.features(all_BP[:, -N - REACH :])[:, -N:],
                matches(all_BP, N), visible_before(shown_BN),
            )  # fmt: skip
            h_BND = h_BND + self.prior.embed(f_BNKr, next_MBN)
        return self._head(self.body(h_BND, state.caches, state.position, N), f_BNKr)


def neighbors(ids_GM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(before, gap, after, distance), each (..., N): the nearest visible bytes around each position
    of a block, and how far they are.

    ids_GM (..., N + 1) is the byte before the block, or START, and the block's bytes with MASK for
    hidden ones.  ``before`` is the last visible id before a position, ``gap`` how many hidden bytes
    lie between.  ``after`` is the first visible byte from the position on, ``distance`` how far on;
    MASK and 0 if there is none.
    """
    M = ids_GM.shape[-1]
    at_M = torch.arange(M, device=ids_GM.device)
    visible_GM = (ids_GM != MASK) | (at_M == 0)
    left_GN = torch.where(visible_GM, at_M, 0).cummax(-1).values[..., :-1]
    right_GM = torch.where(visible_GM, at_M, M).flip(-1).cummin(-1).values.flip(-1)
    right_GN, none_GN = right_GM[..., 1:], right_GM[..., 1:] == M
    after_GN = ids_GM.gather(-1, right_GN.clamp(max=M - 1)).masked_fill(none_GN, MASK)
    distance_GN = (right_GN - at_M[1:]).masked_fill(none_GN, 0)
    return ids_GM.gather(-1, left_GN), at_M[:-1] - left_GN, after_GN, distance_GN


def visible_before(shown_GN: Tensor) -> Tensor:
    """How many bytes right before each are visible, if all before the block are: `PAST` and more.

    ``shown_GN`` is of shape (..., N), with MASK for hidden bytes.
    """
    at_N = torch.arange(shown_GN.shape[-1], device=shown_GN.device)
    last_GN = torch.where(shown_GN == MASK, at_N, -PAST - 1).cummax(-1).values
    last_GN = F.pad(last_GN[..., :-1], (1, 0), value=-PAST - 1)
    return at_N - last_GN - 1


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
        torch.manual_seed(seed)
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
