"""The run folder: its steps, ``latest`` and ``best``, and the metrics log.

RUN/step_0000100/ holds one saved step (`checkpoint` writes and reads its files); RUN/latest and
RUN/best are small text files that name a step; RUN/metrics.jsonl has one JSON object per logged
step; RUN/prior.safetensors has the counted n-gram tables that a model reads in training.
Writers hold the lock of the run folder (`files.folder_lock`); readers need none.
"""

import contextlib
import difflib
import errno
import functools
import importlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitbyte.files import (
    JSON_LIMIT,
    BitbyteError,
    artifacts,
    lock_handle,
    parse_json,
    patiently,
    plain_only,
    remove_folder,
    user_path,
    write_atomic,
)
from bitbyte.process import say

PACKED = ".bbm"  # the suffix of packed models
META = "meta.json"  # in every step folder; written last
STEP_FILES = {META, "model.safetensors", "optim.safetensors"}
POINTERS = ("latest", "best")
PRIOR = "prior.safetensors"  # the tables that a run reads in training
FILES = (*POINTERS, "metrics.jsonl", "run.json", PRIOR)  # of a run folder
LEFT_OVER = re.compile(  # temporary files and folders that a killed process leaves
    r"\.tmp-(?:step_[0-9]{7,18}|latest|best|metrics\.jsonl|run\.json|prior\.safetensors)-[0-9]+"
    r"|\.trash-step_[0-9]{7,18}-[0-9]+"
)
TRACKERS = {  # name: module
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
BESIDE = re.compile(  # other names in a run folder: made by a run, by `clean`, or to stop the run
    r"\.lock|STOP|profile|damaged-step_[0-9]{7,18}-[0-9]+|"
    + "|".join([LEFT_OVER.pattern, *TRACKERS])
)


def run_name(config) -> str:
    """Name of a new run of a training config: time and kind of model."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{config.family}-{config.preset}-{config.linear}"


def refuse_used(run: Path) -> None:
    """Raise BitbyteError unless a new run can start in ``run``.

    It can if the folder is missing, empty, or holds only a failed run that saved no step.
    """
    paths = list(run.iterdir()) if run.is_dir() else [run] * run.exists()
    saved = any(step_of(path.name) is not None for path in paths)
    failed = is_run(run) and not (saved or strangers(run) or in_use(run))
    if not failed and any(path.name != ".lock" for path in paths):
        raise BitbyteError(f"{run} exists; choose another --out, or --resume, or --allow_overwrite")


def in_use(run: Path) -> bool:
    """Whether a process holds the lock of the run folder, that is, is training there."""
    try:
        # For writing, else NFS does not lock; a run of someone else's can only be read.
        path = Path(run) / ".lock"
        handle = plain_only(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    except (BitbyteError, OSError):  # a trainer could not have opened it either
        return False
    try:
        lock_handle(handle)  # released at once, by close
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def is_packed(path: Path) -> bool:
    """Whether a path names a packed model, see `packed`."""
    return path.suffix == PACKED and path.is_file()


def zoo() -> list[Path]:
    """Folders of packed models that `resolve` finds by name: own, of a clone, of the package."""
    here = Path(__file__).parent
    return [artifacts("models"), here.parent / "artifacts" / "models", here / "zoo"]


def short_name(run: str | Path) -> str:
    """A run's or packed model's bare name if `resolve` finds it by that, else its path."""
    place = Path(run).resolve()
    if is_packed(place):
        return place.stem if place.parent in (z.resolve() for z in zoo()) else str(run)
    return Path(run).name if place.parent == artifacts("checkpoints").resolve() else str(run)


def model_name(found: Path) -> str:
    """The name of the run, or of the packed model, that `resolve` has found."""
    return found.stem if is_packed(found) else found.resolve().parent.name


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:07d}"


def step_of(name: str) -> int | None:
    """The step that a folder of this name holds; None if it is not the name of a step folder."""
    match = re.fullmatch(r"step_([0-9]{7,18})", name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def read_plain_json(path: Path) -> tuple[bytes, Any]:
    """(bytes, value) of a JSON file.  Raises BitbyteError if it is missing or malformed."""
    file_size(path)
    with open(path, "rb") as file:
        raw = file.read(JSON_LIMIT + 1)
    return raw, parse_json(raw, str(path))


def file_size(path: Path) -> int:
    """Size of a file in bytes.  Raises BitbyteError if it is missing or not a plain file."""
    try:
        info = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise BitbyteError(f"{path} is missing: the checkpoint is incomplete") from None
    if not stat.S_ISREG(info.st_mode):
        raise BitbyteError(f"{path} is not a plain file")
    return info.st_size


def read_facts(run: Path) -> dict:
    """The content of run.json: of the first start, with a list "resumed" of later ones, if any.

    Raises BitbyteError if it is missing, malformed, or not what a run writes.
    """
    path = Path(run) / "run.json"
    facts = read_plain_json(path)[1]
    later = facts.get("resumed", []) if isinstance(facts, dict) else None
    if not isinstance(later, list) or not all(isinstance(start, dict) for start in later):
        raise BitbyteError(f"{path} is not what a bitbyte run wrote; move it away")
    return facts


def complete_steps(run: Path) -> list[int]:
    """Steps in ``run`` that have a meta.json that parses, ascending."""
    steps = []
    for folder in Path(run).iterdir() if Path(run).is_dir() else ():
        step, meta = step_of(folder.name), folder / META
        with contextlib.suppress(BitbyteError, FileNotFoundError, NotADirectoryError):
            if step is not None:
                info = meta.lstat()
                if _is_object(meta, (info.st_ino, info.st_size, info.st_mtime_ns)):
                    steps.append(step)
    return sorted(steps)


@functools.lru_cache(1 << 16)
def _is_object(path: Path, _) -> bool:
    """Whether a file holds a JSON object; remembered, as every save asks for all steps."""
    return isinstance(read_plain_json(path)[1], dict)


def read_pointer(run: Path, name: str) -> int | None:
    """The step that ``latest`` or ``best`` names; None without that file."""
    path = Path(run) / name
    if not path.exists():
        return None
    with open(path, "rb", opener=plain_only) as file:
        step = step_of(file.read(100).decode("ascii", "replace").strip())
    if step is None:
        raise BitbyteError(f"{path} does not name a step; delete it")
    return step


def set_pointer(run: Path, name: str, step: int) -> None:
    """Point ``latest`` or ``best`` to an existing step."""
    if name not in POINTERS or not (Path(run) / step_name(step) / META).exists():
        raise AssertionError(f"{name} cannot point to step {step} of {run}")
    write_atomic(Path(run) / name, f"{step_name(step)}\n".encode())


def valid_pointer(run: Path, name: str) -> int | None:
    """As `read_pointer`, but None if the file is broken."""
    with contextlib.suppress(BitbyteError):
        return read_pointer(run, name)
    return None


def latest_step(run: Path) -> int | None:
    """The newest complete step, with a note on stderr if ``latest`` names another one."""
    steps = complete_steps(run)
    if not steps:
        return None
    named = valid_pointer(run, "latest")
    if named != steps[-1]:
        text = "nothing" if named is None else f"step {named}"
        say(f"{Path(run) / 'latest'} names {text}; using the newest complete step, {steps[-1]}")
    return steps[-1]


def resolve(path: str | Path, *, best: bool = False) -> Path:
    """The step folder meant by a run, RUN/best, RUN/latest, a step folder, or a run's bare name.

    A run means its latest step, or with ``best`` its best.  If the path does not exist, or is not
    a run (a folder of texts, say), it is looked up in artifacts/checkpoints.  The path or name of a
    packed model gives its file.  Raises BitbyteError that says what was found.
    """
    asked, problem = user_path(path), f"no checkpoint {str(path)!r} here"
    for place in (asked, artifacts("checkpoints") / asked):
        if (place / META).exists() or is_packed(place):
            return place
        run, pointer = place, "best" if best else "latest"
        if place.name in POINTERS and not place.is_dir():
            run, pointer = place.parent, place.name
        if is_run(run):
            return _step_folder(run, pointer)
        if run.is_dir() and step_of(run.name) is not None:
            raise BitbyteError(f"{run} is incomplete: it has no {META}; use another step")
        if run.is_dir():
            problem = f"{run} holds no complete checkpoint"
        elif run.exists():
            problem = f"{run} is a file; give a run or step folder, or a packed model (*{PACKED})"
    for place in [folder / f"{asked}{PACKED}" for folder in zoo()]:
        if is_packed(place):
            return place
    raise BitbyteError(f"{problem}; {_nearest(asked)}")


def is_run(folder: Path) -> bool:
    """Whether anything in ``folder`` has a name that `train` uses in a run folder."""
    return folder.is_dir() and bool(_named(folder))


def _step_folder(run: Path, pointer: str) -> Path:
    if pointer == "latest":
        step = latest_step(run)
        if step is None:
            raise BitbyteError(f"{run} holds no complete checkpoint")
        return run / step_name(step)
    step, steps = read_pointer(run, pointer), complete_steps(run)
    if step in steps:
        return run / step_name(step)
    held = ", ".join(map(step_name, steps[-5:])) or "no complete step"
    problem = f"no {pointer!r}" if step is None else f"a {pointer!r} that names missing step {step}"
    raise BitbyteError(f"{run} has {problem}; it holds {held}")


def _nearest(asked: Path) -> str:
    asked = asked.parent if asked.name in POINTERS else asked
    packed = sorted({path.stem for folder in zoo() for path in folder.glob(f"*{PACKED}")})
    if close := difflib.get_close_matches(asked.name, packed, n=1, cutoff=0.7):
        return f"did you mean {close[0]}? (bitbyte models)"
    known = artifacts("checkpoints") / asked.parent
    for place in (known, asked.parent):
        folders = sorted(p for p in place.iterdir() if p.is_dir()) if place.is_dir() else []
        names = [p.name for p in folders if (p / META).exists() or complete_steps(p)]
        close = difflib.get_close_matches(asked.name, names, n=3, cutoff=0.5)
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 and not close else ""
            return f"in {place} there is: {', '.join(close or names[-5:])}{more}"
    return f"{known} holds none; train one first, or take {' or '.join(packed)}"


def _named(run: Path) -> list[Path]:
    """The entries of a run folder that have a name that `train` uses there."""
    return sorted(p for p in run.iterdir() if p.name in FILES or step_of(p.name) is not None)


def _is_ours(path: Path) -> bool:
    """Whether one of `_named` has the content that a run writes there, and nothing else."""
    if path.is_symlink():
        return False
    try:
        if path.name in POINTERS:
            return read_pointer(path.parent, path.name) is not None
        if path.name == "metrics.jsonl":
            return bool(read_metrics(path.parent)) or path.stat().st_size == 0
        if path.name == PRIOR:
            with open(path, "rb", opener=plain_only) as file:
                head = file.read(4096)
            return b'"codes":' in head and b'"scale":' in head
        if path.name == "run.json":
            about = read_plain_json(path)[1]
            return isinstance(about, dict) and "config" in about
        meta = read_plain_json(path / META)[1]
        files = meta.get("files") if isinstance(meta, dict) else None
        inside = {inner.name for inner in path.iterdir() if not inner.name.startswith(".")}
        return isinstance(files, dict) and inside <= {META, *files}
    except (BitbyteError, OSError):
        return False


def strangers(run: Path) -> list[Path]:
    """The entries of a run folder that no run wrote; an incomplete step counts as a run's."""
    known = [path for path in _named(run) if _is_ours(path) or _is_torn(path)]
    return sorted(p for p in run.iterdir() if p not in known and not BESIDE.fullmatch(p.name))


def _is_torn(path: Path) -> bool:
    """Whether a step folder holds only files of a step, be they incomplete."""
    if step_of(path.name) is None or path.is_symlink() or not path.is_dir():
        return False
    return {inner.name for inner in path.iterdir()} <= STEP_FILES


def prune(run: Path, keep_last: int, protect: Iterable[int] = ()) -> list[int]:
    """Delete all steps but the newest ``keep_last``, ``best`` and ``protect``.

    Returns the deleted steps.  A step folder that holds more than a saved step stays.
    """
    steps = complete_steps(run)
    kept = {*steps[-keep_last:], *protect, valid_pointer(run, "best")}
    return [s for s in steps if s not in kept and remove_step(Path(run) / step_name(s))]


def remove_step(folder: Path) -> bool:
    """Delete a saved step; False, with a note, for a link or a folder that holds more than that."""
    if not _is_ours(folder):
        say(f"{folder} is a link, or holds more than a saved step; leaving it as it is")
        return False
    remove_folder(folder)
    return True


def clean(run: Path) -> None:
    """Delete leftovers of killed processes and repair ``latest``.  The caller holds the lock.

    STOP is deleted too: it was meant for an earlier process.  An incomplete step folder is moved
    aside, as its name will be needed again.  In a folder that no run has written to, only files
    with the exact name of a temporary file are touched, and an empty STOP.
    """
    run = Path(run)
    for path in [*run.glob(".tmp-*"), *run.glob(".trash-*")]:
        if not LEFT_OVER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    is_run, stop = any(map(_is_ours, _named(run))), run / "STOP"
    if stop.is_file() and (is_run or not stop.stat().st_size):
        stop.unlink()
    if not is_run:
        return
    _refuse_stop(run)
    complete = complete_steps(run)
    for folder in sorted(run.iterdir()):
        if step_of(folder.name) not in (None, *complete):
            aside = folder.with_name(f"damaged-{folder.name}-{time.time_ns()}")
            say(f"{folder} is incomplete; moving it to {aside.name}")
            patiently(os.rename, folder, aside)
    newest = latest_step(run)
    if newest is not None and newest != valid_pointer(run, "latest"):
        set_pointer(run, "latest", newest)


def _refuse_stop(run: Path) -> None:
    # A STOP that no earlier process was meant to see would stop the next one, which deletes it.
    if (run / "STOP").exists():
        raise BitbyteError(
            f"{run / 'STOP'} is in the way: training stops when it sees a file of that name, and "
            "deletes it; move it away, or choose another --out"
        )


def remove_run(run: Path) -> None:
    """Delete what bitbyte wrote into ``run``; the lock and all other files stay.

    Raises BitbyteError, with nothing deleted, if something that no run wrote has a name that the
    next run needs.
    """
    _refuse_stop(Path(run))
    named = _named(Path(run))
    for path in named:
        if not _is_ours(path):
            raise BitbyteError(
                f"{path} is in the way: it is not, or not only, what a bitbyte run wrote; move it "
                "away, or choose another --out"
            )
    for path in named:
        if path.name in FILES:
            path.unlink()
        else:
            remove_folder(path)


def append_metrics(run: Path, row: dict) -> None:
    """Append one row to metrics.jsonl in a single write; numbers not finite are logged as null."""
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    line = (json.dumps(plain, allow_nan=False) + "\n").encode()
    path = Path(run) / "metrics.jsonl"
    with open(path, "ab", buffering=0, opener=plain_only) as file:
        size = os.fstat(file.fileno()).st_size
        if file.write(line) != len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _metric_lines(run: Path) -> tuple[list[bytes], list[dict]]:
    path = Path(run) / "metrics.jsonl"
    lines = []
    if os.path.lexists(path):
        with open(path, "rb", opener=plain_only) as file:
            lines = file.read().split(b"\n")[:-1]
    rows = [parse_json(line, f"{path} line {i}") for i, line in enumerate(lines, 1)]
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise BitbyteError(f"{path} line {i}: not a metrics row, which has a step")
    return lines, rows


def read_metrics(run: Path) -> list[dict]:
    """Rows of metrics.jsonl, without a last line that a kill cut short.  Raises BitbyteError."""
    return _metric_lines(run)[1]


def truncate_metrics(run: Path, step: int) -> None:
    """Drop the rows after ``step`` and a partial last line; a resumed run writes them again."""
    lines, rows = _metric_lines(run)
    kept = [line for line, row in zip(lines, rows, strict=True) if row["step"] <= step]
    path = Path(run) / "metrics.jsonl"
    text = b"".join(line + b"\n" for line in kept)
    if path.exists() and path.stat().st_size != len(text):
        write_atomic(path, text)


def tracker_module(name: str):
    """The module of a tracker.  Raises BitbyteError if it is not installed."""
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError:
        raise BitbyteError(
            f"{name} is not installed: pip install 'bitbyte[track]', or drop --tracker"
        ) from None


@contextlib.contextmanager
def tracker(name: str, run: Path, config: dict):
    """Yield a function that sends a row to the tracker ``name``, beside metrics.jsonl."""
    if (run / name).is_symlink():  # it could lead anywhere, see `files.plain_only`
        raise BitbyteError(f"{run / name} is a link; remove it: {name} writes a folder there")
    module = tracker_module(name)
    if name == "wandb":
        session = module.init(
            project="bitbyte", name=run.name, dir=str(run), mode="offline", config=config
        )
        yield lambda row: session.log(row, step=row["step"])
        session.finish()
        return

    def numbers(row: dict) -> dict:
        return {key: value for key, value in row.items() if value is not None and key != "step"}

    if name == "mlflow":
        if "MLFLOW_TRACKING_URI" not in os.environ:
            # MLflow prefers a database; this allows files.
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            module.set_tracking_uri((run / name).absolute().as_uri())
        module.set_experiment("bitbyte")
        with module.start_run(run_name=run.name):
            module.log_params(config)
            yield lambda row: module.log_metrics(numbers(row), step=row["step"])
        return
    with module.SummaryWriter(run / name) as writer:

        def log(row: dict) -> None:
            for key, value in numbers(row).items():
                writer.add_scalar(key, value, row["step"])

        yield log


class Meter:
    """Sums since the last logged row."""

    def __init__(self):
        self.losses, self.norm, self.n_bytes, self.seconds = [], 0.0, 0, 0.0

    def add(self, loss: float, norm: float, n_bytes: int, seconds: float) -> None:
        self.losses.append(loss)
        self.norm = norm
        self.n_bytes += n_bytes
        self.seconds += seconds

    @property
    def loss(self) -> float:
        """Mean loss in nats per byte."""
        return math.fsum(self.losses) / len(self.losses)


def due(step: int, every: int | None) -> bool:
    """Whether something done every ``every`` steps (None: never) is due at ``step``."""
    return bool(every) and step % every == 0


def status(row: dict) -> str:
    """A row of metrics.jsonl as text for the progress bar."""
    names = {"bpb": "bpb", "masked_bpb": "masked", "val_bpb": "val", "val_bound": "val <="}
    parts = [f"{names[key]} {row[key]:.3f}" for key in names if key in row]
    parts.append(f"{row['bytes_per_second'] / 1000:.1f} kB/s")
    if row["memory"]:
        parts.append(f"{row['memory'] / 2**30:.2f} GiB")
    return ", ".join(parts)
