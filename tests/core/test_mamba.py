"""The recurrence in all its forms, the two mixers, decoding from a state."""

import contextlib
import functools
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_causal, sharp, some_ids

from bitbyte import mamba, scans
from bitbyte.config import SSMS, MambaConfig, preset
from bitbyte.files import BitbyteError
from bitbyte.kernels import cpu_norm, cpu_ssd, jit, ngram_counts
from bitbyte.kernels.cpu_conv import FusedConv
from bitbyte.kernels.cpu_norm import FusedGatedNorm
from bitbyte.kernels.cpu_ssd import FusedSSD
from bitbyte.mamba import causal_conv, gated_norm, scan_for
from bitbyte.models import build, use_kernels
from bitbyte.scans import chunked_scan, selective_scan, ssd

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129)  # around the borders of chunks
SMALL = {"n_layer": 2, "d_model": 32, "seq_len": 80, "d_state": 4}


def small(ssm: str, linear: str = "dense", **changes) -> MambaConfig:
    heads = {"n_head": 2} if ssm == "mamba2" else {}
    return MambaConfig(**SMALL | heads | changes, ssm=ssm, linear=linear)


@pytest.fixture(params=["mamba1", "mamba2"])
def ssm(request):
    return request.param


@pytest.fixture(params=["dense", "ternary"])
def model(ssm, request):
    return sharp(small(ssm, request.param), seed=3)


def inputs(shape, N: int, seed: int, dtype=torch.float64, speed: float = 1.0) -> list:
    """x, delta, a, b, c and skip of a recurrence over ``shape``: (B, T, D) or (B, T, H, P)."""
    g = torch.Generator().manual_seed(seed)
    B, T, D = shape[:3]
    x, b, c = (torch.randn(s, generator=g, dtype=dtype) for s in (shape, (B, T, N), (B, T, N)))
    delta = torch.rand(B, T, D, generator=g, dtype=dtype) * speed
    a = -torch.rand((D, N) if len(shape) == 3 else (D,), generator=g, dtype=dtype) * 3
    skip = torch.randn(D, generator=g, dtype=dtype)
    return [v.requires_grad_() for v in (x, delta, a, b, c, skip)]


def results(scan, values) -> list:
    """The answer of a scan and the gradients of all its inputs."""
    y = scan(*values)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, values, weights.to(y.dtype))]


def of_heads(x, delta, a, b, c, skip):
    """The reference of Mamba-2: each channel of a head on its own."""
    P = x.shape[-1]
    delta, a, skip = (v.repeat_interleave(P, -1) for v in (delta, a, skip))
    return selective_scan(x.flatten(2), delta, a[:, None], b, c, skip).view_as(x)


def assert_close(got, want, tolerance):
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(a).all(), k
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max().item()), k


def test_the_reference_by_hand():
    x, delta, a, b, c, skip = (v.detach() for v in inputs((2, 5, 3), 2, seed=1))
    y = selective_scan(x, delta, a, b, c, skip)
    for i in range(2):
        for d in range(3):
            h = [0.0, 0.0]
            for t in range(5):
                step, value = delta[i, t, d].item(), x[i, t, d].item()
                for n in range(2):
                    h[n] = math.exp(step * a[d, n]) * h[n] + step * value * b[i, t, n].item()
                want = sum(c[i, t, n].item() * h[n] for n in range(2)) + skip[d].item() * value
                assert y[i, t, d].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_a_product_with_a_triangle_is_a_running_sum(dim):
    x = torch.randn(2, 7, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = x.cumsum(dim)
    assert (scans._triangular_sum(x, dim) - want).abs().max() < 1e-12
    assert torch.equal(scans.running_sum(x, dim), want)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.sampled_from(LENGTHS), st.integers(1, 4), st.integers(1, 5))
def test_chunked_scan_equals_the_reference(B, T, D, N):
    values = inputs((B, T, D), N, seed=T)
    assert_close(results(chunked_scan, values), results(selective_scan, values), 1e-10)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from(LENGTHS), st.integers(1, 3), st.integers(1, 4),
    st.integers(1, 5), st.sampled_from([1, 2**18]),
)  # fmt: skip
def test_ssd_equals_the_reference(B, T, H, P, N, block):
    values = inputs((B, T, H, P), N, seed=T)
    want = results(of_heads, values)
    assert_close(results(ssd, values), want, 1e-10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_ssd, "BLOCK", block)  # 1: every sequence is a block of its own
        assert_close(results(FusedSSD.apply, values), want, 1e-10)


@pytest.mark.parametrize("T", [1, 33, 64, 300])
def test_scans_agree_in_float32(T):
    flat, heads = (inputs(s, 8, T, torch.float32, 0.3) for s in ((2, T, 6), (2, T, 3, 8)))
    assert_close(results(chunked_scan, flat), results(selective_scan, flat), 1e-4)
    want = results(of_heads, heads)
    assert_close(results(ssd, heads), want, 1e-4)
    assert_close(results(FusedSSD.apply, heads), want, 1e-4)


@pytest.mark.parametrize("speed", [0.0, 1e-6, 300.0, 1e6])
def test_extreme_decays_give_no_nan(speed):
    for dtype in (torch.float32, torch.float64):
        flat, heads = (inputs(s, 3, 5, dtype, speed) for s in ((2, 70, 4), (2, 70, 2, 3)))
        pairs = [(chunked_scan, selective_scan, flat)]
        pairs += [(ssd, of_heads, heads), (FusedSSD.apply, of_heads, heads)]
        for scan, reference, values in pairs:
            got, want = results(scan, values), results(reference, values)
            assert all(torch.isfinite(v).all() for v in got)
            assert_close(got[:1], want[:1], 1e-4)
            # Where all decays at once, the fused gradient of a is a difference of large numbers.
            if dtype == torch.float64 and speed < 1e6:
                assert_close(got, want, 1e-9)


def test_last_states_equal_the_loop():
    x, delta, a, b, c, skip = (v.detach() for v in inputs((2, 70, 4), 3, seed=2))
    h = x.new_zeros(2, 4, 3)
    for t in range(70):
        now = (x[:, t], delta[:, t], a, b[:, None, t], c[:, None, t], skip)
        _, h = scans.scan_step(h, *now)
    assert torch.allclose(scans.last_state(x, delta, a, b), h, atol=1e-12)
    x, delta, a, b, c, skip = (v.detach() for v in inputs((2, 70, 2, 3), 5, seed=2))
    wide = (x.flatten(2), delta.repeat_interleave(3, 2), a.repeat_interleave(3)[:, None], b)
    want = scans.last_state(wide[0], wide[1], wide[2].expand(-1, 5), b)
    assert torch.allclose(scans.last_state_of_heads(x, delta, a, b), want, atol=1e-12)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3, 35, 70])
def test_convolutions_equal_torch(T, taps):
    g = torch.Generator().manual_seed(T)
    both, weight, bias = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, T, 10), (5, taps), (5,))
    )
    values = [v.requires_grad_() for v in (both[..., 5:], weight, bias)]  # x is a strided view

    def of_torch(x, weight, bias):
        y = F.conv1d(x.mT, weight[:, None], bias, padding=taps - 1, groups=5)
        return F.silu(y[..., :T]).mT

    want = results(of_torch, values)
    assert_close(results(causal_conv, values), want, 1e-12)
    assert_close(results(FusedConv.apply, values), want, 1e-12)
    values = [v.detach().float().requires_grad_() for v in values]
    assert_close(results(FusedConv.apply, values), results(causal_conv, values), 1e-5)


def test_gated_norm_equals_its_parts(monkeypatch):
    monkeypatch.setattr(cpu_norm, "BLOCK", 1)
    g = torch.Generator().manual_seed(0)
    y, z, weight = (
        torch.randn(s, generator=g, dtype=torch.float64).requires_grad_()
        for s in ((2, 20, 6), (2, 20, 6), (6,))
    )
    gated = y * z / (1 + torch.exp(-z))
    want = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert torch.allclose(gated_norm(y, z, weight), want, atol=1e-12)

    def fused(y, z, weight):
        return FusedGatedNorm.apply(y, z, weight, torch.float64)

    assert_close(results(fused, [y, z, weight]), results(gated_norm, [y, z, weight]), 1e-12)
    rounded = FusedGatedNorm.apply(y.float(), z.bfloat16(), weight.float(), torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.double(), want, atol=0.05)
    with torch.no_grad():
        z.zero_(), y.zero_()  # nothing to scale
    assert torch.isfinite(torch.stack(results(fused, [y, z, weight])[:3])).all()


def test_parameters_are_as_many_as_the_config_says(ssm):
    sizes = ({}, {"d_conv": 3, "expand": 3}, {"d_state": 7, "dt_rank": 5})
    for changes in sizes:
        config = small(ssm, **changes)
        assert sum(p.numel() for p in build(config).parameters()) == config.n_parameters
    for name in ("nano", "micro"):
        config = preset(name, "mamba", ssm=ssm)
        with torch.device("meta"):
            n = sum(p.numel() for p in build(config).parameters())
        assert n == config.n_parameters


@pytest.mark.parametrize("scan", ["reference", "fast"])
def test_what_is_fed_to_a_state_equals_the_full_forward(model, scan):
    if scan == "fast" and model.config.ssm == "mamba1":
        pytest.importorskip("numba")
    tolerance = 1e-4 if model.config.linear == "dense" else 0.05
    if scan == "reference":
        model.double()  # in float32 a last bit can turn the rounding of an activation
        tolerance = 1e-9 if model.config.linear == "dense" else 1e-4
    use_kernels(model, scan=scan)
    ids = some_ids(2, 75)
    with torch.no_grad():
        want = model.logits(ids)
        state = model.init_state(2)
        for t in range(40):
            got, state = model.step(ids[:, t], state)
            assert (got - want[:, t]).abs().max() < tolerance, t
        for split in (1, 2, 3, 5, 32, 64, 74):
            got, state = model.prefill(ids[:, :split], model.init_state(2))
            assert (got - want[:, split - 1]).abs().max() < tolerance, split
            got, state = model.step(ids[:, split], state)
            assert (got - want[:, split]).abs().max() < tolerance, split
            if split < 60:  # many at once to a state that is not empty
                got, state = model.prefill(ids[:, split + 1 : split + 9], state)
                assert (got - want[:, split + 8]).abs().max() < tolerance, split
                assert state.position == split + 9


@pytest.mark.parametrize("scan", ["reference", "auto"])
@pytest.mark.parametrize("t", [0, 31, 64, 79])
def test_a_byte_changes_nothing_before_it(model, t, scan):
    use_kernels(model, scan=scan)
    assert_causal(model, some_ids(2, 80), t)


def test_a_far_byte_is_remembered(model):
    ids = some_ids(1, 80)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 77) % 256
    with torch.no_grad():
        for block in model.mamba.blocks:
            block.mixer.dt_bias.fill_(-4)
            block.mixer.a_log.zero_()
        assert (model.logits(ids) - model.logits(changed))[:, -1].abs().max() > 1e-3


def test_kernels_agree_in_the_model(ssm):
    if ssm == "mamba1":
        pytest.importorskip("numba")
    model = build(small(ssm), seed=2)
    ids = some_ids(3, 80)
    seen = {}
    for scan in ("reference", "fast"):
        assert (use_kernels(model, scan=scan)["scan"] == "reference") == (scan == "reference")
        model.zero_grad()
        nats = model(ids)
        nats.mean().backward()
        seen[scan] = [nats.detach()] + [p.grad for p in model.parameters()]
    assert_close(seen["fast"], seen["reference"], 1e-4)
    smallest = min(g.abs().max().item() for g in seen["fast"])
    assert smallest > 0  # every parameter is used


def test_plain_forms_agree_with_the_fused_in_the_model(monkeypatch):
    model = build(small("mamba2"), seed=2)
    ids = some_ids(3, 80)
    seen = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(FusedSSD, "apply", ssd)
            monkeypatch.setattr(FusedConv, "apply", causal_conv)
            monkeypatch.setattr(FusedGatedNorm, "apply", lambda *v: gated_norm(*v[:3]))
        model.zero_grad()
        nats = model(ids)
        nats.mean().backward()
        seen.append([nats.detach()] + [p.grad for p in model.parameters()])
    assert_close(*seen, 1e-5)


def test_gradient_checkpointing_changes_no_gradient(model):
    ids = some_ids(2, 70)
    model.train()
    model(ids).mean().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.mamba.grad_checkpoint = True
    model(ids).mean().backward()
    assert_close([p.grad for p in model.parameters()], want, 1e-6)


def test_autocast_is_close_and_keeps_the_recurrence_in_float32(ssm, monkeypatch):
    model = build(small(ssm), seed=2)
    ids = some_ids(3, 70)
    kinds = []
    scan = type(model.mamba.blocks[0].mixer).scan

    def watched(self, kernel, *values):
        y = scan(self, kernel, *values)
        assert not torch.is_autocast_enabled("cpu")
        kinds.append({v.dtype for v in (*values, y)})
        return y

    monkeypatch.setattr(mamba.MIXERS[ssm], "scan", watched)
    seen = []
    for on in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            nats = model(ids)
        nats.mean().backward()
        assert nats.dtype == torch.float32
        seen.append((nats.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert kinds == [{torch.float32}] * 4
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    (want, want_grad), (got, got_grad) = seen
    assert 0 < (got - want).abs().max() < 0.05
    assert F.cosine_similarity(got_grad, want_grad, dim=0) > 0.99


@pytest.mark.parametrize("scan", [ssd, chunked_scan])
def test_no_bit_of_a_scan_depends_on_what_follows(scan):
    """The leak gate demands this of batches of one shape; these two run on GPUs."""
    generator = torch.Generator().manual_seed(0)
    B, T, H, P, N = 2, 200, 2, 8, 4
    x = torch.randn(B, T, H, P, generator=generator)
    delta = torch.rand(B, T, H, generator=generator) * 3
    b, c = (torch.randn(B, T, N, generator=generator) for _ in range(2))
    a, skip = -torch.rand(H, generator=generator), torch.ones(H)

    def run(x, delta, b, c):
        if scan is ssd:
            return scan(x, delta, a, b, c, skip)
        wide = delta.repeat_interleave(P, 2)
        return scan(x.flatten(2), wide, a.repeat_interleave(P)[:, None].expand(-1, N), b, c,
                    skip.repeat_interleave(P))  # fmt: skip

    want = run(x, delta, b, c)
    for cut in (1, 63, 64, 65, 100, 128, 150, 199):
        later = [v.clone() for v in (x, delta, b, c)]
        for v in later:
            v[:, cut:] = torch.rand(v[:, cut:].shape, generator=generator)
        assert torch.equal(run(*later)[:, :cut], want[:, :cut]), cut


WORKS = "selective_scan_cuda = object()\n"
STAND_INS = {  # what mamba_ssm may be: (its two modules, what is wrong for mamba1, mamba2)
    "absent": (None, "not installed .*pip install", "not installed .*pip install"),
    "whole": ({"selective_scan_interface": WORKS, "triton.ssd_combined": ""}, None, None),
    "no extension": (
        {"selective_scan_interface": "selective_scan_cuda = None\n", "triton.ssd_combined": ""},
        "without its CUDA extension .*MAMBA_KEEP_CUDA_BUILD=TRUE pip install", None,
    ),
    "other torch": (
        {"selective_scan_interface": "raise ImportError('undefined symbol: _ZN3c10')\n",
         "triton.ssd_combined": "raise RuntimeError('PTX version')\n"},
        "ImportError: undefined symbol", "RuntimeError: PTX version",
    ),
    "no triton": (
        {"selective_scan_interface": WORKS, "triton.ssd_combined": "import no_such_triton\n"},
        None, "needs the module no_such_triton",
    ),
}  # fmt: skip


@pytest.fixture(params=STAND_INS)
def stand_in(request, tmp_path, monkeypatch):
    """A package mamba_ssm on the path; yields {ssm: what is wrong with it, as a pattern}."""
    modules, *problems = STAND_INS[request.param]
    for name, text in (modules or {}).items():
        path = tmp_path.joinpath("mamba_ssm", "ops", *name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield dict(zip(SSMS, problems, strict=True))
    mamba.mamba_ssm_problem.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def test_mamba_ssm_is_taken_where_it_works(stand_in):
    mamba.mamba_ssm_problem.cache_clear()
    for ssm, problem in stand_in.items():
        own = "chunked" if ssm == "mamba1" else "ssd"
        assert scan_for("auto", ssm, CUDA) == (own if problem else "mamba_ssm")
        if problem:
            with pytest.raises(BitbyteError, match=f"cannot run here: .*{problem}"):
                scan_for("mamba_ssm", ssm, CUDA)
        else:
            assert scan_for("mamba_ssm", ssm, CUDA) == "mamba_ssm"
        with pytest.raises(BitbyteError, match="runs on CUDA, not on cpu"):
            scan_for("mamba_ssm", ssm, CPU)


def selective_scan_fn(u, delta, A, B, C, D):
    """As mamba_ssm's: channels before positions, the last axis contiguous, float32."""
    (batch, width, T), N = u.shape, A.shape[1]
    assert delta.shape == u.shape and A.shape == (width, N) and D.shape == (width,)
    assert B.shape == C.shape == (batch, N, T)
    assert all(v.dtype == torch.float32 for v in (u, delta, A, B, C, D))
    assert all(v.stride(-1) == 1 for v in (u, delta, B, C))
    u, delta, B, C = (v.transpose(1, 2) for v in (u, delta, B, C))
    return selective_scan(u, delta, A, B, C, D).transpose(1, 2)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D):
    """As mamba_ssm's: heads after positions, groups of heads that share B and C."""
    (batch, T, H, _), N = x.shape, B.shape[-1]
    assert dt.shape == (batch, T, H) and A.shape == D.shape == (H,) and chunk_size == scans.CHUNK
    assert B.shape == C.shape == (batch, T, 1, N)
    return ssd(x, dt, A, B[:, :, 0], C[:, :, 0], D)


def test_mamba_ssm_is_called_as_it_wants_to_be(ssm, monkeypatch):
    """With stand-ins that check shapes: the scan and all gradients are those of the reference."""
    for name, functions in (
        ("mamba_ssm", {}), ("mamba_ssm.ops", {}), ("mamba_ssm.ops.triton", {}),
        ("mamba_ssm.ops.selective_scan_interface", {"selective_scan_fn": selective_scan_fn}),
        ("mamba_ssm.ops.triton.ssd_combined",
         {"mamba_chunk_scan_combined": mamba_chunk_scan_combined}),
    ):  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    model, seen = build(small(ssm), 1), {}
    ids = some_ids(2, 70)
    for kernel in ("reference", "mamba_ssm"):
        monkeypatch.setattr(mamba, "scan_for", lambda *asked, it=kernel: it)
        model.zero_grad()
        nats = model(ids)
        nats.mean().backward()
        seen[kernel] = [nats.detach(), *(p.grad.clone() for p in model.parameters())]
    assert_close(seen["mamba_ssm"], seen["reference"], 1e-4)


NUMBAS = {  # what numba may be: (its text, what is wrong with it)
    "absent": ("raise ModuleNotFoundError('No module named numba', name='numba')",
               r"it is not installed \(pip install 'bitbyte\[fast\]'\)"),
    "for another NumPy": ("raise ImportError('Numba needs NumPy 2.2 or less.')",
                          r"it does not load \(ImportError: Numba needs NumPy"),
    "broken": ("raise OSError('libllvm: undefined symbol')", "it does not load .OSError: libllvm"),
    "without llvmlite": ("import no_such_llvmlite", "it needs the module no_such_llvmlite"),
    "works": ("", None),
}  # fmt: skip


@pytest.fixture(params=NUMBAS)
def a_numba(request, tmp_path, monkeypatch):
    """A package numba first on the path; what is wrong with it, as a pattern."""
    text, wrong = NUMBAS[request.param]
    (tmp_path / "numba.py").write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(jit, "problem", functools.cache(jit.problem.__wrapped__))
    yield wrong
    sys.modules.pop("numba", None)


def test_which_scan_runs(a_numba):
    for device in (CPU, CUDA):
        for ssm in SSMS:
            assert scan_for("reference", ssm, device) == "reference"
            assert scan_for("reference", ssm, device, compiled=True) == "reference"
        assert scan_for("fast", "mamba2", device) == "ssd"
        assert scan_for("fast", "mamba2", device, compiled=True) == "ssd"
    assert scan_for("auto", "mamba1", CPU) == ("reference" if a_numba else "numba")
    if a_numba is None:
        assert scan_for("fast", "mamba1", CPU) == "numba"
    else:
        with pytest.raises(BitbyteError, match=f"needs numba: {a_numba}"):
            scan_for("fast", "mamba1", CPU)
    assert scan_for("fast", "mamba1", CUDA) == "chunked"
    assert scan_for("auto", "mamba2", CPU) == "ssd"
    assert scan_for("auto", "mamba1", CPU, compiled=True) == "chunked"
    with pytest.raises(BitbyteError, match=r"torch\.compile cannot take the numba scan"):
        scan_for("fast", "mamba1", CPU, compiled=True)
    with pytest.raises(BitbyteError, match="no scan 'quick'; choose from auto, reference"):
        scan_for("quick", "mamba1", CPU)


def test_which_counter_runs(a_numba, monkeypatch):
    """Training with a prior counts n-grams with numba only where it works."""
    monkeypatch.setattr(ngram_counts, "_compiled", lambda: "in machine code")
    plain = ngram_counts._count
    assert ngram_counts.counter(None) == (plain if a_numba else "in machine code")
    assert ngram_counts.counter(False) is plain
    with pytest.raises(BitbyteError, match=a_numba) if a_numba else contextlib.nullcontext():
        jit.load_numba()


def test_a_scan_that_is_not_there_is_no_scan_of_a_model(ssm, monkeypatch):
    monkeypatch.setattr(jit, "problem", lambda: "it is not installed")
    model = build(small(ssm))
    assert use_kernels(model)["scan"] == ("reference" if ssm == "mamba1" else "ssd")
    with pytest.raises(BitbyteError, match="CUDA"):
        use_kernels(model, scan="mamba_ssm")
