"""Quantisers, the layer in both kernels, packing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitbyte import bitlinear, models
from bitbyte.bitlinear import (
    BitLinear,
    Linear,
    TernaryQuantSTE,
    act_quant_per_token,
    quantize_ternary,
)
from bitbyte.config import TransformerConfig
from bitbyte.files import BitbyteError


def test_ternary_by_hand():
    w = torch.tensor([[[0.1, -0.6, 1.1], [0.0, 0.2, -2.2]]])
    q, scale = quantize_ternary(w)
    assert scale.item() == pytest.approx(4.2 / 6)
    assert q.tolist() == [[[0, -1, 1], [0, 0, -1]]]


def test_each_stacked_matrix_has_its_own_scale():
    layer = BitLinear(8, 12, groups=3)
    with torch.no_grad():
        layer.matrices()[1] *= 100
    q, scale = quantize_ternary(layer.matrices())
    alone = [quantize_ternary(m[None]) for m in layer.matrices()]
    assert torch.equal(q, torch.cat([a[0] for a in alone]))
    assert torch.equal(scale, torch.cat([a[1] for a in alone]))
    assert scale[1] > 50 * scale[0]


def test_zero_matrix_and_zero_token_stay_zero():
    assert quantize_ternary(torch.zeros(1, 4, 4))[0].abs().sum() == 0
    assert act_quant_per_token(torch.zeros(2, 5)).abs().sum() == 0


def test_act_quant_error_is_at_most_half_a_step():
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(1)) * 10
    y = act_quant_per_token(x)
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((x - y).abs() <= step / 2 * 1.0001).all()
    assert torch.allclose((y / step).round(), y / step, atol=1e-4)
    assert torch.allclose(y.abs().amax(1), x.abs().amax(1))


def test_gradients_pass_straight_through():
    x = torch.randn(5, 8, requires_grad=True)
    w = torch.randn(1, 4, 8, requires_grad=True)
    g = torch.randn(5, 4)
    (act_quant_per_token(x) @ TernaryQuantSTE.apply(w)[0].t()).backward(g)
    q, scale = quantize_ternary(w.detach())
    assert torch.allclose(x.grad, g @ (q * scale)[0], atol=1e-6)
    assert torch.allclose(w.grad[0], g.t() @ act_quant_per_token(x.detach()), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_int8_kernel_equals_reference(groups):
    torch.manual_seed(0)
    layer = BitLinear(96, 48, groups=groups)
    x = torch.randn(4, 10, 96, requires_grad=True)
    g = torch.randn(4, 10, 48)
    seen = {}
    for kernel in ("reference", "int8"):
        layer.kernel = kernel
        x.grad = layer.weight.grad = None
        y = layer(x)
        y.backward(g)
        seen[kernel] = (y.detach(), x.grad.clone(), layer.weight.grad.clone())
    for a, b in zip(seen["reference"], seen["int8"], strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_int8_kernel_in_bf16_is_within_rounding_of_fp32():
    torch.manual_seed(0)
    layer = BitLinear(256, 64)
    x = torch.randn(32, 256)
    layer.kernel = "reference"
    want = layer(x)
    layer.kernel = "int8"
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert ((got - want).abs() <= want.abs() * 2**-6 + 1e-6).all()


@pytest.mark.parametrize("name", ["sgd", "fused adamw"])
def test_int8_weight_follows_the_optimizer(name):
    torch.manual_seed(0)
    layer = BitLinear(16, 8)
    layer.kernel = "int8"
    x = torch.randn(20, 16)
    params = layer.parameters()
    step = (
        torch.optim.SGD(params, lr=1.0)
        if name == "sgd"
        else torch.optim.AdamW(params, lr=1.0, fused=True)
    )
    layer(x).square().sum().backward()
    step.step()
    got = layer(x)
    layer.kernel = "reference"
    assert torch.allclose(got, layer(x), atol=1e-5)


def test_int8_weight_is_kept_in_eval_mode_and_follows_a_load():
    layer = BitLinear(16, 8).eval()
    layer.kernel = "int8"
    x = torch.randn(20, 16)
    layer(x)
    assert layer.int8_weight()[0] is layer.int8_weight()[0]
    layer.load_state_dict({"weight": torch.randn(8, 16)})
    got = layer(x)
    layer.kernel = "reference"
    assert torch.allclose(got, layer(x), atol=1e-5)


def test_weights_only_layer_refuses_the_int8_kernel():
    layer = BitLinear(8, 8, act_quant=False)
    layer.kernel = "int8"
    with pytest.raises(BitbyteError, match="act_quant"):
        layer(torch.randn(2, 8))


@pytest.mark.parametrize("rows", [1, 16, 17, 33])
def test_the_product_of_padded_rows_has_the_same_rows(rows):
    """On a GPU, which refuses fewer than 17 rows; here the padding alone."""
    generator = torch.Generator().manual_seed(rows)
    x_MI, w_OI = (
        torch.randint(-127, 128, (n, 24), dtype=torch.int8, generator=generator) for n in (rows, 16)
    )
    padded_MI = bitlinear._padded(x_MI)
    assert padded_MI.shape == (max(rows, bitlinear.CUDA_ROWS), 24) and bitlinear.CUDA_ROWS > 16
    got = torch._int_mm(padded_MI, w_OI.t())[:rows]
    assert torch.equal(got, x_MI.int() @ w_OI.int().t())
    assert torch.equal(got, bitlinear.int8_product(x_MI, w_OI))


def test_widths_that_a_gpu_cannot_take_are_refused_before_training():
    cuda = torch.device("cuda")
    BitLinear(24, 16).check_int8(cuda)
    for layer in (BitLinear(20, 16), BitLinear(24, 20)):
        layer.check_int8(torch.device("cpu"))
        with pytest.raises(BitbyteError, match=r"multiples of 8, not .*20"):
            layer.check_int8(cuda)
    with pytest.raises(BitbyteError, match="act_quant"):
        models.use_kernels(
            models.build(TransformerConfig(d_model=64, act_quant=False)), linear="int8"
        )


def test_weights_only_layer_leaves_activations():
    layer = BitLinear(8, 8, act_quant=False)
    q, scale = quantize_ternary(layer.matrices())
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), x @ (q * scale)[0].t())


def test_dense_twin_has_the_same_parameters():
    torch.manual_seed(0)
    a = Linear(8, 6, groups=2, gain=0.5)
    torch.manual_seed(0)
    b = BitLinear(8, 6, groups=2, gain=0.5)
    assert torch.equal(a.weight, b.weight)
    with pytest.raises(BitbyteError, match="divide"):
        Linear(8, 7, groups=2)


@given(st.lists(st.integers(-1, 1), max_size=40))
def test_packing_round_trip(values):
    q = torch.tensor(values, dtype=torch.int8)
    packed = bitlinear.pack_trits(q)
    assert len(packed) == -(-len(values) // 5)
    assert torch.equal(bitlinear.unpack_trits(packed, len(values)), q)


def test_all_trit_bytes_are_their_own_round_trip():
    every = torch.arange(243, dtype=torch.int16).to(torch.uint8)
    assert torch.equal(bitlinear.pack_trits(bitlinear.unpack_trits(every, 243 * 5)), every)


def test_packing_refuses_what_is_not_ternary():
    with pytest.raises(BitbyteError, match="-1, 0 and 1"):
        bitlinear.pack_trits(torch.tensor([2], dtype=torch.int8))
    with pytest.raises(BitbyteError, match="243"):
        bitlinear.unpack_trits(torch.tensor([243], dtype=torch.uint8), 5)
    with pytest.raises(BitbyteError, match="need 2 bytes"):
        bitlinear.unpack_trits(torch.tensor([0], dtype=torch.uint8), 6)
