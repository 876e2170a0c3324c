"""Who works on which cell of a grid: claims, on one machine or many, without a server.

A cell is done once its folder has ``record.json``, which appears whole or not at all.  Until then
its newest *claim* says who works on it: ``claim-0001.json``, ``claim-0002.json``, and so on.
Claims are only ever added, by creating the file of the next number, which succeeds for one of
several processes; so nobody can remove another's claim by mistake.

A worker holds the lock of the cell's folder while it works, and renews its claim every few seconds.
On one machine a free lock shows at once that a worker is gone.  Locks of other machines are not
always seen: there a claim that is not renewed for a while, by the clock of whoever watches, counts
as abandoned.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from bitbyte.evaluate.records import check_record
from bitbyte.files import (
    BitbyteError,
    folder_lock,
    output_folder,
    patiently,
    read_json,
    shown,
    to_json,
    wrong_fields,
)
from bitbyte.workbench.grid import Cell

BEAT = 10.0  # seconds between two renewals of a claim
SILENCE = 120.0  # seconds without one, after which a claim of another machine is abandoned
DEATHS = 3  # workers that may die over a cell, before it counts as failed
CLAIM = {  # fields of a claim
    "state": (str,), "deaths": (int,), "machine": (str,), "host": (str,), "pid": (int,),
    "beat": (int,), "time": (int, float), "error": (str, type(None)),
}  # fmt: skip
CLAIM_NAME = re.compile(r"claim-([0-9]+)\.json")
STATES = ("running", "waiting", "failed")  # of a claim; a cell without one is waiting


@cache
def machine() -> str:
    """A unique name of this machine: of one kernel, whose processes see each other's locks."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}-{uuid.getnode():x}"


def newest_claim(cell: Cell) -> tuple[int, dict | None]:
    """(number, content) of a cell's newest claim; (0, None) if nobody claimed it yet."""
    paths = {
        int(match[1]): path
        for path in cell.folder.glob("claim-*")
        if (match := CLAIM_NAME.fullmatch(path.name))  # not a copy that a file server made
    }
    if not paths:
        return 0, None
    number, path = max(paths.items())
    value = read_json(path, plain=True)
    if wrong_fields(value, CLAIM) or value["state"] not in STATES:
        raise BitbyteError(f"{shown(path)} is not a claim of bitbyte grid; remove it")
    return number, value


def _claim_path(cell: Cell, number: int) -> Path:
    return cell.folder / f"claim-{number:04d}.json"


def _note(state: str, deaths: int = 0, error: str | None = None, beat: int = 0) -> dict:
    return {
        "state": state, "deaths": deaths, "machine": machine(), "host": socket.gethostname(),
        "pid": os.getpid(), "beat": beat, "time": time.time(), "error": error,
    }  # fmt: skip


def _put(path: Path, value: dict, *, new: bool) -> bool:
    """Write a claim, whole or not at all; with ``new`` False if the name is already taken."""
    temporary = path.with_name(f".claim-{uuid.uuid4().hex}")
    temporary.write_bytes(to_json(value))
    try:
        if not new:
            patiently(os.replace, temporary, path)
            return True
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with open(path, "xb") as file:
                    file.write(to_json(value))
            except FileExistsError:
                return False
        return True
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Claim:
    """A claim on a cell while this process works on it: a context, renewed by a thread."""

    def __init__(self, cell: Cell, number: int, deaths: int):
        self.cell, self.number, self.deaths = cell, number, deaths
        self.lost = threading.Event()  # somebody else has taken the cell over
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self.end = _note("waiting", deaths)  # what the claim says when this is over

    def __enter__(self) -> "Claim":
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._over.set()
        self._thread.join()
        if not self.lost.is_set():
            _put(_claim_path(self.cell, self.number), self.end, new=False)

    def fail(self, error: str) -> None:
        """Let the cell count as failed."""
        self.end = _note("failed", self.deaths, error)

    def _renew(self) -> None:
        for beat in itertools.count(1):
            if self._over.wait(BEAT):
                return
            with contextlib.suppress(OSError):  # a full disk, a server that is away for a minute
                if _claim_path(self.cell, self.number + 1).exists():
                    return self.lost.set()
                note = _note("running", self.deaths, beat=beat)
                _put(_claim_path(self.cell, self.number), note, new=False)


def is_done(cell: Cell) -> bool:
    """Whether a cell has its record."""
    return (cell.folder / "record.json").is_file()


@contextlib.contextmanager
def taken(cell: Cell) -> Iterator[Claim | None]:
    """Claim a cell that is waiting, for the duration of the block; None if it cannot be claimed."""
    if is_done(cell):
        yield None
        return
    output_folder(cell.folder)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(cell.folder))
        except BitbyteError:  # somebody works on it
            yield None
            return
        if (claim := _claim(cell)) is None:
            yield None
            return
        yield stack.enter_context(claim)


def _claim(cell: Cell) -> Claim | None:
    """Claim a cell whose lock this process holds."""
    number, last = newest_claim(cell)
    if last and last["state"] == "running" and last["machine"] == machine():
        last, number = _bury(cell, number, last), number + 1  # or it would hold the lock
    if last and last["state"] != "waiting":
        return None
    deaths = last["deaths"] if last else 0
    new = _put(_claim_path(cell, number + 1), _note("running", deaths), new=True)
    if not new or is_done(cell):  # done between the first look and this claim
        return None
    return Claim(cell, number + 1, deaths)


def retry(cell: Cell) -> None:
    """Let a failed cell wait again."""
    number, last = newest_claim(cell)
    if last and last["state"] == "failed" and not is_done(cell):
        _put(_claim_path(cell, number + 1), _note("waiting"), new=True)


class Watch:
    """Watches claims, to find those that are no longer renewed."""

    def __init__(self, silence: float = SILENCE, clock: Callable[[], float] = time.monotonic):
        self.silence, self.clock = silence, clock
        self._seen: dict[str, tuple] = {}  # cell: (claim, renewal, when it was first seen)

    def reclaim(self, cell: Cell) -> None:
        """Let a cell wait again whose claim is abandoned; too often, and it has failed."""
        number, last = newest_claim(cell)
        if last is None or last["state"] != "running" or is_done(cell):
            return
        if last["machine"] != machine():
            now, seen = self.clock(), (number, last["beat"])
            before = self._seen.get(cell.key)
            if before is None or before[0] != seen:
                self._seen[cell.key] = (seen, now)
            elif now - before[1] >= self.silence:
                _bury(cell, number, last)
            return
        with contextlib.suppress(BitbyteError), folder_lock(cell.folder):  # else it is at work
            number, last = newest_claim(cell)  # it may have ended since
            if last and last["state"] == "running" and not is_done(cell):
                _bury(cell, number, last)


def _bury(cell: Cell, number: int, last: dict) -> dict:
    """Add the claim after that of a worker that is gone; returns its content."""
    deaths = last["deaths"] + 1
    note = _note("waiting", deaths)
    if deaths >= DEATHS:
        error = f"its worker died {deaths} times (out of memory, or killed)"
        note = _note("failed", deaths, error)
    _put(_claim_path(cell, number + 1), note, new=True)
    return note


# --- what is known of a grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What is known of a cell."""

    cell: Cell
    state: str  # done, running, waiting or failed
    bpb: float | None  # of its record; while it runs, the newest of its training
    kind: str | None  # of that number, see `scoring.KINDS`; None while it runs
    seconds: float | None  # it took, or takes so far
    bytes_seen: int | None
    progress: float | None  # share of the training that is done
    where: str  # host that works on it
    error: str | None

    @property
    def is_bound(self) -> bool:
        return self.kind == "upper_bound"

    @property
    def bpb_text(self) -> str:
        """``bpb`` to four digits, with "<= " if it is a bound; "" if it is not known."""
        return "" if self.bpb is None else f"{'<= ' * self.is_bound}{self.bpb:.4f}"


def state_of(cell: Cell) -> State:
    """What the folder of a cell says about it.  Raises BitbyteError on a malformed file."""
    if is_done(cell):
        record = read_json(cell.folder / "record.json", plain=True)
        check_record(record, str(cell.folder / "record.json"))
        about = record.get("grid") if isinstance(record, dict) else None
        if wrong := wrong_fields(about, {"key": (str,), "parameters": (dict,),
                                         "seconds": (int, float), "host": (str,)}):  # fmt: skip
            raise BitbyteError(f"{cell.folder / 'record.json'} is not of a grid: {wrong}")
        return State(
            cell=cell, state="done", bpb=record.get("bpb"), kind=record.get("kind"),
            seconds=about["seconds"], bytes_seen=record.get("bytes_seen"), progress=1.0,
            where=about["host"], error=None,
        )  # fmt: skip
    _, claim = newest_claim(cell)
    state = claim["state"] if claim else "waiting"
    row, progress = {}, None
    if state == "running":
        row, progress = _running(cell)
    return State(
        cell=cell, state=state, bpb=row.get("bpb"), kind=None, seconds=row.get("seconds"),
        bytes_seen=row.get("bytes"), progress=progress,
        where=claim["host"] if claim and state == "running" else "",
        error=claim["error"] if claim else None,
    )  # fmt: skip


def _running(cell: Cell) -> tuple[dict, float | None]:
    """(last row of the metrics, share of the budget) of a training that is under way."""
    try:
        with open(cell.folder / "run" / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            row = json.loads(file.read().split(b"\n")[-2])
    except (OSError, ValueError, IndexError):
        return {}, None
    steps, minutes = cell.fields.get("steps"), cell.fields.get("minutes")
    with contextlib.suppress(TypeError, KeyError):
        if minutes:
            return row, min(1.0, row["seconds"] / 60 / minutes)
        if steps or not cell.fields.get("epochs"):
            return row, min(1.0, row["step"] / (steps or 200))
    return row, None
