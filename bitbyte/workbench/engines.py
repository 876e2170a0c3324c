"""Start workers on a grid and watch it: on this machine, on a Slurm cluster, or on Ray.

bitbyte schedules nothing: an engine only starts copies of `cells.work`, which find their cells in
the grid's folder.  So several engines, machines or shells may work on one grid.
"""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bitbyte.evaluate.tables import text_table
from bitbyte.files import BitbyteError, RunError, artifacts, output_folder, shown
from bitbyte.process import say
from bitbyte.vocab import printable
from bitbyte.workbench import cells, claims
from bitbyte.workbench import grid as grids
from bitbyte.workbench.claims import State, Watch
from bitbyte.workbench.grid import Grid
from bitbyte.workbench.runner import clock

MOST_WORKERS = 32  # that a queue is asked for at a time, unless told otherwise
TRIES = 3  # starts of workers that claim nothing, before that counts as a failure
STOP_SECONDS = 60  # a stopped worker has for saving
LEAST_ROWS = 10  # of the table on a terminal, however low that is


class Engine(Protocol):
    """Starts workers somewhere."""

    size: int  # most workers at a time

    def start(self, n: int) -> None:
        """Start ``n`` workers more."""
        ...

    def live(self) -> int:
        """How many are at work, or in the queue."""
        ...

    def stop(self) -> str:
        """End them, if they are this process's; a note for the user."""
        ...

    def problem(self) -> str:
        """Where to look if workers do nothing."""
        ...


class Local:
    """Processes of this machine."""

    def __init__(self, grid: Grid, size: int, options: dict):
        if options:
            raise BitbyteError("--queue is for slurm and ray; drop it")
        self.grid, self.size = grid, size
        self.logs = grid.folder / "logs"
        self.workers: list[subprocess.Popen] = []
        self.number = 0

    def start(self, n: int) -> None:
        here = {"BITBYTE_ARTIFACTS": str(artifacts().absolute())}
        threads = str(max(1, (os.cpu_count() or 1) // self.size))
        environment = {"OMP_NUM_THREADS": threads} | os.environ | here
        for _ in range(n):
            self.number += 1
            path = output_folder(self.logs) / f"worker-{os.getpid()}-{self.number}.txt"
            words = [sys.executable, "-m", cells.__name__, str(self.grid.snapshot)]
            with open(path, "wb") as log:
                worker = subprocess.Popen(
                    [*words, str(os.getpid())], env=environment, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            self.workers.append(worker)

    def live(self) -> int:
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        return len(self.workers)

    def stop(self) -> str:
        for worker in self.workers:
            worker.terminate()
        try:
            for worker in self.workers:
                worker.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for worker in self.workers:
                worker.kill()
        return "stopped; the same command continues"

    def problem(self) -> str:
        logs = sorted(self.logs.glob(f"worker-{os.getpid()}-*.txt"), key=os.path.getmtime)
        last = logs[-1].read_text("utf-8", "replace").strip().splitlines() if logs else []
        return f"{last[-1] if last else 'no message'} ({shown(self.logs)})"


class Slurm:
    """Jobs of a Slurm cluster, started by submitit as one array."""

    def __init__(self, grid: Grid, size: int, options: dict):
        submitit = _engine_module("submitit", "slurm")
        if shutil.which("sbatch") is None:
            raise BitbyteError("there is no sbatch here; run this where jobs are submitted")
        self.grid, self.size, self.ids = grid, size, []
        self.executor = submitit.AutoExecutor(folder=grid.folder / "logs", cluster="slurm")
        parameters = {"name": f"grid-{grid.name}", "slurm_array_parallelism": size}
        try:
            self.executor.update_parameters(**parameters | options)
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise BitbyteError(f"--queue: {' '.join(str(error).split())[:300]}") from None

    def start(self, n: int) -> None:
        snapshot = str(self.grid.snapshot)
        try:
            jobs = self.executor.map_array(cells.work, [snapshot] * n)
        except Exception as error:  # submitit's FailedJobError, which has the words of sbatch
            raise RunError(f"sbatch: {' '.join(str(error).split())[:500]}") from error
        self.ids += [job.job_id for job in jobs]

    def live(self) -> int:
        if not self.ids:
            return 0
        names = ",".join(sorted({name.partition("_")[0] for name in self.ids}))
        done = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={names}"],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        # A job that ended a while ago is an "Invalid job id"; a controller that does not answer
        # says nothing about the jobs.
        if done.returncode and "Invalid job id" not in done.stderr:
            return len(self.ids)
        self.ids = [name for name in self.ids if name in done.stdout.split()]
        return len(self.ids)

    def stop(self) -> str:
        names = " ".join(sorted({name.partition("_")[0] for name in self.ids}))
        return f"the jobs go on; the same command watches them, scancel {names} ends them"

    def problem(self) -> str:
        return f"see the logs in {shown(self.grid.folder / 'logs')}"


class Ray:
    """Tasks of Ray: on the cluster of $RAY_ADDRESS, else on a Ray of this machine's own."""

    def __init__(self, grid: Grid, size: int, options: dict):
        self.ray = _engine_module("ray", "ray")
        self.grid, self.size, self.tasks = grid, size, []
        root = str(artifacts().absolute())
        try:
            self.ray.init(
                address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="error",
                runtime_env={"env_vars": {"BITBYTE_ARTIFACTS": root}},
            )  # fmt: skip
        except Exception as error:  # a plain one, if its processes do not start in time
            raise RunError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from error
        try:
            self.remote = self.ray.remote(cells.work).options(**{"max_retries": 0} | options)
        except (TypeError, ValueError) as error:
            raise BitbyteError(f"--queue: {' '.join(str(error).split())[:300]}") from None

    def start(self, n: int) -> None:
        self.tasks += [self.remote.remote(str(self.grid.snapshot)) for _ in range(n)]

    def live(self) -> int:
        if self.tasks:
            self.tasks = self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)[1]
        return len(self.tasks)

    def stop(self) -> str:
        self.ray.shutdown()  # ends its tasks, with a Ray of this machine's own
        return "stopped; the same command continues"

    def problem(self) -> str:
        return "see the logs of Ray, by default in /tmp/ray/session_latest/logs"


ENGINES: dict[str, Callable] = {"local": Local, "slurm": Slurm, "ray": Ray}


def _engine_module(name: str, extra: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BitbyteError(f'{name} is missing: pip install "bitbyte[{extra}]"') from None


def engine_for(on: str, grid: Grid, options: dict[str, str]) -> Engine:
    """The engine that ``--on`` names: local, local:4, slurm, slurm:16, ray, ray:8."""
    match = re.fullmatch(r"(local|slurm|ray)(?::([1-9][0-9]{0,3}))?", on)
    if not match:
        raise BitbyteError(f"no engine {on!r}; choose local, slurm or ray, or local:4 for four")
    size = min(MOST_WORKERS, len(grid.cells)) if match[1] != "local" else 1
    plain = {name: _plain(text) for name, text in options.items()}
    return ENGINES[match[1]](grid, int(match[2] or size), plain)


def _plain(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def run_grid(
    grid: Grid, on: str = "local", options: dict[str, str] | None = None, *, wait: bool = True,
    poll: float = 1.0, watch: Watch | None = None, show: Callable | None = None,
) -> list[State]:  # fmt: skip
    """Do the grid's open cells, and give those that failed another try; what became of all.

    ``on`` and ``options`` choose the engine and its parameters.  Without ``wait`` the jobs are
    submitted, and that is all.  ``show(states)`` is called about every ``poll`` seconds.

    Raises BitbyteError before anything starts, and RunError if workers do not work.  A cell that
    fails raises nothing.
    """
    if not wait and on.partition(":")[0] != "slurm":
        raise BitbyteError(f"jobs on {on} end with this command; --no_wait is for slurm")
    grids.save_grid(grid)
    engine = engine_for(on, grid, options or {})
    watch, tries, before = watch or Watch(), 0, None
    for cell in grid.cells:
        claims.retry(cell)
    try:
        while True:
            for cell in grid.cells:
                watch.reclaim(cell)
            states = states_of(grid)
            if show:
                show(states)
            counts = {state: sum(s.state == state for s in states) for state in ORDER}
            if not counts["waiting"] and not counts["running"]:
                return states
            free = engine.size - engine.live() if counts["waiting"] else 0
            if free > 0:
                seen = [claims.newest_claim(cell)[0] for cell in grid.cells]
                tries = tries + 1 if seen == before else 0
                if tries >= TRIES:
                    raise RunError(f"the workers on {on} do nothing: {engine.problem()}")
                before = seen
                engine.start(min(free, counts["waiting"]))
            if not wait:
                return states
            time.sleep(poll)
    except BaseException as error:
        note = engine.stop()
        if isinstance(error, KeyboardInterrupt):
            say(note)
        raise
    finally:
        if isinstance(engine, Ray):
            engine.ray.shutdown()


def states_of(grid: Grid) -> list[State]:
    """What is known of every cell."""
    return [claims.state_of(cell) for cell in grid.cells]


# --- the table

ORDER = ("running", "failed", "done", "waiting")  # of rows where not all fit


def summary(grid: Grid, states: list[State]) -> str:
    """How far a grid is, in one line."""
    counts = {state: sum(s.state == state for s in states) for state in ORDER}
    parts = [f"{counts['done']} of {len(states)} done"]
    parts += [f"{counts[s]} {s}" for s in ("running", "failed", "waiting") if counts[s]]
    for is_bound in (False, True):  # a bound says nothing about the order of costs
        known = [s for s in states if s.state == "done" and s.bpb is not None]
        known = [s for s in known if s.is_bound == is_bound]
        if known:
            best = min(known, key=lambda s: s.bpb or 0)
            parts.append(f"best {best.bpb_text} ({words(best)})")
    left = seconds_left(states)
    if left is not None:
        parts.append(f"about {clock(left)} left")
    return f"{shown(grid.name)}: {', '.join(parts)}"


def words(state: State) -> str:
    """A cell by its parameters."""
    return ", ".join(f"{k} {v}" for k, v in state.cell.parameters.items()) or state.cell.label


def seconds_left(states: list[State]) -> float | None:
    """Estimated seconds until all is done, with as many workers as now; None if unknown."""
    took = sorted(s.seconds for s in states if s.state == "done" and s.seconds is not None)
    running = [s for s in states if s.state == "running"]
    if not took or not running:
        return None
    cells_left = sum(s.state == "waiting" for s in states)
    cells_left += sum(1 - (s.progress or 0) for s in running)
    return took[len(took) // 2] * cells_left / len(running)


def table(grid: Grid, states: list[State], rows: int | None = None) -> str:
    """The cells as a text table, at most ``rows`` of them: first what runs and what has failed."""
    axes = list(dict.fromkeys(name for s in states for name in s.cell.parameters))
    head = (*axes, "state", "BPB", "trained", "time", "host", "")
    chosen = list(states)
    if rows is not None and len(states) > rows:
        first = sorted(range(len(states)), key=lambda i: (ORDER.index(states[i].state), i))
        chosen = [states[i] for i in sorted(first[:rows])]
    body = []
    for s in chosen:
        share = "" if s.progress is None or s.state == "done" else f" {s.progress:.0%}"
        seen = "" if s.bytes_seen is None else f"{s.bytes_seen / 1e6:.1f} MB"
        body.append((
            *(str(s.cell.parameters.get(name, "")) for name in axes), s.state + share,
            s.bpb_text, seen,
            "" if s.seconds is None else clock(s.seconds), s.where, (s.error or "")[:60],
        ))  # fmt: skip
    kept = [tuple(printable(cell.encode("utf-8", "replace")) for cell in row) for row in body]
    lines = [text_table([head, *kept], right={"BPB", "trained", "time"})]
    if len(chosen) < len(states):
        lines.append(f"... and {len(states) - len(chosen)} more")
    return "\n".join(lines)


class Screen:
    """Shows a grid on standard error: redrawn on a terminal, else a line for every change."""

    def __init__(self, grid: Grid):
        self.grid, self.terminal = grid, sys.stderr.isatty()
        self.lines, self.last = 0, {}

    def __call__(self, states: list[State]) -> None:
        if self.terminal:
            size = shutil.get_terminal_size()
            text = table(self.grid, states, max(LEAST_ROWS, size.lines - 6))
            lines = [*text.splitlines(), "", summary(self.grid, states)]
            up = f"\x1b[{self.lines}A" if self.lines else ""
            body = "".join(f"\x1b[2K{line[: size.columns - 1]}\n" for line in lines)
            print(f"{up}\r{body}\x1b[J", end="", file=sys.stderr, flush=True)
            self.lines = len(lines)
            return
        for s in states:
            if self.last.get(s.cell.key, "waiting") != s.state:
                about = f", {s.bpb_text} BPB" if s.bpb_text and s.state == "done" else ""
                about += f": {s.error}" if s.error and s.state == "failed" else ""
                done = sum(other.state == "done" for other in states)
                say(f"[{done}/{len(states)}] {shown(words(s))}: {s.state}{shown(about)}")
            self.last[s.cell.key] = s.state


def as_document(grid: Grid, states: list[State]) -> dict:
    """The state of a grid as JSON."""
    return {
        "name": grid.name, "folder": str(grid.folder), "notebook": grid.notebook,
        "cells": [
            {
                "key": s.cell.key, "parameters": s.cell.parameters, "state": s.state, "bpb": s.bpb,
                "kind": s.kind, "seconds": s.seconds, "bytes_seen": s.bytes_seen, "error": s.error,
                "folder": str(s.cell.folder),
            }
            for s in states
        ],
    }  # fmt: skip


def raise_failures(states: list[State]) -> None:
    """Raise RunError if cells have failed: how many, why the first, and where its log is."""
    failed = [s for s in states if s.state == "failed"]
    if failed:
        log = Path(failed[0].cell.folder, "log.txt")
        raise RunError(
            f"{len(failed)} of {len(states)} cells failed; {words(failed[0])}: {failed[0].error} "
            f"({shown(log)}); the same command tries them again"
        )
