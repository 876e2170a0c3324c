"""One model on several processes: DDP, FSDP2, another number of them on resume, restarts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import words

from bitbyte import checkpoint, runs
from bitbyte.cli.dispatch import main
from bitbyte.config import TrainConfig
from bitbyte.distributed import World, parallel_mode, shard_like, whole
from bitbyte.files import BitbyteError
from bitbyte.train import train

PLAIN = {
    "n_layer": 2, "d_model": 64, "seq_len": 32, "steps": 6, "log_every": 1, "linear": "dense",
    "device": "cpu", "dtype": "fp32", "deterministic": True, "progress": False, "prior": "none",
    "eval_bytes": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("data")
    text = words(5000)
    (folder / "text.bin").write_bytes(text[:20000])
    (folder / "val.bin").write_bytes(text[20000:21000])
    return {"data": str(folder / "text.bin"), "val_data": str(folder / "val.bin")}


def alone(out: Path, fields: dict):
    return train(TrainConfig(**PLAIN | fields | {"out": str(out)}))


def command(out: Path, fields: dict, *agent: str) -> list[str]:
    """The command line of a training under torchrun; ``agent``: options of torchrun."""
    line = [sys.executable, "-m", "torch.distributed.run", *agent, "-m", "bitbyte", "train"]
    line.append(f"--out={out}")
    for key, value in (PLAIN | fields).items():
        if isinstance(value, bool):
            line.append(f"--{'' if value else 'no_'}{key}")
        else:
            line.append(f"--{key}={value}")
    return line


def together(n: int, out: Path, fields: dict) -> None:
    agent = ("--standalone", f"--nproc_per_node={n}")
    finish(command(out, fields, *agent))


def finish(line: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, check=False, capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr, done.stderr
    return done.stderr


def column(run: Path, name: str) -> list[float]:
    return [row[name] for row in runs.read_metrics(run) if name in row]


def assert_same_step(one: Path, two: Path, atol: float) -> None:
    """Both runs' newest steps hold the same files, names, shapes and, to ``atol``, numbers."""
    (_, a, a_optim), (_, b, b_optim) = (
        checkpoint.load_step(runs.resolve(run), with_optim=True) for run in (one, two)
    )
    for ours, theirs in ((a, b), (a_optim, b_optim)):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=atol, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "fields"),
    [
        (2, {"family": "ar", "prior": "counts", "prior_rows": 64, "prior_rank": 4}),
        (3, {"family": "mamba", "grad_checkpoint": True, "grad_accum": 2}),
        (2, {"family": "diffusion", "optimizer": "adamw", "grad_accum": 2}),
    ],
    ids=["ar", "mamba", "diffusion"],
)
def test_fsdp2_gives_the_losses_of_one_process(data, tmp_path, n, fields):
    fields = data | fields
    alone(tmp_path / "one", fields | {"batch_size": 6})
    together(n, tmp_path / "many", fields | {"batch_size": 6 // n, "parallel": "fsdp2"})
    for name in ("loss", "grad_norm", "val_bpb", "val_bound"):
        ours, theirs = column(tmp_path / "one", name), column(tmp_path / "many", name)
        assert theirs == pytest.approx(ours, abs=1e-5)
    assert_same_step(tmp_path / "one", tmp_path / "many", 1e-5)
    assert runs.read_facts(tmp_path / "many")["kernels"]["parallel"] == "fsdp2"


@pytest.mark.slow
def test_a_run_continues_on_other_numbers_of_processes(data, tmp_path):
    """1 -> 2 -> 1 -> 3 -> 2 processes; the windows of a step are divided anew each time.

    Dense, as a ternary value at a rounding border turns with the last bit of a sum.
    """
    fields = data | {"linear": "dense"}
    whole_run = alone(tmp_path / "one", fields | {"batch_size": 6})
    run, brief = tmp_path / "many", {"stop_after": 1, "resume": True, "parallel": "fsdp2"}
    alone(run, fields | {"batch_size": 6, "stop_after": 1})
    together(2, run, fields | brief)
    alone(run, fields | brief)
    together(3, run, fields | brief)
    together(2, run, fields | brief | {"stop_after": 2})
    assert column(run, "loss") == pytest.approx([r["loss"] for r in whole_run.metrics], abs=1e-5)
    assert_same_step(tmp_path / "one", run, 1e-5)
    worlds = [start["world"] for start in runs.read_facts(run)["resumed"]]
    assert worlds == [2, 1, 3, 2]
    with pytest.raises(BitbyteError, match="7 processes cannot share"):
        from bitbyte.train import _redivided

        _redivided(TrainConfig(**PLAIN), {"global_batch": 6, "world": 2}, 7)


EXACT = """
import torch
from bitbyte import models
from bitbyte.config import preset
from bitbyte.distributed import gather, setup_ddp, shard_like, whole, wrap

with setup_ddp("cpu") as world:
    config = preset("nano", n_layer=1, d_model=62, n_head=1, d_ff=51, seq_len=16, prior="counts",
                    prior_rows=64, prior_rank=4)
    ids_BT = torch.arange(32).view(2, 16).to(torch.uint8)
    plain, model = models.build(config), models.build(config)
    want = plain(ids_BT)
    parallel = wrap(model, world, "fsdp2")
    nats = parallel(ids_BT)
    assert torch.equal(nats, want), "a ternary value differs"
    nats.mean().backward()
    want.mean().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.to_local().numel() < q.numel(), name
        torch.testing.assert_close(whole(p.grad), q.grad, atol=1e-6, rtol=1e-5, msg=name)
        assert torch.equal(whole(shard_like(q.detach(), p)), q), name
    content = gather(model.state_dict(), world)
    assert content.keys() == (plain.state_dict().keys() if world.is_main else set())
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in content.items())
    del parallel, model

    ddp = wrap(models.build(config), world, "ddp")
    ddp.module.prior.scale.fill_(world.rank)
    ddp(ids_BT)
    assert ddp.module.prior.scale.max() == world.rank, "the tables were broadcast"
    del ddp
"""


@pytest.mark.slow
def test_sharded_weights_are_exact_and_tables_stay(tmp_path):
    """Widths that three processes cannot divide evenly; ternary values need whole matrices."""
    (tmp_path / "job.py").write_text(EXACT)
    agent = ("--standalone", "--nproc_per_node=3")
    finish([sys.executable, "-m", "torch.distributed.run", *agent, str(tmp_path / "job.py")])


def test_the_mode_follows_from_need(monkeypatch):
    two = World(size=2)
    monkeypatch.setattr(World, "any_rank", lambda self, *flags: list(flags))
    monkeypatch.setattr("bitbyte.distributed.memory", lambda: 64_000)
    assert parallel_mode("fsdp2", 10, World()) == "none"
    assert parallel_mode("auto", 1000, two) == "ddp"
    assert parallel_mode("auto", 1001, two) == "fsdp2"
    assert parallel_mode("ddp", 1001, two) == "ddp"
    tensor = torch.arange(3.0)
    assert whole(tensor) is tensor and shard_like(tensor, tensor) is tensor


@pytest.mark.parametrize(
    "fields", [{"compile": True}, {"dtype": "fp16"}, {"optimizer": "adamw8bit"}]
)
def test_what_fsdp2_does_not_work_with(data, tmp_path, monkeypatch, fields):
    monkeypatch.setattr("bitbyte.train.parallel_mode", lambda *_: "fsdp2")
    with pytest.raises(BitbyteError, match="fsdp2 does not work with"):
        alone(tmp_path / "run", data | fields)
    with pytest.raises(BitbyteError, match="no parallel 'tp'; choose auto, ddp, fsdp2"):
        TrainConfig(parallel="tp")


def test_a_process_alone_is_not_given_a_mode(data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for mode in ("ddp", "fsdp2"):
        words_ = ["train", f"--data={data['data']}", f"--out={tmp_path / 'run'}"]
        assert main([*words_, f"--parallel={mode}"]) == 2
        said = capsys.readouterr().err
        assert f"--parallel {mode} is for several processes: start them with torchrun" in said
        assert not (tmp_path / "run").exists()
    # What Python or torchrun starts, and what began under it, goes on alone, and says so.
    fields = data | {"parallel": "fsdp2", "progress": True, "stop_after": 1}
    alone(tmp_path / "run", fields)
    assert "note: a single process trains, without --parallel fsdp2" in capsys.readouterr().err
    alone(tmp_path / "run", fields | {"resume": True})
    assert "note: a single process trains, without --parallel fsdp2" in capsys.readouterr().err


# --- elastic


def test_a_command_that_restarts_needs_a_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    for fields in ({}, {"out": str(tmp_path / "run"), "allow_overwrite": True}):
        with pytest.raises(BitbyteError, match="give --out, without --allow_overwrite"):
            train(TrainConfig(**PLAIN | data | fields))
    first = alone(tmp_path / "run", data | {"stop_after": 2})
    again = alone(tmp_path / "run", data)  # the same command continues
    assert (first.step, again.step) == (2, 6)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_changes_nothing(data, tmp_path):
    """The run goes on from its last step, and ends with the bits of one without a kill."""
    fields = data | {"parallel": "fsdp2", "batch_size": 3, "save_every": 2, "steps": 40}
    agent = ("--standalone", "--nproc_per_node=2", "--max-restarts=2")
    finish(command(tmp_path / "calm", fields, *agent))
    log = open(tmp_path / "log", "wb")  # noqa: SIM115
    process = subprocess.Popen(
        command(tmp_path / "run", fields, *agent), stdout=log, stderr=log,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with log:
        wait_for(lambda: runs.complete_steps(tmp_path / "run"), process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        code = process.wait(timeout=240)
    assert code == 0, (tmp_path / "log").read_text()[-4000:]
    resumed = runs.read_facts(tmp_path / "run").get("resumed", [])
    assert len(resumed) == 1 and 0 < resumed[0]["step"] < 40
    assert_same_step(tmp_path / "calm", tmp_path / "run", 0)
    assert column(tmp_path / "calm", "loss") == column(tmp_path / "run", "loss")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_machine_leaves_and_another_joins(data, tmp_path):
    """Two agents stand for machines; each counts its own restarts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = tmp_path / "run"
    fields = data | {"batch_size": 3, "save_every": 5, "steps": 100_000}
    agent = (
        "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=5", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--monitor-interval=0.5",
        "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1",
    )  # fmt: skip
    log = open(tmp_path / "log", "wb")  # noqa: SIM115

    def start() -> subprocess.Popen:
        # Without it an agent that joins waits for an address that the others gave out long ago.
        environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment["OMP_NUM_THREADS"] = "1"
        line = command(run, fields, *agent)
        return subprocess.Popen(line, stdout=log, stderr=log, env=environment)

    def worlds() -> list[int]:
        if not (run / "run.json").exists():
            return []
        facts = runs.read_facts(run)
        return [start["world"] for start in (facts, *facts.get("resumed", []))]

    def saved() -> int:
        return max(runs.complete_steps(run), default=0)

    def hosted() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    first = start()
    wait_for(hosted, first)  # the agent that keeps the store of all must not be the one that dies
    second = start()
    with log:
        wait_for(lambda: saved() and worlds()[0] == 2, first)
        for pid in (*children(second.pid), second.pid):
            os.kill(pid, signal.SIGKILL)
        second.wait()
        wait_for(lambda: worlds()[-1] == 1, first)
        reached = saved()
        wait_for(lambda: saved() > reached, first)
        third = start()
        wait_for(lambda: worlds()[-1] == 2, first)
        reached = saved()
        wait_for(lambda: saved() > reached, first)
        (run / "STOP").touch()
        codes = first.wait(timeout=120), third.wait(timeout=120)
    assert codes == (0, 0), (tmp_path / "log").read_text()[-4000:]
    losses = column(run, "loss")
    one = alone(tmp_path / "one", fields | {"batch_size": 6, "stop_after": len(losses)})
    assert losses == pytest.approx([row["loss"] for row in one.metrics], abs=1e-4)
