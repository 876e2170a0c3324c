"""The native engine against PyTorch and against itself: how ids are fed never matters."""

import hashlib
import importlib.util
import itertools
import math
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support import with_features, words

from bitbyte import generate, models, ngrams, transformer
from bitbyte.bitlinear import BitLinear
from bitbyte.config import SamplingConfig, preset
from bitbyte.device import settings_kept
from bitbyte.files import BitbyteError
from bitbyte.kernels import engine
from bitbyte.vocab import MASK, START

pytest.importorskip("llvmlite")

import llvmlite.binding as llvm

from bitbyte.kernels.native import machine as machines
from bitbyte.kernels.native import products, threads, vector
from bitbyte.kernels.native.engine import KERNELS, Engine
from bitbyte.kernels.native.engine import machine as whole_engine
from bitbyte.kernels.native.vector import F32, F64, I32


def test_it_works_here():
    assert engine._problem_here() is None


SHAPE = {"n_layer": 2, "d_model": 64, "seq_len": 80}
SHAPES = {
    "ar": SHAPE | {"d_ff": 96, "n_head": 2},
    "mamba1": SHAPE | {"ssm": "mamba1"},
    "mamba2": SHAPE | {"ssm": "mamba2"},
    "diffusion": SHAPE | {"d_ff": 96, "n_head": 2},
}
CAUSAL = [shape for shape in SHAPES if shape != "diffusion"]
KINDS, BIDIRECTIONAL = (
    [
        f"{linear} {shape}{prior}"
        for shape in shapes
        for linear in ("dense", "ternary")
        for prior in ("", " prior")
    ]
    for shapes in (CAUSAL, ["diffusion"])
)
TEXT = np.frombuffer(words(2000), np.uint8)


def model_of(kind: str, **changes) -> models.ByteModel:
    """A small model whose every weight matters."""
    linear, shape, *prior = kind.split()
    fields = {"prior": "counts", "prior_rows": 256, "prior_orders": 3} if prior else {}
    family = "mamba" if "mamba" in shape else shape
    config = preset("nano", family, linear=linear, **fields | SHAPES[shape] | changes)
    model = models.build(config, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.dim() == 1:  # ones or zeros at first
            p.data += torch.empty(p.shape).normal_(std=0.1, generator=generator)
    if prior:
        tables = list(
            ngrams.count_tables(
                lambda a, b: TEXT[a:b], len(TEXT), config, ngrams.Backoff(TEXT[:9]), fast=False
            )
        )
        codes, scales = (torch.stack(part, i) for i, part in enumerate(zip(*tables, strict=True)))
        model.prior.fill(codes.transpose(0, 1), scales.flatten(0, -2).view(len(tables), -1))
        for p in (model.prior.direct, model.prior.gate, model.prior.match):
            p.data.normal_(std=0.05, generator=generator)
    return model


def ids_of(lanes: int, T: int) -> np.ndarray:
    """Windows of text, each after START."""
    rows = [TEXT[100 * i : 100 * i + T - 1] for i in range(lanes)]
    return np.stack([np.concatenate(([START], row)) for row in rows]).astype(np.int64)


def feed(state, ids_ST: np.ndarray, last: bool = False) -> np.ndarray:
    S, T = ids_ST.shape
    return state.run(ids_ST, last).reshape(S, 1 if last else T, 256).copy()


@torch.no_grad()
def both(model, compute) -> list[np.ndarray]:
    """What each engine computes."""
    made = []
    for model.engine in ("torch", "native"):
        made.append(compute().numpy())
    return made


@pytest.mark.parametrize("kind", KINDS + BIDIRECTIONAL)
def test_logits_are_those_of_torch(kind):
    model, ids_ST = model_of(kind), torch.from_numpy(ids_of(3, 80))
    if "diffusion" in kind:
        ids_ST[:, 5::7] = MASK
    made = both(model, lambda: model.logits(ids_ST))
    error_ST = np.abs(made[0] - made[1]).max(-1)
    assert 0 < np.median(error_ST) < 1e-5
    # A value on the border between two int8 steps may fall to the other side.
    assert error_ST.max() < (0.1 if "ternary" in kind else 1e-5)


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_windows_of_any_length_have_the_same_bits_whatever_is_beside_them(kind):
    native = Engine(model_of(kind))
    for T in (1, 2, 31, 80):
        ids_ST = torch.from_numpy(ids_of(5, 81)[:, 1 : T + 1])
        ids_ST[:, ::3] = MASK
        whole = native.logits(ids_ST)
        for row in range(5):
            assert torch.equal(native.logits(ids_ST[row : row + 1])[0], whole[row])
        with settings_kept():
            torch.set_num_threads(2)
            assert torch.equal(native.logits(ids_ST), whole)


@pytest.mark.parametrize("prior", ["", " prior"])
def test_a_hidden_byte_is_never_seen(prior):
    """Its place holds MASK; what the prior reads at a place lies before it."""
    model, ids_1T = model_of("dense diffusion" + prior), torch.from_numpy(ids_of(1, 80))
    ids_1T[0, 40] = MASK
    want, got = both(model, lambda: model.logits(ids_1T))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    for t in (0, 39, 41, 79):  # every other byte counts, on both sides
        other = ids_1T.clone()
        other[0, t] = 7
        assert not np.array_equal(Engine(model).logits(other)[0, 40], got[0, 40])


@pytest.fixture
def all_together(monkeypatch):
    """Programs that can be divided are, whether or not that is faster."""
    monkeypatch.setattr(threads._Pace, "together", True, raising=False)
    monkeypatch.setattr(threads._Pace, "__init__", lambda pace: None)
    monkeypatch.setattr(threads._Pace, "note", lambda pace, seconds: None)


def used(native: Engine) -> list[np.ndarray]:
    """What comes out of all ways to use an engine."""
    state, pair, config = native.state(1), native.state(2), SamplingConfig(min_p=0.01)
    made = [
        feed(state, ids_of(1, 21)),
        feed(state, ids_of(1, 3)),
        *state.draw(np.full(3, 0.7), config),
    ]
    made += [feed(pair, ids_of(2, 9), last=True), pair.count(torch.tensor([5, 6]))]
    return [*made, native.logits(torch.from_numpy(ids_of(1, 17))).numpy()]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "prior" in kind])
def test_threads_do_not_change_a_bit(kind, n, all_together):
    model = model_of(kind)
    for got, want in zip(used(Engine(model, n)), used(Engine(model)), strict=True):
        assert np.array_equal(got, want)


def test_a_program_is_divided():
    """Both threads have products, of which each computes the panels of a share."""
    native = Engine(model_of("ternary ar"), 2)
    state = native.state(1)
    state.feed(torch.tensor([[START]]))
    first, second = state.step.program.division.lists
    machine = whole_engine()
    for kernel in ("ternary", "dense", "attend", "rotate", "meet"):
        counts = [int((part[:, 0] == machine.addresses[kernel]).sum()) for part in (first, second)]
        assert counts[0] == counts[1] > 0, kernel
    assert len(second) < len(first)  # norms are computed once
    room = np.zeros((1, 96), np.float32)
    for part, columns in ((0, slice(0, 32)), (1, slice(32, 96))):  # three panels
        room[:] = 7
        program = machines.Program(machine)
        program.add(
            products.dense, x=np.ones((1, 32), np.float32), across=32,
            weight=np.ones(96 * 32, np.float32), out=room, inputs=32, outputs=96, add=0,
        )  # fmt: skip
        place = machine.shares[program.rows[0][0]]
        program.rows[0][place : place + 2] = part, 2
        program.finish()
        program.context[0] = 1
        program()
        assert (room[0, columns] == 32).all()
        assert (room == 7).sum() == 96 - (columns.stop - columns.start)


def test_ctrl_c_while_threads_are_called(all_together, monkeypatch):
    """Some may be waiting for others that never come; they end, and later calls are right."""
    model = model_of("ternary ar prior")
    native, want = Engine(model, 3), used(Engine(model))
    submit = native.crew.pool.submit

    def interrupted(*call):
        submit(*call)
        raise KeyboardInterrupt

    monkeypatch.setattr(native.crew.pool, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        feed(native.state(1), ids_of(1, 21))
    for got, wanted in zip(used(native), want, strict=True):
        assert np.array_equal(got, wanted)


def test_states_in_several_threads_share_a_crew(all_together):
    model = model_of("ternary ar prior")
    native, want = Engine(model, 2), used(Engine(model))
    with ThreadPoolExecutor(3) as pool:
        for made in pool.map(lambda i: used(native), range(6)):
            for got, wanted in zip(made, want, strict=True):
                assert np.array_equal(got, wanted)


def test_building_leaves_the_model_alone(monkeypatch):
    """Another thread may be computing with it."""
    model, compared = model_of("ternary ar"), []
    error = engine._error

    def note(twin, native):
        compared.append(twin)
        assert model.engine == "auto"
        assert all(m.act_quant for m in model.modules() if isinstance(m, BitLinear))
        return error(twin, native)

    monkeypatch.setattr(engine, "_error", note)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: engine._native(model), range(4))]
    assert len(compared) == 2 and model not in compared
    assert found[0][0] and all(one is found[0] or one == found[0] for one in found)


@pytest.mark.parametrize("kind", ["dense ar", "ternary ar"])
def test_a_method_of_ones_own_on_a_model(kind):
    """A copy of the model has it, too, and there it calls the model itself."""
    model, calls = model_of(kind), []
    plain = model.logits

    def mine(ids_BT):
        calls.append(ids_BT)
        return plain(ids_BT)

    model.logits = mine
    with torch.no_grad():
        made = model.logits(torch.tensor([[START, 97, 98]]))
    assert len(calls) > 1 and made.shape == (1, 3, 256)

    def wrong(ids_BT):
        raise RuntimeError("mine")

    model.logits = wrong
    engine.forget(model)
    for _ in range(2):  # nothing is left of the first try
        with pytest.raises(RuntimeError, match="mine"):
            engine._native(model)


def test_a_model_that_keeps_what_it_computed():
    """PyTorch refuses to copy tensors that have a gradient's history."""
    model = model_of("dense ar")
    model.norm.last = model.norm.weight * 2
    with torch.no_grad():
        assert model.logits(torch.tensor([[START, 97]])).shape == (1, 2, 256)
    assert engine.described(model) == "torch (it cannot be copied (RuntimeError))"


def test_a_forked_process_computes_alone(all_together):
    native = Engine(model_of("ternary ar prior"), 2)
    native.crew.process += 1  # as a child sees it; the pool's threads are not there
    native.crew.pool = None
    used(native)


def test_the_faster_way_is_found():
    """And found again when the load of the system has changed."""
    pace, together = threads._Pace(), []

    def calls(n: int, alone: float, both: float) -> float:
        """Share of the calls that were made together."""
        together.clear()
        for _ in range(n):
            together.append(pace.together)
            pace.note(both if pace.together else alone)
        return sum(together) / n

    assert calls(2000, 1.0, 0.6) > 0.7
    assert calls(4000, 1.0, 30.0) < 0.02  # every one of these costs as much as 30 others
    assert calls(8000, 1.0, 30.0) < 0.002
    calls(2000, 1.0, 0.6)  # until it is tried again
    assert calls(1000, 1.0, 0.6) > 0.7
    assert calls(3000, 0.5, 0.6) < 0.2
    pace = threads._Pace()
    assert calls(3000, 1e-4, 0) == 0  # not worth it


def test_without_quantized_activations():
    for shape in SHAPES:
        model = model_of(f"ternary {shape}", act_quant=False)
        ids_ST = torch.from_numpy(ids_of(2, 40))
        want, got = both(model, lambda m=model, ids=ids_ST: m.logits(ids))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("mamba1", {"d_state": 5, "dt_rank": 3, "d_conv": 2}),
        ("mamba1", {"d_state": 1, "dt_rank": 65, "d_conv": 1}),
        ("mamba1", {"d_model": 96, "expand": 3, "d_conv": 7}),
        ("mamba2", {"d_state": 8, "n_head": 8, "d_conv": 1}),
        ("mamba2", {"d_model": 96, "expand": 3, "n_head": 6, "d_conv": 5}),
    ],
)
def test_mambas_of_unusual_widths(shape, changes):
    model, ids_ST = model_of(f"dense {shape}", **changes), torch.from_numpy(ids_of(2, 30))
    want, got = both(model, lambda: model.logits(ids_ST))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", ["mamba1", "mamba2"])
def test_a_mamba_has_no_limit(shape):
    """The ids that its prior may look at move through a buffer; all else is in its state."""
    model = model_of(f"dense {shape} prior", n_layer=1)
    native, random = Engine(model), np.random.default_rng(0)
    ids_1T = random.integers(0, 4, (1, 4000))  # so few that most matches lie far back
    state = native.state(1)
    room = state.past.shape[1]
    whole = feed(state, ids_1T)[0]
    assert state.past.shape[1] == room < 1400
    state = native.state(1)
    parts = [feed(state, ids_1T[:, :1500])[0]]
    parts += [feed(state, ids_1T[:, t : t + 1])[0] for t in range(1500, 3100)]
    parts.append(feed(state, ids_1T[:, 3100:])[0])
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(feed(native.state(1), ids_1T, last=True)[0, 0], whole[-1])
    want, _ = both(model, lambda: model.logits(torch.from_numpy(ids_1T)))
    np.testing.assert_allclose(whole, want[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_damage_is_not_hidden(shape):
    """NaN in a weight reaches the logits, as in PyTorch."""
    model, ids_ST = model_of(f"ternary {shape} prior"), torch.from_numpy(ids_of(1, 30))
    for name, p in model.named_parameters():
        kept = p.clone()
        p.view(-1)[1] = math.nan
        want, got = both(model, lambda: model.logits(ids_ST))
        assert np.isfinite(got).all() == np.isfinite(want).all() == ("match" in name), name
        p.copy_(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_pieces_lanes_threads_and_windows_have_the_same_bits(kind):
    native, ids_ST = Engine(model_of(kind)), ids_of(3, 80)
    whole = feed(native.state(3), ids_ST)
    for n in (1, 2, 3):
        with settings_kept():
            torch.set_num_threads(n)
            for _ in range(2):  # a state that was used before is as good as new
                assert np.array_equal(native.logits(torch.from_numpy(ids_ST)).numpy(), whole)
    assert np.array_equal(feed(native.state(1), ids_ST[1:2])[0], whole[1])
    state = native.state(3)
    cuts = itertools.pairwise((0, 7, 8, 25, 80))
    assert np.array_equal(np.concatenate([feed(state, ids_ST[:, a:b]) for a, b in cuts], 1), whole)
    state = native.state(1)
    steps = [feed(state, ids_ST[2:, t : t + 1]) for t in range(80)]
    assert np.array_equal(np.concatenate(steps, 1)[0], whole[2])
    assert np.array_equal(feed(native.state(3), ids_ST[:, :50], last=True)[:, 0], whole[:, 49])


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_later_changes_nothing(kind):
    native, ids_ST = Engine(model_of(kind)), ids_of(1, 80)
    other = ids_ST.copy()
    other[0, 40:] = 255 - other[0, 40:] % 256
    a, b = (feed(native.state(1), ids) for ids in (ids_ST, other))
    assert np.array_equal(a[0, :40], b[0, :40])
    assert not np.array_equal(a[0, 40:], b[0, 40:])


def digest() -> str:
    """Of all bits that the engine makes of some models, in this process."""
    made = hashlib.sha256()
    for kind in BIDIRECTIONAL:
        ids_ST = torch.from_numpy(ids_of(2, 80))
        made.update(Engine(model_of(kind)).logits(ids_ST).numpy().tobytes())
    for kind in KINDS:
        made.update(feed(Engine(model_of(kind)).state(2), ids_of(2, 80)).tobytes())
    return made.hexdigest()


on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="needs an x86"
)


@on_x86
@pytest.mark.parametrize("features", ["+avx2,+avx,+fma,+sse4.2", "+sse2"])
def test_other_instruction_sets_give_the_same_bits(features, tmp_path):
    code = "import test_engine; print(test_engine.digest())"
    said = with_features(features, code, Path(__file__).parent, tmp_path)
    assert said.split()[-1] == digest()


AVX_VNNI = "+avxvnni,+avx2,+avx,+fma,+sse4.2"


@on_x86
def test_the_kernels_for_avx_vnni_give_the_same_bits(tmp_path):
    """They run in registers of 256 bits, with instructions of AVX-512 that do the same."""
    if not llvm.get_host_cpu_features().get("avx512vnni"):
        pytest.skip("needs AVX-512 VNNI")
    code, features = "import test_engine; print(test_engine.digest())", f"{AVX_VNNI},-avxvnni"
    cpu = llvm.get_host_cpu_name()
    said = with_features(features, code, Path(__file__).parent, tmp_path, cpu)
    assert said.split()[-1] == digest()


@on_x86
def test_code_for_avx_vnni():
    """It has the form of ``vpdpbusd`` that such processors know, and nothing of AVX-512."""
    target = llvm.Target.from_default_triple()
    machine = machines.Machine.__new__(machines.Machine)
    machine.target = target.create_target_machine(cpu="x86-64", features=AVX_VNNI, opt=3)
    machine.arguments = whole_engine().arguments
    features = frozenset(f.removeprefix("+") for f in AVX_VNNI.split(","))
    lines = machine.target.emit_assembly(machine._compiled(KERNELS, features)).splitlines()
    dots = [line for line in lines if "vpdpbusd" in line]
    assert dots and all("{vex}" in line for line in dots)
    assert not any(word in line for line in lines for word in ("%zmm", "%k1", "%ymm16", "%xmm16"))


@pytest.mark.parametrize(
    ("shape", "slide"),
    [("ar", "exact"), ("ar", "block"), ("mamba1", "exact"), ("mamba2", "exact")],
)
def test_samples_are_those_of_torch(shape, slide):
    model, config = model_of(f"dense {shape} prior"), SamplingConfig(max_new_tokens=120, seed=3)
    made = []
    for model.engine in ("torch", "native"):
        made.append(generate.generate(model, b"the ", config, slide=slide).bytes)
    assert made[0] == made[1]


@pytest.mark.parametrize(
    "choices",
    [
        *({"temperature": t} for t in (0, 1e-4, 0.3, 1.0, 5.0)),
        {"top_k": 1}, {"top_k": 9}, {"top_p": 0.3}, {"top_p": 0.95, "top_k": 200}, {"min_p": 0.2},
        {"min_p": 1.0}, {"repetition_penalty": 3.0}, {"top_p": 1e-9},
        {"repetition_penalty": 0.5, "repetition_window": 5, "temperature": 2.0},
        {"repetition_penalty": 1.3, "repetition_window": 0},
        {"repetition_penalty": 1.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0},
    ],
    ids=str,
)  # fmt: skip
def test_native_draws_are_those_of_numpy(choices):
    """Each from the logits it reports; the state is then that of feeding the bytes drawn."""
    native, random = Engine(model_of("ternary ar prior")), np.random.default_rng(1)
    for points_N in (random.random(32), np.array([0, 1 - 2**-53, 0.5])):
        state = native.state(1)
        state.feed(torch.tensor([[START, *b"the "]]))
        first = state.latest()
        config, history = SamplingConfig(**choices), bytearray(b"\1the the ")
        bytes_N, logits_NV = state.draw(points_N, config, bytes(history))
        assert np.array_equal(logits_NV[0], first)
        for byte, logits_V, point in zip(bytes_N, logits_NV, points_N, strict=True):
            probs_V = generate.filtered_probs(torch.from_numpy(logits_V), config, history)
            assert byte == generate._draw(probs_V, point)
            assert probs_V[byte] > 0
            history.append(byte)
        again = native.state(1)
        fed = again.feed(torch.tensor([[START, *b"the ", *bytes_N]]))
        assert np.array_equal(state.latest(), fed[0])
        assert state.position == again.position


def test_draws_that_cannot_be(monkeypatch):
    native = Engine(model_of("dense ar"))
    state, points_N = native.state(1), np.full(4, 0.5)
    with pytest.raises(ValueError, match="4 draws"):  # nothing was fed
        state.draw(points_N, SamplingConfig())
    state.feed(torch.full((1, 78), 5))
    for points in (points_N, np.full(33, 0.5), points_N[:0]):
        with pytest.raises(ValueError, match=r"draws in|do not fit"):
            state.draw(points, SamplingConfig())
    pair = native.state(2)
    pair.feed(torch.zeros((2, 3), dtype=torch.long))
    with pytest.raises(ValueError, match="2 lanes"):
        pair.draw(points_N, SamplingConfig())


@pytest.mark.parametrize("n", [1, 2, 3, 40, 200])
@pytest.mark.parametrize("slide", generate.SLIDES)
@pytest.mark.parametrize("shape", CAUSAL)
def test_drawing_ahead_changes_nothing(shape, slide, n, monkeypatch):
    model, config = model_of(f"dense {shape}"), SamplingConfig(max_new_tokens=n, min_p=0.01)
    ahead = generate.generate(model, b"the " * 9, config, slide=slide)
    monkeypatch.setattr(generate, "_drawn_natively", lambda *given: iter(()))
    single = generate.generate(model, b"the " * 9, config, slide=slide)
    assert ahead.bytes == single.bytes
    assert ahead.metrics["bits_per_byte"] == pytest.approx(single.metrics["bits_per_byte"])
    assert ahead.engine == single.engine == "native"


@torch.no_grad()
def test_damaged_weights_are_not_sampled_from():
    model = model_of("dense ar")
    model.norm.weight[3] = math.nan
    with pytest.raises(BitbyteError, match="NaN or infinite"):
        generate.generate(model, b"the ", SamplingConfig(max_new_tokens=5))


@torch.no_grad()
def test_an_engine_follows_its_model():
    model = model_of("ternary ar")
    first = engine.engine_for(model)
    assert engine.engine_for(model) is first
    before = generate.next_byte_logits(model, b"the")
    model.norm.weight.mul_(2)
    after = generate.next_byte_logits(model, b"the")
    torch.testing.assert_close(after, 2 * before)
    assert engine.engine_for(model) is not first


def test_when_it_is_not_used():
    model, ids = model_of("dense ar"), torch.zeros(1, 4, dtype=torch.long)
    assert model.logits(ids).requires_grad
    with torch.no_grad():
        assert engine.engine_for(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert engine.engine_for(model) is None
        assert engine.engine_for(model.train()) is None
        model.eval()
        models.use_kernels(model, attention="plain")
        assert engine.engine_for(model) is None
    assert engine.described(model) == "torch (chosen)"


@pytest.mark.parametrize(
    ("ids", "lanes", "used"),
    [
        ([[257]], 1, 0), ([[-1]], 1, 0), ([[1]], 1, 80), ([[1] * 81], 1, 0), ([[1]], 2, 0),
        ([[]], 1, 0),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(ids, lanes, used):
    native = Engine(model_of("dense ar"))
    state = native.state(lanes)
    state.position = used
    with pytest.raises(ValueError, match=r"ids are 0 to 256|do not fit"):
        state.feed(torch.tensor(ids, dtype=torch.long))
    if len(ids[0]) > 80:
        with pytest.raises(ValueError, match="do not fit"):
            native.logits(torch.tensor(ids))


class SquaredReLU(torch.nn.Module):
    """Another MLP, as the README suggests."""

    def __init__(self, d_model, d_ff, linear, gain):
        super().__init__()
        self.up = linear(d_model, 3 * d_ff // 2)
        self.down = linear(3 * d_ff // 2, d_model, gain=gain)

    def forward(self, x_BTD):
        return self.down(torch.relu(self.up(x_BTD)).square())


@pytest.mark.parametrize("linear", ["dense", "ternary"])
@torch.no_grad()
def test_layers_that_were_changed_from_outside(linear, monkeypatch):
    """The kernels know our own layers only, so these models stay with PyTorch."""
    ids_ST = torch.from_numpy(ids_of(1, 40))
    original = transformer.CausalSelfAttention.__init__
    for target, name, change in (
        (transformer, "MLP", SquaredReLU),
        (transformer.MLP, "forward", lambda self, x: self.down(self.gate_up(x).chunk(2, -1)[1])),
        (transformer, "apply_rotary_emb", lambda x, cos, sin: x),
        (
            transformer.CausalSelfAttention, "__init__",
            lambda self, d, h, theta, causal, *rest: original(self, d, h, theta, False, *rest),
        ),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(target, name, change)
            for kind in (f"{linear} ar", f"{linear} ar prior"):
                model = model_of(kind)
                assert engine.engine_for(model) is None
                assert "its layers" in engine.described(model)
                with pytest.raises(BitbyteError, match="its layers"):
                    engine.choose(model, "native")
                got = model.logits(ids_ST)
                model.engine = "torch"
                assert torch.equal(got, model.logits(ids_ST))
    assert engine.described(model_of(f"{linear} ar prior")) == "native"


@torch.no_grad()
def test_models_it_cannot_run():
    for model, problem in (
        (model_of("ternary ar", d_ff=40), "multiples of 32"),
        (model_of("dense ar").double(), "not float32"),
        (model_of("dense ar", prior="counts", prior_bits=8), "4 bits"),
        (model_of("dense mamba1 prior", prior_rank=48), "multiple of 32"),
        (model_of("dense mamba1", d_model=48), "multiples of 32"),
        (model_of("dense mamba2", n_head=16), "multiples of 16"),
        (model_of("dense mamba2", d_state=12), "d_state"),
    ):
        assert engine.engine_for(model) is None
        assert engine.described(model).startswith("torch (")
        with pytest.raises(BitbyteError, match=problem):
            engine.choose(model, "native")
        engine.choose(model, "torch")
        assert engine.described(model) == "torch (chosen)"
    with pytest.raises(BitbyteError, match="choose from auto, native, torch"):
        engine.choose(model, "fast")


@torch.no_grad()
def test_without_llvmlite(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llvmlite" else find(name, *a)
    )
    engine._problem_here.cache_clear()
    try:
        model = model_of("dense ar")
        assert engine.engine_for(model) is None
        assert "pip install 'bitbyte[fast]'" in engine.described(model)
    finally:
        engine._problem_here.cache_clear()


def test_code_that_does_not_work_is_not_used(monkeypatch):
    monkeypatch.setattr("bitbyte.kernels.native.engine.machine", lambda: 1 / 0)
    engine._problem_here.cache_clear()
    try:
        assert "ZeroDivisionError" in engine.described(model_of("dense ar"))
    finally:
        monkeypatch.undo()
        engine._problem_here.cache_clear()


def add_one(k, x):
    k.store(k.load(F32.x16, x) + 1.0, x)


def sum_of(machine) -> float:
    x, run = np.arange(16, dtype=np.float32), machines.Program(machine)
    run.add(add_one, x=x)
    run.finish()
    run()
    return float(x.sum())


def test_the_stored_code(tmp_path, monkeypatch):
    """It is used if it is whole and private; else everything is compiled again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []
    original = machines.Machine._compiled
    monkeypatch.setattr(
        machines.Machine, "_compiled", lambda *a: compiled.append(1) or original(*a)
    )

    def made() -> int:
        compiled.clear()
        assert sum_of(machines.Machine([add_one])) == 136
        return len(compiled)

    assert [made(), made()] == [1, 0]
    (path,) = (tmp_path / "bitbyte" / "engine").iterdir()
    content = path.read_bytes()
    for damaged in (content[:-1], b"", content[:40] + b"x" + content[41:], b"\0" * len(content)):
        path.write_bytes(damaged)
        assert [made(), made()] == [1, 0]
        assert path.read_bytes() == content
    if os.name == "posix":
        path.parent.chmod(0o777)
        assert made() == 1
        path.parent.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file: no folder can be made there
    assert [made(), made()] == [1, 1]


def compute(kernel, rows: int = 0, **arguments) -> None:
    """Run one kernel."""
    program = machines.Program(whole_engine())
    program.add(kernel, **arguments)
    program.finish()
    program.context[0] = rows
    program()


@pytest.mark.parametrize("seed", range(6))
def test_products_of_any_shape_stay_in_bounds(seed):
    random = np.random.default_rng(seed)
    rows, inputs, outputs = (int(n) for n in random.integers(1, (20, 8, 6)) * (1, 32, 32))
    room = np.full(rows * outputs + 64, 7, np.float32)  # at both ends lies what must not change
    shape = {"out": room[32:-32], "inputs": inputs, "outputs": outputs}

    q_OI = random.integers(-1, 2, (outputs, inputs)).astype(np.int8)
    x_MI = random.integers(-127, 128, (rows, inputs)).astype(np.int8)
    scale_M, scale_O = random.random(rows, np.float32), random.random(outputs, np.float32)
    compute(
        products.ternary, rows, x=x_MI, x_scale=scale_M, x_sum=x_MI.sum(1, dtype=np.int32),
        weight=products.pack_ternary(q_OI), scale=scale_O, **shape, add=1,
    )  # fmt: skip
    exact_MO = (x_MI.astype(np.int64) @ q_OI.T.astype(np.int64)).astype(np.float32)
    want_MO = 7 + exact_MO * scale_M[:, None] * scale_O
    assert np.array_equal(room[32:-32].reshape(rows, outputs), want_MO)
    assert (room[:32] == 7).all()
    assert (room[-32:] == 7).all()

    w_OI = random.standard_normal((outputs, inputs), np.float32)
    f_MI = random.standard_normal((rows, inputs), np.float32)
    room[:] = 7
    compute(
        products.dense, rows, x=f_MI, across=inputs, weight=products.pack_dense(w_OI), **shape,
        add=0,
    )  # fmt: skip
    got_MO = room[32:-32].reshape(rows, outputs)
    np.testing.assert_allclose(got_MO, f_MI @ w_OI.T, rtol=1e-4, atol=1e-4)
    assert (room[:32] == 7).all()
    assert (room[-32:] == 7).all()


def exponential(k, x, out, n):
    k.loop(n, lambda i: k.store(vector.exp(k.load(F32.x16, x + 4 * i)), out + 4 * i), step=16)


def exponential_of_2(k, x, out, n):
    k.loop(n, lambda i: k.store(vector.exp2(k.load(F32.x16, x + 4 * i)), out + 4 * i), step=16)


def softplus(k, x, out, n):
    k.loop(n, lambda i: k.store(vector.softplus(k.load(F32.x16, x + 4 * i)), out + 4 * i), step=16)


def exponential_64(k, x, out, n):
    def body(i):
        k.store(vector.exp_float64(k.load(F64.x16, x + 8 * i)), out + 8 * i)

    k.loop(n, body, step=16)


def rounded(k, x, out, n):
    k.loop(n, lambda i: k.store(vector.rint(k.load(F32.x16, x + 4 * i)), out + 4 * i), step=16)


def folded(k, x, out):
    k.store(k.load(F32.x16, x).sum(), out)
    k.store(k.load(F32.x16, x).max(), out + 4)
    k.store(k.load(I32.x16, x).max(), out + 8)


def test_the_language():
    functions = {
        exponential: np.exp, exponential_of_2: np.exp2, softplus: lambda x: np.logaddexp(x, 0),
    }  # fmt: skip
    machine = machines.Machine([*functions, exponential_64, rounded, folded])
    x = np.concatenate((np.linspace(-87, 88, 4000, dtype=np.float32), np.float32([0] * 96)))
    out = np.zeros_like(x)

    def run(kernel, **arguments):
        program = machines.Program(machine)
        program.add(kernel, **arguments)
        program.finish()
        program()

    for kernel, function in functions.items():
        run(kernel, x=x, out=out, n=len(x))
        assert np.abs(out / function(x.astype(np.float64)) - 1).max() < 4e-7
        assert np.array_equal(out[-96:], np.full(96, function(0), np.float32))
        run(kernel, x=np.float32([-math.inf, -1000, 126, math.nan] * 4), out=out, n=16)
        assert (np.diff(out[:3]) >= 0).all()
        assert 0 <= out[0] < 2e-38
        assert math.isnan(out[3])
    wide = -np.concatenate((np.geomspace(1e-12, 700, 3999), [0]))
    exact = np.zeros_like(wide)
    run(exponential_64, x=wide, out=exact, n=len(wide))
    assert np.abs(exact / np.exp(wide) - 1).max() < 5e-16
    assert exact[-1] == 1
    x[:8] = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.49999, 4194303.5]
    run(rounded, x=x, out=out, n=len(x))
    assert np.array_equal(out, np.rint(x))
    few, result = np.float32(2.0) ** np.arange(16, dtype=np.float32), np.zeros(3, np.float32)
    few[1::2] *= -1
    run(folded, x=few, out=result)
    assert result[:2].tolist() == [few.sum(), 2**14]
    tree = few.copy()
    while len(tree) > 1:  # upper half onto lower half
        tree = tree[: len(tree) // 2] + tree[len(tree) // 2 :]
    assert result[0] == tree[0]
    assert len(KERNELS) == len({k.__name__ for k in KERNELS})


def test_a_loop_returns_what_it_carries():
    def wrong(k, n):
        k.loop(n, lambda i, a: None, k.constant(I32, 0))

    with pytest.raises(AssertionError, match="carries"):
        machines.Machine([wrong])
