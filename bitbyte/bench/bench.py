"""Measure this package against its peers: ``bitbyte bench [ROWS]``.

The sides of a row do the same work and are measured in turn (A, B, A, B, ...) within one run, after
a warm-up of each, so that a busy machine slows both.  What counts is the ratio peer's time / our
time: above 1 we are faster.  Seconds are wall-clock time and say little about another machine.

This is not a profiler, and no test asserts its figures: they depend on the machine and its load,
which the record names.  Peers: the get_batch recipe of nanoGPT (github.com/karpathy/nanoGPT),
rewritten here, memcpy, ``cat``, ``import torch``, Hugging Face's Llama and mambapy's Mamba (these
two come with the extra ``bench``).
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bitbyte import models, shards
from bitbyte.bench import inference, peers
from bitbyte.bench.sides import Group, Pair, Side, Sizes, no_package
from bitbyte.config import MambaConfig, TrainConfig, TransformerConfig
from bitbyte.data import corpora
from bitbyte.data.pack import pack as write_shards
from bitbyte.device import choose_device, environment, prepare_process, settings_kept
from bitbyte.files import BitbyteError, to_json, write_atomic
from bitbyte.optim import create_optimizer
from bitbyte.process import say
from bitbyte.vocab import N_BYTES

BLOCK = 1 << 24  # bytes written at once
COPY = "import shutil, sys; shutil.copyfileobj(open(sys.argv[1], 'rb'), sys.stdout.buffer)"
PYTHON_CAT = [sys.executable, "-c", COPY]  # where there is no cat: Windows


GPU_STEP = {"d_model": 512, "seq_len": 1024, "batch": 64, "device": "cuda"}  # the preset "small"


def _seconds(side: Side, calls: int) -> float:
    """Wall-clock seconds of one call, over ``calls`` of them."""
    if side.before:
        side.before()
    start = perf_counter()
    for _ in range(calls):
        side.run()
    return (perf_counter() - start) / calls


def measure(sides: dict[str, Side], repeats: int, min_seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each side, measured ``repeats`` times, in turn.

    The warm-up doubles the calls until a measurement lasts ``min_seconds``; it is not counted.
    """
    calls = dict.fromkeys(sides, 1)
    for name, side in sides.items():
        while _seconds(side, calls[name]) * calls[name] < min_seconds and not side.before:
            calls[name] *= 2
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(_seconds(side, calls[name]))
    return seconds


def compare(pair: Pair, seconds: dict[str, list[float]]) -> dict:
    """Statistics of one pair.  ``ratio`` is the median over the repeats of peer / ours.

    Each ratio divides measurements made one right after the other, so a load that comes and goes
    cancels; ``ratio_of_medians`` is given beside it.
    """

    def about(name: str) -> dict:
        s = seconds[name]
        return {"name": name, "median_s": median(s), "min_s": min(s), "max_s": max(s), "all_s": s}

    ours, peer = about(pair.ours), about(pair.peer)
    ratios = [b / a for a, b in zip(ours["all_s"], peer["all_s"], strict=True)]
    return {
        "ours": ours, "peer": peer,
        "ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "ratio_of_medians": peer["median_s"] / ours["median_s"], "target": pair.target,
        "reached": None if pair.target is None else median(ratios) >= pair.target,
    }  # fmt: skip


def nanogpt_batch(path: Path, B: int, T: int) -> tuple[Tensor, Tensor]:
    """(x_BT, y_BT) int64 at random offsets, with the file mapped anew in each call."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    starts = torch.randint(len(data) - T, (B,)).tolist()
    x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
    return x, y


def _random_file(path: Path, size: int) -> None:
    """Random bytes, on the disk and in the page cache."""
    generator = np.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, size, BLOCK):
            file.write(generator.bytes(min(BLOCK, size - start)))
        file.flush()
        os.fsync(file.fileno())


def _no_space(size: int) -> str | None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    why = f"{size / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} are free; free some, or "
    return None if free >= size else why + "set TMPDIR to a folder on another disk"


def loader(sizes: Sizes) -> Iterator[Group]:
    """A batch as the trainer asks for it, against nanoGPT's recipe and against memcpy."""
    with tempfile.TemporaryDirectory(prefix="bitbyte-bench-") as folder:
        path = Path(folder, "bytes.bin")
        _random_file(path, sizes.loader_bytes)
        for B, T in sizes.batches:
            yield _loader_group(path, B, T)


def _loader_group(path: Path, B: int, T: int) -> Group:
    data = shards.ByteShardDataset(path.parent, T)
    step = itertools.count()
    whole = np.fromfile(path, dtype=np.uint8)
    starts = itertools.cycle((torch.randint(len(whole) // (B * T), (4096,)) * B * T).tolist())
    copied = np.empty(B * T, dtype=np.uint8)

    def ours() -> Tensor:
        return torch.from_numpy(data.batch(next(step), batch_size=B))

    def memcpy() -> None:  # one run of bytes, at random like the windows
        start = next(starts)
        np.copyto(copied, whole[start : start + B * T])

    sides = {
        "uint8 batch": Side(ours),
        "nanoGPT get_batch": Side(lambda: nanogpt_batch(path, B, T)),
        "memcpy": Side(memcpy),
        "batch widened to int64": Side(lambda: ours().long()),
    }
    pairs = [
        Pair("uint8 batch", "nanoGPT get_batch", 15),
        Pair("uint8 batch", "memcpy"),
        Pair("batch widened to int64", "nanoGPT get_batch"),
    ]
    return Group(f"{B}x{T}", sides, pairs, {"file_bytes": len(whole)})


def step(sizes: Sizes) -> Iterator[Group]:
    """A whole training step in bf16, against a Llama of the same shape with fused AdamW.

    Forward, backward, clipping and our default optimizers (Muon and AdamW) on our side; the Llama
    also with PyTorch's own Muon.  On CUDA both sides are also measured under torch.compile.
    """
    T, device = sizes.seq_len, torch.device(sizes.device)
    cuda = device.type == "cuda"
    ids_BT = torch.randint(N_BYTES, (sizes.batch, T), dtype=torch.uint8, device=device)
    sides, kernels = {}, {}
    for linear in ("dense", "ternary"):
        config = TransformerConfig(
            n_layer=sizes.n_layer, d_model=sizes.d_model, d_ff=sizes.d_ff, seq_len=T, linear=linear
        )
        for compiled in (False, True)[: 1 + cuda]:
            name = f"{linear} bf16" + " compiled" * compiled
            model = models.build(config).to(device)
            kernels[name] = models.use_kernels(model, compiled=compiled)
            steps = TrainConfig.newton_schulz
            optimizer = create_optimizer(model, lr=1e-4, embed_lr=1e-4, steps=steps)
            sides[name] = _step_side(model, optimizer, torch.bfloat16, ids_BT, compiled)
    long_BT = ids_BT.long()
    for name in ("bf16", "bf16 muon", "fp32", "bf16 compiled"):
        if cuda or "compiled" not in name:
            llama = peers.llama(sizes).to(device)
            make = peers.muon if "muon" in name else peers.adamw
            optimizer = make(llama, TrainConfig.newton_schulz)
            dtype = torch.float32 if name == "fp32" else torch.bfloat16
            sides[f"HF Llama {name}"] = _step_side(
                llama, optimizer, dtype, long_BT, "compiled" in name, labels=long_BT
            )
    pairs = [
        Pair(f"{linear} bf16", f"HF Llama {name}", target)
        for name, target in (("bf16", 1.2), ("bf16 muon", None), ("fp32", None))
        for linear in ("dense", "ternary")
    ]
    if cuda:
        pairs += [
            Pair(f"{linear} bf16 compiled", "HF Llama bf16 compiled", 1.0)
            for linear in ("dense", "ternary")
        ]
    case = f"{sizes.n_layer}L/{sizes.d_model}/{sizes.d_ff} {sizes.batch}x{T} {device}"
    facts = {
        "kernels": kernels,
        "parameters": {"ours": config.n_parameters, "peer": llama.num_parameters()},
        "optimizer": {
            "ours": f"muon ({steps} iterations) + adamw, clipped",
            "peer": "fused adamw, clipped",
            "peer muon": f"torch.optim.Muon ({steps} iterations) + fused adamw, clipped",
        },
        # Of the matrix products; the backward pass counts twice, causal scores count half.
        "step_flop": 6
        * ids_BT.numel()
        * (config.n_parameters + config.n_layer * config.d_model * T),
        "transformers": importlib.metadata.version("transformers"),
    }
    if cuda:
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["product_flop_s"] = _product_rate(device)
    yield Group(case, sides, pairs, facts)


def _product_rate(device: torch.device, n: int = 8192) -> float:
    """FLOP/s of a large bf16 matrix product of random numbers: what this card can do."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    side = Side(lambda: (a @ b, torch.cuda.synchronize()))
    return 2 * n**3 / median(measure({"product": side}, 5, 0.1)["product"])


def _step_side(
    model: nn.Module, optimizer, dtype: torch.dtype, ids_BT: Tensor, compiled: bool = False,
    **inputs: Tensor,
) -> Side:  # fmt: skip
    """A training step as a side; without ``optimizer``, forward and backward only."""
    kind = ids_BT.device.type
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            out = forward(ids_BT, **inputs)
            loss = out.mean() if isinstance(out, Tensor) else out.loss
        loss.backward()
        if optimizer:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.zero_grad()
        if kind == "cuda":
            torch.cuda.synchronize()

    return Side(run)


def mamba(sizes: Sizes) -> Iterator[Group]:
    """Forward and backward of a training step in fp32, against the Mamba-1 of mambapy.

    With a state of 16 numbers per channel mamba2 holds as much as the peer; 64 is our default.
    """
    T = sizes.seq_len
    ids_BT = torch.randint(N_BYTES, (sizes.batch, T), dtype=torch.uint8)
    sides, kernels, parameters = {}, {}, {}
    for ssm, d_state in (("mamba1", 16), ("mamba2", 16), ("mamba2", 64)):
        for linear in ("dense", "ternary"):
            name = f"{ssm} N={d_state} {linear}"
            model = models.build(
                MambaConfig(
                    n_layer=sizes.n_layer, d_model=sizes.d_model, seq_len=T, linear=linear,
                    ssm=ssm, d_state=d_state,
                )
            )  # fmt: skip
            kernels[name] = models.use_kernels(model)
            parameters[name] = model.config.n_parameters
            sides[name] = _step_side(model, None, torch.float32, ids_BT)
    parameters["mambapy"] = sum(p.numel() for p in peers.mambapy(sizes).parameters())
    targets = {"mamba1 N=16 dense": 5.0, "mamba2 N=16 dense": 8.0}
    pairs = [Pair(name, "mambapy", targets.get(name)) for name in sides]
    pairs += [Pair(name, "mambapy, our allocator") for name in targets]
    facts = {
        "kernels": kernels,
        "parameters": parameters,
        "mambapy": importlib.metadata.version("mambapy"),
    }
    case = f"{sizes.n_layer}L/{sizes.d_model} {sizes.batch}x{T} fp32"
    with peers.in_own_process(peers.mambapy_step, sizes, ids_BT) as own:
        sides["mambapy"] = Side(own)
        sides["mambapy, our allocator"] = Side(peers.mambapy_step(sizes, ids_BT))
        yield Group(case, sides, pairs, facts)


def pack(sizes: Sizes) -> Iterator[Group]:
    """One file to shards, against ``cat``; the target compares fresh files that are on the disk.

    Without fsync ``cat`` ends in the page cache.  Shards must not: a manifest vouches for them.
    """
    with tempfile.TemporaryDirectory(prefix="bitbyte-bench-") as folder:
        source, copy, packed = (Path(folder, name) for name in ("source", "copy", "packed"))
        _random_file(source, sizes.pack_bytes)

        def clear() -> None:
            shutil.rmtree(packed, ignore_errors=True)
            copy.unlink(missing_ok=True)
            if hasattr(os, "sync"):  # our fsync must not wait for what others wrote
                os.sync()

        def ours() -> None:
            documents, facts = corpora.open_corpus(str(source))
            write_shards(documents, packed, source=facts, progress=False)

        def cat(wait: bool) -> None:
            with open(copy, "wb") as file:
                subprocess.run([*command, source], stdout=file, check=True)
                if wait:
                    os.fsync(file.fileno())

        name, command = ("cat", ["cat"]) if shutil.which("cat") else ("copy", PYTHON_CAT)
        sides = {
            "pack": Side(ours, clear),
            f"{name} + fsync": Side(lambda: cat(wait=True), clear),
            f"{name}, not waited for": Side(lambda: cat(wait=False), clear),
        }
        pairs = [Pair("pack", f"{name} + fsync", 0.33), Pair("pack", f"{name}, not waited for")]
        yield Group(f"{sizes.pack_bytes / 1e9:g} GB", sides, pairs, {"pack": "ends after fsync"})


def imports(sizes: Sizes) -> Iterator[Group]:
    """Start-up of a fresh process, against ``import torch``; the target is 1.15 times its time."""
    names = ("import bitbyte", "import bitbyte.models", "import bitbyte.cli")
    sides = {
        name: Side(functools.partial(subprocess.run, [sys.executable, "-c", name], check=True))
        for name in (*names, "import torch")
    }
    targets = {"import bitbyte": 1 / 1.15}
    pairs = [Pair(name, "import torch", targets.get(name)) for name in names]
    yield Group("fresh process", sides, pairs, {})


class Row(NamedTuple):
    """``groups`` does the work; ``missing`` says why it cannot be done here (None if it can)."""

    groups: Callable[[Sizes], Iterator[Group]]
    missing: Callable[[Sizes], str | None]


ROWS = {
    "loader": Row(loader, lambda sizes: _no_space(sizes.loader_bytes)),
    "step": Row(step, lambda sizes: no_package("transformers")),
    "decode": Row(
        inference.decode, lambda sizes: no_package("transformers") or no_package("llvmlite", "fast")
    ),
    "prefill": Row(
        inference.prefill,
        lambda sizes: no_package("transformers") or no_package("llvmlite", "fast"),
    ),
    "compress": Row(inference.compress, lambda sizes: no_package("llvmlite", "fast")),
    "mixer": Row(inference.mixer, lambda sizes: no_package("llvmlite", "fast")),
    "mamba": Row(mamba, lambda sizes: no_package("mambapy")),
    "pack": Row(pack, lambda sizes: _no_space(2 * sizes.pack_bytes + BLOCK)),
    "import": Row(imports, lambda sizes: None),
}


def run_bench(rows: tuple[str, ...] = (), **options) -> list[dict]:
    """Measure ``rows`` as `measure_rows`, print the table, and return the rows of the record."""
    record = measure_rows(rows, **options)
    print(table(record))
    return record["rows"]


@settings_kept()
def measure_rows(
    rows: tuple[str, ...] = (), *, repeats: int = 5, out: Path | None = None,
    threads: int | None = None, device: str = "cpu", sizes: Sizes | None = None,
    decode: tuple[str, ...] = (),
) -> dict:  # fmt: skip
    """Measure ``rows`` (all if empty); the record, also written as JSON to ``out``.

    ``decode``: presets instead of those of the sizes.

    ``rows`` holds one dict per comparison (`compare`, with row, case, load and facts); a row that
    cannot run here gives one with ``not_measured`` instead, or BitbyteError if it was asked for by
    name.
    """
    for name in rows:
        if name not in ROWS:
            raise BitbyteError(f"no bench row {name!r}; choose from {', '.join(ROWS)}")
    if repeats < 1:
        raise BitbyteError(f"repeats is {repeats}; it must be at least 1, and 5 for a record")
    cuda = choose_device(device).type == "cuda"
    sizes = sizes or Sizes(**GPU_STEP if cuda else {})
    sizes = dataclasses.replace(sizes, decode=decode or sizes.decode)
    prepare_process(threads, False)
    chosen = dict.fromkeys(rows or (("step",) if cuda else ROWS))
    missing = {name: why for name in chosen if (why := ROWS[name].missing(sizes))}
    if rows and missing:
        raise BitbyteError(next(iter(missing.values())))
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    about = environment()
    about["versions"]["numpy"] = np.__version__
    results, load = [], _load()
    for name in chosen:
        if name in missing:
            results.append({"row": name, "not_measured": missing[name]})
        else:
            results += _run_row(name, repeats, sizes)
    record = {
        "kind": "bench", "repeats": repeats, "load_before": load, "load_after": _load(),
        "environment": about, "sizes": dataclasses.asdict(sizes), "rows": results,
    }  # fmt: skip
    if out:
        write_atomic(Path(out), to_json(record), follow=True)
    return record


def _run_row(name: str, repeats: int, sizes: Sizes) -> list[dict]:
    results = []
    with contextlib.closing(ROWS[name].groups(sizes)) as groups:
        for group in groups:
            say(f"measuring {name}, {group.case} ...")
            before = _load()
            seconds = measure(group.sides, repeats, sizes.min_seconds)
            head = {"row": name, "case": group.case, "load_before": before, "load_after": _load()}
            head["facts"] = group.facts
            results += [head | compare(pair, seconds) for pair in group.pairs]
            del group  # unmaps its file, which Windows could not delete otherwise
    return results


def _load() -> float | None:
    """Load average of the last minute; None where the system does not count it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _duration(seconds: float) -> str:
    size, unit = (1, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    return f"{seconds / size:.4g} {unit}"


def table(record: dict) -> str:
    """The record as aligned text: machine, a line per comparison, rows that were not measured."""
    about = record["environment"]
    lines = [("row", "ours", "time", "peer", "time", "ratio", "min..max", "target", "")]
    for row in (row for row in record["rows"] if "ratio" in row):
        verdict = {None: "", True: "reached", False: "missed"}[row["reached"]]
        lines.append((
            f"{row['row']} {row['case']}",
            row["ours"]["name"], _duration(row["ours"]["median_s"]),
            row["peer"]["name"], _duration(row["peer"]["median_s"]),
            f"{row['ratio']:.2f}", f"{row['ratio_min']:.2f}..{row['ratio_max']:.2f}",
            "" if row["target"] is None else f">= {row['target']:.2f}", verdict,
        ))  # fmt: skip
    left_out = [row for row in record["rows"] if "not_measured" in row]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([
        f"{about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}, "
        f"load {record['load_before']} -> {record['load_after']}, median of {record['repeats']}",
        *text,
        *(f"{row['row']}: not measured: {row['not_measured']}" for row in left_out),
        "ratio = peer's time / ours, above 1 we are faster; import: 0.87 is 1.15 times the time",
    ])  # fmt: skip
