"""What a resumed run is: what was said counts, what ran is kept, and nothing is lost by a kill."""

import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import until

from bitbyte import checkpoint, config, device, models, optim, runs
from bitbyte import train as training
from bitbyte.cli import dispatch
from bitbyte.config import TrainConfig, resumed
from bitbyte.files import BitbyteError, RunError, read_json
from bitbyte.train import train
from bitbyte.widgets import monitor

SMALL = {
    "n_layer": 1, "d_model": 32, "d_ff": 48, "n_head": 2, "seq_len": 24, "batch_size": 4,
    "dtype": "fp32", "threads": 1, "device": "cpu", "progress": False, "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "bytes.bin"
    path.write_bytes(np.random.default_rng(0).integers(97, 110, 9000).astype(np.uint8).tobytes())
    return str(path)


def run(data, out, **changes):
    return train(TrainConfig(**SMALL | {"data": data, "steps": 6, "out": str(out)} | changes))


def again(out, **changes):
    return train(TrainConfig(out=str(out), resume=True, progress=False, **changes))


def kept(out) -> dict:
    return checkpoint.read_meta(runs.resolve(out))


# --- what was said


def test_only_fields_that_were_named_are_said():
    assert TrainConfig().said == frozenset()
    assert TrainConfig(steps=3, seed=0).said == {"steps", "seed"}
    changed = TrainConfig(steps=3).replace(data="x")
    assert changed.said == {"steps", "data"} and changed.steps == 3
    assert TrainConfig(steps=3, seed=1).naming({"seed", "nothing"}).said == {"seed"}
    assert TrainConfig(steps=3) == TrainConfig(steps=3).naming(())


FIELDS = [field.name for field in config.dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize("field", FIELDS)
def test_the_command_line_knows_what_was_said(field):
    """In every spelling of every option."""
    default = getattr(TrainConfig(), field)
    kind = {f.name: f.type for f in config.dataclasses.fields(TrainConfig)}[field]
    names = {field, field.replace("_", "-")}
    for name in names:
        if kind is bool:
            words = [[f"--no-{name}" if default else f"--{name}"]]
        elif kind == tuple[int, ...]:
            words = [[f"--{name}", "3", "4"]]
        else:
            value = "3" if default is None or not isinstance(default, str) else default
            words = [[f"--{name}", value], [f"--{name}={value}"]]
        for arguments in words:
            assert dispatch._named([*arguments, "--smoke-test"]) & set(FIELDS) == {field}


@pytest.mark.parametrize(
    ("words", "said", "value"),
    [
        (["--linear", "ternary"], "linear", "ternary"),
        (["--linear=ternary"], "linear", "ternary"),
        (["--seed", "0"], "seed", 0),
        (["--batch-size", "8", "--grad_accum=2"], "batch_size", 8),
        (["--no-act-quant"], "act_quant", False),
    ],
)
def test_said_by_the_command_line(words, said, value, data, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "train", lambda config, *_: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dispatch.main(["train", "ar", "--data", str(data), *words])
    assert said in seen[0].said and getattr(seen[0], said) == value
    assert seen[0].said <= {"family", "data", said, "grad_accum"}


def test_a_default_that_is_named_is_compared(data, tmp_path):
    run(data, tmp_path / "dense", linear="dense", seed=3, stop_after=2)
    for wrong in ({"linear": "ternary"}, {"seed": 0}, {"family": "mamba"}):
        name = next(iter(wrong))
        with pytest.raises(BitbyteError, match=f"{name} = .*cannot change it to {wrong[name]}"):
            again(tmp_path / "dense", **wrong)
    assert again(tmp_path / "dense", linear="dense", seed=3).step == 6


def test_operational_defaults_that_are_named_are_taken(data, tmp_path):
    run(data, tmp_path / "run", log_every=2, batch_size=4, grad_accum=1, stop_after=2)
    result = again(tmp_path / "run", log_every=10, batch_size=2, grad_accum=2)
    assert [row["step"] for row in result.metrics] == [2, 6]
    assert kept(tmp_path / "run")["train"]["log_every"] == 10
    with pytest.raises(BitbyteError, match="4 windows per step, this call has 16"):
        again(tmp_path / "run", batch_size=8, grad_accum=2, steps=9)


def test_a_longer_budget_and_none(data, tmp_path):
    run(data, tmp_path / "run")
    assert again(tmp_path / "run").step == 6
    assert again(tmp_path / "run", steps=8).step == 8
    stored = kept(tmp_path / "run")["train"]
    assert (stored["steps"], stored["minutes"]) == (8, None)
    longer = resumed(TrainConfig(out="x", resume=True, minutes=3), stored, tmp_path)
    assert (longer.steps, longer.minutes) == (None, 3)


def test_launch_says_what_was_said(tmp_path):
    options = monitor.flags(TrainConfig(out="x", resume=True, linear="ternary", lr=None))
    assert sorted(options) == ["--linear=ternary", "--out=x", "--resume"]
    assert dispatch._named(options) >= {"linear", "out", "resume"}


# --- what ran


def test_auto_stays_what_it_was(data, tmp_path, monkeypatch):
    """On a machine where auto means another dtype the run keeps its own."""
    chosen = device.choose_dtype
    auto = [torch.float16]
    monkeypatch.setattr(
        training, "choose_dtype", lambda n, d: auto[0] if n == "auto" else chosen(n, d)
    )
    run(data, tmp_path / "run", dtype="auto", stop_after=2)
    assert kept(tmp_path / "run")["extra"]["dtype"] == "fp16"
    auto[0] = torch.float32
    again(tmp_path / "run")
    assert kept(tmp_path / "run")["extra"]["dtype"] == "fp16"
    run(data, tmp_path / "other", dtype="auto", stop_after=2)
    auto[0] = torch.float16  # had its scaler nothing to load, this was a KeyError
    again(tmp_path / "other")
    assert kept(tmp_path / "other")["extra"]["dtype"] == "fp32"
    with pytest.raises(BitbyteError, match=r"dtype = fp16; .* cannot change it to bf16"):
        again(tmp_path / "run", dtype="bf16", steps=9)
    assert again(tmp_path / "run", dtype="fp16", steps=9).step == 9


def test_another_thread_count_or_device_is_told(data, tmp_path, capsys, monkeypatch):
    run(data, tmp_path / "run", stop_after=2)
    assert (
        kept(tmp_path / "run")["extra"] | {"device": "cpu", "threads": 1}
        == kept(tmp_path / "run")["extra"]
    )
    again(tmp_path / "run", stop_after=2)
    assert "was trained with" not in capsys.readouterr().err
    again(tmp_path / "run", threads=2, stop_after=1)
    assert "was trained with threads 1, now it is 2: " in capsys.readouterr().err
    read = checkpoint.load_step

    def elsewhere(*args, **options):
        meta, *rest = read(*args, **options)
        return (meta | {"extra": meta["extra"] | {"device": "cuda"}}, *rest)

    monkeypatch.setattr(checkpoint, "load_step", elsewhere)
    again(tmp_path / "run", threads=2)
    assert "was trained with device cuda, now it is cpu: " in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["data", "extra"])
def test_a_model_without_its_training_is_not_resumed(data, tmp_path, lacking):
    """As `tag --convert` writes it."""
    run(data, tmp_path / "run", stop_after=2)
    folder = runs.resolve(tmp_path / "run")
    meta = checkpoint.read_meta(folder) | {lacking: {}}
    meta.pop("sha256")
    (folder / "meta.json").write_bytes(checkpoint.seal(meta))
    with pytest.raises(BitbyteError, match="without the state of its training"):
        again(tmp_path / "run")


@pytest.mark.parametrize("pointer", ["best", "latest"])
def test_a_kill_between_a_step_and_its_names_loses_no_best_step(
    data, tmp_path, monkeypatch, pointer
):
    """Of four validations the second is the best, and only the newest step is kept besides it."""
    out, costs = tmp_path / "run", {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5}
    set_pointer = runs.set_pointer

    def validate(trainer):
        trainer.val_bpb = costs[trainer.step]
        return trainer.val_bpb

    def killed(folder, name, step):
        if (name, step) == (pointer, 2):
            raise KeyboardInterrupt
        set_pointer(folder, name, step)

    monkeypatch.setattr(training.Trainer, "_validate", validate)
    monkeypatch.setattr(runs, "set_pointer", killed)
    options = {"val_data": data, "save_best": True, "eval_every": 1, "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(data, out, steps=4, keep_last=1, **options)
    monkeypatch.setattr(runs, "set_pointer", set_pointer)
    assert again(out).step == 4
    assert runs.complete_steps(out) == [2, 4] and runs.read_pointer(out, "best") == 2


def test_a_damaged_earlier_step_stops_nothing(data, tmp_path):
    run(data, tmp_path / "run", steps=6, save_every=2)
    meta = tmp_path / "run" / runs.step_name(2) / "meta.json"
    meta.write_bytes(meta.read_bytes().replace(b'"created": "20', b'"created": "19'))
    assert again(tmp_path / "run", steps=8).step == 8


def test_a_save_reads_few_of_the_steps_before_it(data, tmp_path, monkeypatch):
    read, parsed = [], []
    read_meta, parse = checkpoint.read_meta, runs.read_plain_json
    monkeypatch.setattr(checkpoint, "read_meta", lambda p: read.append(p) or read_meta(p))
    monkeypatch.setattr(runs, "read_plain_json", lambda p: parsed.append(p) or parse(p))
    run(data, tmp_path / "run", steps=20, save_every=1)
    assert len(read) <= 20 and len(parsed) <= 40
    meta = tmp_path / "run" / runs.step_name(3) / "meta.json"
    meta.write_text("{")  # what was remembered of it no longer counts
    (tmp_path / "run" / runs.step_name(99)).write_text("a file")
    assert runs.complete_steps(tmp_path / "run") == [n for n in range(1, 21) if n != 3]


def test_settings_of_the_process_come_back(data, tmp_path):
    threads = torch.get_num_threads()
    seen = []

    def look(row):
        seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))

    for fail in (False, True):
        fields = SMALL | {"threads": threads + 1, "deterministic": True, "steps": 1}
        out = str(tmp_path / str(fail))
        try:
            train(
                TrainConfig(**fields, data=data, out=out),
                lambda row, fail=fail: 1 / 0 if fail else look(row),
            )
        except ZeroDivisionError:
            assert fail
        assert torch.get_num_threads() == threads
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [(threads + 1, True)]


# --- saving by time


def ticking(monkeypatch, seconds: int) -> None:
    """A clock that goes this far at each look, so that steps are saved by time."""
    clock = iter(range(0, 10**9, seconds))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))


def test_a_run_saves_by_time_and_keeps_the_last(data, tmp_path, monkeypatch):
    """A clock that goes one minute a look; the default is every five."""
    assert TrainConfig().save_minutes == 5 and TrainConfig().save_every is None
    ticking(monkeypatch, 60)
    saved, save = [], checkpoint.save_step

    def note(run, step, *rest, **options):
        saved.append(step)
        return save(run, step, *rest, **options)

    monkeypatch.setattr(checkpoint, "save_step", note)
    run(data, tmp_path / "run", steps=23)
    assert len(saved) >= 3 and saved[-1] == 23
    gaps = np.diff([0, *saved[:-1]])
    assert gaps.min() >= 2 and gaps.max() <= 6
    assert runs.complete_steps(tmp_path / "run") == [23]
    assert kept(tmp_path / "run")["extra"]["by_time"] is False
    saved.clear()
    run(data, tmp_path / "by steps", steps=23, save_every=10)
    assert saved == [10, 20, 23]
    saved.clear()
    run(data, tmp_path / "never", steps=23, save_minutes=0)
    assert saved == [23]


def test_saving_by_time_leaves_what_is_not_only_a_step(data, tmp_path, monkeypatch, capsys):
    """Notes beside a step, and a step that is a link; a `best` that names no step stops nothing."""
    out, outside, noted = tmp_path / "run", tmp_path / "outside", set()
    outside.mkdir()

    def note(row):
        (out / "best").write_text("my best poems")
        for folder in out.glob("step_*"):
            if not noted:  # the first: as if it were kept on another disk
                moved = folder.rename(outside / folder.name)
                folder.symlink_to(moved, target_is_directory=True)
            (folder / "notes.txt").write_text("mine")
            noted.add(folder)

    ticking(monkeypatch, 60)
    fields = SMALL | {"data": data, "steps": 23, "out": str(out)}
    assert train(TrainConfig(**fields), note).finished
    assert len(noted) >= 3
    assert {(folder / "notes.txt").read_text() for folder in noted} == {"mine"}
    assert [path.name for path in out.glob(".*")] == [".lock"]
    assert min(noted).is_symlink() and checkpoint.read_meta(min(noted))["step"] > 0
    assert f"{min(noted)} is a link, or holds more than a saved step" in capsys.readouterr().err


def test_a_step_that_cannot_be_removed_does_not_end_a_run(data, tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    ticking(monkeypatch, 60)
    monkeypatch.setattr(runs, "remove_folder", refuse)
    assert run(data, tmp_path / "run", steps=23).finished
    assert "cannot be removed: [Errno 13]" in capsys.readouterr().err


def test_steps_that_were_asked_for_stay(data, tmp_path, monkeypatch):
    run(data, tmp_path / "run", steps=9, save_every=3)
    ticking(monkeypatch, 100)
    config = TrainConfig(out=str(tmp_path / "run"), resume=True, steps=20, progress=False)
    train(config.replace(save_every=None))
    assert runs.complete_steps(tmp_path / "run") == [3, 6, 9, 20]


def test_a_killed_run_with_default_saving_goes_on(data, tmp_path):
    """kill -9 without warning: what was saved by time is there, and the end is the same."""
    out = tmp_path / "run"
    options = [f"--{k}={v}" for k, v in SMALL.items() if k != "progress"]
    command = [sys.executable, "-m", "bitbyte", "train", "ar", f"--data={data}", f"--out={out}"]
    process = subprocess.Popen([*command, *options, "--steps=100000", "--save_minutes=0.001"])
    until(lambda: out.is_dir() and runs.latest_step(out) is not None, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    steps = runs.complete_steps(out)
    assert 1 <= len(steps) <= 2  # the one before goes once the next is there
    end = steps[-1] + 5
    assert again(out, steps=end).step == end
    run(data, tmp_path / "whole", steps=100000, stop_after=steps[-1])
    again(tmp_path / "whole", steps=end)
    one, two = (checkpoint.load_step(runs.resolve(r))[1] for r in (out, tmp_path / "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- steps that are skipped


def test_fp16_learns(data, tmp_path):
    want = [row["loss"] for row in run(data, tmp_path / "fp32").metrics]
    got = [row["loss"] for row in run(data, tmp_path / "fp16", dtype="fp16").metrics]
    assert got == pytest.approx(want, rel=5e-3)
    assert kept(tmp_path / "fp16")["extra"]["scaler"]["scale"] > 1


def test_a_run_whose_steps_were_all_skipped_goes_on(data, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler

    def huge(*args, **options):
        return scaler(*args, init_scale=2.0**40, **options)

    monkeypatch.setattr(torch.amp, "GradScaler", huge)
    run(data, tmp_path / "run", steps=3, stop_after=1, dtype="fp16", linear="dense")
    assert again(tmp_path / "run").step == 3


@pytest.mark.parametrize("which", ["embed", "matrices"])
def test_an_overflow_anywhere_skips_all_parts(data, tmp_path, monkeypatch, which):
    """Muon would make a full step of its momentum where only AdamW's gradients overflowed."""
    weights, seen = [], []
    session, clip, unscale = (
        training.Trainer, torch.nn.utils.clip_grad_norm_, torch.amp.GradScaler.unscale_,
    )  # fmt: skip

    def overflow(scaler, optimizer):
        if len(weights) == 3:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if (p is seen[0].model.embed) == (which == "embed"):
                    p.grad.fill_(math.inf)
        unscale(scaler, optimizer)

    def look(parameters, limit):
        weights.append([p.detach().clone() for p in seen[0].model.parameters()])
        return clip(parameters, limit)

    monkeypatch.setattr(training, "Trainer", lambda *a: seen.append(session(*a)) or seen[0])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflow)
    result = run(data, tmp_path / "run", dtype="fp16", steps=5)
    for before, skipped, after in zip(*weights[2:], strict=True):
        assert not torch.equal(before, skipped) and torch.equal(skipped, after)
    assert math.isinf(result.metrics[3]["grad_norm"])
    assert kept(tmp_path / "run")["extra"]["scaler"]["scale"] < 2**16


def test_a_gradient_that_is_not_finite_stops_a_run(data, tmp_path, monkeypatch):
    """The loss itself is finite; without this the parameters would be lost."""
    clip, n = torch.nn.utils.clip_grad_norm_, []

    def poison(parameters, limit):
        n.append(None)
        return torch.tensor(math.inf) if len(n) == 3 else clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poison)
    with pytest.raises(RunError, match=r"gradient norm inf at step 2 .*last good checkpoint: none"):
        run(data, tmp_path / "run")


# --- what the batch is divided into


@pytest.mark.parametrize("family", ["ar", "diffusion"])
def test_a_divided_batch_is_the_same_batch(data, tmp_path, family):
    changes = {"family": family, "linear": "dense", "optimizer": "adamw", "n_head": 2}
    whole = run(data, tmp_path / "whole", batch_size=8, **changes)
    for batch, parts in ((4, 2), (2, 4), (1, 8)):
        out = tmp_path / f"{parts}"
        divided = run(data, out, batch_size=batch, grad_accum=parts, **changes)
        losses = [[row["loss"] for row in result.metrics] for result in (whole, divided)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_ternary_drops_weight_decay_after_two_thirds(data, tmp_path, monkeypatch):
    seen, plain = [], optim.Optimizers.set_rates
    monkeypatch.setattr(
        optim.Optimizers, "set_rates",
        lambda self, factor, decay=True: seen.append(decay) or plain(self, factor, decay),
    )  # fmt: skip
    run(data, tmp_path / "ternary", steps=9)
    assert seen == [True] * 6 + [False] * 3
    seen.clear()
    run(data, tmp_path / "dense", steps=9, linear="dense")
    assert seen == [True] * 9
    seen.clear()
    run(data, tmp_path / "said", steps=9, decay_until=0.0)
    assert seen == [False] * 9


def test_run_json_says_on_what_it_runs(data, tmp_path):
    run(data, tmp_path / "run", stop_after=2)
    again(tmp_path / "run")
    facts = read_json(tmp_path / "run" / "run.json")
    assert facts["kernels"] == models.use_kernels(
        checkpoint.load_model(tmp_path / "run")[0].train()
    )
    assert facts["resumed"][0]["step"] == 2


# --- a run folder from a stranger


@pytest.mark.parametrize("text", ["[1]", '{"resumed": 3}', '{"resumed": [3]}', "not json", "pipe"])
def test_a_run_json_that_no_run_wrote_is_refused(data, tmp_path, text):
    run(data, tmp_path / "run", stop_after=2)
    path = tmp_path / "run" / "run.json"
    if text == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("POSIX")
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_text(text)
    with pytest.raises(BitbyteError, match=r"run\.json.*(what a bitbyte|valid JSON|plain file)"):
        again(tmp_path / "run")


@pytest.mark.parametrize("value", [{}, {"bpb": None}, {"bpb": "low"}])
def test_a_finished_run_whose_last_row_has_no_bpb(data, tmp_path, value, capsys):
    """A run of another program, or one whose loss was not finite, which is logged as null."""
    run(data, tmp_path / "run", steps=2)
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 2} | value) + "\n")
    assert math.isnan(again(tmp_path / "run").bpb)
    dispatch.main(["train", "ar", "--out", str(tmp_path / "run"), "--resume"])
    assert re.match(r"step 2: .* kB/s\)\n", capsys.readouterr().out)
