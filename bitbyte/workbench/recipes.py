"""Artifacts by recipe: describe what you want and get its folder, made if absent, else reused.

Notebooks get the data and runs of earlier notebooks here, so that each of them also works alone on
a clean checkout.  A folder is named by a hash of everything that went into it.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from bitbyte import checkpoint, shards
from bitbyte.config import OPERATIONAL, TrainConfig, config_to_dict
from bitbyte.data import corpora, pack
from bitbyte.files import BitbyteError, artifacts, user_path
from bitbyte.runs import latest_step, resolve
from bitbyte.train import train

EVERY = 2.0  # seconds between two looks at runs that are being trained


def dataset(corpus: str = "stories", *, n_bytes: int = 2_000_000, seed: int = 0) -> Path:
    """Packed folder of a corpus: built-in name, file or folder.

    Files are identified by path, size and modification time, so an edited file is packed again.
    Relative paths are relative to the folder that holds ``artifacts``.
    """
    if corpus in corpora.BUILT_IN:
        key: list = [corpus, n_bytes, seed]
        source = corpus
    else:
        source = str(_project() / user_path(corpus))
        if not Path(source).exists():
            names = ", ".join(corpora.BUILT_IN)
            raise BitbyteError(f"there is no {source}; corpus is a path, or {names}")
        key = [corpora.stamp(Path(source))]
    documents, facts = corpora.open_corpus(source, n_bytes=n_bytes, seed=seed)
    key += [shards.FORMAT, facts]
    folder = artifacts("datasets", f"{facts['name']}-{_hash(key)}")
    if not (folder / shards.MANIFEST).exists():
        most = n_bytes if corpus == "stdlib" else None  # stories are made in this size
        pack.pack(
            documents, folder, sep_byte=facts.get("sep_byte"), source=facts, progress=False,
            max_bytes=most,
        )  # fmt: skip
    return folder


def trained(data: Path, on_step: Callable | None = None, **choices) -> Path:
    """Run folder of a finished training run on ``data``; keywords are fields of TrainConfig.

    A run that was stopped midway is resumed.  ``minutes=0`` means to train by ``steps``.
    """
    run, choices = _planned(data, choices)
    step = latest_step(run) if run.is_dir() else None
    if finished(run):
        return run
    if step is not None:
        choices = {"resume": True, "threads": choices.get("threads")}
    elif run.is_dir():
        choices["allow_overwrite"] = True  # it has saved nothing yet
    fields = {"data": str(data), "progress": False, "out": str(run), **choices}
    with _progress({run.name: run}):
        train(TrainConfig(**fields), on_step)
    return run


def all_trained(data: Path, runs: dict[str, dict], **common) -> dict[str, Path]:
    """Run folders of several training runs by name: `trained` with ``common`` and own fields.

    On a CPU missing runs are trained side by side, each in its own process with its share of the
    threads, as tiny models gain little from more than one.  With CUDA they run one by one.
    """
    choices = {name: common | own for name, own in runs.items()}
    planned = {_planned(data, choices[name])[0]: name for name in runs}  # two may be the same run
    missing = {name: folder for folder, name in planned.items() if not finished(folder)}
    n_workers = min(len(missing), os.cpu_count() or 1)
    if n_workers > 1 and not torch.cuda.is_available():
        share = {"threads": max(1, torch.get_num_threads() // n_workers)}
        context = multiprocessing.get_context("spawn")  # fork does not mix with PyTorch's threads
        # When interrupted outside of `train` (which would save), workers end without a traceback.
        quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
        with _progress(missing), ProcessPoolExecutor(n_workers, context, **quiet) as pool:
            for i in range(0, len(missing), n_workers):  # no job is queued if the user interrupts
                some = list(missing)[i : i + n_workers]
                jobs = [pool.submit(trained, data, **share | choices[name]) for name in some]
                for job in jobs:
                    job.result()
    return {name: trained(data, **choices[name]) for name in runs}


@contextlib.contextmanager
def _progress(runs: dict[str, Path]):
    """In a notebook, show how far these runs are while they are trained; the cell is left empty.

    nbval, which compares what cells wrote, does not know that it was cleared; BITBYTE_PROGRESS=0
    is for such readers.
    """
    if "ipykernel" not in sys.modules or os.environ.get("BITBYTE_PROGRESS") == "0":
        yield
        return
    from IPython.display import clear_output

    done = threading.Event()

    def show() -> None:
        shown = False
        while not done.wait(EVERY):
            clear_output(wait=True)
            print("\n".join(f"{name}: {_state(run)}" for name, run in runs.items()), flush=True)
            shown = True
        if shown:
            clear_output()

    watch = threading.Thread(target=show, daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def _state(run: Path) -> str:
    """How far a run is, in words, from what it has logged."""
    rows = checkpoint.read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    if not rows:
        return "beginning"
    if finished(run):
        return "done"
    cost = next((rows[-1][key] for key in ("bpb", "masked_bpb") if rows[-1].get(key)), None)
    return f"step {rows[-1]['step']:,}" + (f", {cost:.3f} bits per byte" if cost else "")


def output(kind: str) -> Path:
    """Folder for a notebook's output: in the batch run that executes it, else in runs/notebooks.

    ``kind`` is "figures" or "results".
    """
    folder = Path(os.environ.get("BITBYTE_RUN") or artifacts("runs", "notebooks")) / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def within(value: float, expected: float | None, tolerance: float) -> str:
    """A value that results from training, as text: "3.453 (expected 3.49 +- 0.08: ok)".

    Another CPU or torch version changes the last digits, so the comparison of stored outputs skips
    the number in text of this form (tests/nbval_sanitize.cfg), and a value that is too far off
    raises AssertionError here.  ``expected`` None (settings other than the notebook's own) shows
    just the value.
    """
    if expected is None:
        return _shown(value)
    if not math.isclose(value, expected, rel_tol=0, abs_tol=tolerance):
        raise AssertionError(f"{_shown(value)} is not within {tolerance} of {expected}")
    return f"{_shown(value)} (expected {expected} +- {tolerance}: ok)"


def at_most(value: float, limit: float) -> str:
    """A value that may not exceed ``limit``, as `within`: "0.0003 (at most 0.01: ok)"."""
    if not value <= limit:
        raise AssertionError(f"{_shown(value)} is more than {limit}")
    return f"{_shown(value)} (at most {limit}: ok)"


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _planned(data: Path, choices: dict) -> tuple[Path, dict]:
    """Run folder of a recipe, and its fields of TrainConfig."""
    choices = {key: value for key, value in choices.items() if value or key != "minutes"}
    if "minutes" in choices:
        choices.pop("steps", None)
    config = TrainConfig(data=str(data), progress=False, **choices)
    windows = shards.open_dataset(data, 1, split="train")
    config = config.with_prior(windows.n_bytes)
    name = f"{config.family}-{config.preset}-{config.linear}"
    key = _hash(identity(config, windows.fingerprint))
    return artifacts("checkpoints", f"{name}-{key}"), choices


def identity(config: TrainConfig, data: str) -> list:
    """All that makes a training run, for a hash; ``data`` is the fingerprint of its bytes."""
    shape = config_to_dict(config.model_config())  # the same if spelled out or by default
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in OPERATIONAL}
    fields = {k: v for k, v in fields.items() if k != "preset"} | shape
    budget = [config.steps, config.minutes, config.epochs, config.batch_size, config.grad_accum]
    return [data, fields, budget]


def finished(run: Path) -> bool:
    """Whether a run folder holds a run that has used up its budget."""
    if not run.is_dir() or latest_step(run) is None:
        return False
    return checkpoint.read_meta(resolve(run))["extra"]["finished"]


def _project() -> Path:
    return artifacts().absolute().parent


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
