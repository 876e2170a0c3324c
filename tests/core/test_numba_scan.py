"""The fused scan against a plain loop in float64: values, gradients, sizes, threads, SIMD."""

import errno
import importlib
import os
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbyte.files import BitbyteError, RunError
from bitbyte.kernels import jit, numba_scan

NAMES = ("x", "delta", "a", "b", "c", "skip")


def sequential_scan(x_BTD, delta_BTD, a_DN, b_BTN, c_BTN, skip_D):
    """The recurrence as the paper writes it."""
    h_BDN = 0
    ys = []
    for t in range(x_BTD.shape[1]):
        decay_BDN = torch.exp(delta_BTD[:, t, :, None] * a_DN)
        drive_BDN = (delta_BTD[:, t] * x_BTD[:, t])[..., None] * b_BTN[:, t, None]
        h_BDN = decay_BDN * h_BDN + drive_BDN
        ys.append((h_BDN * c_BTN[:, t, None]).sum(-1) + skip_D * x_BTD[:, t])
    return torch.stack(ys, 1)


def inputs(B, T, D, N, seed=0):
    """Six leaves with gradients, and a gradient of y."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N), (D,), (B, T, D))
    x, delta, a, b, c, skip, grad = (torch.randn(shape, generator=g) for shape in shapes)
    leaves = (x, torch.nn.functional.softplus(delta - 2), -torch.exp(a), b, c, skip)
    return [v.requires_grad_() for v in leaves], grad


def run(scan, leaves, grad):
    """(y, six gradients) of a scan."""
    y = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def in_float64(leaves, grad):
    leaves = [v.detach().double().requires_grad_() for v in leaves]
    return run(sequential_scan, leaves, grad.double())


def assert_close(found, expected, value=1e-5, gradient=1e-4):
    """Largest error relative to the largest entry."""
    for name, f, e in zip(("y", *NAMES), found, expected, strict=True):
        assert f.shape == e.shape, name
        error, largest = (f.double() - e).abs().max(), e.abs().max()
        assert error <= largest * (value if name == "y" else gradient), (name, error, largest)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def numba():
    return pytest.importorskip("numba")


# One position; segments and blocks that end early; several groups; the largest state.
SIZES = [(1, 1, 1, 1), (2, 70, 100, 5), (1, 33, 600, 3), (1, 64, 64, 16), (1, 40, 3, 256)]


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_sequential_loop(numba, size):
    leaves, grad = inputs(*size)
    found = run(numba_scan.FusedScan.apply, leaves, grad)
    assert_close(found, in_float64(leaves, grad), value=1e-6, gradient=2e-6)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3), T=st.integers(1, 70), D=st.integers(1, 140), N=st.integers(1, 20),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_odd_sizes(B, T, D, N, seed):
    pytest.importorskip("numba")
    leaves, grad = inputs(B, T, D, N, seed)
    assert_close(run(numba_scan.FusedScan.apply, leaves, grad), in_float64(leaves, grad))


@pytest.mark.parametrize("number", range(6), ids=NAMES)
def test_gradient_equals_finite_differences(numba, number):
    leaves, grad = inputs(2, 35, 4, 3)
    found = run(numba_scan.FusedScan.apply, leaves, grad)[1 + number].double()
    points = [v.detach().double() for v in leaves]
    step = 1e-5 * torch.randn(points[number].shape, dtype=torch.float64)
    costs = []
    for sign in (1, -1):
        moved = [*points[:number], points[number] + sign * step, *points[number + 1 :]]
        costs.append((sequential_scan(*moved) * grad).sum())
    assert (found * step).sum().item() == pytest.approx((costs[0] - costs[1]).item() / 2, rel=1e-4)


def test_the_comparison_can_fail(numba):
    """The test notices a state that is not carried from one segment to the next."""
    T = numba_scan.SEGMENT + 1
    leaves, grad = inputs(1, T, 2, 2)
    whole = run(numba_scan.FusedScan.apply, leaves, grad)
    cut = run(
        lambda x, delta, a, b, c, skip: torch.cat(
            [
                numba_scan.FusedScan.apply(x[:, t], delta[:, t], a, b[:, t], c[:, t], skip)
                for t in (slice(0, T - 1), slice(T - 1, T))
            ],
            1,
        ),
        leaves,
        grad,
    )
    with pytest.raises(AssertionError):
        assert_close(cut, [v.double() for v in whole])


def test_threads_change_no_bit(numba, two_threads):
    leaves, grad = inputs(3, 75, 700, 4)
    two = run(numba_scan.FusedScan.apply, leaves, grad)
    torch.set_num_threads(1)
    one = run(numba_scan.FusedScan.apply, leaves, grad)
    assert all(torch.equal(t, o) for t, o in zip(two, one, strict=True))


def test_rows_and_channels_do_not_meet(numba):
    leaves, _ = inputs(2, 40, 70, 3)
    x, delta, a, b, c, skip = (v.detach() for v in leaves)
    y = numba_scan.FusedScan.apply(x, delta, a, b, c, skip)
    for channel in (0, 63, 64, 69):
        d = slice(channel, channel + 1)
        alone = (x[1:, :, d], delta[1:, :, d], a[d], b[1:], c[1:], skip[d])
        assert torch.equal(numba_scan.FusedScan.apply(*alone)[0, :, 0], y[1, :, channel])


def test_strided_inputs(numba):
    (x, delta, a, b, c, skip), grad = inputs(2, 20, 65, 3)
    turned = [v.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for v in (x, delta, a, b)]
    wide = torch.stack([c.detach()] * 2, -1)[..., 0]
    every_other = torch.stack([skip.detach()] * 2, -1)[..., 0]
    strided = [*turned, wide, every_other]
    assert not any(v.is_contiguous() for v in strided)
    strided = [v.requires_grad_() for v in strided]
    plain = run(numba_scan.FusedScan.apply, [x, delta, a, b, c, skip], grad)
    apart = run(numba_scan.FusedScan.apply, strided, grad)
    assert all(torch.equal(p, s) for p, s in zip(plain, apart, strict=True))
    ones = run(numba_scan.FusedScan.apply, strided, torch.ones(()).expand(2, 20, 65))
    assert torch.allclose(ones[6], x.detach().sum((0, 1)), atol=1e-5)


def test_bfloat16_is_computed_in_float32(numba):
    leaves, grad = inputs(1, 50, 10, 4)
    half = [v.detach().bfloat16().requires_grad_() for v in leaves]
    exact = [v.detach().float().requires_grad_() for v in half]
    found = run(numba_scan.FusedScan.apply, half, grad.bfloat16())
    expected = run(numba_scan.FusedScan.apply, exact, grad.bfloat16().float())
    assert all(f.dtype == torch.bfloat16 for f in found)
    assert all(torch.equal(f, e.bfloat16()) for f, e in zip(found, expected, strict=True))


def test_types_may_be_mixed(numba):
    leaves, grad = inputs(1, 5, 4, 2)
    mixed = [v.detach().bfloat16().requires_grad_() if i < 2 else v for i, v in enumerate(leaves)]
    found = run(numba_scan.FusedScan.apply, mixed, grad.bfloat16())
    assert [v.dtype for v in found[1:]] == [v.dtype for v in mixed]


def test_only_wanted_gradients(numba):
    leaves, grad = inputs(1, 5, 4, 2)
    x, *rest = (v.detach() for v in leaves)
    x.requires_grad_()
    numba_scan.FusedScan.apply(x, *rest).backward(grad)
    assert torch.equal(x.grad, run(numba_scan.FusedScan.apply, leaves, grad)[1])


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_strong_decay_forgets_without_nan(numba, scale):
    leaves, grad = inputs(1, 40, 20, 3)
    leaves[2] = (leaves[2].detach() * 0 - scale).requires_grad_()
    leaves[1] = (leaves[1].detach() + 1).requires_grad_()  # delta * A <= -100
    found = run(numba_scan.FusedScan.apply, leaves, grad)
    assert all(v.isfinite().all() for v in found)
    x, delta, _, b, c, skip = (v.detach().double() for v in leaves)
    y = delta * x * (b * c).sum(-1, keepdim=True) + skip * x  # h is the newest input alone
    assert (found[0] - y).abs().max() <= 1e-6 * y.abs().max()


def test_no_decay_sums_up(numba):
    ones = torch.ones(1, 100, 1)
    y = numba_scan.FusedScan.apply(
        ones, ones, torch.full((1, 1), -1e-12), ones, ones, torch.zeros(1)
    )
    assert y.flatten().tolist() == list(range(1, 101))


@pytest.mark.parametrize("number", range(6), ids=NAMES)
def test_nan_is_not_swallowed(numba, number):
    leaves, _ = inputs(1, 40, 70, 3)
    leaves = [v.detach() for v in leaves]
    leaves[number].flatten()[0] = torch.nan
    assert numba_scan.FusedScan.apply(*leaves).isnan().any()


def test_exp2(numba):
    numba_scan._compiled()  # makes _exp2 known to numba

    @numba.njit
    def all_exp2(z, out):
        for i in range(len(z)):
            out[i] = numba_scan._exp2(z[i])

    z = np.concatenate([np.linspace(-125, 126.4, 200_001), np.linspace(-1, 1, 100_001)])
    z = z.astype(np.float32)
    found = np.empty_like(z)
    all_exp2(z, found)
    assert np.abs(found / np.exp2(z.astype(np.float64)) - 1).max() <= 2e-7
    special = np.array([0, -0.0, -1, -126, -1e38, -np.inf, np.nan], np.float32)
    found = np.empty_like(special)
    all_exp2(special, found)
    assert found[:3].tolist() == [1, 1, 0.5]
    assert found[3:6].tolist() == [2.0**-125] * 3 and np.isnan(found[6])


def test_shapes_that_do_not_fit_are_refused(numba):
    leaves, _ = inputs(1, 5, 4, 2)
    for number in range(1, 6):
        wrong = [v.detach() for v in leaves]
        wrong[number] = wrong[number][..., :-1]
        with pytest.raises(RunError, match="do not fit"):
            numba_scan.FusedScan.apply(*wrong)


def test_loops_are_simd_without_calls_of_exp(numba):
    """What makes it fast: one aliasing check too many would lose it, with results still right."""
    from llvmlite import binding

    if not binding.get_host_cpu_features().get("avx2"):
        pytest.skip("looks for the instructions of AVX2")
    numba_scan._compiled()
    kernel = numba.njit(nogil=True, fastmath=numba_scan.REORDER)(numba_scan._forward)
    f4 = [numba.types.Array(numba.float32, dims, "C") for dims in (4, 4, 3, 3, 3, 2, 4, 5)]
    kernel.compile((*f4, numba.intp, numba.intp))
    (code,) = kernel.inspect_asm().values()
    assert len(re.findall(r"vfmadd\w+ps.*[yz]mm", code)) >= 7
    assert not re.search(r"call.*exp|vgather|vfmadd\w+ss", code)


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    for module, name in ((numba_scan, "_compiled"), (jit, "problem")):  # not what was found before
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    leaves, _ = inputs(1, 2, 3, 1)
    with pytest.raises(BitbyteError, match=re.escape("pip install 'bitbyte[fast]'")):
        numba_scan.FusedScan.apply(*leaves)


def test_numba_has_no_problem(numba):
    assert jit.problem() is None


def test_import_needs_no_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "bitbyte.kernels.jit")
    fresh = importlib.import_module("bitbyte.kernels.jit")
    assert fresh is not jit and "it is not installed" in fresh.problem()


def _addition(a, b):
    return a + b


def test_without_a_place_for_its_cache_numba_compiles_all_the_same(monkeypatch):
    """A read-only package and no home folder: a service, a container, another user."""
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.CodeLibraryCacheImpl, "_locator_classes", [], raising=False)
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [], raising=False)
    function = jit.compiler()(_addition)
    assert function(2, 3) == 5
    assert isinstance(function._cache, caching.NullCache)


def test_a_full_disk_is_no_reason_not_to_run(monkeypatch, tmp_path):
    caching = pytest.importorskip("numba.core.caching")
    tried = []

    def full(*_):
        tried.append(True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    function = jit.compiler()(_addition)
    if isinstance(function._cache, caching.NullCache):
        pytest.skip("there is no place for a cache here")
    function._cache._cache_file.flush()  # forget what an earlier test has saved
    assert function(2, 3) == 5 and tried


@pytest.mark.parametrize("writable", [True, False])
def test_a_user_without_a_home_gets_no_folder_of_that_name(writable, monkeypatch):
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(jit.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(jit.os, "access", lambda *place: writable)
    function = jit.compiler()(_addition)
    assert isinstance(function._cache, caching.NullCache) is not writable
