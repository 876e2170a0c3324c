"""Portable inference: exact parts, the same counts however computed, and close to the model."""

import decimal
import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitbyte import models
from bitbyte.compress import (
    exact,
    portable_mamba,
    portable_scan,
    portable_transformer,
    rans,
)
from bitbyte.compress.predictors import IntegerPredictor, supports
from bitbyte.config import DiffusionConfig, MambaConfig, TransformerConfig
from bitbyte.files import BitbyteError
from bitbyte.kernels import jit
from bitbyte.models import build
from bitbyte.vocab import START

SMALL = {"n_layer": 2, "d_model": 64, "d_ff": 96, "n_head": 2, "seq_len": 32}
KINDS = ("ar", "mamba1", "mamba2", "prior")
PRIOR = {"prior": "counts", "prior_orders": 3, "prior_rows": 64, "prior_rank": 8}
GOLDEN = {  # counts and fingerprint
    "ar": "5a592b10a387c7d9 14c0b1719a253f4ca4cfb98c52b2c6a9",
    "mamba1": "2cf896591a71ce9b 23dffdcceec3a7d635519a5932a7a25f",
    "mamba2": "0a680de0d84cf204 cc1e87d0ab51f6c4e4717db1616a3f55",
    "prior": "e30613bee6c3906a 48e52f4cc0179fdb31c34242d3f2b7e7",
}


def small(kind, **changes):
    if kind == "prior":
        changes = PRIOR | changes
    if kind in ("ar", "prior"):
        return TransformerConfig(**SMALL | changes)
    fields = {"n_layer": 2, "d_model": 48, "seq_len": 32, "ssm": kind, "d_state": 12, "n_head": 4}
    return MambaConfig(**fields | changes)


def by_formula(kind="ar", **changes):
    """A model with weights from integer formulas: the same on every machine, no generator."""
    model = build(small(kind, **changes)).eval()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            i = torch.arange(weight.numel()) + 1000003 * number
            i = (i * 2654435761 + 12345) % 2**32
            i = ((i ^ (i >> 15)) * 2246822519) % 2**32
            i = ((i ^ (i >> 13)) >> 8) % 4096 - 2048
            near_one = weight.dim() == 1
            weight.copy_((i / 2**13 + 1 if near_one else i / 2**12).view_as(weight))
    if model.prior:
        i = torch.arange(model.prior.codes.numel())
        model.prior.codes.copy_((i * 2654435761 % 2**32 >> 13).view_as(model.prior.codes))
        scale = model.prior.scale
        scale.copy_(torch.arange(scale.numel()).view_as(scale) / 256 + 0.25)
    return model


def some_ids(S, T, seed=0):
    ids_ST = torch.randint(0, 256, (S, T), generator=torch.Generator().manual_seed(seed))
    ids_ST[:, 0] = START
    return ids_ST


def formula_ids(S, T):
    ids_ST = (torch.arange(S * T).view(S, T) * 7919 // 5) % 256
    ids_ST[:, 0] = START
    return ids_ST


def digest(counts):
    return hashlib.sha256(np.ascontiguousarray(counts, dtype="<u4").tobytes()).hexdigest()[:16]


def by_steps(predictor, ids_ST):
    state, counts = predictor.start(len(ids_ST)), []
    for t in range(ids_ST.shape[1]):
        counts_SV, state = predictor.step(ids_ST[:, t], state)
        counts.append(counts_SV)
    return np.stack(counts, 1)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return by_formula(kind)


@pytest.fixture(scope="module")
def predictor(model):
    return IntegerPredictor(model)


def test_tables_of_mamba():
    with decimal.localcontext(prec=30):
        x = [decimal.Decimal(i) / 256 for i in range(-4096, 4097)]
        true = [float((1 + v.exp()).ln()) for v in x]
    want = torch.tensor(true, dtype=torch.float64).float()
    assert torch.equal(portable_mamba.softplus_table(), want)
    body = IntegerPredictor(by_formula("mamba1")).body
    y = torch.cat((torch.linspace(0, 25, 10_001), torch.linspace(0, 1e-3, 1001)))
    mine = body.exp(y * portable_mamba.DECAY_STEPS)
    want = (-y.double()).exp() * (y < portable_mamba.DECAY_RANGE)
    assert torch.allclose(mine.double(), want, rtol=3e-6, atol=3e-9)
    assert torch.allclose(mine[10_001:].double(), want[10_001:], rtol=3e-7, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33])
def test_halved(n):
    x_SND = torch.randn(2, n, 5)
    assert torch.allclose(portable_mamba.halved(x_SND.clone()), x_SND.sum(1), atol=1e-5)


def test_windows_equals_step(predictor):
    ids_ST = some_ids(5, 32)
    counts = predictor.windows(ids_ST)
    assert counts.shape == (5, 32, 256)
    assert counts.dtype == np.uint32
    assert (counts.sum(-1, dtype=np.int64) == rans.TOTAL).all()
    assert counts.min() >= 1
    assert np.array_equal(by_steps(predictor, ids_ST), counts)


@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 64])
def test_the_batch_does_not_matter(predictor, lanes):
    ids_ST = some_ids(7, 32, seed=1)
    counts = predictor.windows(ids_ST)
    rows = torch.arange(lanes) % 7
    assert np.array_equal(predictor.windows(ids_ST[rows]), counts[rows.numpy()])
    assert np.array_equal(by_steps(predictor, ids_ST[rows][:, :9]), counts[rows.numpy(), :9])


def test_parts_of_a_window(predictor):
    ids_ST = some_ids(2, 32, seed=2)
    counts = predictor.windows(ids_ST)
    for T in (1, 2, 17):
        assert np.array_equal(predictor.windows(ids_ST[:, :T]), counts[:, :T])
    assert predictor.windows(ids_ST[:0]).shape == (0, 32, 256)


@pytest.mark.parametrize(("chunk", "tokens"), [(1, 1), (5, 64), (128, 10**6)])
def test_blocks_of_work_do_not_matter(predictor, monkeypatch, chunk, tokens):
    ids_ST = some_ids(4, 32, seed=3)
    counts = predictor.windows(ids_ST)
    monkeypatch.setattr(portable_transformer, "CHUNK", chunk)
    monkeypatch.setattr(predictor.body, "tokens", tokens)
    assert np.array_equal(predictor.windows(ids_ST), counts)


@pytest.mark.parametrize(("d_state", "threads"), [(1, 1), (12, 2), (16, 1)])
@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
def test_the_fused_recurrence_has_the_same_bits(ssm, d_state, threads, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(portable_scan, "WORK", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = by_formula(ssm, d_state=d_state, d_model=96)  # 192 channels: whole blocks
        odd = by_formula(ssm, d_state=d_state, d_model=36)  # 72: a part of one
        for given in (model, odd):
            fused = IntegerPredictor(given)
            models.use_kernels(given, scan="reference")
            plain = IntegerPredictor(given)
            assert [p.kernels["scan"] for p in (fused, plain)] == ["numba", "reference"]
            assert fused.fingerprint == plain.fingerprint
            ids_ST = some_ids(3, 32, seed=4)
            want = plain.windows(ids_ST)
            assert np.array_equal(fused.windows(ids_ST), want)
            assert np.array_equal(by_steps(fused, ids_ST), want)
    finally:
        torch.set_num_threads(before)


def test_extremes_of_the_fused_recurrence():
    """States that vanish, decays beyond the end of the table, halves that round to even."""
    pytest.importorskip("numba")
    body = IntegerPredictor(by_formula("mamba1")).body
    layer = body.layers[0]
    generator = torch.Generator().manual_seed(5)
    D, N, S, T = layer.d_inner, layer.d_state, 3, 40
    delta = torch.randint(0, 4096, (S, T, D), generator=generator) / 512
    delta[0] *= 0.5 ** torch.arange(T)[:, None]
    x = torch.randn(S, T, D, generator=generator) * 2.0 ** torch.randint(-40, 20, (S, T, D))
    b, c = torch.randn(2, S, T, N, generator=generator)
    b[1, 5:] = 0
    found = []
    for kernel in ("reference", "numba"):
        layer.kernel, state = kernel, torch.zeros(S, N, D)
        found.append((layer.scan(state, x, delta, b, c), state))
    for plain, fused in zip(*found, strict=True):
        assert torch.equal(plain, fused)
        assert torch.equal(plain.signbit(), fused.signbit())
    assert (found[0][1] == 0).any() and (found[0][1] != 0).any()


def test_without_numba(monkeypatch):
    monkeypatch.setattr(jit, "problem", lambda: "pip install 'bitbyte[fast]'")
    model = by_formula("mamba1")
    assert IntegerPredictor(model).kernels["scan"] == "reference"
    models.use_kernels(model)
    for block in model.body.blocks:
        block.mixer.kernel = "fast"
    with pytest.raises(BitbyteError, match=r"bitbyte\[fast\]"):
        IntegerPredictor(model)


def test_int8_and_float_products_agree(model, monkeypatch):
    ids_ST, found = some_ids(3, 32), set()
    for vnni in (True, False):
        monkeypatch.setattr(exact, "has_vnni", lambda vnni=vnni: vnni)
        predictor = IntegerPredictor(model)
        layers = [part for part in predictor.body.constants() if isinstance(part, exact.Ternary)]
        assert {layer.int8 for layer in layers} == {vnni}
        found.add((digest(predictor.windows(ids_ST)), predictor.fingerprint))
    assert len(found) == 1


def test_golden(kind, predictor):
    """Every machine must get these numbers, or it cannot decode files made here.

    A change of the arithmetic needs a new `predictors.VERSION`.
    """
    counts = predictor.windows(formula_ids(3, 32))
    assert f"{digest(counts)} {predictor.fingerprint.hex()}" == GOLDEN[kind]


PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
torch.set_float32_matmul_precision(sys.argv[3])
from test_integer import *
ids = formula_ids(40, 32)
for kind in KINDS:
    predictor = IntegerPredictor(by_formula(kind))
    with torch.autocast("cpu"):
        counts = predictor.windows(ids)
        steps = by_steps(predictor, ids[:, :12])
    print(digest(counts), digest(steps), predictor.fingerprint.hex())
print(torch.backends.cpu.get_cpu_capability(), torch.get_float32_matmul_precision())
"""


@pytest.mark.parametrize(
    ("threads", "precision", "environment"),
    [
        (1, "highest", {"ATEN_CPU_CAPABILITY": "default"}),
        (2, "medium", {"ATEN_CPU_CAPABILITY": "avx2"}),
        (2, "high", {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}),
    ],
)
def test_another_process(threads, precision, environment):
    ids_ST, want = formula_ids(40, 32), []
    for kind in KINDS:
        predictor = IntegerPredictor(by_formula(kind))
        counts = predictor.windows(ids_ST)
        want.append(f"{digest(counts)} {digest(counts[:, :12])} {predictor.fingerprint.hex()}")
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, Path(__file__).parent, str(threads), precision],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *hashes, about = answer.stdout.splitlines()
    assert hashes == want
    assert about.split()[1] == precision
    if "ATEN_CPU_CAPABILITY" in environment:
        assert about.split()[0] == environment["ATEN_CPU_CAPABILITY"].upper()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(kind, predictor):
    ids_ST = formula_ids(9, 32)
    there = IntegerPredictor(by_formula(kind).cuda())
    assert there.fingerprint == predictor.fingerprint
    assert np.array_equal(there.windows(ids_ST), predictor.windows(ids_ST))
    assert np.array_equal(by_steps(there, ids_ST), predictor.windows(ids_ST))


class ExactSums(TorchDispatchMode):
    """Computes every float sum again, in float64 and in a different order; all must agree.

    The sum of absolute values must fit; then so does every partial sum in any order.
    """

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm") and out.is_floating_point():
            a, b = (x.detach().double() for x in args[:2])
            self.check(name, out, a, b)
        if name == "sum" and out.is_floating_point():
            a = args[0].double()
            self.check(name, out.flatten(), a.flatten(0, -2), torch.ones(a.shape[-1], 1).double())
        if name == "_int_mm":
            a, b = (x.detach().double() for x in args[:2])
            assert torch.equal(out.double(), a @ b)
        assert "addcmul" not in name and "addmm" not in name and "baddbmm" not in name
        return out

    def check(self, name, out, a, b):
        self.seen.add((name, str(out.dtype).removeprefix("torch.")))
        order = torch.randperm(a.shape[-1])
        again = a[..., order] @ b[..., order, :]
        assert torch.equal(out.double().flatten(), again.flatten())
        # In units of the row and of the column, all products are integers.
        sizes = (a / self.unit(a, -1)).abs() @ (b / self.unit(b, -2)).abs()
        assert sizes.max() <= 2 ** (exact.DOUBLE if out.dtype == torch.float64 else exact.SINGLE)

    @staticmethod
    def unit(x, dim):
        """Largest power of two that divides all values along ``dim``."""
        mantissa, exponent = torch.frexp(x)
        mantissa = (mantissa * 2.0**53).long()
        units = (mantissa & -mantissa).double() * 2.0 ** (exponent - 53.0)
        units = units.masked_fill(x == 0, math.inf).amin(dim, keepdim=True)
        return units.masked_fill(units.isinf(), 1)


def weighted(kind, how):
    """A small model with weights unlike any trained ones."""
    model = by_formula("ar", seq_len=64, d_model=128) if kind == "ar" else by_formula(kind)
    with torch.no_grad():
        for weight in model.parameters():
            if how == "constant":
                weight.fill_(3.0)
            elif how != "plain":
                weight.mul_({"huge": 300, "zero": 0, "small": 2.0**-20, "tiny": 1e-30}[how])
    return model


@pytest.mark.parametrize("how", ["plain", "huge", "constant", "zero", "small"])
def test_all_sums_are_exact(kind, how, monkeypatch):
    monkeypatch.setattr(exact, "has_vnni", lambda: False)
    predictor = IntegerPredictor(weighted(kind, how))
    ids_ST = some_ids(3, predictor.window)
    with ExactSums() as mode:
        counts = predictor.windows(ids_ST)
    assert {("mm", "float32"), ("mm", "float64"), ("sum", "float64")} <= mode.seen
    if kind == "ar":
        assert {("bmm", "float32"), ("sum", "float32")} <= mode.seen
    assert np.array_equal(by_steps(predictor, ids_ST), counts)


@pytest.mark.parametrize("how", ["plain", "huge", "small", "tiny"])
def test_flushing_to_zero_does_not_matter(kind, how):
    model = weighted(kind, how)
    ids_ST, found = some_ids(2, 32), set()
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            predictor = IntegerPredictor(model)
            found.add((digest(predictor.windows(ids_ST)), predictor.fingerprint))
        finally:
            torch.set_flush_denormal(False)
    assert len(found) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_near_the_float_model(kind, seed):
    model = build(small(kind, n_layer=1 + seed), seed=seed).eval()
    with torch.no_grad():
        model.embed.mul_(12)  # distributions that are not flat
        if model.prior:
            random = torch.Generator().manual_seed(seed)
            codes = torch.randint(0, 256, model.prior.codes.shape, generator=random)
            model.prior.codes.copy_(codes)
            model.prior.scale.fill_(0.3)
            for weight in (model.prior.direct, model.prior.gate, model.prior.match):
                weight.copy_(torch.randn(weight.shape, generator=random) / 8)
    ids_ST = some_ids(8, 32)
    with torch.no_grad():
        probs = model.logits(ids_ST).double().softmax(-1)
    mine = torch.from_numpy(IntegerPredictor(model).windows(ids_ST) / rans.TOTAL)
    assert probs.amax(-1).mean() > 0.05
    assert (probs - mine).abs().sum(-1).div(2).mean() < 0.02
    extra = (probs * (probs.log() - mine.log())).sum(-1).mean() / math.log(2)
    assert extra < 0.01


def test_the_fingerprint_tells_models_apart(kind, predictor):
    other = by_formula(kind)
    assert IntegerPredictor(other).fingerprint == predictor.fingerprint
    assert len(predictor.fingerprint) == 16
    with torch.no_grad():
        other.embed[0, 0] += 0.25
    assert IntegerPredictor(other).fingerprint != predictor.fingerprint
    for name, weight in other.named_parameters():
        if name.endswith("a_log"):
            with torch.no_grad():
                weight[0] += 0.25
            assert IntegerPredictor(other).fingerprint != predictor.fingerprint
    if kind == "ar":
        other = by_formula(rope_theta=20000.0)
        assert IntegerPredictor(other).fingerprint != predictor.fingerprint


def test_settings_of_the_caller_come_back(predictor):
    torch.set_float32_matmul_precision("medium")
    try:
        predictor.windows(some_ids(1, 4))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", ["ar", "mamba1"])
def test_tables_without_blocks(kind):
    predictor = IntegerPredictor(by_formula(kind, n_layer=0, **PRIOR))
    ids_ST = some_ids(2, 9)
    assert np.array_equal(predictor.windows(ids_ST), by_steps(predictor, ids_ST))


def test_supports():
    assert supports(TransformerConfig())
    assert not supports(TransformerConfig(linear="dense"))
    assert not supports(TransformerConfig(act_quant=False))
    assert not supports(TransformerConfig(seq_len=1 << 20))
    assert not supports(DiffusionConfig())
    assert supports(MambaConfig())
    assert supports(MambaConfig(ssm="mamba1"))
    assert not supports(MambaConfig(linear="dense"))


def test_errors(predictor):
    with pytest.raises(BitbyteError, match="no portable form of ar models with linear dense"):
        IntegerPredictor(build(TransformerConfig(**SMALL, linear="dense")))
    with pytest.raises(BitbyteError, match="33 ids do not fit"):
        predictor.windows(some_ids(1, 33))
    with pytest.raises(BitbyteError, match="from 0 to 256"):
        predictor.windows(torch.tensor([[257]]))
    with pytest.raises(BitbyteError, match="from 0 to 256"):
        predictor.step(torch.tensor([-1]), predictor.start(1))
    state = predictor.start(1)._replace(position=32)
    with pytest.raises(BitbyteError, match="have 32 bytes"):
        predictor.step(torch.tensor([0]), state)
    model = by_formula()
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(BitbyteError, match=r"norm\.weight holds more than 1024"):
        IntegerPredictor(model)
