"""A causal transformer as a list of native operations.

Shapes: S lanes (independent streams), T positions fed at once, M = S T rows, D width, F
feed-forward width, K contexts of a prior, r its rank, V bytes.
"""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bitbyte.bitlinear import BitLinear, Linear
from bitbyte.config import MATCHES
from bitbyte.kernels.native import ngrams, products
from bitbyte.kernels.native import transformer as ops
from bitbyte.kernels.native.machine import Machine, Program
from bitbyte.transformer import rope_cos_sin
from bitbyte.vocab import N_BYTES, START, VOCAB_SIZE

TOGETHER = 4096  # ids that one thread computes at once; more does not make it faster
KERNELS = [products.ternary, products.dense, *ops.KERNELS, *ngrams.KERNELS]


@functools.cache
def machine() -> Machine:
    """All kernels, compiled for this processor."""
    return Machine(KERNELS)


class Engine:
    """A causal transformer; see `logits` and `state`.

    What runs is raw addresses, so ids, positions and shapes are checked before (ValueError).
    """

    def __init__(self, model: nn.Module):
        c = model.config
        self.config, self.context = c, c.seq_len
        self.cached = -(-c.seq_len // 16) * 16
        self.width = c.d_model // c.n_head
        cos, sin = rope_cos_sin(0, c.seq_len, self.width, c.rope_theta, torch.device("cpu"))
        half = self.width // 2
        self.cos, self.sin = (np.ascontiguousarray(t.numpy()[:, :half]) for t in (cos, sin))
        self.table = _array(model.embed)
        self.head = products.pack_dense(self.table[:N_BYTES])
        self.norm = _array(model.norm.weight)
        self.prior = model.prior and _Prior(model.prior)
        self.blocks = [
            _Block(
                _array(b.attn_norm.weight), _Weight(b.attn.qkv), _Weight(b.attn.out),
                _array(b.mlp_norm.weight), _Weight(b.mlp.gate_up), _Weight(b.mlp.down),
            )
            for b in model.body.blocks
        ]  # fmt: skip
        self.idle: list[State] = []  # states of windows that were computed, to be used again
        self.lock = threading.Lock()  # of that list

    def state(self, lanes: int) -> "State":
        """What ``lanes`` streams remember that have been fed nothing."""
        return State(self, lanes)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """logits_BTV (float32): what PyTorch's ``model.logits`` computes.

        Windows are divided among as many threads as PyTorch may use.
        """
        B, T = ids_BT.shape
        logits_BTV = np.empty((B, T, N_BYTES), np.float32)
        ids_BT = _checked(ids_BT)
        lanes = max(1, min(-(-B // torch.get_num_threads()), TOGETHER // max(1, T)))

        def work(first: int) -> None:
            part = ids_BT[first : first + lanes]
            state = self._idle_state(len(part))
            logits_BTV[first : first + lanes] = state.run(part).reshape(-1, T, N_BYTES)
            with self.lock:
                self.idle.append(state)

        if self.context < T:
            raise ValueError(f"{T} ids do not fit into a context of {self.context}")
        starts = range(0, B, lanes)
        if len(starts) == 1:
            work(0)
        else:
            with ThreadPoolExecutor(torch.get_num_threads()) as workers:
                list(workers.map(work, starts))
        return torch.from_numpy(logits_BTV)

    def _idle_state(self, lanes: int) -> "State":
        """A state of so many lanes, at position 0."""
        with self.lock:
            for i, state in enumerate(self.idle):
                if state.lanes == lanes:
                    state.position = 0
                    return self.idle.pop(i)
            del self.idle[:-1]  # of other sizes: one is enough to keep
        return self.state(lanes)


class State:
    """What lanes remember of the ids they were fed, and how to feed them more."""

    def __init__(self, engine: Engine, lanes: int):
        c = engine.config
        self.engine, self.lanes, self.position = engine, lanes, 0
        shape = (2, c.n_layer, lanes, c.n_head, engine.cached * engine.width)
        self.caches = np.zeros(shape, np.float32)  # keys and values, see `transformer.rotate`
        self.past = np.full((lanes, engine.cached + 2 * ngrams.GAP), START, np.int32)
        self.steps: dict[tuple, _Step] = {}

    def feed(self, ids_ST: Tensor) -> Tensor:
        """logits_SV (float32) after T more ids in each lane."""
        return torch.from_numpy(self.run(_checked(ids_ST), last=True).copy())

    def run(self, ids_ST: np.ndarray, last: bool = False) -> np.ndarray:
        """logits_MV after each of the ids (``last``: logits_SV after the last), good until the
        next call.
        """
        S, T = ids_ST.shape
        if not (T and self.lanes == S and self.position + T <= self.engine.context):
            raise ValueError(
                f"{S} x {T} ids do not fit: {self.lanes} lanes, {self.position} of "
                f"{self.engine.context} positions used"
            )
        step = self.steps.get((T, last))
        if step is None:  # few lengths come twice, except for 1 and that of a window
            self.steps = {key: s for key, s in self.steps.items() if key[0] == 1}
            step = self.steps[T, last] = _Step(self.engine, self, T, last)
        logits = step.run(ids_ST, self.position)
        self.position += T
        return logits


def _checked(ids: Tensor) -> np.ndarray:
    """The ids as int64.  ValueError if one is outside 0..256."""
    array = np.ascontiguousarray(ids.numpy(), np.int64)
    if array.size and (array.min() < 0 or array.max() >= VOCAB_SIZE):
        raise ValueError("ids are 0 to 256")
    return array


class _Weight:
    """A packed matrix."""

    def __init__(self, layer: Linear):
        self.outputs, self.inputs = layer.weight.shape
        self.scale_O = None
        if isinstance(layer, BitLinear):
            q_OI, scale_O = layer.int8_weight()
            self.packed, self.scale_O = products.pack_ternary(q_OI.numpy()), _array(scale_O)
        else:
            self.packed = products.pack_dense(_array(layer.weight))


class _Block(NamedTuple):
    attn_norm: np.ndarray
    qkv: _Weight
    out: _Weight
    mlp_norm: np.ndarray
    gate_up: _Weight
    down: _Weight


class _Prior:
    """A prior's tables and weights."""

    def __init__(self, prior):
        self.orders, self.shift = prior.orders, 65 - prior.rows.bit_length()
        self.codes, self.scale = prior.codes.numpy().copy(), _array(prior.scale)
        self.contexts, self.rank = prior.scale.shape
        self.project, self.gate = _Weight(prior.project), _array(prior.gate)
        self.direct = products.pack_dense(_array(prior.direct))
        self.match = [np.ascontiguousarray(table) for table in _array(prior.match)]


class _Step:
    """The operations for T more ids in each of a state's lanes, with their scratch."""

    def __init__(self, engine: Engine, state: State, T: int, last: bool):
        c, e, S = engine.config, engine, state.lanes
        M = S * T
        D, F = c.d_model, c.d_ff
        widest = max(D, F, e.prior.contexts * e.prior.rank if e.prior else 0)
        self.h_MD, self.y = np.zeros((M, D), np.float32), np.zeros((M, widest), np.float32)
        self.wide = np.zeros((M, max(3 * D, 2 * F)), np.float32)
        self.q = {
            "out": np.zeros((M, widest), np.int8), "scale": np.zeros(M, np.float32),
            "total": np.zeros(M, np.int32),
        }  # fmt: skip
        self.ids_ST = np.zeros((S, T), np.int64)
        self.body = p = Program(machine())
        p.context[:] = M, 0, T, p.address(self.ids_ST)
        p.add(ops.embed, table=e.table, out=self.h_MD, width=D)
        f_MKr = self._prior(e.prior, state, M, D) if e.prior else None
        heads = {"heads": c.n_head, "width": e.width, "cached": e.cached}
        scores = np.zeros((ops.TILE, e.cached), np.float32)
        for i, block in enumerate(e.blocks):
            keys, values = state.caches[0, i], state.caches[1, i]
            self._normed(block.attn_norm, block.qkv, self.wide, D)
            p.add(
                ops.rotate, qkv=self.wide, keys=keys, values=values, cos=e.cos, sin=e.sin, **heads
            )
            p.add(ops.attend, qkv=self.wide, keys=keys, values=values, scores=scores, out=self.y,
                  **heads)  # fmt: skip
            self._product(block.out, self.y, self.h_MD, add=1)
            self._normed(block.mlp_norm, block.gate_up, self.wide, D)
            if block.down.scale_O is None:
                p.add(ops.gate, x=self.wide, out=self.y, width=F)
            else:
                p.add(ops.gate_quantize, x=self.wide, gated=self.y, **self.q, width=F)
            self._product(block.down, self.y, self.h_MD, add=1, quantized=True)
        n = S if last else M
        self.picked = None if not last or M == S else np.zeros((S, D), np.float32)
        f_nKr = f_MKr
        if self.picked is not None:  # a program of its own, for other rows
            p.finish()
            self.head = p = Program(machine())
            if f_MKr is not None:
                f_nKr = np.zeros((S, f_MKr.shape[1]), np.float32)
        self.S, self.f_MKr, self.f_nKr = S, f_MKr, f_nKr
        h_nD = self.h_MD if self.picked is None else self.picked
        y_nD, self.logits_MV = np.zeros((n, D), np.float32), np.zeros((n, N_BYTES), np.float32)
        p.add(ops.norm, x=h_nD, weight=e.norm, out=y_nD, width=D)
        p.add(products.dense, x=y_nD, weight=e.head, out=self.logits_MV, inputs=D, outputs=N_BYTES,
              add=0)  # fmt: skip
        if e.prior:
            gated = np.zeros_like(f_nKr)
            p.add(ngrams.weigh, f=f_nKr, normed=y_nD, gate=e.prior.gate, out=gated,
                  contexts=e.prior.contexts, rank=e.prior.rank, width=D)  # fmt: skip
            p.add(products.dense, x=gated, weight=e.prior.direct, out=self.logits_MV,
                  inputs=f_nKr.shape[1], outputs=N_BYTES, add=1)  # fmt: skip
        p.finish()

    def run(self, ids_ST: np.ndarray, position: int) -> np.ndarray:
        """logits_MV, overwritten by the next call."""
        self.ids_ST[:] = ids_ST
        self.body.context[1] = position
        self.body()
        if self.picked is not None:
            self.picked[:] = self.h_MD.reshape(self.S, -1, self.h_MD.shape[1])[:, -1]
            if self.f_MKr is not None:
                self.f_nKr[:] = self.f_MKr.reshape(self.S, -1, self.f_MKr.shape[1])[:, -1]
            self.head.context[0] = self.S
            self.head()
        return self.logits_MV

    def _prior(self, prior: _Prior, state: State, M: int, D: int) -> np.ndarray:
        """Add to the embedding what the prior says; returns f_MKr, to be filled by the program."""
        p, f_MKr = self.body, np.zeros((M, prior.contexts * prior.rank), np.float32)
        past = {"past": state.past, "stride": state.past.shape[1]}
        p.add(ngrams.remember, **past)
        p.add(ngrams.features, **past, codes=prior.codes, scale=prior.scale, out=f_MKr,
              orders=prior.orders, shift=prior.shift, rank=prior.rank)  # fmt: skip
        self._product(prior.project, f_MKr, self.h_MD, add=1)
        for span, table in zip(MATCHES, prior.match, strict=True):
            p.add(ngrams.follow, **past, table=table, out=self.h_MD, span=span, width=D)
        return f_MKr

    def _normed(self, norm_D: np.ndarray, weight: _Weight, out: np.ndarray, D: int) -> None:
        """out = weight applied to the normed residual stream."""
        if weight.scale_O is None:
            self.body.add(ops.norm, x=self.h_MD, weight=norm_D, out=self.y, width=D)
        else:
            self.body.add(ops.norm_quantize, x=self.h_MD, weight=norm_D, **self.q, width=D)
        self._product(weight, self.y, out, quantized=True)

    def _product(self, w: _Weight, x, out: np.ndarray, add: int = 0, quantized=False) -> None:
        """out (+)= x w^T; a ternary weight takes x from self.q, where it may be already."""
        shape = {"inputs": w.inputs, "outputs": w.outputs, "add": add}
        if w.scale_O is None:
            self.body.add(products.dense, x=x, weight=w.packed, out=out, **shape)
            return
        if not quantized:
            self.body.add(ops.quantize, x=x, **self.q, width=w.inputs)
        self.body.add(
            products.ternary, x=self.q["out"], x_scale=self.q["scale"], x_sum=self.q["total"],
            weight=w.packed, scale=w.scale_O, out=out, **shape,
        )  # fmt: skip


def self_test() -> None:
    """Compile, and compare a product with NumPy's.  Raises whatever goes wrong."""
    run, one = Program(machine()), np.ones(1, np.float32)
    x_MI = np.arange(-32, 32, dtype=np.int8)[None]
    q_OI = (np.arange(64 * 64) * 7 % 3 - 1).astype(np.int8).reshape(64, 64)
    out = np.zeros((1, 64), np.float32)
    run.add(
        products.ternary, x=x_MI, x_scale=one, x_sum=x_MI.sum(1, dtype=np.int32),
        weight=products.pack_ternary(q_OI), scale=np.ones(64, np.float32), out=out, inputs=64,
        outputs=64, add=0,
    )  # fmt: skip
    run.finish()
    run.context[0] = 1
    run()
    if not np.array_equal(out[0], q_OI.astype(np.int32) @ x_MI[0]):
        raise ArithmeticError("wrong sums")


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())
