"""Bits per byte of a model on a file: one evaluator for all families, and its result records.

The bytes are cut into windows of ``window`` bytes.  With ``stride`` = window they do not overlap;
with a smaller stride each window scores only its last ``stride`` bytes (the first one all of its
bytes), so that every byte is scored once with at least window - stride bytes of context.  Every
window starts with START: no model sees anything outside of its window.

BPB = sum of bits / bytes, the bytes counted from the file.  The 95 % interval is a bootstrap over
windows (blocks of neighbouring windows when there are very many).
"""

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bitbyte import __version__
from bitbyte.checkpoint import environment
from bitbyte.dist import dtype_name
from bitbyte.files import BitbyteError, RunError, artifacts, read_json, to_json, write_atomic
from bitbyte.models import packed_bytes
from bitbyte.shards import manifest_of, open_dataset

RECORD_FORMAT = 1
MIN_BLOCKS = 10  # fewer windows say nothing about their spread
MAX_BLOCKS = 4096  # resampled units of the bootstrap
LEAK_BITS = 40  # a fixed model saves more than this on a known law with chance below 2^-40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What a pass over the bytes gave; all sums in float64."""

    bits: float
    n_bytes: int
    block_bits: np.ndarray  # (n_blocks,) bits of each bootstrap unit
    block_bytes: np.ndarray  # (n_blocks,) scored bytes of each
    position_bits: np.ndarray  # (window,) mean bits by position in the window; nan = not scored
    seconds: float

    @property
    def bpb(self) -> float:
        return self.bits / self.n_bytes


def windows(n_bytes: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored byte) of each window: every byte is scored exactly once."""
    scored = 0
    while scored < n_bytes:
        stop = min(n_bytes, scored + (window if scored == 0 else stride))
        yield max(0, stop - window), stop, scored
        scored = stop


# Not inference_mode: tables cached under it could not be used by a training step that follows.
@torch.no_grad()
def surprisal(
    model, data, *, window: int, stride: int | None = None, batch_size: int = 32,
    dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None, progress=False,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Bits of each byte of ``data.read(start, stop)``, in order: yields (context_bytes, bits).

    ``data`` has ``n_bytes`` and ``read(start, stop)``.  ``bits`` is float64, one value a byte of
    one window's scored part, and ``context_bytes`` the bytes of the window before that part.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise BitbyteError(f"stride is {stride}; it must be between 1 and the window, {window}")
    if batch_size < 1:
        raise BitbyteError(f"batch_size is {batch_size}; it must be at least 1")
    stop = data.n_bytes if stop is None else min(stop, data.n_bytes)
    if stop <= start:
        raise BitbyteError("there are no bytes to score")
    device = next(model.parameters()).device
    model.eval()
    bar = tqdm(
        total=stop - start,
        unit="B",
        unit_scale=True,
        desc="eval",
        disable=None if progress else True,
    )
    with bar:
        for group in _groups(windows(stop - start, window, stride), batch_size):
            rows = np.stack([data.read(start + a, start + b) for a, b, _ in group])
            ids_BT = torch.from_numpy(rows).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                nats_BT = model(ids_BT).double().cpu().numpy()
            for (a, _, first), nats_T in zip(group, nats_BT, strict=True):
                yield first - a, nats_T[first - a :] / math.log(2)
            bar.update(sum(b - first for _, b, first in group))


def _groups(items: Iterator[tuple], size: int) -> Iterator[list[tuple]]:
    """Batches of up to ``size`` windows of one length."""
    group: list[tuple] = []
    for item in items:
        if group and (len(group) == size or item[1] - item[0] != group[0][1] - group[0][0]):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def score(model, data, *, window: int | None = None, stride: int | None = None, **options) -> Score:
    """Score all bytes of ``data`` (or ``start`` to ``stop``).  Options as in `surprisal`.

    A model with ``bits(data) -> bits_n`` instead of ``forward`` is an oracle: it gets the whole
    stream at once and takes no windows.
    """
    clock = time.perf_counter()
    if hasattr(model, "bits"):
        start, stop = options.get("start", 0), options.get("stop")
        stop = data.n_bytes if stop is None else stop
        bits = model.bits(data.read(0, stop).tobytes())[start:]
        window = window or 1024
        parts = ((0, part) for part in np.array_split(bits, max(1, len(bits) // window)))
    else:
        context = model.config.seq_len
        window = context if window is None else window
        if not 1 <= window <= context:
            raise BitbyteError(f"window is {window}; this model scores windows of 1 to {context}")
        parts = surprisal(model, data, window=window, stride=stride, **options)
    block_bits, block_bytes = [], []
    totals, counts = np.zeros(window), np.zeros(window)
    for context, bits in parts:
        block_bits.append(bits.sum())
        block_bytes.append(len(bits))
        where = slice(context, context + min(len(bits), window - context))
        totals[where] += bits[: window - context]
        counts[where] += 1
    block_bits, block_bytes = np.array(block_bits), np.array(block_bytes)
    if not np.isfinite(block_bits).all():
        raise RunError("the model gives costs that are not finite numbers; its weights are broken")
    with np.errstate(invalid="ignore"):
        by_position = totals / counts
    return Score(
        bits=math.fsum(block_bits), n_bytes=int(block_bytes.sum()), block_bits=block_bits,
        block_bytes=block_bytes, position_bits=by_position, seconds=time.perf_counter() - clock,
    )  # fmt: skip


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Total cost in nats of ``n_bytes`` bytes -> bits per byte."""
    return nats / math.log(2) / n_bytes


def interval(result: Score, draws: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of the BPB, resampling windows; None for fewer than MIN_BLOCKS."""
    n = len(result.block_bits)
    if n < MIN_BLOCKS:
        return None
    edges = np.linspace(0, n, min(n, MAX_BLOCKS) + 1).astype(int)[:-1]
    bits = np.add.reduceat(result.block_bits, edges)
    sizes = np.add.reduceat(result.block_bytes, edges).astype(float)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):
        chosen = generator.integers(len(bits), size=len(bits))
        means[i] = bits[chosen].sum() / sizes[chosen].sum()
    return tuple(float(x) for x in np.quantile(means, (0.025, 0.975)))


def floor_bits(data, path: str | Path) -> float | None:
    """Exact bits of these bytes under their own law, if the data say that they have one."""
    manifest = manifest_of(path)
    if manifest is None or manifest.source.get("name") != "stories":
        return None
    from bitbyte.stories import StoriesLaw

    return float(StoriesLaw().bits(data.read(0, data.n_bytes).tobytes()).sum())


def evaluate(
    model, path: str | Path, *, name: str, split: str = "val", window: int | None = None,
    stride: int | None = None, batch_size: int = 32, dtype: torch.dtype = torch.float32,
    limit: int | None = None, meta: dict | None = None, kernels: dict | None = None,
    progress: bool = True,
) -> tuple[dict, Score]:  # fmt: skip
    """Score a split whole (or its first ``limit`` bytes) and make the result record.

    ``name`` is what tables call the model, ``meta`` the checkpoint's meta data.  Raises RunError
    if the model beats the known law of the data: then something leaks.
    """
    data = open_dataset(path, 1, split=split)
    options = {"batch_size": batch_size, "dtype": dtype, "stop": limit, "progress": progress}
    result = score(model, data, window=window, stride=stride, **options)
    window = len(result.position_bits)
    floor = floor_bits(data, path) if limit is None else None
    if floor is not None and result.bits < floor - LEAK_BITS:
        raise RunError(
            f"{name} needs {result.bits:.0f} bits where the law of the data needs {floor:.0f}: "
            "it sees the bytes it should predict, or was trained on them; no record is written"
        )
    oracle = hasattr(model, "bits")
    bounds = interval(result)
    record = {
        "format": RECORD_FORMAT,
        "model": name,
        "family": "oracle" if oracle else model.config.family,
        "kind": "exact" if model.exact else "upper_bound",
        "bpb": result.bpb,
        "interval": None if bounds is None else list(bounds),
        "bits": result.bits,
        "bytes": result.n_bytes,
        "floor_bpb": None if floor is None else floor / result.n_bytes,
        "context": {
            "window": window,
            "stride": window if stride is None else stride,
            "start": "whole stream" if oracle else "START before every window",
        },
        "draws": None,
        "data": {
            "path": Path(path).absolute().name,
            "split": data.split,
            "whole": result.n_bytes == data.n_bytes,
            "sha256": sha256_of(data, limit),
        },
        "trained_on_it": data.fingerprint == (meta or {}).get("data", {}).get("train"),
        "checkpoint": (meta or {}).get("files", {}).get("model.safetensors", {}).get("sha256"),
        "step": (meta or {}).get("step"),
        "bytes_seen": (meta or {}).get("bytes_seen"),
        "config": (meta or {}).get("config"),
        "parameters": 0 if oracle else sum(p.numel() for p in model.parameters()),
        "packed_bytes": 0 if oracle else packed_bytes(model),
        "device": "cpu" if oracle else str(next(model.parameters()).device),
        "dtype": dtype_name(dtype),
        "kernels": kernels or {},
        "seconds": round(result.seconds, 3),
        "bitbyte": __version__,
        "environment": environment(),
    }
    return record, result


def sha256_of(data, limit: int | None = None, block: int = 1 << 24) -> str:
    """SHA-256 of the scored bytes themselves, whatever files they lie in."""
    digest = hashlib.sha256()
    stop = data.n_bytes if limit is None else min(limit, data.n_bytes)
    for start in range(0, stop, block):
        digest.update(data.read(start, min(stop, start + block)))
    return digest.hexdigest()


def write_record(record: dict, folder: Path | None = None) -> Path:
    """Write a record to ``folder`` (default artifacts/results) under a name that tells its content.

    The name ends in a hash of the result, so two results never share a file.
    """
    folder = folder or artifacts("results")
    folder.mkdir(parents=True, exist_ok=True)
    stable = {k: v for k, v in record.items() if k not in ("seconds", "environment")}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:8]
    words = (record["model"], record["data"]["path"], record["data"]["split"])
    safe = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", word).strip("-.") for word in words)
    path = folder / f"{safe}-{digest}.json"
    write_atomic(path, to_json(record))
    return path


def read_records(folder: Path | None = None) -> list[dict]:
    """All result records of a folder (default artifacts/results), by data, kind and BPB."""
    folder = folder or artifacts("results")
    records = [read_json(path) for path in sorted(folder.glob("*.json"))]
    records = [r for r in records if isinstance(r, dict) and r.get("format") == RECORD_FORMAT]
    return sorted(records, key=lambda r: (r["data"]["path"], r["kind"], r["bpb"]))
