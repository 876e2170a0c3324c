"""Bits per byte of a model on a file: one evaluator for all families, and its result records.

The bytes are cut into windows of ``window`` bytes.  With ``stride`` = window they do not overlap;
with a smaller stride each window scores only its last ``stride`` bytes (the first one all of its
bytes), so that every byte is scored once with at least window - stride bytes of context.  No
model of any family sees a byte outside of its window.

Kinds of numbers, never mixed in one column: ``exact`` (causal models), ``upper_bound``,
``chain_rule:left_to_right`` and ``chain_rule:confidence`` (masked diffusion, see `bounds`).

BPB = sum of bits / bytes, the bytes counted from the file.  The 95 % interval is a bootstrap over
up to 100 blocks of neighbouring windows: single windows are too much alike to be independent.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bitbyte import __version__, bounds, leaks
from bitbyte.checkpoint import environment
from bitbyte.dist import dtype_name
from bitbyte.files import (
    BitbyteError,
    RunError,
    artifacts,
    read_json,
    safe_name,
    to_json,
    write_atomic,
)
from bitbyte.models import packed_bytes
from bitbyte.shards import manifest_of, open_dataset
from bitbyte.vocab import N_BYTES

RECORD_FORMAT = 1
MIN_BLOCKS = 10  # fewer windows say nothing about their spread
BLOCKS = 100  # resampled units of the bootstrap at most; their sums are kept in the record
CHAIN_RULE = "chain_rule:"
KINDS = ("exact", "upper_bound", *(CHAIN_RULE + order for order in bounds.ORDERS))
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


def costs(model, kind: str | None, draws: int, per_pass: int, seed: int) -> Callable:
    """(ids_BT, scored bytes S, window numbers) -> nats_BS, for a kind of number.

    ``kind`` None is the family's own: exact, or the upper bound.  Raises BitbyteError where the
    family has no such number.
    """
    kind = kind_of(model, kind)
    if draws < 1:
        raise BitbyteError(f"draws is {draws}; it must be at least 1")
    if kind == "exact":
        return lambda ids_BT, S, indices: model(ids_BT)[:, -S:]
    if kind == "upper_bound":
        return lambda ids_BT, S, indices: bounds.upper_bound(
            model, ids_BT, S, draws=draws, indices=indices, seed=seed
        )
    order = kind.removeprefix(CHAIN_RULE)
    return lambda ids_BT, S, indices: bounds.chain_rule(
        model, ids_BT, S, order=order, per_pass=per_pass
    )


def kind_of(model, kind: str | None = None) -> str:
    """The kind of number that ``kind`` means for this model; None is the family's own."""
    if kind is None:
        return "upper_bound" if model.exact is False else "exact"
    if kind not in KINDS:
        raise BitbyteError(f"no kind {kind!r}; choose from {', '.join(KINDS)}")
    if model.exact not in (None, kind == "exact"):
        other = "exact" if model.exact else ", ".join(KINDS[1:])
        raise BitbyteError(f"this model's family has no {kind} cost; it has: {other}")
    return kind


# Not inference_mode: tables cached under it could not be used by a training step that follows.
@torch.no_grad()
def surprisal(
    model, data, *, window: int, stride: int | None = None, batch_size: int = 32,
    dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None, progress=False,
    kind: str | None = None, draws: int = 16, per_pass: int = 1, seed: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Bits of each byte of ``data.read(start, stop)``, in order: yields (context_bytes, bits).

    ``data`` has ``n_bytes`` and ``read(start, stop)``.  ``bits`` is float64, one value a byte of
    one window's scored part, and ``context_bytes`` the bytes of the window before that part.
    ``draws`` and ``seed`` belong to the upper bound, ``per_pass`` to the chain rules.
    """
    cost = costs(model, kind, draws, per_pass, seed)
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise BitbyteError(f"stride is {stride}; it must be between 1 and the window, {window}")
    if batch_size < 1:
        raise BitbyteError(f"batch_size is {batch_size}; it must be at least 1")
    stop = data.n_bytes if stop is None else min(stop, data.n_bytes)
    if stop <= start:
        raise BitbyteError("there are no bytes to score")
    device = device_of(model)
    model.eval()
    bar = tqdm(
        total=stop - start, unit="B", unit_scale=True, desc="eval",
        disable=None if progress else True,
    )  # fmt: skip
    index = 0
    with bar:
        for group in _groups(windows(stop - start, window, stride), batch_size):
            rows = np.stack([data.read(start + a, start + b) for a, b, _ in group])
            ids_BT = torch.from_numpy(rows).to(device, torch.int64)
            a, b, first = group[0]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                nats_BS = cost(ids_BT, b - first, range(index, index + len(group)))
            index += len(group)
            for nats_S in nats_BS.double().cpu().numpy():
                yield first - a, nats_S / math.log(2)
            bar.update(len(group) * (b - first))


def device_of(model) -> torch.device:
    """Where the model's parameters are; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _groups(items: Iterator[tuple], size: int) -> Iterator[list[tuple]]:
    """Batches of up to ``size`` windows of one length and one scored part."""
    group: list[tuple] = []
    for a, b, first in items:
        same = group and (b - a, b - first) == (
            group[0][1] - group[0][0],
            group[0][1] - group[0][2],
        )
        if group and (len(group) == size or not same):
            yield group
            group = []
        group.append((a, b, first))
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
        stop = min(stop, data.n_bytes)
        stream = model.bits(data.read(0, stop).tobytes())[start:]
        window = window or 1024
        cut = windows(len(stream), window, stride or window)
        parts = ((first - a, stream[first:b]) for a, b, first in cut)
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
    if len(result.block_bits) < MIN_BLOCKS:
        return None
    sizes = _merged(result.block_bytes.astype(float))
    return _bootstrap(_merged(result.block_bits), sizes, draws, seed)


def _merged(values) -> np.ndarray:
    """Sums over at most BLOCKS neighbourhoods of about the same number of values."""
    n = len(values)
    return np.add.reduceat(values, [i * n // min(n, BLOCKS) for i in range(min(n, BLOCKS))])


def _bootstrap(bits: np.ndarray, sizes: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    """95 % interval of sum(bits) / sum(sizes) over resampled blocks."""
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):
        chosen = generator.integers(len(bits), size=len(bits))
        means[i] = bits[chosen].sum() / sizes[chosen].sum()
    return tuple(float(x) for x in np.quantile(means, (0.025, 0.975)))


def compare(a: dict, b: dict, draws: int = 10_000, seed: int = 0) -> dict:
    """Paired bootstrap of two records on the same bytes and windows.

    Returns {"difference": BPB of a - BPB of b, "interval": its 95 % interval, "verdict": text}.
    Raises BitbyteError if the records are not about the same bytes, cut in the same way.
    """
    for what, of in (
        ("the same bytes", lambda r: f"{r['bytes']:,} of {r['data']['sha256'][:8]}"),
        ("the same windows", lambda r: f"{r['context']['window']}/{r['context']['stride']}"),
    ):
        if of(a) != of(b):
            raise BitbyteError(
                f"{a['model']} and {b['model']} were not scored on {what}: {of(a)}, {of(b)}; "
                "score both with the same --data, --split, --limit, --window and --stride"
            )
    few = min(len(record.get("blocks") or ()) for record in (a, b))
    if few < MIN_BLOCKS:
        raise BitbyteError(f"{few} blocks are too few to compare; score more bytes")
    gaps = _merged(a["blocks"]) - _merged(b["blocks"])
    cut = windows(a["bytes"], a["context"]["window"], a["context"]["stride"])
    sizes = _merged([float(stop - first) for _, stop, first in cut])
    low, high = _bootstrap(gaps, sizes, draws, seed)
    verdict = "not distinguishable"
    if low > 0 or high < 0:
        better, worse = (b, a) if low > 0 else (a, b)
        verdict = f"{better['model']} is better"
        if worse["kind"] == "upper_bound":
            verdict += f", as far as the bound on {worse['model']} tells"
    elif a["kind"] == b["kind"] == "upper_bound":
        verdict += ", as far as two bounds tell"
    return {"difference": a["bpb"] - b["bpb"], "interval": [low, high], "verdict": verdict}


def _sample_rows(model, data, window: int | None, limit: int | None) -> np.ndarray:
    """A few windows from all over the scored bytes, for the leak check."""
    stop = data.n_bytes if limit is None else min(limit, data.n_bytes)
    window = min(window or model.config.seq_len, model.config.seq_len, stop)
    starts = np.linspace(0, stop - window, leaks.ROWS).astype(int)
    return np.stack([data.read(a, a + window) for a in dict.fromkeys(starts.tolist())])


def floor_bits(data, path: str | Path, n_bytes: int | None = None) -> float | None:
    """Exact bits of these bytes (or the first of them) under their own law, if they have one.

    Packed stories with something else among them, as another separator, have none.
    """
    manifest = manifest_of(path)
    if manifest is None or manifest.source.get("name") != "stories":
        return None
    from bitbyte.stories import StoriesLaw

    with contextlib.suppress(BitbyteError):
        return float(StoriesLaw().bits(data.read(0, data.n_bytes).tobytes())[:n_bytes].sum())
    return None


def evaluate(
    model, path: str | Path, *, name: str, split: str = "val", window: int | None = None,
    stride: int | None = None, batch_size: int = 32, dtype: torch.dtype = torch.float32,
    limit: int | None = None, meta: dict | None = None, kernels: dict | None = None,
    progress: bool = True, kind: str | None = None, draws: int = 16, per_pass: int = 1,
    seed: int = 0,
) -> tuple[dict, Score]:  # fmt: skip
    """Score a split whole (or its first ``limit`` bytes) and make the result record.

    ``name`` is what tables call the model, ``meta`` the checkpoint's meta data; the rest as in
    `surprisal`.  Raises RunError if a cost of a causal model depends on what it must not (see
    `leaks`), or if any model beats the known law of the data: then something leaks.
    """
    for option, value in (("limit", limit), ("window", window), ("stride", stride)):
        if value is not None and value < 1:
            raise BitbyteError(f"{option} is {value}; it must be at least 1")
    if not 0 <= seed < 2**63:
        raise BitbyteError(f"seed is {seed}; it must be from 0 to 2^63 - 1")
    data = open_dataset(path, 1, split=split)
    kind = kind_of(model, kind)
    oracle = hasattr(model, "bits")
    if kind.startswith(CHAIN_RULE) and per_pass > (window or model.config.seq_len):
        raise BitbyteError(f"per_pass is {per_pass}; a window has fewer bytes")
    checked = None
    if model.exact and not oracle:
        checked = leaks.check(model, _sample_rows(model, data, window, limit), dtype=dtype)
    result = score(
        model, data, window=window, stride=stride, batch_size=batch_size, dtype=dtype, stop=limit,
        progress=progress, kind=kind, draws=draws, per_pass=per_pass, seed=seed,
    )  # fmt: skip
    window = len(result.position_bits)
    floor = floor_bits(data, path, result.n_bytes)
    if floor is not None and result.bits < floor - LEAK_BITS:
        raise RunError(
            f"{name} needs {result.bits:.0f} bits where the law of the data needs {floor:.0f}: "
            "it sees the bytes it should predict, or was trained on them; no record is written"
        )
    spread = interval(result)
    record = {
        "format": RECORD_FORMAT,
        "model": name,
        "family": "oracle" if oracle else model.config.family,
        "kind": kind,
        "bpb": result.bpb,
        "interval": None if spread is None else list(spread),
        "bits": result.bits,
        "bytes": result.n_bytes,
        "floor_bpb": None if floor is None else floor / result.n_bytes,
        "context": {
            "window": window,
            "stride": window if stride is None else stride,
            "start": "whole stream" if oracle else "nothing before a window is seen",
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
        "trained_on_it": _trained_on(data, (meta or {}).get("data", {})),
        "checkpoint": (meta or {}).get("files", {}).get("model.safetensors", {}).get("sha256"),
        "step": (meta or {}).get("step"),
        "bytes_seen": (meta or {}).get("bytes_seen"),
        "train_seconds": (meta or {}).get("extra", {}).get("seconds"),
        "train_seed": ((meta or {}).get("rng") or {}).get("seed"),
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


def _trained_on(data, seen: dict) -> bool:
    """Whether a file of ``data`` was among the training data that a checkpoint names."""
    return data.fingerprint == seen.get("train") or bool({*data.hashes} & {*seen.get("files", ())})


class Uniform(torch.nn.Module):
    """Every byte equally likely: exactly 8 bits per byte, in every kind of number."""

    exact = None  # it has all kinds

    def __init__(self, seq_len: int = 256):
        super().__init__()
        self.config = types.SimpleNamespace(family="uniform", seq_len=seq_len)

    def forward(self, ids_BT, generator=None):
        return torch.full(ids_BT.shape, math.log(N_BYTES), dtype=torch.float64)

    def logits(self, ids_BT):
        return torch.zeros(*ids_BT.shape, N_BYTES)


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
    path = folder / f"{safe_name(*words)}-{digest}.json"
    write_atomic(path, to_json(record))
    return path


def read_records(folder: Path | None = None) -> list[dict]:
    """All result records of a folder (default artifacts/results), by data, kind and BPB."""
    folder = folder or artifacts("results")
    records = [read_json(path) for path in sorted(folder.glob("*.json"))]
    records = [r for r in records if isinstance(r, dict) and r.get("format") == RECORD_FORMAT]
    return sorted(records, key=lambda r: (r["data"]["path"], r["kind"], r["bpb"]))
