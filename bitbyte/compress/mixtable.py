"""The mixer on files, with a model and without, beside other compressors: a record and its tables.

Each file is compressed in one process and restored in another, which gets nothing but the
compressed file (and the model), and compared.  Speeds are those of coding alone; memory is the peak
of the process that restores.  The promise is the cost by `costs`, which is what bitbyte eval --mix
says of the file.
"""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from bitbyte import __version__, checkpoint, models, runs
from bitbyte.compress import baselines, child, costs, streamed
from bitbyte.compress.container import plain_file
from bitbyte.compress.mixer import fast
from bitbyte.compress.mixer.codec import MB, MEMORY
from bitbyte.device import environment
from bitbyte.evaluate.evaluation import seen_by, trained_on
from bitbyte.evaluate.records import FORMATS, read_records
from bitbyte.evaluate.tables import cell
from bitbyte.files import BitbyteError, RunError, sha256_file
from bitbyte.shards import ByteStreamDataset

NONE, MODEL = "none", "model"  # names of our rows in a record
# What the processes run.  It prints what was done, and the peak of its memory in bytes.
CHILD = """
import json, sys
what, source, target, ckpt = sys.argv[1:]
from bitbyte.compress import mixed
if ckpt:
    from bitbyte import checkpoint
    from bitbyte.compress import streamed
    model, meta = checkpoint.load_model(ckpt)
if what == "out":
    done = mixed.compress([source], target, expert=streamed.Expert(model, meta) if ckpt else None)
else:
    find = lambda header: streamed.expert_for(header, model, meta, source)
    done = mixed.decompress(source, target, expert=find if ckpt else None)
try:  # of this program; what getrusage has on Linux may be the parent's
    lines = open("/proc/self/status").read().splitlines()
    peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
except (OSError, StopIteration):
    peak = None
    if sys.platform == "darwin":
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([done.size, done.seconds, done.with_model, peak]))
"""


def _child(what: str, source: Path, target: Path, ckpt: Path | None) -> list:
    return child.run(CHILD, [what, str(source), str(target), str(ckpt or "")], str(source))


def coded(path: Path, ckpt: Path | None) -> dict:
    """Size, speeds, memory of one file through two processes.  Raises RunError if it is not whole.

    ``with_model`` is False if there is none, or if it would not have helped.
    """
    n = path.stat().st_size
    with tempfile.TemporaryDirectory(prefix="bitbyte-") as folder:
        packed, back = Path(folder, "packed"), Path(folder, "back")
        size, out, with_model, _ = _child("out", path, packed, ckpt)
        _, again, _, peak = _child("back", packed, back, ckpt if with_model else None)
        if sha256_file(back) != sha256_file(path):
            raise RunError(f"{path} was not restored exactly; please report this")
    return {
        "bytes": size, "out_kb_s": _rate(n, out), "back_kb_s": _rate(n, again), "restored": True,
        "with_model": with_model, "memory_mb": peak and round(peak / MB),
    }  # fmt: skip


def _rate(n: int, seconds: float) -> float:
    return round(n / 1000 / max(seconds, 1e-9), 3)


def measure(
    paths: list[Path], ckpt: str | Path | None = None, *, others: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> dict:  # fmt: skip
    """A record of the mixer on these files, alone and, if ``ckpt`` is given, with this model.

    With ``others`` it also has the installed compressors (`baselines`).  ``say`` gets a line about
    each file.  Raises BitbyteError if the model cannot be mixed here, or two files have one name.
    """
    if why := fast.problem():
        raise BitbyteError(f"without llvmlite the mixer takes hours: {why}")
    paths = [plain_file(Path(path)) for path in paths]
    baselines.check_names(paths)
    step = expert = None
    meta: dict = {"data": {}, "files": {}}
    about: dict = {"model": NONE, "model_bytes": 0, "checkpoint": None}
    if ckpt is not None:
        step = runs.resolve(ckpt)
        model, meta = checkpoint.load_model(step)
        expert = streamed.Expert(model, meta)
        packed = runs.is_packed(step)
        about = {
            "model": runs.model_name(step),
            "model_bytes": step.stat().st_size if packed else models.packed_bytes(model),
            "checkpoint": meta["files"]["model.safetensors"]["sha256"],
        }
    _warm_up(step)
    files = {}
    for path in paths:
        files[path.name] = entry = _measured(path, step, expert, meta, others)
        say(summary(path.name, entry, about["model"]))
    left_out = baselines.compressors() if others else {}
    return {
        "format": FORMATS["mixer"], "mode": "mixed", **about, "memory_mb": MEMORY, "files": files,
        "missing": {n: c.missing for n, c in left_out.items() if c.squeeze is None},
        "bitbyte": __version__, "environment": environment(),
    }  # fmt: skip


def _warm_up(step: Path | None) -> None:
    """Let the mixer and the native engine compile and cache before anything is timed."""
    with tempfile.TemporaryDirectory(prefix="bitbyte-") as folder:
        source = Path(folder, "source")
        source.write_bytes(b"once upon a time " * 9)
        with contextlib.suppress(RunError):
            coded(source, step)


def _measured(path: Path, step: Path | None, expert, meta: dict, others: bool) -> dict:
    n, data = path.stat().st_size, path.read_bytes()
    sizes = {NONE: coded(path, None)}
    if step is not None:
        sizes[MODEL] = coded(path, step)
        if not sizes[MODEL]["with_model"]:
            sizes[MODEL] = sizes[NONE] | {"with_model": False}
    for row in sizes.values():
        told = expert if row["with_model"] else None
        row["promised_bits"] = float(costs.Mixed(told).bits(data).sum())
    seen = {"trained_on_it": False}
    if n and step is not None:
        seen = trained_on(ByteStreamDataset(path, 1), n, seen_by(meta))
    if others:
        sizes |= baselines.measure(path, leave_out=(baselines.MIXER,))
    return {"bytes": n, "sha256": sha256_file(path), **seen, "sizes": sizes}


def summary(name: str, entry: dict, model: str) -> str:
    """What was measured on one file, in a line for each way."""
    lines = [f"{name}: {entry['bytes']:,} bytes"]
    for row_name, row in entry["sizes"].items():
        shown = {NONE: "alone", MODEL: f"with {model}"}.get(row_name, row_name)
        bpb = 8 * row["bytes"] / max(entry["bytes"], 1)
        promise = row.get("promised_bits")
        more = f", promised {promise / 8:,.0f}" if promise is not None else ""
        more += "" if row["restored"] else ", not restored"
        more += ", left out" if row_name == MODEL and not row["with_model"] else ""
        lines.append(
            f"  {shown:24} {row['bytes']:11,} bytes, {bpb:.3f}{more}; "
            f"{row['out_kb_s'] or 0:,.1f} kB/s out, {row['back_kb_s'] or 0:,.1f} back"
        )
    return "\n".join(lines)


def tables(folder: Path | None = None) -> str:
    """Markdown of all records of this kind, the newest format of `table` each."""
    return "\n\n".join(table(record) for record in read_records("mixer", folder))


def table(record: dict) -> str:
    """Markdown: bits per byte by file, the model's gain, then totals with the model's file charged.

    The smallest size of a row is bold.  A gain is how much smaller the model makes a file.
    """
    files, model = record["files"], record["model"]
    first = next(iter(files.values()))["sizes"]
    others = [name for name in first if name not in (NONE, MODEL)]
    ours = [name for name in (NONE, MODEL) if name in first]
    head = ["file", "bytes", "alone", "BPB"]
    head += [f"with `{cell(model)}`", "BPB", "gain"] * (MODEL in first)
    lines = [_row([*head, *others]), "|---|" + "--:|" * (len(head) - 1 + len(others))]
    failed: set[str] = set()
    for name, entry in files.items():
        n, sizes = max(entry["bytes"], 1), entry["sizes"]
        lost = {other for other in others if not sizes[other]["restored"]}
        failed |= lost
        best = min(row["bytes"] for other, row in sizes.items() if other not in lost)

        def rate(which: str, n=n, sizes=sizes, best=best, lost=lost) -> str:
            text = f"{8 * sizes[which]['bytes'] / n:.3f}"
            return f"{text} (!)" if which in lost else _bold(text, sizes[which]["bytes"] == best)

        seen = ", trained on it" * bool(entry.get("trained_on_it"))
        cells = [cell(name) + seen, f"{entry['bytes']:,}"]
        for which in ours:
            cells += [f"{sizes[which]['bytes']:,}", rate(which)]
        if MODEL in first and sizes[MODEL]["with_model"]:
            cells.append(
                f"{100 * (1 - sizes[MODEL]['bytes'] / max(sizes[NONE]['bytes'], 1)):.1f} %"
            )
        elif MODEL in first:
            cells[-2:] = ["left out", cells[-1], ""]
        lines.append(_row([*cells, *map(rate, others)]))
    if failed:
        lines += ["", f"(!) {', '.join(sorted(failed))} did not give this file back."]
    return "\n".join([*lines, "", *_totals(record, [*ours, *others])])


def _totals(record: dict, names: list[str]) -> list[str]:
    files, model = record["files"], record["model"]
    total = max(1, sum(entry["bytes"] for entry in files.values()))
    lines = [
        f"| all {len(files)} files | bytes | BPB | with the model's file | BPB | kB/s out "
        "| kB/s back | memory |",
        "|---|" + "--:|" * 7,
    ]
    for name in names:
        rows = [(entry["bytes"], entry["sizes"][name]) for entry in files.values()]
        size = sum(row["bytes"] for _, row in rows)
        charged = size + record["model_bytes"] * (name == MODEL)
        peaks = [row["memory_mb"] for _, row in rows if row.get("memory_mb")]
        shown = {NONE: "alone", MODEL: f"with `{cell(model)}`"}.get(name, name)
        lines.append(_row([
            shown, f"{size:,}", f"{8 * size / total:.3f}", f"{charged:,}",
            f"{8 * charged / total:.3f}", baselines.rate_of(rows, "out_kb_s"),
            baselines.rate_of(rows, "back_kb_s"), f"{max(peaks):,} MB" if peaks else "",
        ]))  # fmt: skip
    return lines


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
