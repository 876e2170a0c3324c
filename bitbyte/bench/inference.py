"""Rows of the bench without gradients: decoding, reading a prompt, compressing.

The native engine's sides are compared with the same model in PyTorch, with Hugging Face's Llama and
Mamba and, where it is installed, with llama.cpp.  All use as many threads; targets are for one.
"""

import contextlib
import importlib.metadata
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitbyte import generate, models
from bitbyte.bench import peers
from bitbyte.bench.sides import Group, Pair, Side, Sizes
from bitbyte.compress import codec, container, streamed
from bitbyte.compress.mixer import codec as mixing
from bitbyte.compress.mixer.shapes import Shape
from bitbyte.compress.predictors import IntegerPredictor, NativePredictor
from bitbyte.config import SamplingConfig, preset
from bitbyte.kernels import engine
from bitbyte.process import say
from bitbyte.vocab import N_BYTES

LINEARS = ("ternary", "dense")
HOW = "native", "torch"
CONTEXTS = (32, 240)  # ids before the step that is measured
SAMPLED = 200  # bytes
ALONE = "ternary native, one thread"
LARGEST = 300_000_000  # parameters of a model that is measured in float32 as well
CODED = 512  # bytes that are compressed: two windows


class Targets(NamedTuple):
    """Least ratios of a preset: a step and a prompt over PyTorch's, and over llama.cpp's TQ2_0."""

    step: float
    step_llama_cpp: float = 2.5
    prefill_llama_cpp: float = 4.5


TARGETS = {"micro": Targets(30), "small": Targets(25), "base": Targets(12), "large": Targets(6, 2)}


def decode(sizes: Sizes) -> Iterator[Group]:
    """A step of decoding: one more id after a context of so many."""
    for name in sizes.decode:
        bench = _Models(name)
        for context in CONTEXTS:
            ids_1C = torch.randint(N_BYTES, (1, context))
            short = context == CONTEXTS[0]
            target = TARGETS[name].step_llama_cpp if short else None
            sides = bench.sides(_step, peers.llama_step, ids_1C)
            yield from bench.groups(
                f"{bench.case} after {context}", sides, TARGETS[name].step, target, ids_1C, "step"
            )
        if name == "micro":
            yield _samples(bench)
    yield from _decode_mamba()


def _samples(bench: "_Models") -> Group:
    """Bytes drawn with all filters on, from the prompt to their costs."""
    config = SamplingConfig(
        max_new_tokens=SAMPLED, top_k=100, top_p=0.95, min_p=0.01, repetition_penalty=1.1
    )

    def side(linear: str, how: str) -> Side:
        model = bench.models[linear]

        def run() -> None:
            engine.choose(model, how, _threads())
            generate.generate(model, b"Once upon a time", config)

        return Side(run)

    sides = {f"{linear} {how}": side(linear, how) for linear in LINEARS for how in HOW}
    pairs = [
        Pair("ternary native", "ternary torch", 30),
        Pair("dense native", "dense torch"),
    ]
    return Group(f"{bench.case}, {SAMPLED} bytes sampled", sides, pairs, {})


def prefill(sizes: Sizes) -> Iterator[Group]:
    """A prompt read at once, from nothing to the logits after its last id."""
    for name in sizes.decode:
        bench = _Models(name)
        ids_1C = torch.randint(N_BYTES, (1, CONTEXTS[-1]))
        sides = bench.sides(_prompt, peers.llama_prompt, ids_1C)
        yield from bench.groups(
            f"{bench.case}, {CONTEXTS[-1]} ids", sides, None, TARGETS[name].prefill_llama_cpp,
            ids_1C, "prompt",
        )  # fmt: skip


class _Models:
    """Our models of a preset, and their peers.

    Of a very large one only what is stored in fewer bits is measured, which takes half the memory.
    """

    def __init__(self, name: str):
        self.config = preset(name, "ar", linear="ternary")
        small = self.config.n_parameters <= LARGEST
        self.models = {
            linear: models.build(preset(name, "ar", linear=linear)).eval()
            for linear in (LINEARS if small else LINEARS[:1])
        }
        self.llama = peers.llama(self.config).eval() if small else None
        self.case = f"{name} {self.config.n_layer}L/{self.config.d_model}"
        self.no_llama_cpp = peers.llama_cpp_problem()
        if self.no_llama_cpp:
            say(f"note: {self.no_llama_cpp}")
        self.facts = {"parameters": {"ours": self.config.n_parameters}}
        if self.llama:
            self.facts["parameters"]["peer"] = self.llama.num_parameters()
            self.facts["transformers"] = importlib.metadata.version("transformers")
        if not self.no_llama_cpp:
            self.facts["llama-cpp-python"] = importlib.metadata.version("llama-cpp-python")

    def sides(self, make: Callable, make_peer: Callable, ids_1C: Tensor) -> dict[str, Side]:
        """``make(model, how, ids_1C)`` of our models, native and in PyTorch, and a peer's side."""
        made = {ALONE: make(self.models["ternary"], "native", ids_1C, 1)} if _threads() > 1 else {}
        made |= {
            f"{linear} {how}": make(model, how, ids_1C)
            for linear, model in self.models.items()
            for how in HOW
        }
        return made | ({"HF Llama fp32": Side(make_peer(self.llama, ids_1C))} if self.llama else {})

    def groups(
        self, case: str, sides: dict[str, Side], torch_target: float | None,
        cpp_target: float | None, ids_1C: Tensor, what: str,
    ) -> Iterator[Group]:  # fmt: skip
        """The group of these sides, with llama.cpp's added: its ``what``, "step" or "prompt"."""
        pairs = [
            Pair("ternary native", "ternary torch", torch_target),
            Pair("dense native", "dense torch"),
            Pair("ternary native", "HF Llama fp32"),
            Pair("dense native", "HF Llama fp32"),
            Pair("ternary native", ALONE),
        ]
        with contextlib.ExitStack() as stack:
            for kind in () if self.no_llama_cpp else ("TQ2_0", "Q8_0"):
                peer = peers.llama_cpp(self.config, kind, ids_1C, _threads())
                sides[f"llama.cpp {kind}"] = Side(getattr(stack.enter_context(peer), what))
                target = cpp_target if kind == "TQ2_0" else None
                pairs.append(Pair("ternary native", f"llama.cpp {kind}", target))
            present = [pair for pair in pairs if {pair.ours, pair.peer} <= sides.keys()]
            yield Group(case, sides, present, self.facts)


def _threads() -> int:
    """How many threads each side may use."""
    return torch.get_num_threads()


def _step(model: models.CausalModel, how: str, ids_1C: Tensor, threads: int = 0) -> Side:
    """One step after ids_1C, again and again.  ``threads`` 0: as all sides."""
    one = ids_1C[:, 0]
    with torch.no_grad():
        engine.choose(model, how, threads or _threads())
        _, state = model.prefill(ids_1C, model.init_state(1))

    def run() -> None:
        nonlocal state
        with torch.no_grad():
            if how == "native":
                state.position = ids_1C.shape[1]
                model.step(one, state)
            else:
                state = model.step(one, state._replace(position=ids_1C.shape[1]))[1]

    return Side(run)


def _prompt(model: models.CausalModel, how: str, ids_1C: Tensor, threads: int = 0) -> Side:
    """The prompt ids_1C read again and again, into the same memory."""
    with torch.no_grad():
        engine.choose(model, how, threads or _threads())
        state = model.init_state(1)

    def run() -> None:
        with torch.no_grad():
            if how == "native":
                state.clear()
                state.feed(ids_1C)
            else:
                model.prefill(ids_1C, state)

    return Side(run)


def _decode_mamba() -> Iterator[Group]:
    """A step of Mamba-1; Hugging Face's has the same width, state, and number of layers."""
    made = {
        linear: models.build(preset("micro", "mamba", ssm="mamba1", linear=linear)).eval()
        for linear in LINEARS
    }
    c, ids_1C = made["dense"].config, torch.randint(N_BYTES, (1, CONTEXTS[0]))
    sides = {
        f"{linear} {how}": _step(model, how, ids_1C)
        for linear, model in made.items()
        for how in HOW
    } | {"HF Mamba fp32": Side(peers.mamba_step(c, ids_1C))}
    pairs = [
        Pair("ternary native", "ternary torch", 25),
        Pair("dense native", "dense torch"),
        Pair("ternary native", "HF Mamba fp32", 10),
        Pair("dense native", "HF Mamba fp32"),
    ]
    facts = {"transformers": importlib.metadata.version("transformers")}
    yield Group(f"micro mamba1 {c.n_layer}L/{c.d_model}", sides, pairs, facts)


def compress(sizes: Sizes) -> Iterator[Group]:
    """Encoding and decoding, one window after the other, natively and in integers (PyTorch)."""
    data = b"a" * CODED
    for family in ("ar", "mamba"):
        model = models.build(preset("micro", family, linear="ternary")).eval()
        with torch.no_grad():  # it expects the byte before once more, so the data is not stored
            model.embed.normal_(std=0.25)
        predictors = {"native": NativePredictor(model), "integers": IntegerPredictor(model)}
        sides = {}
        for how, predictor in predictors.items():
            header = container.Header(
                mode="portable", lanes=1, window=predictor.window, block=1 << 20, length=CODED,
                model=bytes(16), fingerprint=bytes(16),
            )  # fmt: skip
            encode, payload, n_states = _encoder(data, header, predictor)
            sides[f"{how} encode"] = Side(encode)
            sides[f"{how} decode"] = Side(_decoder(payload, n_states, header, predictor))
        pairs = [
            Pair("native encode", "integers encode", 5),
            Pair("native decode", "integers decode", 10),
        ]
        yield Group(f"{family} ternary micro, {CODED} bytes", sides, pairs, {"lanes": 1})


def mixer(sizes: Sizes) -> Iterator[Group]:
    """The mixer alone beside xz, and with a model beside the model without the mixer."""
    package = Path(__file__).parents[1]
    data = b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))[: sizes.mixed]
    values = np.frombuffer(data, np.uint8)

    def sides(model, n: int) -> dict[str, Side]:
        def mixer() -> mixing.Codec:
            if model is not None:
                model.begin()
            return mixing.Codec(*mixing.sizes_for(len(data)), model)

        def decode() -> None:
            back = mixer().decode(code, n, Shape())
            assert back is not None and (back == values[:n]).all()

        code = mixer().encode(values[:n], Shape())
        assert code is not None
        return {"encode": Side(lambda: mixer().encode(values[:n], Shape())), "decode": Side(decode)}

    xz = {"xz -9e": Side(lambda: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    pairs = [Pair("encode", "xz -9e"), Pair("decode", "encode")]
    yield Group(f"{len(data)} bytes, no model", sides(None, len(data)) | xz, pairs, {})
    for family in ("ar", "mamba"):
        expert = streamed.Expert(models.build(preset("micro", family, linear="ternary")).eval())
        n = len(data) // 10

        def known(expert=expert, n=n) -> None:
            expert.begin()
            for _ in expert.known(values[:n]):
                pass

        def steps(expert=expert, n=n) -> None:
            expert.begin()
            for byte in data[:n]:
                expert.next()
                expert.take(byte)

        alone = {"model, windows": Side(known), "model, steps": Side(steps)}
        pairs = [Pair("encode", "model, windows"), Pair("decode", "model, steps")]
        case = f"{n} bytes, {family} ternary micro"
        yield Group(case, sides(expert, n) | alone, pairs, {"threads": 1})


def _encoder(data: bytes, header: container.Header, predictor) -> tuple[Callable, bytes, int]:
    """(encodes the data once per call, what comes out, its coder states)."""

    def encode() -> tuple:
        return codec.encode_block(data, header, predictor, lambda n, bits: None)

    payload, n_states, _, _ = encode()
    return encode, payload, n_states


def _decoder(payload: bytes, n_states: int, header: container.Header, predictor) -> Callable:
    return lambda: codec.decode_block(payload, n_states, CODED, header, predictor, lambda n: None)
