"""Commands about models on disk: runs, runs rm, models, export.

Their options are the parameters of functions, which import heavy modules inside.
"""

import time

from bitbyte.cli.options import Ckpt, Json, argument
from bitbyte.files import BitbyteError, artifacts, output, shown, user_path


def list_runs(json: Json = False) -> list[dict]:
    """List the trained models with size, data, bits per byte and age.

    Shows the runs in artifacts/checkpoints, newest first.  BPB is the last validation during
    training, and <= marks an upper bound (diffusion); bitbyte eval measures a whole data set.
    """
    from bitbyte.evaluate import listing, tables
    from bitbyte.runs import in_use

    runs = listing.list_runs()
    now, rows, document = time.time(), [], []
    for run in runs:
        size, busy = listing.disk_bytes(run.path), in_use(run.path)
        note = "training now" if busy else "" if run.finished else run.problem or "not finished"
        model = " ".join(filter(None, (run.family, run.variant, run.preset)))
        known = run.saved is not None
        rows.append((
            shown(run.name), model, f"{run.parameters / 1e6:.2g} M" if known else "",
            shown(run.data), f"{run.step:,}" if known else "", run.bpb_text,
            listing.age(now - run.saved) if known else "", _megabytes(size), shown(note),
        ))  # fmt: skip
        document.append(_facts(run) | {"disk_bytes": size, "in_use": busy})
    if not json:
        head = ("run", "model", "weights", "data", "steps", "BPB", "age", "disk", "")
        place = shown(artifacts("checkpoints"))
        table = tables.text_table([head, *rows], right={"weights", "steps", "BPB", "age", "disk"})
        print(table if rows else f"{place} holds no runs; train one first")
    return document


def _facts(run) -> dict:
    """A run as JSON; unknown facts are null."""
    saved = None
    if run.saved is not None:
        saved = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.saved))
    kind = None if run.bpb is None else "upper_bound" if run.is_bound else "exact"
    return {
        "name": run.name, "path": str(run.path), "family": run.family or None,
        "variant": run.variant or None, "preset": run.preset or None,
        "parameters": run.parameters, "data": run.data or None, "step": run.step,
        "bytes_seen": run.bytes_seen, "bpb": run.bpb, "kind": kind, "finished": run.finished,
        "saved": saved, "problem": run.problem or None,
    }  # fmt: skip


def remove_runs(
    names: argument(tuple[str, ...], "NAME [NAME ...]"),
    /,
    dry_run: bool = False,
    json: Json = False,
) -> list[dict]:
    """Remove trained models from the disk.

    Nothing is removed if one of them is being trained, or if its folder holds other files too.

    Args:
        names: run names, as bitbyte runs lists them, or run folders.
        dry_run: only say what would be removed.
    """
    from bitbyte.evaluate import listing

    if not names:
        raise BitbyteError("name the runs to remove; bitbyte runs lists them")
    folders = list(dict.fromkeys(map(listing.find_run, names)))
    for folder in folders:
        listing.check_removable(folder)
    document = [
        {"name": folder.name, "path": str(folder), "disk_bytes": listing.disk_bytes(folder)}
        for folder in folders
    ]
    if not dry_run:
        listing.remove(folders)
    for row in document if not json else ():
        word = "would remove" if dry_run else "removed"
        print(f"{word} {shown(row['path'])}, {_megabytes(row['disk_bytes'])}")
    return [row | {"removed": not dry_run} for row in document]


def list_models(json: Json = False) -> list[dict]:
    """List the models that come with bitbyte, and your own packed ones.

    Each is one file, which the other commands take by its name or path; your own are those in
    artifacts/models. BPB is the last validation during training, and <= marks an upper bound
    (diffusion).
    """
    from bitbyte.evaluate import listing, tables

    models = listing.list_models()
    document, rows = [_facts(facts) | {"name": facts.path.stem} for facts in models], []
    for facts, row in zip(models, document, strict=True):
        row["bytes"] = facts.path.stat().st_size
        weights = f"{facts.parameters / 1e6:.2g} M" if facts.parameters else ""
        where = facts.problem or str(facts.path.parent)
        rows.append((
            shown(row["name"]), f"{facts.family} {facts.variant}", weights, shown(facts.data),
            facts.bpb_text, _megabytes(row["bytes"]), shown(where),
        ))  # fmt: skip
    if not json:
        head = ("model", "family", "weights", "data", "BPB", "size", "where")
        print(tables.text_table([head, *rows], right={"weights", "BPB", "size"}))
    return document


def export(
    ckpt: Ckpt,
    out: argument(str, "OUT"),
    /,
    to: str = "bbm",
    allow_overwrite: bool = False,
    json: Json = False,
) -> dict:
    """Write a model as one small file, or for another engine.

    By default as a packed model, for bitbyte: ternary weights take five to a byte, tables of
    n-grams stay as they are, the rest is rounded to 16 bits, so scores may change in the fifth
    digit. The file holds no optimizer state: it can be used everywhere, but not trained on.
    With --to hf as a folder that transformers loads, with --to gguf as a file for llama.cpp, both
    in float32: models without tables of n-grams (--prior none), diffusion models for hf only.
    There the activations of a ternary model are not rounded, so its scores change a little.
    With --to hf-code as a folder that brings the model's own code, one readable file, which
    transformers runs with trust_remote_code=True only: for any model but diffusion in blocks, with
    the same scores. With --to hf-ternary (a folder) and gguf-ternary (a file) weights of a ternary
    transformer stay packed, and activations are rounded: in the first as here.

    Args:
        ckpt: run folder, step folder or run name.
        out: file to write, whose name ends in .bbm or .gguf, or folder for the forms of hf.
        to: bbm, hf, hf-ternary, hf-code, gguf or gguf-ternary.
        allow_overwrite: replace what is there.
    """
    from bitbyte import checkpoint
    from bitbyte.runs import PACKED

    if to != "bbm":
        return _export_to(to, ckpt, out, allow_overwrite, json)
    if user_path(out).suffix != PACKED:
        raise BitbyteError(f"{shown(out)} must end in {PACKED}")
    target = output(out, overwrite=allow_overwrite)
    size = checkpoint.export_packed(ckpt, target, overwrite=allow_overwrite)
    if not json:
        print(f"{shown(target)}: {size:,} bytes")
    return {"path": str(target), "bytes": size}


def import_model(
    source: argument(str, "MODEL"),
    out: argument(str, "[RUN]") = "",
    /,
    start: int | None = None,
    seq_len: int | None = None,
    allow_overwrite: bool = False,
    json: Json = False,
) -> dict:
    """Make a run of a model of another engine.

    MODEL is what export writes, a folder for transformers or a .gguf file, or another Llama,
    EuroBert or Mamba of the same kind: ids are bytes, the head is the embedding, no biases. A
    folder's own code is not run. The run can be used like any other, and be trained on with --init.

    Args:
        source: folder of transformers or .gguf file.
        out: run folder to write; default: of MODEL's name, in artifacts/checkpoints.
        start: byte that stands before every window, for a model of 256 ids, which has no start
            symbol.
        seq_len: bytes per window; default: as many as MODEL has positions for.
        allow_overwrite: replace the checkpoints in RUN.
    """
    from bitbyte.interop import importer

    path = user_path(source)
    model, note = importer.read_model(path, start=start, seq_len=seq_len)
    name = path.absolute().name
    run = user_path(out) if out else artifacts("checkpoints") / name.removesuffix(".gguf")
    folder = importer.write_run(model, run, name, overwrite=allow_overwrite)
    if not json:
        c = model.config
        print(f"{shown(run)}: {c.family} {c.linear}, {c.n_parameters:,} parameters"
              + f"; {note}" * bool(note))  # fmt: skip
    return {"path": str(folder), "family": model.config.family, "note": note}


def _export_to(to: str, ckpt: str, out: str, allow_overwrite: bool, json: bool) -> dict:
    """A model in the format of another engine."""
    from bitbyte import checkpoint, runs
    from bitbyte.interop import export as exports

    if to not in exports.FORMATS:
        raise BitbyteError(f"no format {to!r}; choose from bbm, {', '.join(exports.FORMATS)}")
    kind, _, special = to.partition("-")
    if kind == "gguf":
        if user_path(out).suffix != ".gguf":
            raise BitbyteError(f"{shown(out)} must end in .gguf")
        target = output(out, overwrite=allow_overwrite)
    else:
        target = user_path(out)
        if target.is_dir() and any(target.iterdir()) and not allow_overwrite:
            raise BitbyteError(
                f"{shown(out)} holds files; choose another folder, or --allow_overwrite"
            )
    model, _ = checkpoint.load_model(runs.resolve(ckpt))
    ternary = special == "ternary"
    if kind == "gguf":
        size = exports.write_gguf(model, target, ternary=ternary, overwrite=allow_overwrite)
    else:
        size = exports.write_hf(model, target, ternary=ternary, code=special == "code")
    note = exports.described(model, to)
    if not json:
        print(f"{shown(target)}: {size:,} bytes; {note}")
    return {"path": str(target), "bytes": size, "note": note}


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"
