"""A model as a list of native operations.

Shapes: S lanes (independent streams), T positions fed at once, M = S T rows, D width, K contexts
of a prior, r its rank, V bytes.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from bitbyte.config import MATCHES, SamplingConfig
from bitbyte.kernels.native import counts, mamba, ngrams, products, sampling, threads
from bitbyte.kernels.native import transformer as ops
from bitbyte.kernels.native.machine import WIDTH, Machine, Program
from bitbyte.kernels.native.products import Weight, array
from bitbyte.kernels.native.threads import Crew
from bitbyte.prior import PAST
from bitbyte.vocab import N_BYTES, START, VOCAB_SIZE

PIECE = 16  # ids of each lane that are computed at once, at least
FAMILIES = {"ar": ops.Transformer, "mamba": mamba.Mamba, "diffusion": ops.Bidirectional}
KERNELS = [
    products.ternary, products.dense, *ops.KERNELS, *mamba.KERNELS, *ngrams.KERNELS,
    *sampling.KERNELS, *counts.KERNELS,
]  # fmt: skip
COUNT_BITS = 24  # counts of a row sum to 2 to this power
DRAWS = 32  # bytes that are drawn in one call, at most


@functools.cache
def machine() -> Machine:
    """All kernels, compiled for this processor."""
    return Machine(KERNELS + threads.KERNELS)


class Engine:
    """A model; see `logits` and, for causal ones, `state`.

    What runs is raw addresses, so ids, positions and shapes are checked before (ValueError).
    ``threads`` is how many compute a step.
    """

    def __init__(self, model, threads: int = 1):
        self.crew = Crew(threads) if threads > 1 else None
        self.blocks = FAMILIES[model.config.computes_as](model, machine())
        self.context, self.width = self.blocks.context, model.config.d_model
        self.late = int(not model.exact)  # see `ngrams.remember`
        self.table = array(model.embed)
        self.head = Weight(model.embed[:N_BYTES])
        self.norm = array(model.norm.weight)
        self.prior = _Prior(model.prior) if model.prior else None
        self.idle: list[State] = []  # states of windows that were computed, to be used again
        self.lock = threading.Lock()  # of that list

    def state(self, lanes: int) -> "State":
        """What ``lanes`` streams remember that have been fed nothing."""
        return State(self, lanes)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """logits_BTV (float32): what PyTorch's ``model.logits`` computes.

        Windows are divided among as many threads as PyTorch may use.
        """
        return torch.from_numpy(self._windows(ids_BT, np.float32))

    def counts(self, ids_BT: Tensor) -> np.ndarray:
        """counts_BTV (uint32) of those logits, see `counts.count`; they sum to 2^COUNT_BITS.

        Raises FloatingPointError if a logit is NaN or infinite.
        """
        return self._windows(ids_BT, np.uint32)

    def _windows(self, ids_BT: Tensor, kind: type) -> np.ndarray:
        B, T = ids_BT.shape
        made_BTV = np.empty((B, T, N_BYTES), kind)
        windows_BT = _checked(ids_BT)
        lanes = max(1, min(-(-B // torch.get_num_threads()), self.blocks.together // max(1, T)))

        def work(first: int) -> None:
            part = windows_BT[first : first + lanes]
            state = self._idle_state(len(part))
            made_BTV[first : first + lanes] = state.run(part, kind=kind).reshape(-1, T, N_BYTES)
            with self.lock:
                self.idle.append(state)

        if self.context < T:
            raise ValueError(f"{T} ids do not fit into a context of {self.context}")
        starts, threads = range(0, B, lanes), torch.get_num_threads()
        if min(len(starts), threads) == 1:
            for first in starts:
                work(first)
        else:
            with ThreadPoolExecutor(threads) as workers:
                list(workers.map(work, starts))
        return made_BTV

    def _idle_state(self, lanes: int) -> "State":
        """A state of so many lanes, at position 0."""
        with self.lock:
            for i, state in enumerate(self.idle):
                if state.lanes == lanes:
                    state.clear()
                    return self.idle.pop(i)
            del self.idle[:-1]  # of other sizes: one is enough to keep
        return self.state(lanes)


class State:
    """What lanes remember of the ids they were fed, and how to feed them more."""

    draws = DRAWS

    def __init__(self, engine: Engine, lanes: int):
        self.engine, self.lanes, self.position = engine, lanes, 0
        self.caches = engine.blocks.caches(lanes)
        room = engine.blocks.remembered  # from position ``first`` on
        self.past = np.full((lanes, ngrams.GAP + room + ngrams.GAP), START, np.int32)
        self.first = 0
        self.step: Step | None = None  # for the most ids that came at once
        self.sampler: _Sampler | None = None

    def clear(self) -> None:
        """Forget all ids."""
        self.position = self.first = 0
        self.engine.blocks.clear(self.caches)

    def feed(self, ids_ST: Tensor) -> Tensor:
        """logits_SV (float32) after T more ids in each lane."""
        return torch.from_numpy(self.run(_checked(ids_ST), last=True).copy())

    def count(self, ids_S: Tensor) -> np.ndarray:
        """counts_SV (uint32) after one more id in each lane, as `Engine.counts`."""
        return self.run(_checked(ids_S)[:, None], kind=np.uint32).copy()

    def run(self, ids_ST: np.ndarray, last: bool = False, kind: type = np.float32) -> np.ndarray:
        """logits_MV after each of the ids (``last``: logits_SV after the last), good until the
        next call.  With ``kind`` uint32, their counts.
        """
        S, T = ids_ST.shape
        if not (T and self.lanes == S and self.position + T <= self.engine.context):
            raise ValueError(
                f"{S} x {T} ids do not fit: {self.lanes} lanes, {self.position} of "
                f"{self.engine.context} positions used"
            )
        piece = max(PIECE, self.engine.blocks.together // S)
        if piece < T:
            cuts = range(0, T, piece)
            made = [self.run(ids_ST[:, i : i + piece], last, kind).copy() for i in cuts]
            parts = [logits.reshape(S, -1, N_BYTES) for logits in (made[-1:] if last else made)]
            return np.concatenate(parts, 1).reshape(-1, N_BYTES)
        if self.step is None or self.step.T < T:
            self.step = Step(self.engine, self, T)
        made_MV = self.step.run(ids_ST, self._place(T), last, kind)
        self.position += T
        return made_MV

    def latest(self) -> Tensor:
        """logits_V after the last id, for one lane."""
        assert self.step and self.lanes == 1
        return torch.from_numpy(self.step.logits_MV[0].copy())

    def draw(
        self, points_N: np.ndarray, config: SamplingConfig, recent: bytes = b""
    ) -> tuple[np.ndarray, np.ndarray]:
        """(bytes_N, logits_NV): N bytes, each drawn after the one before and fed at once.

        For one lane that was fed before.  The first is drawn from the last logits; ``points_N``
        (float64, at least 0, below 1) choose the bytes, see `sampling.draw`.  ``recent``: all bytes
        so far, for the repetition penalty.
        """
        N = len(points_N)
        if not (self.step and self.lanes == 1 and 1 <= N <= DRAWS):
            raise ValueError(f"{N} draws in {self.lanes} lanes")
        if self.position + N > self.engine.context:
            raise ValueError(f"{N} ids do not fit after {self.position}")
        if self.sampler is None or self.sampler.step is not self.step:
            self.sampler = _Sampler(self.step)
        recent = recent[max(0, len(recent) - config.repetition_window) :]
        made = self.sampler.run(points_N, config, recent, self._place(N))
        self.position += N
        return made

    def follow(self, first: int, n: int, operation: Callable) -> int:
        """Feed up to ``n`` ids to one lane; each is chosen by an operation after the one before.

        ``first`` is the first id.  ``operation(counts_MV, ids_M, context)`` gives the address of
        code and an array of numbers, see `translate`.  That code reads the counts after an id, puts
        the next one into ids_M, and adds 1 to the context's "start".  Returns how many were fed;
        the last one that was put there is not.
        """
        n = min(n, self.engine.context - self.position, self.engine.blocks.together)
        if self.lanes != 1 or n < 1 or not 0 <= first < VOCAB_SIZE:
            raise ValueError(f"{n} ids from {first} on in {self.lanes} lanes")
        if self.step is None:
            self.step = Step(self.engine, self, 1)
        self.step.follow(first, self._place(n), n, operation)
        self.position += n
        return n

    def _place(self, T: int) -> int:
        """Where in ``past`` the next T ids go; drops the oldest ones if there is no room."""
        place = self.position - self.first
        if place + T > self.engine.blocks.remembered:
            ids = self.past[:, ngrams.GAP : -ngrams.GAP]
            ids[:, :PAST] = ids[:, place - PAST : place]
            self.first, place = self.position - PAST, PAST
        return place


def _checked(ids: Tensor) -> np.ndarray:
    """The ids as int64.  ValueError if one is outside 0..256."""
    array = np.ascontiguousarray(ids.numpy(), np.int64)
    largest = array.item() if array.size == 1 else array.view(np.uint64).max(initial=0)
    if not 0 <= largest < VOCAB_SIZE:  # a negative id is a large one without its sign
        raise ValueError("ids are 0 to 256")
    return array


class _Prior:
    """A prior's tables and weights."""

    def __init__(self, prior):
        self.orders, self.shift = prior.orders, 65 - prior.rows.bit_length()
        self.codes, self.scale = prior.codes.numpy().copy(), array(prior.scale)
        self.contexts, self.rank = prior.scale.shape
        self.project, self.gate = Weight(prior.project), array(prior.gate)
        self.direct = Weight(prior.direct)
        self.match = [array(table) for table in prior.match]


class Step:
    """The operations for up to T more ids in each of a state's lanes, with their scratch."""

    def __init__(self, engine: Engine, state: State, T: int):
        e, S, D = engine, state.lanes, engine.width
        self.T, self.M, self.late = T, S * T, engine.late
        self.crew, self.threads = engine.crew, engine.crew.threads if engine.crew else 1
        widest = max(D, e.blocks.widest, e.prior.contexts * e.prior.rank if e.prior else 0)
        self.h_MD, self.y = self.floats(D), self.floats(widest)
        self.q = {
            "out": np.zeros((self.M, widest), np.int8), "scale": np.zeros(self.M, np.float32),
            "total": np.zeros(self.M, np.int32),
        }  # fmt: skip
        self.ids_M = np.zeros(self.M, np.int64)
        self.program = Program(machine())
        self.program.context[-1] = self.program.address(self.ids_M)
        self.add(ops.embed, table=e.table, out=self.h_MD, width=D)
        f_MKr = self._prior(e.prior, state) if e.prior else None
        e.blocks.add(self, state.caches)
        for x_MN in (self.h_MD, f_MKr):
            if x_MN is not None:
                self.add(ops.keep_last, x=x_MN, width=x_MN.shape[1])
        self.add(ops.go_on_with_last, context=self.program.context)
        self.logits_MV = self.floats(N_BYTES)
        self.add(ops.norm, x=self.h_MD, weight=e.norm, out=self.y, width=D)
        self.product(e.head, self.y, self.logits_MV)
        if e.prior and f_MKr is not None:
            gated = np.zeros_like(f_MKr)
            self.add(ngrams.weigh, f=f_MKr, normed=self.y, gate=e.prior.gate, out=gated,
                     contexts=e.prior.contexts, rank=e.prior.rank, width=D)  # fmt: skip
            self.product(e.prior.direct, gated, self.logits_MV, add=1)
        self.program.finish(e.crew)

    def run(self, ids_ST: np.ndarray, start: int, last: bool, kind: type) -> np.ndarray:
        """logits_MV (``last``: logits_SV) or their counts, overwritten by the next call.

        ``start`` is the ids' place in ``past``, and their position in a transformer.
        """
        S, T = ids_ST.shape
        self.ids_M[: S * T] = ids_ST.reshape(-1)
        program, made_MV = self.program, self.logits_MV
        if kind is np.uint32:
            program, made_MV = self._counting
        program(S * T, start, T, last)
        made_MV = made_MV[: S if last else S * T]
        if kind is np.uint32:
            _check_counts(made_MV)
        return made_MV

    def follow(self, first: int, start: int, n: int, operation: Callable) -> None:
        """See `State.follow`; ``start`` as in `run`."""
        counting, counts_MV = self._counting
        program, self.ids_M[0] = Program(machine()), first
        program.context = counting.context
        address, numbers = operation(counts_MV.view(np.int32), self.ids_M, program.context)
        program.rows = [*counting.rows, [address, program.address(numbers)] + [0] * (WIDTH - 2)]
        program.finish()
        program(1, start, 1, 0, times=n)
        _check_counts(counts_MV[:1])

    @functools.cached_property
    def _counting(self) -> tuple[Program, np.ndarray]:
        """The same operations, followed by the counts of the logits; and these."""
        program, counts_MV = Program(machine()), np.zeros((self.M, N_BYTES), np.uint32)
        program.context = self.program.context
        program.rows += self.program.rows
        program.add(counts.count, logits=self.logits_MV, mass=np.zeros(N_BYTES), out=counts_MV,
                    total=1 << COUNT_BITS)  # fmt: skip
        program.finish(self.crew)
        return program, counts_MV

    def floats(self, width: int) -> np.ndarray:
        """Scratch of ``width`` numbers for each row."""
        return np.zeros((self.M, width), np.float32)

    def add(self, kernel: Callable, **arguments) -> None:
        """Append an operation, see `Program.add`."""
        self.program.add(kernel, **arguments)

    def normed(
        self, norm_D: np.ndarray, weight: Weight, out: np.ndarray, x=None, add: int = 0
    ) -> None:
        """out (+)= weight applied to the normed x, the residual stream unless given."""
        x = self.h_MD if x is None else x
        if weight.scale_O is None:
            self.add(ops.norm, x=x, weight=norm_D, out=self.y, width=len(norm_D))
        else:
            self.add(ops.norm_quantize, x=x, weight=norm_D, **self.q, width=len(norm_D))
        self.product(weight, self.y, out, add, quantized=True)

    def product(
        self, w: Weight, x: np.ndarray, out: np.ndarray, add: int = 0, quantized: bool = False,
        across: int = 0,
    ) -> None:  # fmt: skip
        """out (+)= x w^T; a ternary weight takes x from self.q, where it may be already.

        ``across``: from one row of a dense product's x to the next, if that is not I.
        """
        shape = {"inputs": w.inputs, "outputs": w.outputs, "add": add}
        if w.scale_O is None:
            across = across or w.inputs
            self.add(products.dense, x=x, across=across, weight=w.packed, out=out, **shape)
            return
        if not quantized:
            self.add(ops.quantize, x=x, **self.q, width=w.inputs)
        self.add(
            products.ternary, x=self.q["out"], x_scale=self.q["scale"], x_sum=self.q["total"],
            weight=w.packed, scale=w.scale_O, out=out, **shape,
        )  # fmt: skip

    def _prior(self, prior: _Prior, state: State) -> np.ndarray:
        """Add to the embedding what the prior says; returns f_MKr, to be filled by the program."""
        f_MKr = self.floats(prior.contexts * prior.rank)
        past = {"past": state.past, "stride": state.past.shape[1]}
        self.add(ngrams.remember, **past, late=self.late)
        self.add(ngrams.features, **past, codes=prior.codes, scale=prior.scale, out=f_MKr,
                 orders=prior.orders, shift=prior.shift, rank=prior.rank)  # fmt: skip
        self.product(prior.project, f_MKr, self.h_MD, add=1)
        for span, table in zip(MATCHES, prior.match, strict=True):
            self.add(ngrams.follow, **past, table=table, out=self.h_MD, span=span,
                     width=self.h_MD.shape[1])  # fmt: skip
        return f_MKr


def _check_counts(counts_MV: np.ndarray) -> None:
    if not counts_MV.all():
        raise FloatingPointError("the model's logits are NaN or infinite")


class _Sampler:
    """The operations of a step, after a draw from the logits of the step before."""

    def __init__(self, step: Step):
        self.step = step
        self.points_N, self.chosen_N = np.zeros(DRAWS), np.zeros(DRAWS, np.int64)
        self.kept_NV = np.zeros((DRAWS, N_BYTES), np.float32)
        self.settings, self.seen = np.ones(len(sampling.SETTINGS)), sampling.places(b"")
        self.program = Program(machine())
        self.program.context[-1] = self.program.address(step.ids_M)
        self.program.add(
            sampling.draw, context=self.program.context, logits=step.logits_MV,
            points=self.points_N, chosen=self.chosen_N, kept=self.kept_NV,
            settings=self.settings, seen=self.seen, scores=np.zeros(N_BYTES),
            mass=np.zeros(N_BYTES), ranks=np.zeros(N_BYTES, np.int32), ranked=np.zeros(N_BYTES),
        )  # fmt: skip
        # `go_on_with_last` of the step changes the step's own context, not this one.
        self.program.rows += step.program.rows
        self.program.finish(step.crew)

    def run(
        self, points_N: np.ndarray, config: SamplingConfig, recent: bytes, place: int
    ) -> tuple[np.ndarray, np.ndarray]:
        N = len(points_N)
        self.points_N[:N], self.settings[:] = points_N, sampling.settings(config)
        if config.repetition_penalty != 1:
            self.seen[:] = sampling.places(recent)
        self.program(1, place, 1, 0, 0, times=N)
        return self.chosen_N[:N].copy(), self.kept_NV[:N].copy()


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
