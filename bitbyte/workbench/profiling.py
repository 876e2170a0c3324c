"""Where the time of a training goes: a trace by torch.profiler and the costliest operations."""

import math
import os
from pathlib import Path

import torch

from bitbyte import checkpoint, runs
from bitbyte.config import TrainConfig, resumed
from bitbyte.distributed import announced
from bitbyte.files import BitbyteError, patiently, to_json, user_path
from bitbyte.process import say
from bitbyte.shards import open_dataset

TOP = 10
FOLDER = "profile"  # in a run folder


class Profiler:
    """An ``on_step`` for `train`: profiles the steps between its first and second row.

    The first row's steps warm up; so there are ``log_every`` steps in the profile.  Writes
    RUN/profile/trace-STEP.json.gz, which https://ui.perfetto.dev and chrome://tracing open, and
    top-STEP.json, and prints the same ten lines.  ``rows`` has them, once they are there.
    """

    def __init__(self):
        self.run: Path | None = None  # None on a process that is not the main one
        self.first, self.rows = None, []

    def begin(self, run: Path) -> None:
        self.run = run

    def __call__(self, row: dict) -> None:
        if self.run is None or self.rows:
            return
        if self.first is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it reports its start and stop
            self.profile = torch.profiler.profile(activities=kinds)
            self.profile.start()
            self.first = row["step"]
            return
        self.profile.stop()
        steps = row["step"] - self.first
        self.rows = costliest(self.profile, steps)
        folder = self.run / FOLDER
        folder.mkdir(exist_ok=True)
        trace = folder / f"trace-{self.first:07d}.json.gz"
        temporary = trace.with_name(f".tmp-{os.getpid()}-{trace.name}")
        self.profile.export_chrome_trace(str(temporary))
        patiently(os.replace, temporary, trace)
        (folder / f"top-{self.first:07d}.json").write_bytes(to_json(self.rows))
        say(text(self.rows, steps) + f"\n-> {trace}")

    def end(self) -> None:
        """Say so if the run was too short; after `train`."""
        if self.run is not None and not self.rows:
            if self.first is not None:
                self.profile.stop()
            say("nothing was profiled: that takes two rows of the log; lower --log_every")


def check_length(config: TrainConfig) -> None:
    """Raise BitbyteError if a training is too short for two rows of the log.

    A budget in minutes does not show it.
    """
    begun = 0
    if config.resume:
        run = user_path(config.out or "")
        if not run.is_dir() or runs.latest_step(run) is None:
            return  # `train` says what is wrong
        meta = checkpoint.read_meta(runs.resolve(run))
        if not isinstance(meta["train"], dict):
            return
        config, begun = resumed(config, meta["train"], run), meta["step"]
    if config.minutes and not config.stop_after:
        return
    steps = math.inf if config.minutes else config.steps or 200
    if config.epochs and config.data:
        T = min(config.model_config().seq_len, config.seq_len_cap or config.model_config().seq_len)
        data = open_dataset(config.data, T, split="train", stride=config.stride)
        windows = config.batch_size * config.grad_accum * announced().size
        steps = max(1, math.ceil(config.epochs * data.n_windows / windows))
    last = min(steps, begun + (config.stop_after or math.inf))
    first = min(begun - begun % n + n for n in (config.log_every, config.eval_every) if n)
    if first >= last:
        raise BitbyteError(
            "--profile takes two rows of the log, and this training, up to step "
            f"{max(last, begun)}, has fewer; lower --log_every {config.log_every}, or drop it"
        )


def costliest(profile: torch.profiler.profile, steps: int) -> list[dict]:
    """The operations with the most time of their own, on the device that is slower in sum.

    Rows of name, calls and milliseconds a step, and share of all time.
    """
    events = profile.key_averages()
    on_gpu = sum(e.self_device_time_total for e in events)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    total = sum(getattr(e, key) for e in events) or 1.0
    events = sorted(events, key=lambda e: getattr(e, key), reverse=True)[:TOP]
    return [
        {
            "name": e.key, "calls": e.count / steps, "ms": getattr(e, key) / 1000 / steps,
            "share": getattr(e, key) / total,
        }
        for e in events
    ]  # fmt: skip


def text(rows: list[dict], steps: int) -> str:
    lines = [f"of {steps} step{'s' * (steps > 1)}, time of their own a step:"]
    lines += [
        f"{row['share']:6.1%} {row['ms']:9.2f} ms {row['calls']:7.1f} calls  {row['name']}"
        for row in rows
    ]
    return "\n".join(lines)
