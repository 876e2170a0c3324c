"""Predictors turn ids into tables for the coder; encoder and decoder must use the same one.

A table gives each of the 256 byte values an integer count of at least 1; the counts sum to TOTAL.
If one count differs between encoder and decoder, everything after it is lost.  So a predictor has
a ``fingerprint``, and a decoder with a different one refuses before it decodes a byte.

`NativePredictor` is the native engine (`kernels.native`): floats, but in an order that no processor
changes.  `IntegerPredictor` computes in integers, with PyTorch alone and on GPUs, ternary models
only.  Both give the same bits on any machine, with any number of threads and any batch size.
`FloatPredictor` runs any causal model as it is.  Floating-point sums depend on the processor, the
libraries and the batch, so its fingerprint covers the distributions that this machine computes for
a fixed probe, and the batch never changes within a file.

A diffusion model that was trained in blocks predicts next bytes, so all of these run it;
`FloatBlocks` and `IntegerBlocks` code its blocks as a denoiser sees them instead.

Shapes: S lanes (windows side by side), T positions, V = 256 byte values.
"""

import contextlib
import hashlib
import json
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bitbyte.compress.exact import (
    LEVELS,
    LOGIT_STEPS,
    Dense,
    Residual,
    Ternary,
    counts_from_logits,
    parameter,
)
from bitbyte.compress.portable_mamba import IntegerMamba
from bitbyte.compress.portable_prior import IntegerPrior
from bitbyte.compress.portable_transformer import IntegerTransformer
from bitbyte.compress.rans import TOTAL
from bitbyte.config import config_to_dict
from bitbyte.device import device_of
from bitbyte.files import BitbyteError
from bitbyte.kernels import engine
from bitbyte.ngrams import REACH
from bitbyte.prior import PAST, matches
from bitbyte.vocab import MASK, N_BYTES, START, VOCAB_SIZE

MODES = ("auto", "native", "portable", "float", "blocks")
PROBE_STEPS = 64  # of the numeric fingerprint
FINGERPRINT_BYTES = 16


class Predictor(Protocol):
    """Integer distributions over the next byte, for ``lanes`` windows side by side."""

    mode: str  # "native", "portable", "float" or "blocks"
    fingerprint: bytes  # 16 bytes: of the weights and of how the numbers are computed
    window: int  # longest window, in bytes
    kernels: dict  # which code computes each part, for records

    def start(self, n_lanes: int) -> object:
        """State of ``n_lanes`` windows before their first byte."""

    def step(self, ids_S: np.ndarray, state) -> tuple[np.ndarray, object]:
        """(counts_SV uint32, state) after one more int64 id per lane; the first is START."""

    def windows(self, ids_ST: np.ndarray) -> np.ndarray | None:
        """What `step` gives for these ids, bit for bit: counts_STV; None if not guaranteed."""


class NativePredictor:
    """The model as the native engine computes it; see `Predictor`.

    ``windows`` equals ``step`` bit for bit.  Raises BitbyteError if the engine cannot run it here.
    """

    mode = "native"

    def __init__(self, model):
        with torch.no_grad():
            native = engine.engine_for(model.eval())
        if native is None:
            raise BitbyteError(f"no native mode here: {engine.described(model)}")
        self.engine, self.window = native, model.config.seq_len
        self.kernels = {"arithmetic": "native"}
        digest = hashlib.sha256(b"native " + _about(model.config))
        digest.update(tensors_hash(model))
        digest.update(native.counts(_probe(self.window)).astype("<u4").tobytes())
        self.fingerprint = digest.digest()[:FINGERPRINT_BYTES]

    def start(self, n_lanes: int):
        return self.engine.state(n_lanes)

    def step(self, ids_S: np.ndarray, state) -> tuple[np.ndarray, object]:
        with _broken():
            return state.count(torch.from_numpy(np.ascontiguousarray(ids_S, np.int64))), state

    def windows(self, ids_ST: np.ndarray) -> np.ndarray:
        with _broken():
            return self.engine.counts(torch.from_numpy(ids_ST))


@contextlib.contextmanager
def _broken():
    """Say of a model whose logits are no numbers that its weights are broken."""
    try:
        yield
    except FloatingPointError as error:
        raise BitbyteError(f"{error}; the model's weights are broken") from None


class FloatPredictor:
    """The model as it is, always with ``lanes`` windows at a time.

    The native engine gives the same bits for steps and windows, so it encodes whole windows.
    """

    mode = "float"

    def __init__(self, model, lanes: int):
        self.model, self.lanes = model.eval(), lanes
        self.kernels = {"arithmetic": "float", "engine": engine.described(model)}
        self.window = model.config.seq_len
        self._device = device_of(model)
        self._fingerprint: bytes | None = None

    @property
    def fingerprint(self) -> bytes:
        """Hash of the weights and of a probe's logits and counts, as this machine is set now."""
        if self._fingerprint is None:
            digest = hashlib.sha256(b"float 1 %d " % self.lanes + weights_hash(self.model))
            state, ids = self.start(self.lanes), np.full(self.lanes, START)
            lane = np.arange(self.lanes)
            for t in range(min(PROBE_STEPS, self.window)):
                logits, state = self._logits(ids, state)
                digest.update(logits.tobytes())
                digest.update(counts_from_floats(logits).tobytes())
                ids = (lane * 97 + t * t * 31 + t * 57) % N_BYTES
            self._fingerprint = digest.digest()[:FINGERPRINT_BYTES]
        return self._fingerprint

    def start(self, n_lanes: int):
        if n_lanes != self.lanes:
            raise AssertionError(f"{n_lanes} lanes, made for {self.lanes}: the sums would differ")
        with torch.no_grad():  # else the steps would be PyTorch's
            return self.model.init_state(n_lanes)

    def _logits(self, ids_S: np.ndarray, state) -> tuple[np.ndarray, object]:
        with torch.no_grad():
            ids = torch.from_numpy(np.ascontiguousarray(ids_S, np.int64)).to(self._device)
            logits_SV, state = self.model.step(ids, state)
            return logits_SV.float().cpu().numpy(), state

    def step(self, ids_S: np.ndarray, state) -> tuple[np.ndarray, object]:
        logits_SV, state = self._logits(ids_S, state)
        return counts_from_floats(logits_SV), state

    def windows(self, ids_ST: np.ndarray) -> np.ndarray | None:
        with torch.no_grad():
            if not engine.engine_for(self.model):
                return None  # a full forward pass sums in a different order than steps do
            logits_STV = self.model.logits(torch.from_numpy(ids_ST)).numpy()
        return counts_from_floats(logits_STV.reshape(-1, N_BYTES)).reshape(logits_STV.shape)


def counts_from_floats(logits_SV: np.ndarray) -> np.ndarray:
    """counts_SV (uint32) of float logits: each row sums to TOTAL and holds no 0.

    Each value gets 1 plus the integer part of its share of the rest; the largest count (the first
    one, in a tie) takes the remainder.
    """
    weights = logits_SV.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities give NaN, which is refused below
        weights -= weights.max(1, keepdims=True)
    np.exp(weights, out=weights)
    total = weights.sum(1, keepdims=True)
    if not np.isfinite(total).all():
        raise BitbyteError("the model's logits are NaN or infinite; its weights are broken")
    weights *= (TOTAL - N_BYTES) / total
    counts = weights.astype(np.uint32)  # rounds towards 0
    counts += 1
    rest = TOTAL - counts.sum(1, dtype=np.int64)
    counts[np.arange(len(counts)), counts.argmax(1)] += rest.astype(np.uint32)
    return counts


def weights_hash(model) -> bytes:
    """SHA-256 (32 bytes) of a model's config and of every tensor by name, shape, type and value."""
    config = json.dumps(config_to_dict(model.config), sort_keys=True).encode()
    return tensors_hash(model, config)


def tensors_hash(model, before: bytes = b"") -> bytes:
    """`weights_hash` with ``before`` in place of the config."""
    digest = hashlib.sha256(before)
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {tuple(plain.shape)} {plain.dtype}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def predictor_for(model, meta: dict | None = None, mode: str = "auto", *, lanes: int) -> Predictor:
    """The predictor of a causal model; "auto" is the first of native, portable, float that works.

    ``meta`` (of the checkpoint) only serves to name the model in errors.  Raises BitbyteError for
    other families and for a mode that the model does not support.
    """
    if mode not in MODES:
        raise BitbyteError(f"no mode {mode!r}; choose from {', '.join(MODES)}")
    family = model.config.family
    if mode == "blocks":
        if not getattr(model, "block", 0):
            raise BitbyteError(
                "--mode blocks needs a diffusion model that was trained with --block"
            )
        return IntegerBlocks(model) if supports(model.config) else FloatBlocks(model, lanes)
    if not hasattr(model, "step"):
        raise BitbyteError(
            f"a {family} model of whole windows has no next byte to code; compress with one of "
            "family ar or mamba, or of blocks"
        )
    if mode == "native" or (mode == "auto" and engine.described(model) == "native"):
        return NativePredictor(model)
    portable = supports(model.config)
    if mode == "portable" and not portable:
        what = (meta or {}).get("variant") or getattr(model.config, "linear", "")
        raise BitbyteError(
            f"models of family {family}, {what}, have no portable mode; use --mode float"
        )
    if portable and mode != "float":
        return IntegerPredictor(model)
    return FloatPredictor(model, lanes)


VERSION = 1  # of the arithmetic; raise it when any count of any model changes
MAX_WINDOW = 2048  # beyond this, the probabilities of a row would be too coarse
MAX_WIDTH = 1 << 14
MAX_WEIGHT = 1024.0  # a larger one could overflow a product
PROBE = 48  # ids whose counts are part of the fingerprint


def supports(config) -> bool:
    """Whether models of this config have a portable form: causal ternary ones."""
    if config.computes_as not in BODIES or config.linear != "ternary" or not config.act_quant:
        return False
    return config.seq_len <= MAX_WINDOW and config.d_model <= MAX_WIDTH


class IntegerState(NamedTuple):
    """State of the lanes: two tensors per layer, as the body needs them, written in place."""

    caches: list[tuple[Tensor, Tensor]]
    position: int  # ids fed so far
    past_SP: Tensor | None  # noqa: N815 - the last ids fed, for a model with a prior


BODIES = {"ar": IntegerTransformer, "mamba": IntegerMamba}


class IntegerPredictor:
    """The portable form of a causal ternary model; see `Predictor`.

    ``windows`` equals ``step`` bit for bit.  ``fingerprint`` covers the weights, the tables, the
    rules and the counts of a short probe, so it differs on a machine whose arithmetic is not exact.
    Raises BitbyteError for models that have no portable form.
    """

    mode = "portable"

    def __init__(self, model):
        c = self.config = model.config
        if not supports(c):
            raise BitbyteError(
                f"no portable form of {c.family} models with linear {c.linear} and act_quant "
                f"{c.act_quant} and seq_len {c.seq_len}: it needs ar or mamba, ternary, int8 "
                f"activations and at most {MAX_WINDOW}; use --mode float"
            )
        self.window, self.device = c.seq_len, model.embed.device
        if self.device.type not in ("cpu", "cuda"):
            raise BitbyteError(f"no portable inference on {self.device.type}; use cpu or cuda")
        for name, weight in model.named_parameters():
            if not bool((weight.detach().abs() <= MAX_WEIGHT).all()):  # false for NaN, too
                raise BitbyteError(f"{name} holds more than {MAX_WEIGHT:g}; use --mode float")
        self.residual = Residual(c.d_model)
        embed_VD = model.embed.detach().double()
        self.embed_VD = self.residual.integers(embed_VD)
        self._head(model.norm, embed_VD[:N_BYTES])
        self.body = BODIES[c.computes_as](c, model.body, self.device)
        self.prior = None
        if model.prior:
            self.prior = IntegerPrior(model.prior, self.residual, self.device)
        self.kernels = {"arithmetic": "integer"} | self.body.kernels
        self.fingerprint = self._fingerprint()

    def _head(self, norm, embed_VD: Tensor) -> None:
        self.norm_D = parameter(norm.weight)
        self.head = Dense(embed_VD, self.residual.root * LOGIT_STEPS)

    def _fingerprint(self) -> bytes:
        digest = hashlib.sha256(_about(self.config))
        mine = [self.embed_VD, self.head.weight, self.head.factor, self.norm_D]
        if self.prior:
            mine += self.prior.constants()
        for part in mine + self.body.constants():
            if isinstance(part, Ternary):
                digest.update(part.digest)
            else:
                data = part.detach().cpu().contiguous().numpy()
                digest.update(data.astype(data.dtype.newbyteorder("<")).tobytes())
        digest.update(self._probed().astype("<u4").tobytes())
        return digest.digest()[:16]

    def _probed(self) -> np.ndarray:
        return self.windows(_probe(self.window))

    def start(self, n_lanes: int) -> IntegerState:
        """State of ``n_lanes`` windows before their first id."""
        past_SP = self.prior.nothing(n_lanes) if self.prior else None
        return IntegerState(self.body.state(n_lanes), 0, past_SP)

    def step(self, ids_S, state: IntegerState) -> tuple[np.ndarray, IntegerState]:
        """Feed one id per lane (START first): (counts_SV uint32, state); use each state once."""
        ids_S1 = self._ids(ids_S)[:, None]
        if state.position >= self.window:
            raise BitbyteError(f"windows of this model have {self.window} bytes")
        with _exact():
            return self._run(ids_S1, state)

    def windows(self, ids_ST) -> np.ndarray:
        """counts_STV (uint32) of all positions at once; ids as for `step`, START first."""
        ids_ST = self._ids(ids_ST)
        S, T = ids_ST.shape
        if self.window < T:
            raise BitbyteError(f"{T} ids do not fit into a window of {self.window}")
        counts = np.empty((S, T, N_BYTES), dtype=np.uint32)
        lanes = max(1, self.body.tokens // max(1, T))
        with _exact():
            for a in range(0, S, lanes):
                part = ids_ST[a : a + lanes]
                counts_NV, _ = self._run(part, self.start(len(part)))
                counts[a : a + lanes] = counts_NV.reshape(len(part), T, -1)
        return counts

    def _ids(self, ids) -> Tensor:
        ids = torch.as_tensor(ids)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= VOCAB_SIZE):
            raise BitbyteError(f"ids must be from 0 to {START}")
        return ids.to(self.device, torch.int64)

    def _run(
        self, ids_ST: Tensor, state: IntegerState, near_SD: Tensor | None = None
    ) -> tuple[np.ndarray, IntegerState]:
        """(counts_NV, state) after the ids; with near_SD, (counts_SV, state) of a query beside the
        last id, whose input is the same plus this.
        """
        (S, T), x_ND = ids_ST.shape, self.embed_VD.index_select(0, ids_ST.flatten())
        past_SP, f_NKr = state.past_SP, None
        if self.prior:
            all_SP = torch.cat((past_SP, ids_ST), 1)
            f_NKr = self.prior.features(all_SP[:, -T - REACH :], T)
            self.prior.embed(x_ND, matches(all_SP, T), f_NKr)
            past_SP = all_SP[:, -PAST:]
        if near_SD is None:
            self.body(x_ND, state.caches, state.position, (S, T))
        else:
            x_STD = x_ND.view(S, T, -1)
            limit, last_S1D = self.residual.limit, x_STD[:, -1:] + near_SD[:, None]
            x_ND = torch.cat((x_STD, last_S1D.clamp_(-limit, limit)), 1).flatten(0, 1)
            self.body(x_ND, state.caches, state.position, (S, T + 1), 1)
            x_ND, f_NKr = x_ND[T :: T + 1], None if f_NKr is None else f_NKr[T - 1 :: T]
        q_ND, scale_N1 = self.residual.normed(x_ND, self.norm_D, float(LEVELS))
        logits_NV = self.head(q_ND, scale_N1)
        if self.prior:
            logits_NV += self.prior.logits(f_NKr, q_ND, scale_N1)
        counts_NV = counts_from_logits(logits_NV).cpu().numpy().view(np.uint32)
        return counts_NV, IntegerState(state.caches, state.position + T, past_SP)


class BlockState(NamedTuple):
    """State of lanes that are coded within blocks, from left to right."""

    past: object  # the network's, of all blocks before
    ids_SM: np.ndarray  # noqa: N815 - (S, 2 block): the block before, and what is known of this one
    known: int  # bytes of it, -1 before the first id

    @property
    def block(self) -> int:
        return self.ids_SM.shape[1] // 2

    def plus(self, ids_S: np.ndarray, feed) -> "BlockState":
        """After one more id in each lane; ``feed(ids, past) -> past`` takes whole blocks."""
        past, ids_SM, known, N = self.past, self.ids_SM.copy(), self.known + 1, self.block
        ids_SM[:, N - 1 + known] = ids_S
        if known == N:
            past = feed(ids_SM[:, N - 1 : -1], past)
            ids_SM[:, :N], ids_SM[:, N:], known = ids_SM[:, N:], MASK, 0
        return BlockState(past, ids_SM, known)

    @classmethod
    def before(cls, past: object, lanes: int, block: int) -> "BlockState":
        """The state of a window of which nothing is known."""
        return cls(past, np.full((lanes, 2 * block), MASK), -1)


class FloatBlocks(FloatPredictor):
    """A model that fills blocks, as it is: its chain rule from left to right within each block."""

    mode = "blocks"

    def __init__(self, model, lanes: int):
        super().__init__(model, lanes)
        self.kernels = {"arithmetic": "float", "engine": "torch (blocks)"}

    def start(self, n_lanes: int) -> BlockState:
        past = self.model.empty_state(n_lanes)
        return BlockState.before(past, n_lanes, self.model.block)

    def _tensor(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(self._device)

    def _logits(self, ids_S: np.ndarray, state) -> tuple[np.ndarray, object]:
        with torch.no_grad():
            state = state.plus(ids_S, lambda i, past: self.model.prefill(self._tensor(i), past)[1])
            logits_SNV = self.model.fill(self._tensor(state.ids_SM), state.past)
            return logits_SNV[:, state.known].float().cpu().numpy(), state

    def windows(self, ids_ST: np.ndarray) -> None:
        return None


class IntegerBlocks(IntegerPredictor):
    """`FloatBlocks` in the portable arithmetic, for ternary models."""

    mode = "blocks"

    def __init__(self, model):
        N, residual = model.block, Residual(model.config.d_model)
        # Integers of float64, so small that all sums of their products are exact in any order.
        inside_Vr, around_NrD = (
            torch.round(x.detach().cpu().double().clamp(-32, 32) * 2.0**bits)
            for x, bits in ((model.inside, 16), (model.around[:N], 20))
        )
        table_NVD = inside_Vr @ around_NrD * 2.0**-36
        self.block, self.table_NVD = N, residual.integers(table_NVD).to(model.embed.device)
        self.beside_D = residual.integers(model.apart.detach()[0].double())
        super().__init__(model)

    def _near(self, ids_SN: Tensor) -> Tensor:
        """near_SD: what a query knows of the N bytes before it, beside the last one's embedding."""
        near_SD = self.beside_D.repeat(len(ids_SN), 1)
        for ids_S, table_VD in zip(ids_SN.unbind(1), self.table_NVD, strict=True):
            rows_SD = table_VD.index_select(0, ids_S.clamp(max=N_BYTES - 1))
            near_SD += rows_SD * (ids_S < N_BYTES)[:, None]
        return near_SD

    def start(self, n_lanes: int) -> BlockState:  # pyright: ignore
        return BlockState.before(super().start(n_lanes), n_lanes, self.block)

    def step(self, ids_S, state) -> tuple[np.ndarray, BlockState]:  # pyright: ignore
        with _exact():
            state = state.plus(np.asarray(ids_S), lambda i, past: self._run(self._ids(i), past)[1])
            ids_SM, N, known = self._ids(state.ids_SM), self.block, state.known
            near_SD = self._near(ids_SM[:, known : N + known])
            return self._run(ids_SM[:, N - 1 : N + known], state.past, near_SD)[0], state

    def windows(self, ids_ST) -> None:  # pyright: ignore
        return None

    def _probed(self) -> np.ndarray:
        state = self.start(2)
        counts = [self.table_NVD.cpu().numpy(), self.beside_D.cpu().numpy()]
        for ids_S in _probe(self.window).T.numpy():
            counts_SV, state = self.step(ids_S, state)
            counts.append(counts_SV)
        return np.concatenate(counts, axis=None)


def _about(c) -> bytes:
    """What a fingerprint says of a config: not all of it, since configs get new fields."""
    about = [VERSION, c.family, c.n_head, c.seq_len, c.n_layer, getattr(c, "ssm", "")]
    return json.dumps(about).encode()


def _probe(window: int) -> Tensor:
    """ids_ST whose counts are part of a fingerprint."""
    ids_ST = (torch.arange(2 * min(PROBE, window)) * 37 % N_BYTES).view(2, -1)
    ids_ST[:, 0] = START
    return ids_ST


@contextlib.contextmanager
def _exact():
    """No gradients, no autocast, and full float32 products, whatever the caller has chosen."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    off = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), next(off), next(off):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
