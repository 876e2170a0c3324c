"""Numbers that are the same everywhere: square roots, tables, ternary weights, counts."""

import decimal
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbyte.bitlinear import quantize_ternary
from bitbyte.compress import exact, rans
from bitbyte.files import BitbyteError
from bitbyte.kernels import fixed
from bitbyte.transformer import rope_cos_sin


@given(st.integers(0, 2**53 - 2**28))
def test_isqrt(n):
    near = [n, math.isqrt(n) ** 2, max(0, math.isqrt(n) ** 2 - 1)]
    roots = exact.isqrt(torch.tensor(near, dtype=torch.float64))
    assert [int(r) for r in roots] == [math.isqrt(k) for k in near]


@pytest.mark.parametrize("off", [-1, 1])
def test_isqrt_mends_a_bad_square_root(off, monkeypatch):
    n = torch.tensor([0.0, 1, 2, 3, 4, 15, 16, 17, 2**40 - 1, 2**40], dtype=torch.float64)
    sqrt = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: (sqrt(x) + off).clamp_(min=0))
    assert [int(r) for r in exact.isqrt(n)] == [math.isqrt(int(k)) for k in n]


def test_exp_table():
    table = exact.exp_table(256, 4097, 1 << 16)
    with decimal.localcontext(prec=50):
        true = [(decimal.Decimal(-i) / 256).exp() * (1 << 16) for i in range(4096)]
        true = [int(x.to_integral_value(decimal.ROUND_HALF_UP)) for x in true]
    assert table.tolist() == [*true, 0]


def test_sigmoid_table():
    table = exact.sigmoid_table(128, 2048, 20)
    with decimal.localcontext(prec=50):
        one = decimal.Decimal(1)
        true = [one / (one + (decimal.Decimal(-i) / 128).exp()) for i in range(-2048, 2049)]
        true = [round(float(x * 2**20)) / 2**20 for x in true]
    assert table.tolist() == true
    assert table[2048] == 0.5


@pytest.mark.parametrize(("width", "theta"), [(64, 10000.0), (6, 500000.0), (2, 1.0), (8, 0.5)])
def test_rope_tables(width, theta):
    if theta < 1:
        theta = 1 / theta
    mine = fixed.rope_tables(512, width, theta)
    theirs = rope_cos_sin(0, 512, width, theta, torch.device("cpu"))
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=2**-20, rtol=0)


def test_exact_ternary_is_ternary():
    w_GOI = torch.randn(3, 40, 64)
    q, scales = fixed.exact_ternary(w_GOI)
    want_q, want_scale = quantize_ternary(w_GOI)
    assert torch.equal(q.float(), want_q)
    assert torch.allclose(torch.tensor([float(s) for s in scales]), want_scale.flatten())
    q, scales = fixed.exact_ternary(torch.zeros(1, 2, 3))
    assert not q.any()
    assert 0 < float(scales[0]) <= 1e-5
    with pytest.raises(BitbyteError, match="too many to sum"):
        fixed.exact_ternary(torch.full((1, 4, 4), 2.0**40))


@pytest.mark.parametrize("value", [0.5, 0.25, 1.0])
def test_exact_ternary_rounds_a_half_to_0(value):
    w = torch.tensor([value, 3 * value]).view(1, 1, 2)  # the mean is 2 value: the first is a half
    assert fixed.exact_ternary(w)[0].flatten().tolist() == [0, 1]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 300.0, 1e4, 1e9, 1e-3]))
def test_counts(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 256, generator=generator, dtype=torch.float64) * spread
    counts = exact.counts_from_logits(logits.clone())
    assert counts.dtype == torch.int32
    assert (counts.sum(1) == rans.TOTAL).all()
    assert counts.min() >= 1
    probs = (logits / exact.LOGIT_STEPS).softmax(1)
    assert torch.allclose(counts.double() / rans.TOTAL, probs, atol=2e-4)
    below = (logits.amax(1, keepdim=True) - logits).round()
    order = below.scatter(1, logits.argmax(1, keepdim=True), -1).argsort(1)
    assert (counts.gather(1, order).diff(dim=1) <= 0).all()


def test_the_rest_goes_to_the_first_of_equals():
    counts = exact.counts_from_logits(torch.zeros(1, 256, dtype=torch.float64))[0]
    assert counts.tolist() == [2**16] * 256
    logits = torch.zeros(1, 256, dtype=torch.float64)
    logits[0, 100:103] = 5000
    counts = exact.counts_from_logits(logits)[0]
    assert counts[101] == counts[102] <= counts[100] < counts[101] + 256
    assert counts[101] > 2**20
