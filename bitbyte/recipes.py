"""Artifacts by recipe: say what is wanted, get the folder; made when absent, reused when present.

The notebooks ask here for the data and the runs of earlier notebooks, so that each of them also
works alone on a clean checkout.  A folder is named by a hash of all that went into it.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from bitbyte import checkpoint, corpora, manifest, models, shards
from bitbyte.config import OPERATIONAL, TrainConfig
from bitbyte.files import BitbyteError, artifacts
from bitbyte.train import train


def dataset(corpus: str = "stories", *, n_bytes: int = 2_000_000, seed: int = 0) -> Path:
    """Packed folder of a corpus: built-in name, file or folder.

    Files are known by path, size and time of change: an edited file is packed anew.  Relative
    paths count from the folder that holds ``artifacts``.
    """
    if corpus in corpora.BUILT_IN:
        key: list = [corpus, n_bytes, seed]
        source = corpus
    else:
        source = str(_project() / Path(corpus).expanduser())
        key = [_stamp(Path(source))]
    documents, facts = corpora.open_corpus(source, n_bytes=n_bytes, seed=seed)
    key += [manifest.FORMAT, facts]
    folder = artifacts("datasets", f"{facts['name']}-{_hash(key)}")
    if not (folder / manifest.MANIFEST).exists():
        shards.pack(documents, folder, sep_byte=facts.get("sep_byte"), source=facts, progress=False)
    return folder


def trained(data: Path, on_step: Callable | None = None, **choices) -> Path:
    """Run folder of a finished training run on ``data``; fields of TrainConfig as keywords.

    A run that was stopped half-way is resumed.  ``minutes=0`` means: by ``steps``.
    """
    choices = {key: value for key, value in choices.items() if value or key != "minutes"}
    if "minutes" in choices:
        choices.pop("steps", None)
    config = TrainConfig(data=str(data), progress=False, **choices)
    identity = shards.open_dataset(data, 1, split="train").fingerprint
    name = f"{config.family}-{config.preset}-{config.linear}"
    shape = models.config_to_dict(config.model_config())  # whether written out or by default
    made_of = {k: v for k, v in dataclasses.asdict(config).items() if k not in OPERATIONAL}
    made_of = {k: v for k, v in made_of.items() if k != "preset"} | shape
    budget = [config.steps, config.minutes, config.epochs, config.batch_size, config.grad_accum]
    key = _hash([identity, made_of, budget])
    run = artifacts("checkpoints", f"{name}-{key}")
    step = checkpoint.latest_step(run) if run.is_dir() else None
    if step is not None:
        meta = checkpoint.read_meta(checkpoint.resolve(run))
        if meta["extra"]["finished"]:
            return run
        choices = {}
    elif run.is_dir():
        choices["allow_overwrite"] = True  # nothing was saved there yet
    again = {"resume": True} if step is not None else {}
    fields = {"data": str(data), "progress": False, "out": str(run), **choices, **again}
    train(TrainConfig(**fields), on_step)
    return run


def output(kind: str) -> Path:
    """Folder for what a notebook makes: below the batch run that executes it, else runs/notebooks.

    ``kind`` is "figures" or "results".
    """
    folder = Path(os.environ.get("BITBYTE_RUN") or artifacts("runs", "notebooks")) / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def within(value: float, expected: float | None, tolerance: float) -> str:
    """Text of a value that comes out of training: "2.31 within 0.02", or an AssertionError.

    Another CPU or torch version changes last digits; the text stays the same as long as the value
    does.  ``expected`` None (other settings than the notebook's own) shows the value itself.
    """
    if expected is None:
        return f"{value:.4f}"
    if not math.isclose(value, expected, rel_tol=0, abs_tol=tolerance):
        raise AssertionError(f"{value:.4f} is not within {tolerance} of {expected}")
    return f"{expected} within {tolerance}"


def _project() -> Path:
    return artifacts().absolute().parent


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _stamp(path: Path) -> list:
    """Names, sizes and times of all files of a corpus."""
    if not path.exists():
        raise BitbyteError(
            f"there is no {path}; corpus is a path, or {', '.join(corpora.BUILT_IN)}"
        )
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(os.fspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
