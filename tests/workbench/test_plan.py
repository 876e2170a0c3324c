"""Plans: parts of the memory, what would fit, times, curves of bits per byte, the one-line form."""

import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from support import record, words

from bitbyte import models
from bitbyte.cli.dispatch import main
from bitbyte.config import TrainConfig
from bitbyte.evaluate.records import write_record
from bitbyte.evaluate.scaling import curves, fit
from bitbyte.optim import create_optimizer
from bitbyte.runs import complete_steps
from bitbyte.train import train
from bitbyte.workbench import plan

CPU = torch.device("cpu")
SMALL = {"n_layer": 3, "d_model": 64, "seq_len": 32, "device": "cpu", "prior": "none"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    Path("text.bin").write_bytes(words(3000))
    return tmp_path


@pytest.mark.parametrize("family", ["ar", "mamba", "diffusion"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weights_gradients_and_optimizer_are_exact(family, optimizer):
    config = TrainConfig(family=family, optimizer=optimizer, **SMALL)
    model = models.build(config.model_config())
    part = create_optimizer(model, optimizer, lr=1e-3, embed_lr=1e-3)
    model(torch.zeros(2, 32, dtype=torch.uint8), torch.arange(2), None).mean().backward()
    part.step()
    state = sum(t.nbytes for t in part.state_tensors().values() if t.ndim)
    needed = plan.memory_of(config, 10**6)
    assert needed.weights == needed.gradients == sum(p.nbytes for p in model.parameters())
    assert needed.optimizer == state
    assert needed.tables == needed.counting == 0


@pytest.mark.parametrize("family", ["ar", "mamba", "diffusion"])
@pytest.mark.parametrize("again", [False, True])
def test_activations_grow_evenly_with_layers_and_windows(family, again):
    config = TrainConfig(family=family, batch_size=5, grad_checkpoint=again, **SMALL)
    shape = config.model_config()
    whole = plan._kept(config, shape, 5, CPU, again)
    rest = 0
    if again:  # and one block, computed again
        one = plan._with_layers(shape, 1)
        rest = 5 * (plan._kept(config, one, 1, CPU, False) - plan._kept(config, one, 1, CPU, True))
        assert whole < plan._kept(config, shape, 5, CPU, False)
    assert plan.activations(config, CPU) == pytest.approx(whole + rest, rel=0.02)


def test_measuring_leaves_no_memory_behind():
    config = TrainConfig(batch_size=4, **SMALL)
    kept, real = [], models.build

    def build(*arguments):
        model = real(*arguments)
        kept.append(weakref.ref(model.embed))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", build)
        plan.activations(config, CPU)
    gc.collect()
    assert kept and all(ref() is None for ref in kept)


def test_what_would_fit_keeps_the_batch_of_a_step():
    config = TrainConfig(batch_size=16, grad_accum=2, **SMALL | {"seq_len": 256})
    whole = plan.memory_of(config, 10**6)
    found, needed = plan.that_fits(config, 10**6, round(0.6 * whole.total))
    assert found.batch_size < 16 and found.batch_size * found.grad_accum == 32
    assert needed.total <= 0.6 * whole.total and not found.grad_checkpoint
    least = plan.memory_of(config.replace(batch_size=1), 10**6)
    again = plan.memory_of(config.replace(batch_size=1, grad_checkpoint=True), 10**6)
    limit = round((least.total + again.total) / 2 / plan.SPARE)
    found, _ = plan.that_fits(config, 10**6, limit)
    assert found.grad_checkpoint
    assert plan.that_fits(config, 10**6, least.weights) is None


def test_tables_and_their_counting():
    config = TrainConfig(**SMALL | {"prior": "counts", "prior_rows": 1 << 14})
    needed, shape = plan.memory_of(config, 10**6), config.model_config()
    assert needed.tables == 10 * shape.table_bytes and needed.counting == 16 * (1 << 14) * 1024
    assert needed.total == needed.weights + needed.tables + needed.counting


SHARES = """
import json, sys
import torch
from bitbyte import models
from bitbyte.config import TrainConfig
from bitbyte.distributed import setup_ddp, wrap
from bitbyte.optim import create_optimizer

with setup_ddp("cpu") as world:
    for optimizer in ("muon", "adamw"):
        config = TrainConfig(optimizer=optimizer, **json.loads(sys.argv[1]))
        model = models.build(config.model_config())
        parallel = wrap(model, world, "fsdp2")
        optim = create_optimizer(model, optimizer, lr=1e-3, embed_lr=1e-3)
        parallel(torch.zeros(2, 32, dtype=torch.uint8), torch.arange(2), None).mean().backward()
        optim.step()
        held = lambda tensors: sum(t.to_local().nbytes for t in tensors if t.ndim)
        counts = [held(model.parameters()), held(p.grad for p in model.parameters()),
                  held(optim.state_tensors().values())]
        if world.is_main:
            print(json.dumps(counts))
        del parallel, model, optim
"""


@pytest.mark.slow
def test_shares_of_three_processes_are_exact(tmp_path):
    """Of widths that three do not divide; the first has the most."""
    fields = SMALL | {"d_model": 62, "n_head": 1, "d_ff": 51}
    (tmp_path / "job.py").write_text(SHARES)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
         str(tmp_path / "job.py"), json.dumps(fields)],
        check=False, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for optimizer, line in zip(("muon", "adamw"), done.stdout.splitlines(), strict=True):
        config = TrainConfig(optimizer=optimizer, parallel="fsdp2", **fields)
        needed = plan.memory_of(config, 10**6, processes=3)
        assert [needed.weights, needed.gradients, needed.optimizer] == json.loads(line)


def test_memory_of_several_processes():
    config = TrainConfig(optimizer="adamw", **SMALL)
    one = plan.memory_of(config, 10**6)
    P = config.model_config().n_parameters
    assert one.whole == one.gathered == one.moment == 0 and one.checkpoint == 12 * P
    assert plan.memory_of(config.replace(parallel="ddp"), 10**6, processes=4) == one
    two = plan.memory_of(config.replace(parallel="fsdp2"), 10**6, processes=2)
    assert two.weights == pytest.approx(one.weights / 2, rel=0.01)
    blocks = models.build(config.model_config()).body.blocks
    block = sum(p.numel() for p in blocks[0].parameters())
    assert two.gathered == 4 * (4 * block + 2 * (P - 3 * block))
    # The main process of a CPU saves: its share, and all of the weights and the state.
    assert two.moment == two.weights + two.optimizer + 12 * P
    assert two.total > two.moment == dataclasses.replace(two, activations=0).total
    assert two.checkpoint == one.checkpoint


def test_a_plan_for_several_processes(place, capsys, monkeypatch):
    words_ = ["plan", "ar", "--n_layer=3", "--d_model=64", "--seq_len=32", "--data=text.bin",
              "--device=cpu", "--prior=none", "--batch_size=2", "--probe=0.05"]  # fmt: skip
    assert main([*words_, "--epochs=1", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    two_ = ["--processes=2", "--parallel=fsdp2"]
    assert main([*words_, *two_, "--epochs=1", "--json"]) == 0
    two = json.loads(capsys.readouterr().out)
    assert (two["processes"], two["parallel"], one["parallel"]) == (2, "fsdp2", "none")
    assert two["time"]["steps"] == -(-one["time"]["steps"] // 2)
    assert two["time"]["bytes"] == two["time"]["steps"] * 2 * 2 * 32
    assert two["disk"]["step"] == one["disk"]["step"] and "measured" not in two["memory"]
    assert main([*words_, *two_]) == 0
    said = capsys.readouterr().out
    for text in ("2 on this machine, fsdp2", "in each process: ", "gathered", " for a moment, with",
                 "at best, 2 times that of one process"):  # fmt: skip
        assert text in said
    assert main([*words_, "--processes=2"]) == 0
    assert "2 on this machine, ddp" in capsys.readouterr().out
    for wrong, why in ((["--parallel=fsdp2"], "by --processes N"), (["--processes=0"], "least 1")):
        assert main([*words_, *wrong]) == 2
        assert why in capsys.readouterr().err
    # Half of the memory is enough for a share, all of it is not for the whole model.
    monkeypatch.setattr(plan, "available", lambda _: 2**60)
    alone = plan.memory_of
    monkeypatch.setattr(plan, "memory_of", lambda c, n, p=0, processes=1: dataclasses.replace(
        alone(c, n, p, processes), work=0 if processes > 1 else 2**61
    ))  # fmt: skip
    assert main([*words_, *two_]) == 0
    assert "rate        unknown: it is measured in one process" in capsys.readouterr().out


def test_a_probe_measures_and_writes_nothing(place, monkeypatch):
    config = TrainConfig(**SMALL, data="text.bin", val_data="text.bin", batch_size=2, steps=50)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rate = plan.probe(config, 0.05)
    assert torch.equal(torch.get_rng_state(), state)
    assert rate.n_bytes == 2 * 32 and rate.step > 0 and rate.steps >= 1 and rate.score > 0
    assert rate.count == 0 and sorted(p.name for p in place.iterdir()) == ["text.bin"]
    times = plan._time(config, rate, 10**6)
    assert times["steps"] == 50 and times["bytes"] == 3200
    assert times["train"] == pytest.approx(50 * rate.step)
    for budget, steps in (({"minutes": 1.0}, round(60 / rate.step)), ({"epochs": 2.0}, 31250)):
        times = plan._time(config.replace(steps=None, **budget), rate, 10**6)
        assert times["steps"] == steps
    monkeypatch.setattr(plan, "COUNT_BYTES", 1000)
    counted = plan.probe(config.replace(prior="counts", prior_rows=64, prior_rank=4), 0.05)
    assert counted.count > 0


@pytest.mark.parametrize("stride", [None, 5, 32])
@pytest.mark.parametrize("epochs", [0.03, 0.011])
def test_steps_and_saves_are_those_of_the_run(place, stride, epochs):
    n_bytes = Path("text.bin").stat().st_size
    config = TrainConfig(
        **SMALL | {"n_layer": 1}, data="text.bin", batch_size=2, epochs=epochs, stride=stride,
        save_every=2, out="run", progress=False,
    )  # fmt: skip
    result = train(config)
    assert plan._steps(config, n_bytes, 1) == result.step
    disk = plan._disk(config, plan.memory_of(config, n_bytes), n_bytes, 1)
    assert disk["total"] == len(complete_steps(result.run)) * disk["step"]


def test_a_validation_is_as_long_as_its_bytes(place):
    rate = plan.Rate(step=1.0, cpu=1.0, n_bytes=64, count=0.0, score=0.5, memory=0, steps=1)
    for val, seconds in ((None, 0), ("text.bin", 0.5 * Path("text.bin").stat().st_size)):
        config = TrainConfig(**SMALL, data="text.bin", val_data=val, steps=2)
        assert plan._time(config, rate, 10**6)["validate"] == seconds


def test_the_command_and_the_line_of_train(place, capsys):
    options = ["--n_layer=1", "--d_model=32", "--seq_len=32", "--batch_size=2", "--device=cpu"]
    words_ = ["ar", "--data", "text.bin", *options, "--steps", "3"]
    assert main(["plan", *words_, "--probe", "0.05"]) == 0
    said = capsys.readouterr().out
    for word in ("parameters ", "memory ", "disk ", "rate ", "3 steps", "BPB         unknown"):
        assert word in said
    assert main(["plan", *words_, "--probe", "0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["time"] is None and document["memory"]["fits"] and document["bpb"] == []
    assert not Path("artifacts").exists()
    assert main(["train", *words_, "--out", "run"]) == 0
    assert "plan: 36,992 parameters, about " in capsys.readouterr().err
    assert main(["train", *words_, "--out", "two", "--no_progress"]) == 0
    assert "plan:" not in capsys.readouterr().err
    for wrong, why in (
        (["--resume", "--out=run"], "drop --resume"), (["--probe=-1"], "at least 0 seconds"),
        (["--probe=nan"], "at least 0 seconds")
    ):  # fmt: skip
        assert main(["plan", *words_, *wrong]) == 2
        assert why in capsys.readouterr().err
    assert main(["plan", "ar"]) == 2


def test_what_does_not_fit_is_said(place, capsys, monkeypatch):
    monkeypatch.setattr(plan, "_resident", lambda: 0)
    monkeypatch.setattr(plan, "LIBRARIES", 0)
    config = TrainConfig(**SMALL, data="text.bin", batch_size=16)
    total = plan.memory_of(config, 10**6).total
    monkeypatch.setattr(plan, "available", lambda _: round(0.7 * total))
    words_ = ["ar", "--n_layer=3", "--d_model=64", "--seq_len=32", "--device=cpu", "--prior=none"]
    assert main(["plan", *words_, "--data=text.bin", "--batch_size=16", "--probe=0.05"]) == 0
    said = capsys.readouterr().out
    assert "the same training fits with --batch_size" in said and "rate " in said
    monkeypatch.setattr(plan, "available", lambda _: 1000)
    assert main(["plan", *words_, "--data=text.bin", "--probe=0.05"]) == 0
    said = capsys.readouterr().out
    assert "not even one window at a time fits" in said and "rate " not in said


# --- curves


def cards(preset: str, E: float, A: float, b: float, seeds=(0,), steps=(128, 512, 2048), **more):
    rng = np.random.default_rng(0)
    return [
        record(
            model=f"card-{preset}-ternary-none-{n}", bytes_seen=2048 * n, train_seed=seed,
            bpb=E + A * (2048 * n) ** -b + (0.02 * rng.normal() if len(seeds) > 1 else 0),
            checkpoint=f"{preset}{n}{seed}",
        ) | more for n in steps for seed in seeds
    ]  # fmt: skip


def test_a_curve_is_found_again():
    E, A, b = 1.0, 40.0, 0.25
    (curve,) = curves([*cards("nano", E, A, b), *cards("tiny", E, A, b, steps=(128, 512))])
    assert (curve.preset, curve.exponent) == ("nano", pytest.approx(b))
    assert curve.n_bytes == (2048 * 128, 2048 * 2048) and len(curve.records) == 3
    value, low, high = curve.at(3e6)
    assert value == pytest.approx(E + A * 3e6**-b, abs=1e-3) and low < value < high
    assert curve.noise == 0.01 and not curve.measured
    assert not curve.is_far(1.6e7) and curve.is_far(1.7e7) and curve.is_far(6e4)
    far = curve.at(1e9)
    assert far[2] - far[1] > 2 * (high - low)  # farther away, less is known


def test_noise_is_that_of_seeds_where_there_are_several():
    (curve,) = curves(cards("nano", 1.0, 40.0, 0.25, seeds=range(8)))
    assert curve.measured and 0.01 < curve.noise < 0.03


def test_few_seeds_leave_most_of_the_assumed_noise():
    """Noise is pooled by degrees of freedom, of which the assumed one has four."""
    pairs = cards("nano", 1.0, 40.0, 0.25)
    (alone,) = curves(pairs)
    twin = pairs[1] | {"train_seed": 1, "checkpoint": "twin"}
    for gap in (0.0, 0.0002, 0.1):
        (curve,) = curves([*pairs, twin | {"bpb": twin["bpb"] + gap}])
        assert curve.noise == pytest.approx(((4 * 0.01**2 + gap**2 / 2) / 5) ** 0.5)
        assert not curve.measured
        widths = [high - low for _, low, high in (curve.at(3e6), alone.at(3e6))]
        assert widths[0] > 0.7 * widths[1]
    five = [pairs[0] | {"train_seed": k, "bpb": pairs[0]["bpb"] + 0.03 * k} for k in range(1, 5)]
    (curve,) = curves([*pairs, twin, *five])  # a group of five, with four degrees, and one of two
    assert curve.measured
    assert curve.noise == pytest.approx(((4 * 0.01**2 + 10 * 0.03**2) / 9) ** 0.5)


def test_a_training_scored_twice_is_one_training():
    own = cards("nano", 1.0, 40.0, 0.25)
    (alone,), (twice,) = curves(own), curves([*own, *own])
    assert twice.noise == alone.noise and twice.at(3e6) == pytest.approx(alone.at(3e6))


def test_a_fit_never_rises_nor_goes_below_zero():
    x = np.array([1e5, 1e6, 1e7])
    E, A, _ = fit(x, np.array([2.0, 2.1, 2.2]))
    assert A == 0 and pytest.approx(2.1) == E
    E, A, b = fit(x, 9 * x**-0.1)
    assert pytest.approx(0, abs=1e-6) == E and b == pytest.approx(0.1) and A > 0


def test_records_of_other_bytes_or_kinds_are_not_mixed():
    own = cards("nano", 1.0, 40.0, 0.25)
    other = record()["data"] | {"sha256": "cd" * 32}
    foreign = cards("nano", 3.0, 40.0, 0.25, steps=(64, 256), data=other)
    bounds = cards("nano", 3.0, 40.0, 0.25, kind="upper_bound")
    seen = cards("nano", 3.0, 40.0, 0.25, trained_on_it=True)
    (curve,) = curves([*foreign, *bounds, *seen, *own])
    assert curve.at(1e6)[0] == pytest.approx(1 + 40 * 1e6**-0.25, abs=1e-3)


def test_a_plan_says_which_records_it_rests_on(place, capsys):
    for row in [*cards("nano", 1.0, 40.0, 0.25), *cards("tiny", 0.9, 40.0, 0.25)]:
        write_record(row)
    words_ = ["ar", "--data=text.bin", "--prior=none", "--device=cpu", "--batch_size=1",
              "--steps=300", "--probe=0.05"]  # fmt: skip
    assert main(["plan", *words_]) == 0
    said = capsys.readouterr().out
    assert "BPB         nano" in said and "            tiny" in said
    assert "through 6 records on 1,000,000 bytes of text, windows 256/256" in said
    assert "noise of 0.010 (assumed)" in said
    assert main(["plan", *words_, "--n_layer=1"]) == 0
    assert "BPB         unknown" in capsys.readouterr().out
    like = TrainConfig(prior="none", linear="ternary", n_layer=1).naming(())  # as --like of it is
    assert (
        plan._expected(like, None, 0) == [] != plan._expected(like.replace(n_layer=None), None, 0)
    )
