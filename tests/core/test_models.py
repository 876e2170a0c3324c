"""Attention kernels, the transformer, the causal model and its contract."""

import dataclasses
import math

import pytest
import torch
from support import TINY, assert_causal, sharp, some_ids

from bitbyte import models
from bitbyte.config import PRESETS, TransformerConfig, config_from_dict, config_to_dict, preset
from bitbyte.files import BitbyteError
from bitbyte.kernels.cpu_attention import ChunkedAttention
from bitbyte.kernels.cpu_norm import FusedRMSNorm
from bitbyte.models import build
from bitbyte.transformer import apply_rotary_emb, plain_attention, rope_cos_sin
from bitbyte.vocab import N_BYTES, START


@pytest.fixture(params=["dense", "ternary"])
def model(request):
    return sharp(dataclasses.replace(TINY, linear=request.param), seed=3)


def test_fused_norm_equals_torch():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    inputs = (x, weight)
    assert torch.autograd.gradcheck(lambda *i: FusedRMSNorm.apply(*i, torch.float64), inputs)
    want = torch.nn.functional.rms_norm(x, (12,), weight, eps=1e-5)
    assert torch.allclose(FusedRMSNorm.apply(*inputs, torch.float64), want, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 7, 128, 129, 300])
def test_chunked_attention_equals_the_formula(T, causal):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, 3, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    g = torch.randn(2, 3, T, 8, dtype=torch.float64)
    seen = []
    for attend in (
        lambda: plain_attention(q, k, v, causal),
        lambda: ChunkedAttention.apply(q, k, v, causal),
    ):
        q.grad = k.grad = v.grad = None
        y = attend()
        y.backward(g)
        seen.append([y.detach(), q.grad.clone(), k.grad.clone(), v.grad.clone()])
    for a, b in zip(*seen, strict=True):
        assert torch.allclose(a, b, atol=1e-5)  # probabilities are float32 in both


@pytest.mark.parametrize("kernel", ["sdpa", "chunked", "auto"])
def test_attention_kernels_agree_in_the_model(model, kernel):
    ids = some_ids(3, 24)
    models.use_kernels(model, "plain")
    want = model(ids)
    want.mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    models.use_kernels(model, kernel)
    got = model(ids)
    got.mean().backward()
    assert torch.allclose(got, want, atol=1e-4)
    for n, p in model.named_parameters():
        assert torch.allclose(p.grad, grads[n], atol=1e-4), n


def test_rotation_depends_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).unbind(0)
    cos, sin = rope_cos_sin(0, 64, 16, 10000.0, torch.device("cpu"))

    def product(i, j):
        turned_q = apply_rotary_emb(q, cos[i : i + 1], sin[i : i + 1])
        return (turned_q * apply_rotary_emb(k, cos[j : j + 1], sin[j : j + 1])).sum().item()

    assert product(9, 4) == pytest.approx(product(45, 40), abs=1e-5)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


@pytest.mark.parametrize("t", [0, 1, 11, 23])
def test_a_byte_changes_nothing_before_it(model, t):
    assert_causal(model, some_ids(2, 24), t)


def test_forward_is_the_cost_under_its_own_logits(model):
    ids = some_ids(2, 24)
    before = torch.cat((torch.full((2, 1), START), ids[:, :-1]), dim=1)
    law = model.logits(before).log_softmax(-1)
    assert law.shape == (2, 24, N_BYTES)
    want = -law.gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(model(ids), want, atol=1e-5)
    assert torch.equal(model(ids.to(torch.uint8)), model(ids))


def test_step_and_prefill_equal_the_full_forward(model):
    model.double()  # in float32 a last bit can turn the rounding of an activation
    ids = torch.cat((torch.full((2, 1), START), some_ids(2, 23)), dim=1)
    want = model.logits(ids)
    state = model.init_state(2)
    for t in range(24):
        got, state = model.step(ids[:, t], state)
        assert torch.allclose(got, want[:, t], atol=1e-4), t
    with pytest.raises(BitbyteError, match="25 ids"):
        model.step(ids[:, 0], state)
    got, state = model.prefill(ids[:, :10], model.init_state(2))
    assert torch.allclose(got, want[:, 9], atol=1e-4)
    got, state = model.prefill(ids[:, 10:20], state)
    assert torch.allclose(got, want[:, 19], atol=1e-4)
    got, state = model.step(ids[:, 20], state)
    assert torch.allclose(got, want[:, 20], atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(model):
    ids = some_ids(2, 24)
    model.train()
    model(ids).mean().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.transformer.grad_checkpoint = True
    model(ids).mean().backward()
    for n, p in model.named_parameters():
        assert torch.allclose(p.grad, want[n], atol=1e-6), n


def test_fresh_model_knows_nothing():
    bits = build(TransformerConfig(), seed=0)(some_ids(4, 256)).mean().item() / math.log(2)
    assert bits == pytest.approx(8.0, abs=0.15)


def test_zero_embedding_is_the_uniform_model():
    model = build(TINY)
    with torch.no_grad():
        model.embed.zero_()
    assert torch.allclose(model(some_ids(2, 24)), torch.full((2, 24), math.log(256)), atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_documented_size(name):
    sizes = {
        "nano": 361_216, "tiny": 886_016, "micro": 1_377_792, "mini": 5_180_928,
        "small": 15_866_880, "medium": 50_476_032, "base": 85_151_232, "large": 679_947_264,
    }  # fmt: skip
    config = preset(name)
    assert config.n_parameters == sizes[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config).parameters()) == sizes[name]


def test_config_round_trip_and_refusals():
    fields = config_to_dict(TINY)
    assert config_from_dict(fields) == TINY
    for broken, word in (
        (fields | {"colour": 1}, "unknown field 'colour'"),
        ({k: v for k, v in fields.items() if k != "d_ff"}, "missing field 'd_ff'"),
        (fields | {"d_model": "32"}, "mistyped field 'd_model'"),
        (fields | {"d_model": True}, "mistyped field 'd_model'"),
        (fields | {"seq_len": 10**5000}, "mistyped field 'seq_len'"),  # too long to be printed
        (fields | {"family": "rnn"}, "no model family 'rnn'"),
        (fields | {"linear": "int3"}, "linear is 'int3'"),
        (fields | {"n_head": 5}, "does not divide"),
        (fields | {"n_layer": 0}, "at least 1"),
        (fields | {"d_model": 10**9, "n_head": 1}, "more than bitbyte supports"),
    ):
        with pytest.raises(BitbyteError, match=word):
            config_from_dict(broken)
    with pytest.raises(BitbyteError, match="no preset"):
        preset("huge")


def test_build_is_seeded_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = build(TINY, seed=1), build(TINY, seed=1), build(TINY, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.embed, b.embed) and not torch.equal(a.embed, c.embed)


def test_kernels_are_reported():
    model = build(TransformerConfig(d_model=256, d_ff=512, seq_len=64))
    assert models.use_kernels(model, "plain", "reference") == {
        "attention": "plain", "linear": "reference",
    }  # fmt: skip
    assert models.use_kernels(model)["attention"] == "chunked"
    with pytest.raises(BitbyteError, match="no attention kernel"):
        models.use_kernels(model, "flash9")


def test_packed_bytes_by_hand():
    model = build(TINY)
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    matrices = 2 * 7
    per_layer = sum(-(-n // 5) for n in (3 * 32 * 32, 32 * 32, 2 * 32 * 48, 32 * 48))
    rest = sum(p.numel() for p in model.parameters()) - layers
    assert models.packed_bytes(model) == 2 * per_layer + 4 * matrices + 2 * rest
