"""Result records: the JSON files in artifacts/results that tables, comparisons and papers read.

The ``format`` of a record names its kind: 1 is an evaluation (by `evaluate`), "certificate 1" and
"compressors 1" come from `certify`, "mixer 1" from `mixtable`, "passport 1" from `passport`,
"judged 1" from `judge`.  Other files in the folder, such as a benchmark or a manifest, are skipped.
A record with a missing or invalid field is an error that names the file and the field, so readers
need no checks of their own.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from bitbyte.files import (
    BitbyteError,
    artifacts,
    output_folder,
    read_json,
    safe_name,
    to_json,
    user_path,
    write_atomic,
)

FORMATS = {
    "evaluation": 1, "certificate": "certificate 1", "compressors": "compressors 1",
    "mixer": "mixer 1", "passport": "passport 1", "judged": "judged 1",
}  # fmt: skip
COMMAND = {  # that writes records of a kind
    "evaluation": "eval", "certificate": "certify", "compressors": "certify",
    "mixer": "certify", "passport": "passport", "judged": "judge",
}  # fmt: skip
BLOCK_BYTES = 1 << 15  # minimum length of the blocks that an interval resamples, see `bootstrap`
MIN_BLOCKS = 10  # fewer blocks say nothing about their spread
LEAST_BYTES = MIN_BLOCKS * BLOCK_BYTES  # fewer scored bytes have no interval
MISSING = object()
MIXED = "exact:mixed"  # the kind of a cost in the mixer, which learns from the scored bytes


def _text(value) -> bool:
    return isinstance(value, str)


def _flag(value) -> bool:
    return isinstance(value, bool)


def _number(value) -> bool:
    return isinstance(value, int | float) and not _flag(value) and math.isfinite(value)


def _count(value) -> bool:
    return isinstance(value, int) and not _flag(value) and value >= 0


def _length(value) -> bool:
    return _count(value) and value > 0  # cutting into windows of 0 bytes would never end


def _interval(value) -> bool:
    return value is None or (_list_of(_number)(value) and len(value) == 2)


def _object(value) -> bool:
    return isinstance(value, dict)


def _list_of(fits: Callable) -> Callable:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _maybe(fits: Callable) -> Callable:
    return lambda value: value is None or fits(value)


def _having(fields: dict[str, Callable]) -> Callable:
    """An object with these fields."""
    return lambda value: isinstance(value, dict) and _wrong(value, fields) is None


def _objects(fits: Callable) -> Callable:
    """An object with at least one entry, all of which fit."""
    return lambda value: isinstance(value, dict) and bool(value) and all(map(fits, value.values()))


SIZE = _having({"bytes": _count, "out_kb_s": _maybe(_number), "back_kb_s": _maybe(_number),
                "restored": _flag})  # fmt: skip
AUDIT = _having({"name": _text, "verdict": _text, "text": _text})
WRITING = _having({"way": _text, "bytes_per_cpu_second": _number, "bpb": _number})
FILLING = _having({"way": _text, "right": _number, "excess_bits": _number, "cpu_ms": _number})
PUBLISHED = _having({name: _text for name in ("system", "data", "counted", "source")}
                    | {"bpb": _number})  # fmt: skip
TRAINING = _having(
    {name: _text for name in ("optimizer", "schedule", "dtype", "command")}
    | {
        name: _number
        for name in ("lr", "embed_lr", "weight_decay", "decay_until", "warmup", "clip")
    }
    | {name: _length for name in ("batch_size", "grad_accum", "processes", "seq_len")}
    | {"steps": _count, "seed": _count, "config": _object, "prior": _maybe(_object)}
    | {"init": _maybe(_object)}
)
# The fields that readers rely on, by dotted path; a record may hold more.
FIELDS = {
    "evaluation": {
        "model": _text, "kind": _text, "bpb": _number, "bits": _number, "bytes": _count,
        "interval": _interval, "data.path": _text, "data.split": _text, "data.sha256": _text,
        "context.window": _length, "context.stride": _length, "trained_on_it": _flag,
        "parameters": _count, "packed_bytes": _count, "bytes_seen": _maybe(_count),
    },
    "certificate": {
        "model": _text, "mode": _text, "file": _text, "sha256": _text, "bytes": _count,
        "stored_bytes": _count, "payload_bits": _number, "container_bytes": _count,
        "container_bpb": _maybe(_number), "promised_bpb": _maybe(_number),
        "charged_bpb": _maybe(_number), "gap_percent": _maybe(_number), "encode_kb_s": _number,
        "decode_kb_s": _number, "encode_over_prefill": _number,
        "decode_over_step": _maybe(_number), "coder_share": _objects(_number),
    },
    "compressors": {
        "model": _text, "mode": _text, "model_bytes": _count, "code_bytes": _count,
        "files": _objects(_having({"bytes": _count, "sizes": _objects(SIZE)})),
        "published": _list_of(PUBLISHED),
    },
    "mixer": {
        "model": _text, "mode": _text, "model_bytes": _count,
        "files": _objects(_having({"bytes": _count, "sizes": _objects(SIZE),
                                   "sizes.none.with_model": _flag})),
    },
    "passport": {
        "model": _text, "mode": _text, "kind": _text, "verdict": _text, "why": _text,
        "bpb": _maybe(_number), "interval": _interval, "bytes": _count, "audits": _list_of(AUDIT),
        "data.path": _text, "data.split": _text, "data.sha256": _text,
        "context": _maybe(_having({"window": _length, "stride": _length, "start": _text})),
        "trained_on_it": _flag,
    },
    "judged": {
        "model": _text, "mode": _text, "judge": _text, "data.path": _text,
        "truth_bpb": _maybe(_number),
        "samples": _count, "length": _count, "holes": _count, "seed": _count,
        "temperature": _number,
        "writing": _list_of(WRITING), "filling": _list_of(FILLING), "prompts": _list_of(_text),
        "texts": _maybe(_objects(_list_of(_text))),
    },
}  # fmt: skip
# Fields of an evaluation that may be missing or None.
OPTIONAL = {
    "blocks": _list_of(_number), "draws": _having({"per_window": _count}), "per_pass": _count,
    "train_seconds": _number, "train_seed": _number, "checkpoint": _text, "dtype": _text,
    "step": _count, "training": TRAINING,
}  # fmt: skip


def kind_of_record(value: object) -> str | None:
    """The name in `FORMATS` of what this is, e.g. certificate; None if it is not a record."""
    kinds = {number: kind for kind, number in FORMATS.items()}
    found = value.get("format") if isinstance(value, dict) else None
    kind = kinds.get(found) if isinstance(found, int | str) and not _flag(found) else None
    # Manifests and checkpoints have a format 1 too.
    return None if kind == "evaluation" and not {"kind", "bpb"} <= value.keys() else kind


def check_record(value: dict, name: str) -> str | None:
    """As `kind_of_record`.  Raises BitbyteError, naming the file ``name``, on an invalid field."""
    kind = kind_of_record(value)
    if kind is None:
        return None
    wrong = _wrong(value, FIELDS[kind])
    if kind == "evaluation" and not wrong:
        present = {name: fits for name, fits in OPTIONAL.items() if value.get(name) is not None}
        wrong = _wrong(value, present)
    if wrong:
        raise BitbyteError(
            f"{name} is not a valid result record: {wrong}; write it again with "
            f"bitbyte {COMMAND[kind]}, or remove it"
        )
    return kind


def _wrong(value: dict, fields: dict[str, Callable]) -> str | None:
    """What is wrong with the first invalid field, or None."""
    for path, fits in fields.items():
        field = value
        for key in path.split("."):
            field = field.get(key, MISSING) if isinstance(field, dict) else MISSING
        if field is MISSING:
            return f"it has no {path}"
        if not fits(field):
            return f"its {path} is {json.dumps(field)[:40]}"
    return None


def read_record(path: Path) -> tuple[str | None, object]:
    """(kind, content) of a JSON file; the kind is None if it is not a record.

    Raises BitbyteError on malformed JSON and on records with invalid fields.  Intervals of earlier
    versions over fewer bytes than `MIN_BLOCKS` blocks were too narrow and are dropped.
    """
    value = read_json(path)
    kind = check_record(value, str(path))
    if kind == "evaluation" and value["bytes"] < LEAST_BYTES:
        value["interval"] = None
    return kind, value


def read_records(kind: str, folder: Path | None = None, since: float = 0.0) -> list[dict]:
    """All records of a kind in a folder (default artifacts/results), in order of file name.

    Only files modified at ``since`` (seconds since 1970) or later.  Raises as `read_record` does.
    """
    folder = artifacts("results") if folder is None else Path(folder)
    paths = (path for path in sorted(folder.glob("*.json")) if path.is_file())  # a pipe would block
    paths = (path for path in paths if path.stat().st_mtime >= since)
    return [value for found, value in map(read_record, paths) if found == kind]


def find_record(name: str | Path) -> Path | None:
    """The file meant by a path, or by a name in artifacts/results with or without its suffix."""
    path = user_path(name)
    path = path if os.path.isfile(path) else artifacts("results", name)
    path = path if path.suffix == ".json" else path.with_name(path.name + ".json")
    return path if os.path.isfile(path) else None  # Path.is_file raises if the name is too long


def write_record(record: dict, folder: Path | None = None) -> Path:
    """Write a record to ``folder`` (default artifacts/results) under a descriptive name.

    The name ends in a hash of the result, so two results never share a file.
    """
    folder = output_folder(artifacts("results") if folder is None else folder)
    stable = record
    if record["format"] in (FORMATS["evaluation"], FORMATS["passport"]):
        stable = {k: v for k, v in record.items() if k not in ("seconds", "environment")}
    if record["format"] == FORMATS["evaluation"]:
        words = [record["model"], record["data"]["path"], record["data"]["split"]]
        words += ["mixed"] * (record["kind"] == MIXED)
    else:
        about = record.get("file", "") or record.get("data", {}).get("path", "")
        words = [record["format"].split()[0], record["model"], about, record["mode"]]
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"{safe_name(*words)}-{digest}.json"
    write_atomic(path, to_json(record))
    return path


def runs_word(records: list[dict]) -> str:
    """What to call several trainings: "seeds", or "runs" if a seed is unknown or occurs twice."""
    seeds = [record.get("train_seed") for record in records]
    return "runs" if None in seeds or len({*seeds}) < len(seeds) else "seeds"
