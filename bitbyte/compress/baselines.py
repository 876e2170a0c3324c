"""Compressors on the same files: their sizes and speeds, and published figures beside them.

Compressors that are not installed are left out and named.  One of them is our mixer, alone and,
where that is possible, with the certified model.  A general-purpose compressor needs no model, so
`table` gives sizes twice, without and with the model.  The size of the other programs
is not counted.  A zpaq archive holds names, dates and hashes: a few hundred bytes, which matter for
small files.
"""

import bz2
import gzip
import importlib.util
import lzma
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from bitbyte.compress import frames, segments
from bitbyte.compress.mixer import fast
from bitbyte.compress.mixer.codec import sizes_for
from bitbyte.evaluate.records import FORMATS
from bitbyte.evaluate.tables import cell
from bitbyte.files import BitbyteError, RunError, shown

ZSTD_WINDOW = 1 << 27  # bytes; level 22 looks back this far


class Compressor(NamedTuple):
    """A compressor and its inverse, bytes -> bytes, or else what to install to get them."""

    squeeze: Callable[[bytes], bytes] | None
    restore: Callable[[bytes], bytes] | None
    missing: str = ""


class Published(NamedTuple):
    """A published figure; ``counted`` says what its size includes."""

    system: str
    data: str
    bpb: float
    counted: str
    source: str


LTCB = "Large Text Compression Benchmark, as transcribed in 2026"
BELLARD = "bellard.org/ts_zip"
PUBLISHED = (
    Published("fx2-cmix-transformer", "enwik9", 0.803, "archive and decompressor", LTCB),
    Published("nncp v3.2", "enwik9", 0.858, "archive and decompressor", LTCB),
    Published("cmix v21", "enwik9", 0.866, "archive and decompressor", LTCB),
    Published("xz", "enwik9", 1.58, "archive and decompressor", LTCB),
    Published("zstd -22", "enwik9", 1.73, "archive and decompressor", LTCB),
    Published("gzip -9", "enwik9", 2.58, "archive and decompressor", LTCB),
    Published("cmix v19", "enwik8", 1.187, "archive", BELLARD),
    Published("ts_zip (RWKV 169M)", "enwik8", 1.106, "archive, not the model", BELLARD),
    Published("ts_zip (RWKV 169M)", "alice29.txt", 1.142, "archive, not the model", BELLARD),
)


MIXER, MIXED = "bitbyte none", "mixed"  # names: our mixer, alone and with the certified model


def compressors(expert=None) -> dict[str, Compressor]:
    """All compressors by name, including those that are not installed.

    ``expert``: the certified model as a `streamed.Expert`; any other cannot code files.
    """
    from bitbyte.compress import streamed

    by_name = {
        "gzip -9": Compressor(lambda data: gzip.compress(data, 9, mtime=0), gzip.decompress),
        "bzip2 -9": Compressor(lambda data: bz2.compress(data, 9), bz2.decompress),
        "xz -9e": Compressor(
            lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress
        ),
    }
    for name, module, make in (
        ("zstd --ultra -22", "zstandard", _zstd), ("brotli -q 11", "brotli", _brotli),
        ("ppmd (var. I, order 8)", "pyppmd", _ppmd),
    ):  # fmt: skip
        present = importlib.util.find_spec(module) is not None
        hint = f'pip install "bitbyte[compress]" ({module})'
        by_name[name] = make() if present else Compressor(None, None, hint)
    present = shutil.which("zpaq") is not None
    by_name["zpaq -m5"] = (
        Compressor(lambda data: _zpaq(data, True), lambda data: _zpaq(data, False))
        if present
        else Compressor(None, None, "the program zpaq (Debian: apt install zpaq)")
    )
    why = fast.problem()
    by_name[MIXER] = Compressor(None, None, f"llvmlite: {why}") if why else _mixer()
    if isinstance(expert, streamed.Expert):
        by_name[MIXED] = _mixer(expert)
    return by_name


def _mixer(expert=None) -> Compressor:
    def squeeze(data: bytes) -> bytes:
        n_buckets, ring_bits = sizes_for(len(data))
        header, sink = (
            frames.Header(archive=False, n_buckets=n_buckets, ring_bits=ring_bits),
            BytesIO(),
        )
        pieces = segments.frames(segments.pieces(BytesIO(data)))
        frames.write(sink, header, pieces, model=_begun(expert))
        return sink.getvalue()

    def restore(packed: bytes) -> bytes:
        source = frames.Source(BytesIO(packed), "the compressed data")
        header = frames.read_header(source)
        return b"".join(frames.read(source, header, frames.Totals(), model=_begun(expert)))

    return Compressor(squeeze, restore)


def _begun(expert):
    if expert is not None:
        expert.begin()
    return expert


def _zstd() -> Compressor:
    import zstandard

    return Compressor(
        zstandard.ZstdCompressor(level=22).compress,
        zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompress,
    )


def _brotli() -> Compressor:
    import brotli

    return Compressor(lambda data: brotli.compress(data, quality=11, lgwin=24), brotli.decompress)


def _ppmd() -> Compressor:
    import pyppmd

    setup = {"max_order": 8, "mem_size": 256 << 20, "variant": "I"}
    return Compressor(
        lambda data: pyppmd.compress(data, **setup), lambda data: pyppmd.decompress(data, **setup)
    )


def _zpaq(data: bytes, squeeze: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "data" if squeeze else "data.zpaq")
        given.write_bytes(data)
        words = ["add", "data.zpaq", "data", "-m5"] if squeeze else ["extract", "data.zpaq"]
        done = subprocess.run(
            ["zpaq", *words, "-threads", "1"], cwd=folder, check=False, capture_output=True
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
            raise RunError(f"zpaq failed: {shown(lines[-1] if lines else done.returncode)}")
        return Path(folder, "data.zpaq" if squeeze else "data").read_bytes()


def measure(path: Path, expert=None, leave_out: tuple[str, ...] = ()) -> dict[str, dict]:
    """Size and speed of every installed compressor, by name, on one file, which is read whole.

    ``leave_out``: names of compressors that are not wanted.

    Speeds are in kB of the original per second.  A compressor that does not restore the file has
    ``restored`` false and ``back_kb_s`` None; one that fails on it also has ``out_kb_s`` None, and
    the file's own size.
    """
    data = Path(path).read_bytes()
    rows = {}
    for name, compressor in compressors(expert).items():
        if compressor.squeeze is None or name in leave_out:
            continue
        clock = time.perf_counter()
        try:
            packed = compressor.squeeze(data)
        except (RunError, OSError):
            rows[name] = {"bytes": len(data), "out_kb_s": None, "back_kb_s": None}
            rows[name]["restored"] = False
            continue
        middle = time.perf_counter()
        try:
            restored = compressor.restore(packed) == data
        except Exception:  # each library raises its own; pyppmd rejects some of its own output
            restored = False
        end = time.perf_counter()
        back = round(len(data) / 1000 / max(end - middle, 1e-9), 1)
        rows[name] = {
            "bytes": len(packed),
            "out_kb_s": round(len(data) / 1000 / max(middle - clock, 1e-9), 1),
            "back_kb_s": back if restored else None,
            "restored": restored,
        }
    return rows


def check_names(paths: list[Path]) -> None:
    """Raise BitbyteError if two of the files have one name, by which a record knows them."""
    if len({path.name for path in paths}) < len(paths):
        raise BitbyteError("two of the files have the same name; the tables need different ones")


def comparison(certificates: list[dict], paths: list[Path], expert=None) -> dict:
    """One record of all compressors, and the certified model, on the files of ``certificates``.

    The compressors are timed now, on one thread; the model's speeds come from the certificates.
    ``model_bytes`` and ``code_bytes`` are what `table` charges, once for all files.
    """
    files = {}
    for certificate, path in zip(certificates, paths, strict=True):
        about = {key: certificate[key] for key in ("bytes", "sha256")}
        about["trained_on_it"] = certificate.get("trained_on_it", False)  # older ones do not say
        ours = {
            "restored": True, "bytes": certificate["container_bytes"],
            "out_kb_s": certificate["encode_kb_s"],
            # Reading stored bytes back says nothing about the model's speed.
            "back_kb_s": None if certificate["stored_bytes"] else certificate["decode_kb_s"],
        }  # fmt: skip
        files[certificate["file"]] = about | {"sizes": measure(path, expert) | {"model": ours}}
    first = certificates[0]
    return {
        "format": FORMATS["compressors"],
        "model": first["model"],
        "mode": first["mode"],
        "checkpoint": first["checkpoint"],
        "certificates": [certificate["record"] for certificate in certificates],
        "files": files,
        "model_bytes": first["model_bytes"],
        "code_bytes": first["code_bytes"],
        "missing": {n: c.missing for n, c in compressors().items() if c.squeeze is None},
        "published": [entry._asdict() for entry in PUBLISHED],
    }


def rate_of(sizes: list[tuple[int, dict]], way: str) -> str:
    """kB/s over all files whose speed is known (not None); a dash if there are none."""
    timed = [(n, row[way]) for n, row in sizes if n and row[way] is not None]
    seconds = sum(n / 1000 / rate for n, rate in timed)
    return f"{sum(n for n, _ in timed) / 1000 / seconds:,.1f}" if seconds else "-"


def table(record: dict) -> str:
    """Markdown: bits per byte by file; totals, speeds and the model charged; published figures.

    Speeds are as in `comparison`.  The size of a compressor's own program is not counted.
    """
    files = record["files"]
    names = list(next(iter(files.values()))["sizes"])
    model = cell(record["model"])
    titles = {name: cell(name) for name in names} | {"model": model, MIXED: f"bitbyte {model}"}
    lines = [
        "| file | bytes | " + " | ".join(titles[name] for name in names) + " |",
        "|---|--:|" + "--:|" * len(names),
    ]
    failed: set[str] = set()
    for file, entry in files.items():
        n = entry["bytes"]
        rates = {name: 8 * size["bytes"] / max(n, 1) for name, size in entry["sizes"].items()}
        lost = {name for name, size in entry["sizes"].items() if not size["restored"]}
        failed |= lost
        best = min(rate for name, rate in rates.items() if name not in lost)
        cells = [
            f"{r:.3f} (!)" if name in lost else f"**{r:.3f}**" if r == best else f"{r:.3f}"
            for name, r in rates.items()
        ]
        seen = ", trained on it" if entry.get("trained_on_it") else ""
        lines.append(f"| {cell(file)}{seen} | {n:,} | " + " | ".join(cells) + " |")
    if failed:
        lines += ["", f"(!) {', '.join(sorted(failed))} did not give this file back."]
    total = max(1, sum(entry["bytes"] for entry in files.values()))
    lines += [
        "",
        "| all files | bytes | BPB | with the model | BPB | kB/s out | kB/s back |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        sizes = [(entry["bytes"], entry["sizes"][name]) for entry in files.values()]
        size = sum(row["bytes"] for _, row in sizes)
        charged = size + (record["model_bytes"] + record["code_bytes"]) * (name in ("model", MIXED))
        rates = [rate_of(sizes, way) for way in ("out_kb_s", "back_kb_s")]
        lines.append(
            f"| {titles[name]} | {size:,} | {8 * size / total:.3f} | {charged:,} | "
            f"{8 * charged / total:.3f} | {rates[0]} | {rates[1]} |"
        )
    lines += ["", "| elsewhere | data | BPB | counted | source |", "|---|---|--:|---|---|"]
    lines += [
        f"| {p['system']} | {p['data']} | {p['bpb']} | {p['counted']} | {p['source']} |"
        for p in record["published"]
    ]
    return "\n".join(lines)
