"""Watching training live in a notebook: curves, figures and a Stop button.

A cell that trains blocks its kernel, and a blocked kernel does not see buttons.  These stay live:

    monitor = TrainingMonitor(launch(config)).follow()     own process: outlives the kernel
    monitor = TrainingMonitor().train(config)              a thread of this kernel

``train(config, on_step=TrainingMonitor())`` draws too, but its Stop button works only if the
training runs in a thread.  All of them read metrics.jsonl, which training writes anyway, so any
run can be followed from anywhere that sees its folder, and stopped by a file named STOP in it.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from html import escape
from pathlib import Path

import ipywidgets as W

from bitbyte import checkpoint, runs
from bitbyte.config import TrainConfig
from bitbyte.data.readers import find_data
from bitbyte.files import (
    BitbyteError,
    artifacts,
    cut_name,
    output_folder,
    parse_json,
    plain_only,
    user_path,
)
from bitbyte.plots import svg
from bitbyte.plots.style import INK, drawable
from bitbyte.process import ending
from bitbyte.train import TrainResult, train
from bitbyte.widgets.base import Panel, control, wrapped
from bitbyte.widgets.jobs import Job

PERIOD = 0.5  # seconds between two updates
LIVE = ("starting", "running", "stopping")
COSTS = {  # key of a row -> its name; the cost of masked bytes is not a BPB
    "bpb": "train", "masked_bpb": "train (masked bytes)",
    "val_bpb": "val", "val_bound": "val (bound)",
}  # fmt: skip
COLUMNS = {  # of the table that compares runs: key of a row -> (heading, format)
    "step": ("step", "{:,}"), "bytes": ("bytes", "{:,}"), "seconds": ("seconds", "{:,.0f}"),
    "bpb": ("train bits/byte", "{:.4f}"), "masked_bpb": ("train bits/masked byte", "{:.4f}"),
    "val_bpb": ("val bits/byte", "{:.4f}"), "val_bound": ("val bits/byte <=", "{:.4f}"),
    "lr": ("lr", "{:.2e}"), "grad_norm": ("gradient norm", "{:.3f}"),
    "bytes_per_second": ("bytes/s", "{:,.0f}"),
}  # fmt: skip
CHILDREN: dict[Path, subprocess.Popen] = {}  # run folder -> process that `launch` started


@dataclasses.dataclass(eq=False)
class Followed:
    """What is known about one run."""

    name: str
    folder: Path | None = None  # None: rows come from `TrainingMonitor.__call__` alone
    rows: list[dict] = dataclasses.field(default_factory=list)
    facts: dict = dataclasses.field(default_factory=dict)  # of run.json
    state: str = "starting"  # running, stopping, finished, stopped, ended unsaved, failed, empty
    problem: str = ""
    failed: bool = False  # whether training it in a thread of this process failed
    stopping: bool = False  # Stop was pressed
    thread: threading.Thread | None = None
    inode: int = 0
    offset: int = 0  # bytes of metrics.jsonl read


def read_new(run: Followed) -> None:
    """Read the new complete lines of metrics.jsonl; one still being written is left for later.

    A file that was replaced (resumed, overwritten) is read from the start.
    """
    try:
        with open(run.folder / "metrics.jsonl", "rb", opener=plain_only) as file:
            info = os.fstat(file.fileno())
            if info.st_ino != run.inode or info.st_size < run.offset:
                run.rows, run.inode, run.offset = [], info.st_ino, 0
            file.seek(run.offset)
            text = file.read()
    except FileNotFoundError:
        return
    except BitbyteError as error:  # a link, a pipe
        run.problem = str(error)
        return
    lines = text.split(b"\n")[:-1]
    run.offset += sum(len(line) + 1 for line in lines)
    for line in lines:
        try:
            row = parse_json(line, "metrics.jsonl")
        except BitbyteError as error:
            run.problem = f"a line was skipped: {error}"
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            while run.rows and run.rows[-1]["step"] >= row["step"]:
                run.rows.pop()
            run.rows.append(row)


def log_of(run: Path) -> Path:
    """Where `launch` writes the output of a run's process."""
    mark = hashlib.sha256(os.fsencode(run)).hexdigest()[:8]
    return artifacts("logs", f"{cut_name(run.name)}-{mark}.log")


def look(run: Followed) -> None:
    """Update state, rows and facts of a run, and pass on a request to stop."""
    if run.folder is None:
        return
    run.state = _state(run)  # before the rows, so that none is missed at the end
    read_new(run)
    with contextlib.suppress(OSError, BitbyteError):
        run.facts = runs.read_facts(run.folder)
    child = CHILDREN.get(run.folder)
    if run.state == "failed" and child:
        lines = log_of(run.folder).read_text("utf-8", "replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        run.problem = f"exit code {child.returncode}: {last}"
    if run.stopping and run.state == "running":
        # Repeatedly: one from before the start is deleted unseen.
        with open(run.folder / "STOP", "ab", opener=plain_only):
            pass
    elif run.stopping and run.state not in LIVE:
        run.stopping = False
        (run.folder / "STOP").unlink(missing_ok=True)
    run.state = "stopping" if run.stopping else run.state


def _state(run: Followed) -> str:
    if runs.in_use(run.folder):
        return "running"
    child = CHILDREN.get(run.folder)
    if (child and child.poll() is None) or (run.thread and run.thread.is_alive()):
        return "starting"
    if (child and child.returncode) or run.failed:
        return "failed"
    saved = (runs.complete_steps(run.folder) or [0])[-1]
    with contextlib.suppress(BitbyteError):
        meta = checkpoint.read_meta(run.folder / runs.step_name(saved))
        if meta.get("extra", {}).get("finished"):
            return "finished"
    read_new(run)
    if not saved and not run.rows:
        return "empty"
    return "ended unsaved" if run.rows and saved < run.rows[-1]["step"] else "stopped"


def points(rows: list[dict], axis: str, key: str) -> tuple[list, list]:
    """(x, y) of the rows that have numbers for both ``axis`` and ``key``."""
    pairs = [(row.get(axis), row.get(key)) for row in rows]
    kept = [pair for pair in pairs if all(map(drawable, pair))]
    return [x for x, _ in kept], [y for _, y in kept]


def budget(run: Followed) -> tuple[float | None, float | None]:
    """(steps, minutes) of the last start in run.json; None for what it does not say."""
    facts = (run.facts.get("resumed") or [run.facts])[-1]
    config = facts.get("config")
    minutes = config.get("minutes") if isinstance(config, dict) else None
    said = (facts.get("steps"), minutes)
    steps, minutes = (v if isinstance(v, int | float) else None for v in said)
    return steps, minutes


def remaining(run: Followed) -> float | None:
    """Seconds until the budget in run.json is spent, at the recent pace; None if unknown."""
    total, minutes = budget(run)
    steps, seconds = points(run.rows, "step", "seconds")
    if not steps or run.state not in LIVE or not (total or minutes):
        return None
    if minutes:
        return max(0.0, 60 * minutes - seconds[-1])
    steps, seconds = [0, *steps][-21:], [0, *seconds][-21:]
    pace = (seconds[-1] - seconds[0]) / max(1, steps[-1] - steps[0])
    return max(0.0, (total - steps[-1]) * pace)


def best(rows: list[dict]) -> str:
    """The lowest validation cost, else training cost, and its step."""
    for key, name in reversed(COSTS.items()):
        steps, values = points(rows, "step", key)
        if values:
            value, step = min(zip(values, steps, strict=True))
            return f"best {name} {value:.4f} at step {step:,}"
    return ""


def header(watched: list[Followed]) -> str:
    """A line of HTML for each run: state, step, time left, memory, best."""
    lines = []
    for i, run in enumerate(watched, 1):
        total, left = budget(run)[0], remaining(run)
        step = f"step {run.rows[-1]['step'] if run.rows else 0:,}"
        parts = [run.state, f"{step} of {total:,}" if total else step]
        parts += [] if left is None else [f"ETA {timedelta(seconds=round(left))}"]
        now = run.rows[-1:]
        parts += [f"{v:,.0f} bytes/s" for v in points(now, "step", "bytes_per_second")[1]]
        parts += [f"{v / 2**20:,.0f} MiB" for v in points(now, "step", "memory")[1]]
        parts += [best(run.rows), run.problem]
        if run.state == "stopped" and run.folder:
            name = runs.short_name(run.folder)
            parts.append(f"continue with launch(TrainConfig(out={name!r}, resume=True))")
        name, color = escape(run.name), svg.COLORS[(i - 1) % len(svg.COLORS)]
        if len(watched) > 1:
            name = f'<span style="color:{color}">{i}</span> {name}'
        words = " &middot; ".join(escape(part) for part in parts if part)
        lines.append(f"<div><b>{name}</b>: {words}</div>")
    style = f"line-height:1.6;min-height:1.6em;overflow-wrap:anywhere;color:{INK}"
    return f'<div style="{style}">{"".join(lines) or "no run yet"}</div>'


def panels(watched: list[Followed], axis: str, levels: dict[str, float] | None = None) -> str:
    """Four plots as HTML: bits per byte (with ``levels``), learning rate, gradient norm, speed."""

    def plot(names: dict[str, str], label: str, levels: dict[str, float] | None = None) -> str:
        curves, styles = {}, {}
        for i, run in enumerate(watched):
            for key, name in names.items():
                x, y = points(run.rows, axis, key)
                if not x:
                    continue
                shown = f"{i + 1} {name}" if len(watched) > 1 else name
                curves[shown] = (x, y)
                if len(watched) > 1:  # a color for each run, in all plots and in the header
                    styles[shown] = (i, key.startswith("val"))
        options = {"xlabel": axis, "ylabel": label, "levels": levels, "width": 410}
        return svg.lines(curves, styles=styles, **options)

    plots = [plot(dict(reversed(COSTS.items())), "bits per byte", levels)]
    for key, name, label in (
        ("lr", "lr", "learning rate"), ("grad_norm", "norm", "gradient norm"),
        ("bytes_per_second", "speed", "bytes/s"),
    ):  # fmt: skip
        plots.append(plot({key: name}, label))
    columns = "repeat(auto-fit,minmax(0,410px))"  # as many as fit, or one that is narrower
    style = f"display:grid;grid-template-columns:{columns};gap:4px 12px;color:{INK}"
    return f'<div style="{style}">{"".join(plots)}</div>'


def table(watched: list[Followed]) -> str:
    """The last values of several runs side by side, as HTML; "" for fewer than two runs."""
    if len(watched) < 2:
        return ""
    last = []
    for run in watched:
        values: dict = {}
        for row in run.rows:  # validation is not in every row
            values |= row
        last.append(values)
    keys = [key for key in COLUMNS if any(key in values for values in last)]
    lines = [["run", "state", *(COLUMNS[key][0] for key in keys)]]
    for i, (run, values) in enumerate(zip(watched, last, strict=True), 1):
        numbers = [(COLUMNS[key][1], values.get(key)) for key in keys]
        cells = [f.format(v) if drawable(v) else "-" for f, v in numbers]
        lines.append([f"{i} {run.name}", run.state, *cells])
    cell = '<td style="text-align:right;padding:1px 8px;white-space:nowrap">'
    body = "<tr>".join("".join(f"{cell}{escape(text)}" for text in line) for line in lines)
    rows = (
        f'<table style="border-collapse:collapse;color:{INK};line-height:20px"><tr>{body}</table>'
    )
    # No number is cut in two: what does not fit is scrolled to, without a say in the width.
    return f'<div style="width:0;min-width:100%;overflow-x:auto">{rows}</div>'


class TrainingMonitor(Panel):
    """Curves of one or more runs, redrawn at most twice a second, and a Stop button.

    ``runs`` are folders or names in artifacts/checkpoints, or lists of them.  ``floor`` draws a
    line in the plot of bits per byte, such as the entropy of the source or a reference; a dict
    draws several, with names.

    `train` trains in a thread, `follow` watches runs of other processes; the monitor can also be
    the ``on_step`` of `bitbyte.train.train`, which then blocks the cell (see the top of this file).
    """

    def __init__(
        self, *runs: str | Path | Iterable[str | Path],
        floor: float | dict[str, float] | None = None,
    ):  # fmt: skip
        super().__init__("cpu")  # it loads no model
        floor = floor if isinstance(floor, dict) else {} if floor is None else {"floor": floor}
        self.levels = {f"{name} {value:.4g}": value for name, value in floor.items()}
        self.followed: list[Followed] = []
        self.result: TrainResult | None = None  # of `train`
        self.error: BaseException | None = None
        self._own: Followed | None = None  # the run that calls this monitor
        self._following = False
        self._drawn: object = None
        self._time = -math.inf
        self.header, self.plots, self.table = W.HTML(), W.HTML(), W.HTML()
        self.axis = control(W.Dropdown, 200, "x axis", options=("step", "bytes", "seconds"))
        self.run_choice = control(W.Dropdown, 300)
        self.stop_button.layout.flex = "none"
        self.stop_button.tooltip = "finish the step, save, and end the training"
        self._on_click(self.stop_button, lambda: self.stop(self.run_choice.value or None))
        self._on_change(self.axis, lambda _: self.update())
        controls = wrapped(self.stop_button, self.run_choice, self.axis)
        self.box = W.VBox([self.header, controls, self.status, self.plots, self.table])
        self.box.add_class("bb-monitor")
        for run in runs:
            several = isinstance(run, Iterable) and not isinstance(run, str)
            for one in run if several else [run]:
                self._add(_folder(one))
        self.update()

    def _add(self, folder: Path | None) -> Followed:
        with self._lock:
            for run in self.followed:
                if folder is not None and run.folder == folder:
                    return run
            run = Followed(folder.name if folder else "this run", folder)
            self.followed.append(run)
            names = [(f"{i} {run.name}", run) for i, run in enumerate(self.followed, 1)]
            chosen = self.run_choice.value or ""
            self.run_choice.options = [("all runs", ""), *names]  # the value None would show blank
            self.run_choice.value = chosen
            self.run_choice.layout.display = "none" if len(names) < 2 else None
            return run

    def update(self) -> bool:
        """Look at all runs and redraw what changed; returns whether any is still training."""
        with self._lock:
            for run in self.followed:
                look(run)
            live = any(run.state in LIVE for run in self.followed)
            seen = [(len(r.rows), r.rows[-1:], r.state, r.problem) for r in self.followed]
            if self._drawn != (self.axis.value, seen):
                self._drawn = (self.axis.value, seen)
                self.header.value = header(self.followed)
                self.plots.value = panels(self.followed, self.axis.value, self.levels)
                self.table.value = table(self.followed)
            waiting = any(run.state in LIVE[:2] for run in self.followed)
            self.stop_button.disabled = not waiting  # nothing is live that was not asked to stop
            return live

    def follow(self, wait: bool = False) -> "TrainingMonitor":
        """Keep updating, in a thread, until no run is training; ``wait`` blocks until then."""
        with self._lock:
            if not self._following:
                self._following = True
                self._jobs.start(self._look_on)
        if wait:
            self._jobs.wait()
        return self

    def _look_on(self, job: Job) -> None:
        try:
            while not job.stopped():
                with self._lock:
                    if not self.update():
                        self._following = False
                        return
                time.sleep(PERIOD)
        except BaseException:
            self._following = False
            raise

    def stop(self, which: Followed | None = None) -> None:
        """Let one run, or all, finish the current step, save and end; returns at once."""
        for run in self.followed:
            if which in (None, run) and run.state in LIVE:
                run.stopping = True
        self.follow()

    def begin(self, folder: Path) -> None:
        """Called by `bitbyte.train.train` with the folder to which it will write its rows."""
        self._own = self._add(Path(folder).absolute())
        self._own.stopping = False
        self.follow()

    def __call__(self, row: dict) -> bool:
        """Add a logged row; returns True once Stop was pressed.  Redraws at most twice a second."""
        if self._own is None:
            self._own = self._add(None)
        run = self._own
        if run.folder is None:  # else the row is in the file, and the thread reads it
            with self._lock:
                run.rows.append(dict(row))
                run.state = "stopping" if run.stopping else "running"
            if time.monotonic() - self._time >= PERIOD:
                self._time = time.monotonic()
                self.update()
        return run.stopping or ending()

    def train(self, config: TrainConfig) -> "TrainingMonitor":
        """Train in a thread of this process and return at once; `wait` gives the result."""
        if self._own and self._own.thread and self._own.thread.is_alive():
            raise BitbyteError("this monitor is already training; stop() it or wait() for it")
        config = dataclasses.replace(_placed(config), progress=False)
        self.result = self.error = None
        run = self._own = self._add(Path(config.out))
        run.problem, run.failed, run.stopping = "", False, False
        run.thread = threading.Thread(target=self._train, args=(config, run))
        run.thread.start()
        return self.follow()

    def _train(self, config: TrainConfig, run: Followed) -> None:
        try:
            self.result = train(config, self)
        except BaseException as error:
            self.error, run.failed, run.problem = error, True, f"{type(error).__name__}: {error}"

    def wait(self, timeout: float | None = None) -> TrainResult | None:
        """Block until `train` is done, at most ``timeout`` seconds; returns its result or raises.

        None if it is still training.  While a cell waits, the kernel cannot see the Stop button.
        """
        if self._own is None or self._own.thread is None:
            raise BitbyteError("nothing to wait for: train(config) was not called")
        self._own.thread.join(timeout)
        self.update()
        if self.error:
            raise self.error
        return self.result

    def __repr__(self) -> str:
        return f"TrainingMonitor({', '.join(f'{r.name} {r.state}' for r in self.followed)})"

    def to_html(self) -> str:
        """The state of the runs, without curves: they are SVG, which many viewers drop."""
        return self.header.value + self.table.value


def _folder(run: str | Path) -> Path:
    """Run folder of a path, or of a name in artifacts/checkpoints."""
    if not isinstance(run, str | os.PathLike):
        raise BitbyteError(f"a run is a folder or a name, not {run!r}")
    for place in (user_path(run), artifacts("checkpoints") / run):
        if place.is_dir():
            return place.absolute()
    raise BitbyteError(f"no run {str(run)!r}, neither here nor in {artifacts('checkpoints')}")


def _placed(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths; makes its run folder.  Raises where training would."""
    if config.data is None and not config.resume:
        raise BitbyteError("no training data: give TrainConfig(data=...) a folder or a file")
    if config.resume:
        with contextlib.suppress(BitbyteError):
            config = config.replace(out=str(_folder(config.out)))
    config.model_config()  # raises on an impossible shape
    data, val_data = (
        None if name is None else str(find_data(name).absolute())
        for name in (config.data, config.val_data)
    )
    run = artifacts("checkpoints", runs.run_name(config))
    run = user_path(run if config.out is None else config.out).absolute()
    while config.out is None and run.exists():
        run = run.with_name(f"{run.name}+")  # another run started in the same second
    if config.resume and not runs.complete_steps(run):
        raise BitbyteError(f"{run} holds no complete checkpoint to resume from")
    if not (config.resume or config.allow_overwrite):
        runs.refuse_used(run)
    output_folder(run)
    return config.replace(out=str(run), data=data, val_data=val_data)


def flags(config: TrainConfig) -> list[str]:
    """The options of ``bitbyte train`` for the fields that were named in ``config``."""
    options = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if field.name not in config.said or value is None or value == ():
            continue
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            options += [f"--{name}", *map(str, value)]
        else:
            options.append(f"--{name}={value}")
    return options


def launch(config: TrainConfig) -> Path:
    """Train in a separate process that outlives this one; returns the run folder at once.

    `TrainingMonitor` follows and stops it.  Its command line and output go to `log_of` the run.
    Raises BitbyteError where `bitbyte.train.train` would refuse the folder.
    """
    config = _placed(config)
    run = Path(config.out)
    command = [sys.executable, "-m", "bitbyte", "train", *flags(config)]
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    windows = ("DETACHED_PROCESS", "CREATE_NEW_PROCESS_GROUP")
    with open(log_of(run), "ab") as log:
        log.write(os.fsencode(f"{shlex.join(command)}\n"))
        log.flush()
        CHILDREN[run] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, creationflags=sum(getattr(subprocess, w, 0) for w in windows),
        )  # fmt: skip
    return run
