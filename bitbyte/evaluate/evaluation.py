"""Score a model on a split and make the result record: bits, bytes, interval, and how.

BPB = sum of bits / bytes, the bytes counted from the file.  See `scoring` for how bytes are
scored, `bootstrap` for the interval, and `records` for the fields of a record.
"""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import torch

from bitbyte import __version__
from bitbyte.device import device_of, dtype_name, environment
from bitbyte.evaluate import leaks
from bitbyte.evaluate.bootstrap import _merged, bootstrap_interval
from bitbyte.evaluate.records import FORMATS, MIXED
from bitbyte.evaluate.training import training_of
from bitbyte.files import BitbyteError, RunError
from bitbyte.models import packed_bytes
from bitbyte.scoring import CHAIN_RULE, Score, kind_of, score, score_stream
from bitbyte.shards import EVERY, SEEN, comparable, manifest_of, open_dataset, overlap

LEAK_BITS = 40  # a fixed model beats the true distribution by more with probability below 2^-40


def _sample_rows(model, data, window: int | None, limit: int | None) -> np.ndarray:
    """A few windows, spread over the scored bytes, for the leak check."""
    stop = data.n_bytes if limit is None else min(limit, data.n_bytes)
    window = min(window or model.config.seq_len, model.config.seq_len, stop)
    starts = np.linspace(0, stop - window, leaks.ROWS).astype(np.int64)
    return np.stack([data.read(a, a + window) for a in dict.fromkeys(starts.tolist())])


def floor_bits(data, path: str | Path, n_bytes: int | None = None) -> float | None:
    """Exact bits of the data (or its first bytes) under its true distribution, None if unknown.

    It is known for packed stories, unless something else is mixed in, such as another separator.
    """
    manifest = manifest_of(path)
    if manifest is None or manifest.source.get("name") != "stories":
        return None
    from bitbyte.stories.grammar import StoriesModel

    with contextlib.suppress(BitbyteError):
        return float(StoriesModel().bits(data.read(0, data.n_bytes).tobytes())[:n_bytes].sum())
    return None


def evaluate(
    model, path: str | Path, *, name: str, split: str = "val", window: int | None = None,
    stride: int | None = None, batch_size: int = 32, dtype: torch.dtype = torch.float32,
    limit: int | None = None, meta: dict | None = None, kernels: dict | None = None,
    progress: bool = True, kind: str | None = None, draws: int = 16, per_pass: int = 1,
    seed: int = 0, mixed=None,
) -> tuple[dict, Score]:  # fmt: skip
    """Score a whole split (or its first ``limit`` bytes) and make the result record.

    ``name`` is the model's name in tables, ``meta`` the checkpoint's meta data; the rest as in
    `surprisal`.  With ``mixed``, a mixer that the model is an expert of (`compress.costs.Mixed`),
    the mixer is scored, on the whole stream; windows then only group the sums, and ``model`` may be
    None.  Raises RunError if something leaks: if a cost of a causal model depends on what it must
    not (see `leaks`), or if anything beats the true distribution of the data.
    """
    for option, value in (("limit", limit), ("window", window), ("stride", stride)):
        if value is not None and value < 1:
            raise BitbyteError(f"{option} is {value}; it must be at least 1")
    if not 0 <= seed < 2**63:
        raise BitbyteError(f"seed is {seed}; it must be from 0 to 2^63 - 1")
    data = open_dataset(path, 1, split=split)
    kind = kind_of(model, kind) if mixed is None else MIXED
    oracle = model is None or hasattr(model, "bits")
    stream = mixed or (model if oracle else None)
    if mixed and not oracle:
        window = stride = model.config.seq_len  # as in a static evaluation, to compare the sums
    if kind.startswith(CHAIN_RULE) and per_pass > (window or model.config.seq_len):
        raise BitbyteError(f"per_pass is {per_pass}; a window has fewer bytes")
    checked = None
    if not oracle and model.exact:
        checked = leaks.check(model, _sample_rows(model, data, window, limit), dtype=dtype)
    cut = {"window": window, "stride": stride, "stop": limit}
    result = score_stream(stream, data, **cut) if stream else score(
        model, data, **cut, batch_size=batch_size, dtype=dtype, progress=progress, kind=kind,
        draws=draws, per_pass=per_pass, seed=seed,
    )  # fmt: skip
    window = len(result.position_bits)
    floor = floor_bits(data, path, result.n_bytes)
    if floor is not None and result.bits < floor - LEAK_BITS:
        raise RunError(
            f"{name} needs {result.bits:.0f} bits, but the data's true distribution needs "
            f"{floor:.0f}: the model sees the bytes it should predict, or was trained on them; no "
            "record is written"
        )
    spread, extra = bootstrap_interval(result), (meta or {}).get("extra", {})
    origin = extra.get("init") or {}
    record = {
        "format": FORMATS["evaluation"],
        "model": name,
        "family": "none" if model is None else "oracle" if oracle else model.config.family,
        "kind": kind,
        "bpb": result.bpb,
        "interval": None if spread is None else list(spread),
        "bits": result.bits,
        "bytes": result.n_bytes,
        "floor_bpb": None if floor is None else floor / result.n_bytes,
        "context": {
            "window": window,
            "stride": window if stride is None else stride,
            "start": "whole stream" if stream else "nothing before a window is seen",
        },
        "draws": {"per_window": draws, "seed": seed} if kind == "upper_bound" else None,
        "per_pass": per_pass if kind.startswith(CHAIN_RULE) else None,
        "leaks": checked,
        "data": {
            "path": Path(path).absolute().name,
            "split": data.split,
            "whole": result.n_bytes == data.n_bytes,
            "sha256": sha256_of(data, limit),
        },
        **trained_on(data, result.n_bytes, seen_by(meta or {})),
        "checkpoint": (meta or {}).get("files", {}).get("model.safetensors", {}).get("sha256"),
        "step": (meta or {}).get("step"),
        "bytes_seen": meta.get("bytes_seen", 0) + origin.get("bytes_seen", 0) if meta else None,
        "train_seconds": extra.get("seconds", 0) + origin.get("seconds", 0) or None,
        "train_seed": ((meta or {}).get("rng") or {}).get("seed"),
        "training": training_of(meta or {}),
        "config": (meta or {}).get("config"),
        "parameters": 0 if oracle else sum(p.numel() for p in model.parameters()),
        "packed_bytes": 0 if oracle else packed_bytes(model),
        "device": "cpu" if oracle else str(device_of(model)),
        "dtype": dtype_name(dtype),
        "kernels": kernels or {},
        "blocks": [round(bits, 3) for bits in _merged(result.block_bits)],
        "seconds": round(result.seconds, 3),
        "bitbyte": __version__,
        "environment": environment(),
    }
    return record, result


def seen_by(meta: dict) -> dict:
    """What a checkpoint records of its training data, with that of the weights it started from."""
    origin = meta.get("extra", {}).get("init") or {}
    return meta.get("data", {}) | {"init": origin.get("data")}


def trained_on(data, n_bytes: int, seen: dict) -> dict:
    """Whether a model was trained on what was scored: the first ``n_bytes`` bytes of ``data``.

    ``seen`` is what its checkpoint records of its training data.  Two tests: whether they share a
    file, and, if the checkpoint has a sketch, how much content they share, however it is packed.
    The record says which were made: ``content`` (both), ``files``, or None if nothing is known.
    A run that started from weights was also trained on what those were.
    """
    before = seen.get("init") and trained_on(data, n_bytes, seen["init"])
    if before and before["trained_on_it"]:
        return before
    same = data.fingerprint == seen.get("train") or bool({*data.hashes} & {*seen.get("files", ())})
    test, share, sketch = "files" if seen.get("train") else None, None, seen.get("sketch") or []
    scored = data.sketch_of(n_bytes) if sketch else []
    # Of fewer bytes, perhaps no piece is among those that a sketch of more would have kept.
    if n_bytes >= 8 * EVERY and len(comparable(sketch, scored)) > 1:
        test, share = "content", overlap(sketch, scored)
    return {
        "trained_on_it": same or (share or 0) >= SEEN,
        "trained_on_it_test": test,
        "overlap": share,
    }


def sha256_of(data, limit: int | None = None, block: int = 1 << 24) -> str:
    """SHA-256 of the scored bytes themselves, however they are divided into files."""
    digest = hashlib.sha256()
    stop = data.n_bytes if limit is None else min(limit, data.n_bytes)
    for start in range(0, stop, block):
        digest.update(data.read(start, min(stop, start + block)))
    return digest.hexdigest()
