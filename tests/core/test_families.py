"""What is the same in all families, and what only diffusion has."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from support import SMALL, some_ids

import bitbyte.config
from bitbyte import checkpoint, models, runs, scoring
from bitbyte.config import (
    PRESETS,
    DiffusionConfig,
    MambaConfig,
    ModelConfig,
    TrainConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
    preset,
)
from bitbyte.evaluate import bootstrap, evaluation
from bitbyte.files import BitbyteError
from bitbyte.interop import export
from bitbyte.kernels import engine
from bitbyte.models import build
from bitbyte.train import train
from bitbyte.vocab import MASK

CONFIGS = {
    "ar": TransformerConfig(**SMALL, d_ff=48, n_head=2),
    "mamba1": MambaConfig(**SMALL, ssm="mamba1"),
    "mamba2": MambaConfig(**SMALL, ssm="mamba2", n_head=2),
    "diffusion": DiffusionConfig(**SMALL, d_ff=48, n_head=2),
    "blocks": DiffusionConfig(**SMALL, d_ff=48, n_head=2, block=4),
    "steps": DiffusionConfig(**SMALL, d_ff=48, n_head=2, diffusion_steps=64),
    "around": DiffusionConfig(**SMALL, d_ff=48, n_head=2, around=3),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.mark.parametrize("linear", ["ternary", "dense"])
def test_one_contract(config, linear):
    config = dataclasses.replace(config, linear=linear)
    model = build(config, seed=1)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters
    ids = some_ids(3, 24)
    nats = model(ids, torch.arange(3))
    assert nats.shape == ids.shape and nats.dtype == torch.float32
    assert (nats >= 0).all() and nats.isfinite().all()
    # At the start nothing is known: the mean is near log 256 for costs and for weighted draws.
    assert nats.mean().item() == pytest.approx(math.log(256), abs=0.1)
    assert model.logits(ids).shape == (3, 24, 256)
    nats.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = config_from_dict(config_to_dict(config))
    assert again == config


def test_ids_that_are_no_bytes_are_refused(config):
    ids = some_ids(2, 24)
    ids[1, 3] = MASK
    with pytest.raises(BitbyteError, match="cannot be data"):
        build(config)(ids)


def test_presets_of_all_families_are_about_as_large():
    for name in PRESETS:
        sizes = [preset(name, f, linear="dense").n_parameters for f in models.FAMILIES]
        sizes += [preset(name, "mamba", ssm="mamba1").n_parameters]
        assert max(sizes) < 1.25 * min(sizes), (name, sizes)


@pytest.mark.parametrize(
    ("family", "change"),
    [("ar", {"ssm": "mamba1"}), ("mamba", {"d_ff": 64}), ("ar", {"diffusion_steps": 4}),
     ("diffusion", {"d_state": 4})],
)  # fmt: skip
def test_options_of_another_family_are_refused(family, change):
    with pytest.raises(BitbyteError, match=f"{family} models have no {next(iter(change))}"):
        preset("nano", family, **change)


def test_a_family_need_not_have_all_fields_of_a_preset(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Narrow(ModelConfig):
        family = "narrow"
        per_layer = 1

    monkeypatch.setitem(bitbyte.config.CONFIGS, "narrow", Narrow)
    assert preset("tiny", "narrow") == Narrow(n_layer=4, d_model=128, seq_len=256)
    assert TrainConfig(family="narrow").model_config().d_model == 128
    with pytest.raises(BitbyteError, match="narrow models have no d_ff; leave it out"):
        preset("tiny", "narrow", d_ff=64)


def test_bad_noise_is_refused():
    for change in (
        {"diffusion_steps": -1}, {"min_mask_prob": 0.0}, {"min_mask_prob": 0.6},
        {"max_mask_prob": 1.5}, {"around": -1}, {"around": 2, "block": 4},
    ):  # fmt: skip
        with pytest.raises(BitbyteError):
            DiffusionConfig(**change)


def test_the_denoiser_sees_both_sides_and_not_the_hidden_byte():
    model = build(CONFIGS["diffusion"], seed=2).eval()
    ids = some_ids(1, 24)
    masked = ids.clone()
    masked[0, 10] = MASK
    law = model.logits(masked)[0, 10]
    for position in (3, 20):
        other = masked.clone()
        other[0, position] = (other[0, position] + 1) % 256
        assert not torch.allclose(model.logits(other)[0, 10], law)


def test_a_table_tells_of_the_visible_bytes_around_a_place():
    model = build(CONFIGS["around"], seed=2)
    ids_BT = some_ids(2, 24)
    ids_BT[:, 5:8] = MASK
    got_BTD = model.embedded(ids_BT)
    for b, t in itertools.product(range(2), range(24)):
        want_D = model.embed[ids_BT[b, t]]
        for place in range(max(0, t - 3), min(24, t + 4)):
            if ids_BT[b, place] != MASK:
                code_r = model.inside[ids_BT[b, place]]
                want_D = want_D + model.around[:, :, place - t + 3] @ code_r
        assert torch.allclose(got_BTD[b, t], want_D, atol=1e-6)


def test_only_pytorch_knows_the_table_of_what_is_around(tmp_path):
    model = build(preset("nano", "diffusion", around=2, linear="dense"))
    with pytest.raises(BitbyteError, match=r"native engine cannot run .* no native kernel"):
        engine.choose(model, "native")
    assert engine.described(model).startswith("torch (")
    for function in (export.exportable, export.code_tensors):
        with pytest.raises(BitbyteError, match="trained with --around has no form in other"):
            function(model)


def test_the_continuous_loss_is_a_draw_of_the_bound():
    """Every k comes up equally often, exactly k bytes are hidden, weighted T / k."""
    model = build(CONFIGS["diffusion"])
    B, T = 24, 24
    for first in (0, 12345, 2**61):
        counts_T = model.hide(first + torch.arange(100 * T), T).sum(1).bincount(minlength=T + 1)
        assert counts_T[0] == 0 and (counts_T[1:] - 100).abs().max() <= 3
        few_T = model.hide(first + torch.arange(T), T).sum(1).bincount(minlength=T + 1)
        assert few_T.max() <= 3 and (few_T[1:] == 0).sum() <= T // 3  # random levels: 1 / e
    noise_B = torch.arange(B) + 7
    nats_BT = model(some_ids(B, T), noise_B)
    hidden_BT = model.hide(noise_B, T)
    assert torch.equal(nats_BT > 0, hidden_BT)
    masked_BT = some_ids(B, T).masked_fill(hidden_BT, MASK)
    costs_BT = (
        -model.logits(masked_BT).log_softmax(-1).gather(-1, some_ids(B, T)[..., None])[..., 0]
    )
    want_BT = costs_BT * hidden_BT * (T / hidden_BT.sum(1, keepdim=True))
    assert torch.allclose(nats_BT, want_BT, atol=1e-4)


def test_fixed_steps_hide_the_share_they_say():
    model = build(dataclasses.replace(CONFIGS["steps"], min_mask_prob=0.1, max_mask_prob=0.5))
    shares_B = model.hide(torch.arange(64 * 8), 6400).float().mean(1).sort().values
    steps = (torch.arange(64) + 1) / 64
    assert torch.allclose(shares_B.view(64, 8).mean(1), 0.1 + steps * 0.4, atol=0.01)
    noise_B = torch.arange(8)
    nats_BT = model(some_ids(8, 24), noise_B).detach()
    hidden_BT = model.hide(noise_B, 24)
    costs_BT = model.costs(some_ids(8, 24).masked_fill(hidden_BT, MASK), some_ids(8, 24)).detach()
    assert nats_BT.mean().item() == pytest.approx(costs_BT[hidden_BT].mean().item(), rel=1e-5)


def test_noise_belongs_to_the_window_and_not_to_the_batch():
    """Any division of a batch hides the same bytes, each byte as often as any other."""
    for name in ("diffusion", "steps"):
        model = build(CONFIGS[name])
        noise_B = torch.arange(2**61, 2**61 + 4000)
        hidden_BT = model.hide(noise_B, 24)
        parts = [model.hide(part, 24) for part in noise_B.split([1, 999, 3000])]
        assert torch.equal(torch.cat(parts), hidden_BT)
        share_T = hidden_BT.float().mean(0)
        assert (share_T - share_T.mean()).abs().max() < 0.04  # five standard errors
        joint_TT = hidden_BT.float().T.corrcoef()
        level = joint_TT[
            ~torch.eye(24, dtype=torch.bool)
        ]  # alike for all pairs: one level a window
        assert (level - level.mean()).abs().max() < 0.08
    windows = model.hide(torch.arange(2), 24)
    assert not torch.equal(windows[0], windows[1])


def test_the_bound_is_unbiased_for_every_row():
    """Mean over noise of the training loss of one window, in any row, is the bound itself."""
    model = build(CONFIGS["diffusion"], seed=3).eval()
    T = 8
    ids_T = some_ids(1, T)[0]
    costs = []
    for k in range(1, T + 1):  # all masks of k bytes, S / k times the hidden nats
        masks = torch.tensor([m for m in itertools.product((0, 1), repeat=T) if sum(m) == k]).bool()
        ids = ids_T.expand(len(masks), T)
        nats = model.costs(ids.masked_fill(masks, MASK), ids)
        costs.append((nats * masks).sum(1).mean().item() * T / k)
    want = sum(costs) / T
    with torch.no_grad():
        rows = model(ids_T.expand(4096, T), 99 + torch.arange(4096)).sum(1)
    for row in range(4):  # of batches of four
        mean, spread = rows[row::4].mean().item(), rows.std().item() / 32
        assert abs(mean - want) < 4 * spread, (row, mean, want)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "bytes.bin"
    path.write_bytes((np.arange(9000) % 251).astype(np.uint8).tobytes())
    return path


@pytest.mark.parametrize("family", ["mamba", "diffusion"])
@pytest.mark.parametrize("linear", ["ternary", "dense"])
def test_training_resumes_bit_for_bit(family, linear, data, tmp_path):
    fields = {
        "family": family, "linear": linear, "data": str(data), "n_layer": 2, "d_model": 64,
        "seq_len": 64, "batch_size": 2, "steps": 6, "progress": False, "device": "cpu",
        "deterministic": True, "val_data": str(data), "eval_bytes": 512,
    }  # fmt: skip
    whole = train(TrainConfig(**fields, out=str(tmp_path / "whole")))
    part = train(TrainConfig(**fields, out=str(tmp_path / "part"), stop_after=3))
    assert not part.finished
    train(TrainConfig(out=str(tmp_path / "part"), resume=True, progress=False))
    ends = [checkpoint.load_step(runs.resolve(tmp_path / n))[1] for n in ("whole", "part")]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    row = whole.metrics[-1]
    if family == "diffusion":
        assert "masked_bpb" in row and "val_bound" in row
        assert "bpb" not in row and "val_bpb" not in row
    else:
        assert "bpb" in row and "val_bpb" in row
    meta = checkpoint.read_meta(runs.resolve(tmp_path / "whole"))
    kind = "upper_bound" if family == "diffusion" else "exact"
    assert checkpoint.validation(meta) == (whole.val_bpb, kind) and whole.val_kind == kind
    del meta["extra"]["val_kind"]  # of earlier versions
    assert checkpoint.validation(meta) == (whole.val_bpb, kind)
    assert ("scan" in meta["extra"]["kernels"]) == (family == "mamba")
    with pytest.raises(BitbyteError, match=f"a checkpoint of family {family}, wanted ar"):
        checkpoint.load_model(tmp_path / "whole", family="ar")


def test_diffusion_has_all_its_kinds_and_no_exact_one(data):
    model = build(CONFIGS["diffusion"]).eval()
    for kind in scoring.KINDS[1:]:
        record, result = evaluation.evaluate(
            model, data, name="d", limit=480, kind=kind, draws=2, per_pass=6, progress=False
        )
        assert record["kind"] == kind and record["bytes"] == 480
        assert result.bpb == pytest.approx(8, abs=0.5)
        assert (record["draws"] is not None) == (kind == "upper_bound")
        assert record["per_pass"] == (6 if kind.startswith("chain") else None)
    with pytest.raises(BitbyteError, match="has no exact cost"):
        evaluation.evaluate(model, data, name="d", kind="exact")
    with pytest.raises(BitbyteError, match="has no upper_bound cost"):
        evaluation.evaluate(build(CONFIGS["ar"]), data, name="a", kind="upper_bound")


def test_paired_comparison(data, monkeypatch):
    monkeypatch.setattr(bootstrap, "BLOCK_BYTES", 96)  # so that few bytes are enough
    a, b = build(CONFIGS["ar"], seed=0), build(CONFIGS["mamba2"], seed=1)
    with torch.no_grad():
        a.embed.mul_(30)  # confident and wrong: worse than b by far
    records = [
        evaluation.evaluate(m, data, name=n, limit=2400, progress=False)[0]
        for m, n in ((a, "a"), (b, "b"))
    ]
    found = bootstrap.paired_bootstrap(*records)
    assert found["verdict"] == "b is better"
    low, high = found["interval"]
    assert 0 < low < found["difference"] < high
    assert found["difference"] == pytest.approx(records[0]["bpb"] - records[1]["bpb"])
    assert bootstrap.paired_bootstrap(records[0], records[0])["verdict"] == "not distinguishable"
    other, _ = evaluation.evaluate(b, data, name="b", limit=2376, progress=False)
    with pytest.raises(BitbyteError, match="not scored on the same bytes"):
        bootstrap.paired_bootstrap(records[0], other)
    bound = records[0] | {"kind": "upper_bound"}
    assert bootstrap.paired_bootstrap(bound, records[1])["verdict"].endswith(
        "as far as the bound on a tells"
    )
    same = bootstrap.paired_bootstrap(bound, bound)["verdict"]
    assert same == "not distinguishable, as far as two bounds tell"
