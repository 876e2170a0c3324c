"""Certificates: a model's bits per byte on a file, proved by compressing and restoring that file.

The promised size is the sum that `evaluate` gives in windows of the model's length.  The file is
then compressed, and decompressed in a separate process that gets nothing but the compressed file
and the checkpoint.  A record keeps what was promised, what it took, and what else a receiver needs:
the weights and the code (charged as in the Large Text Compression Benchmark).

A file can take less than promised: a byte that the model considers impossible may be promised 40
bits, but in a table of 2^24 counts, none of them 0, it costs at most 24.
"""

import lzma
import tempfile
import time
from pathlib import Path

import torch

from bitbyte import __version__, checkpoint, models, runs, scoring
from bitbyte.bitlinear import BitLinear
from bitbyte.compress import baselines, child, codec
from bitbyte.compress.container import plain_file
from bitbyte.device import (
    choose_device,
    device_of,
    environment,
    prepare_process,
    settings_kept,
)
from bitbyte.evaluate.evaluation import seen_by, trained_on
from bitbyte.evaluate.records import FORMATS, read_records, write_record
from bitbyte.evaluate.tables import cell
from bitbyte.files import RunError, sha256_file
from bitbyte.shards import ByteStreamDataset

NOTE = (
    "model_bytes: ternary weights at 5 to a byte, everything else in the 32 bits that decoding "
    "needs, packed_bytes the same with 16; code_bytes: the package's modules that decoding "
    "imports, as one xz; Python, numpy and PyTorch are not counted, and nothing writes weights so "
    "small yet: a receiver keeps the checkpoint"
)
KINDS = {"blocks": "chain_rule:left_to_right"}  # of numbers that a mode codes; others: exact
LEAST_SHOWN = 100_000  # bytes; `markdown` leaves out smaller files
# What the receiver runs.  It prints how long decoding took and which bitbyte modules it used.
RECEIVER = """
import json, sys, time
import torch
packed, back, ckpt, device, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
from bitbyte import checkpoint, compress
model, meta = checkpoint.load_model(ckpt, device=device)
done = compress.decompress_file(packed, back, model, meta)
files = sorted({m.__file__ for n, m in sys.modules.items()
                if n.split(".")[0] == "bitbyte" and getattr(m, "__file__", None)})
print(json.dumps([done.seconds, done.coder_seconds, files]))
"""


@settings_kept()
def certify(
    ckpt: str | Path, file: str | Path, *, mode: str = "auto", lanes: int = codec.LANES,
    device: str = "cpu", threads: int | None = None, folder: Path | None = None, progress=False,
) -> dict:  # fmt: skip
    """Evaluate, compress, decompress in another process and compare; returns the record.

    It says whether the model was trained on the file, as an evaluation does.  It is also written to
    ``folder`` (default artifacts/results).  Raises RunError if the file is not restored exactly.
    """
    path, step = plain_file(Path(file)), runs.resolve(ckpt)
    prepare_process(threads, deterministic=False)
    place = choose_device(device)
    model, meta = checkpoint.load_model(step, device=place)
    n, promised, seen = path.stat().st_size, 0.0, {"trained_on_it": False}
    if n:
        data = ByteStreamDataset(path, 1)
        kind = KINDS.get(mode)
        promised = scoring.score(model, data, progress=progress, kind=kind).bits
        seen = trained_on(data, n, seen_by(meta))
    with tempfile.TemporaryDirectory(prefix="bitbyte-") as temporary:
        packed, back = Path(temporary, "packed"), Path(temporary, "back")
        coded = codec.compress_file(
            path, packed, model, meta, mode=mode, lanes=lanes, progress=progress
        )
        decode_seconds, decode_coder, sources = _receive(packed, back, step, str(place))
        digest = sha256_file(path)
        if sha256_file(back) != digest:
            raise RunError(f"{path} was not restored exactly; please keep {step} and report this")
    rates = model_rates(model, coded.header.lanes)
    code = b"".join(Path(source).read_bytes() for source in sources)
    code_bytes = len(lzma.compress(code, preset=9 | lzma.PRESET_EXTREME))
    model_bytes = exact_bytes(model)
    encode_rate = n / coded.seconds / 1000
    decode_rate = n / decode_seconds / 1000
    charged = coded.size + model_bytes + code_bytes
    header = coded.header
    record = {
        "format": FORMATS["certificate"],
        "file": path.name,
        "bytes": n,
        "sha256": digest,
        "identical": True,
        **seen,
        "model": runs.model_name(step),
        "family": meta["model_family"],
        "variant": meta["variant"],
        "checkpoint": meta["files"]["model.safetensors"]["sha256"],
        "mode": header.mode,
        "lanes": header.lanes,
        "window": header.window,
        "promised_bits": promised,
        "table_bits": coded.table_bits,
        "payload_bits": 8 * coded.payload,
        "stored_bytes": coded.stored,
        # Stored blocks bypass the coder, so the promise says nothing about them.
        "gap_percent": None if coded.stored else _percent(8 * coded.payload, promised),
        "coder_gap_percent": (
            None if coded.stored else _percent(8 * coded.payload, coded.table_bits)
        ),
        "mode_cost_bpb": (coded.table_bits - promised) / n if n else None,
        "promised_bpb": promised / n if n else None,
        "container_bytes": coded.size,
        "container_bpb": 8 * coded.size / n if n else None,
        "packed_bytes": models.packed_bytes(model),
        "model_bytes": model_bytes,
        "code_bytes": code_bytes,
        "charged_bytes": charged,
        "charged_bpb": 8 * charged / n if n else None,
        "note": NOTE,
        "encode_kb_s": round(encode_rate, 3),
        "decode_kb_s": round(decode_rate, 3),
        "model_prefill_kb_s": round(rates["prefill"], 3),
        "model_step_kb_s": round(rates["step"], 3),
        "encode_over_prefill": round(encode_rate / rates["prefill"], 3),
        # Reading stored bytes back says nothing about the model's speed.
        "decode_over_step": None if coded.stored else round(decode_rate / rates["step"], 3),
        "coder_share": {
            "encode": round(coded.coder_seconds / coded.seconds, 4),
            "decode": round(decode_coder / decode_seconds, 4),
        },
        "device": str(place),
        "kernels": coded.kernels | (models.use_kernels(model) if header.threads else {}),
        "bitbyte": __version__,
        "environment": environment(),
    }
    record["record"] = write_record(record, folder).stem
    return record


def _percent(actual: float, expected: float) -> float | None:
    return 100 * (actual / expected - 1) if expected else None


def _receive(packed: Path, back: Path, step: Path, device: str) -> tuple[float, float, list[str]]:
    """Decode in a separate process: (seconds, seconds in the coder, modules it needed)."""
    words = [str(packed), str(back), str(step), device, str(torch.get_num_threads())]
    return tuple(child.run(RECEIVER, words, "decoding failed"))


@torch.no_grad()
def model_rates(model, lanes: int, seconds: float = 1.0) -> dict[str, float]:
    """kB/s of the model alone: "step" with ``lanes`` lanes, and "prefill" of whole windows."""
    T, place = model.config.seq_len, device_of(model)
    ids_ST = torch.randint(0, 256, (lanes, T), generator=torch.Generator().manual_seed(0))
    ids_ST = ids_ST.to(place)

    def step() -> int:
        state = model.init_state(lanes)
        for ids_S in ids_ST.T:
            logits, state = model.step(ids_S, state)
        logits.cpu()  # wait for the device
        return lanes * T

    def prefill() -> int:
        return model.logits(ids_ST[:32]).cpu()[..., 0].numel()

    rates = {}
    for name, work in (("step", step), ("prefill", prefill)):
        if name == "prefill":
            work()  # warm up
        n, clock = 0, time.perf_counter()
        while (spent := time.perf_counter() - clock) < seconds or not n:
            n += work()
        spent = time.perf_counter() - clock
        rates[name] = n / spent / 1000
    return rates


def exact_bytes(model) -> int:
    """Bytes of the weights in the smallest form that still decodes: no 32-bit number is shortened.

    A ternary layer computes with its signs and one scale per matrix; nothing else of it is needed.
    """
    in_layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, BitLinear))
    rest = sum(p.numel() for p in model.parameters()) - in_layers
    return models.packed_bytes(model) + 2 * rest


def markdown(records: list[dict]) -> str:
    """Table of certificates: bits per byte promised, paid and charged, and speeds.

    Leaves out files below LEAST_SHOWN bytes, whose header weighs too much, and files that were
    stored uncompressed.
    """
    lines = [
        "| model | file | bytes | promised | payload | gap | whole | with weights and code | "
        "encode | decode | coder |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|---|--:|",
    ]
    for r in sorted(records, key=lambda r: (r["model"], r["mode"], r["file"])):
        n = r["bytes"]
        if n < max(1, LEAST_SHOWN) or r["stored_bytes"] == n:
            continue
        decode, gap = f"{r['stored_bytes']:,} bytes are stored", "-"
        if not r["stored_bytes"]:
            gap = f"{r['gap_percent']:+.3f} %"
            decode = f"{r['decode_kb_s']:.2f} kB/s, {r['decode_over_step']:.2f} of its steps"
        seen = ", trained on it" if r.get("trained_on_it") else ""  # older ones do not say
        lines.append(
            f"| {cell(r['model'])}, {r['mode']}{seen} | {cell(r['file'])} "
            f"| {n:,} | {r['promised_bpb']:.4f} "
            f"| {r['payload_bits'] / n:.4f} | {gap} | {r['container_bpb']:.4f} "
            f"| {r['charged_bpb']:.3f} | {r['encode_kb_s']:.2f} kB/s, "
            f"{r['encode_over_prefill']:.2f} of its prefill | {decode} "
            f"| {max(r['coder_share'].values()):.1%} |"
        )
    return "\n".join(lines)


def all_tables(folder: Path | None = None) -> str:
    """Markdown: all certificates, then all comparisons with other compressors."""
    compared = read_records("compressors", folder)
    tables = [markdown(read_records("certificate", folder)), *map(baselines.table, compared)]
    return "\n\n".join(tables)


def summary(record: dict) -> str:
    """A certificate in a few lines."""
    r = record
    if not r["bytes"]:
        return f"{r['file']}: nothing to code, {r['container_bytes']} bytes; came back identical"
    gap = f"{r['stored_bytes']:,} bytes stored as they are, which is shorter"
    if not r["stored_bytes"]:
        gap = (
            f"{r['gap_percent']:+.3f} % ({r['mode']} tables {r['mode_cost_bpb']:+.4f} BPB, coder "
            f"{r['coder_gap_percent']:+.3f} %)"
        )
    steps = "stored, not decoded"
    if r["decode_over_step"] is not None:
        share = f"coder {r['coder_share']['decode']:.1%}"
        steps = f"{r['decode_over_step']:.2f} of the model's steps, {share}"
    note = ["  note: the model was trained on these bytes"] if r.get("trained_on_it") else []
    return "\n".join((
        f"{r['file']}: {r['bytes']:,} bytes, sha256 {r['sha256'][:16]}; came back identical",
        *note,
        f"  promised   {r['promised_bits'] / 8:,.0f} bytes, {r['promised_bpb']:.4f} bits per byte",
        f"  payload    {r['payload_bits'] / 8:,.0f} bytes, {gap}",
        f"  file       {r['container_bytes']:,} bytes, {r['container_bpb']:.4f} bits per byte",
        f"  charged    {r['charged_bytes']:,} bytes with weights {r['model_bytes']:,} and code "
        f"{r['code_bytes']:,}: {r['charged_bpb']:.4f} bits per byte",
        f"  encode     {r['encode_kb_s']:.2f} kB/s, {r['encode_over_prefill']:.2f} of the model's "
        f"prefill, coder {r['coder_share']['encode']:.1%}",
        f"  decode     {r['decode_kb_s']:.2f} kB/s, {steps}; {r['lanes']} lanes",
    ))  # fmt: skip
