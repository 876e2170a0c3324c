"""Commands that score: eval, compare, results, entropy.

Their options are the parameters of functions, which import heavy modules inside.
"""

import contextlib
import math
from pathlib import Path

from bitbyte.cli.options import NO_MODEL, Ckpt, File, Json, argument, refuse
from bitbyte.files import (
    BitbyteError,
    artifacts,
    open_input,
    output,
    output_folder,
    read_text,
    shown,
    user_path,
    write_atomic,
)


def evaluate(
    ckpt: Ckpt,
    /,
    data: str,
    split: str = "val",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    kind: tuple[str, ...] = (),
    draws: int | None = None,
    per_pass: int | None = None,
    seed: int = 0,
    dtype: str = "fp32",
    device: str = "auto",
    engine: str = "auto",
    threads: int | None = None,
    name: str | None = None,
    mix: bool = False,
    record: bool = True,
    out: str | None = None,
    json: Json = False,
) -> list[dict]:
    """Measure a model's bits per byte on all of a data set.

    The whole split is scored, with a 95 % interval, and a result record is written.  Causal models
    (ar, mamba) have an exact cost. Diffusion models have an upper bound, shown as <=, and the
    lengths of two codes: chain_rule:left_to_right and chain_rule:confidence. Those trained in
    blocks have all of them. With --mix the model joins the mixer of bitbyte compress, which learns
    from the bytes as it goes; that cost is a kind of its own.

    Args:
        ckpt: run folder, step folder or run name; stories-law is the true distribution of the
            built-in stories, uniform a model without knowledge, none the mixer alone.
        data: packed folder or its name, folder or glob of .bin, or one file.
        split: split of a packed folder.
        window: bytes per window; default: the model's context. With none, which reads one stream,
            it only groups the sums: give that of the model to compare with.
        stride: bytes scored per window, the rest is context; default: the window.
        batch_size: windows at a time; affects the speed, and the result only by rounding (up to
            some 1e-5 bits per byte for ternary models without the int8 kernel).
        limit: score only the first so many bytes.
        kind: exact, upper_bound, chain_rule:left_to_right, chain_rule:confidence, exact:mixed, or
            several of them; default: exact where there is one, else upper_bound.
        draws: masks per window for the upper bound; default 16.
        per_pass: bytes revealed per pass of a chain rule, default 1; more is faster and costs
            more bits.
        seed: seed of the masks.
        dtype: fp32, bf16, fp16 or auto.
        device: auto, cpu, cuda, mps.
        engine: how the model predicts: auto, native (refuses where it cannot) or torch.
        threads: CPU threads.
        name: the model's name in tables; default: its run folder.
        mix: score the model in the mixer (kind exact:mixed), as bitbyte compress would code the
            data; bitbyte eval none scores the mixer alone.
        record: write a result record.
        out: folder of the record; default artifacts/results.
    """
    from bitbyte import scoring
    from bitbyte.data.readers import find_data
    from bitbyte.device import choose_device, choose_dtype, prepare_process
    from bitbyte.evaluate import evaluation
    from bitbyte.evaluate.records import MIXED, write_record
    from bitbyte.kernels.engine import choose, described

    prepare_process(threads, deterministic=False)
    kinds = [*kind, *[MIXED] * (mix and MIXED not in kind)]
    if ckpt == NO_MODEL:
        kinds = kinds or [MIXED]
    grouping = window if ckpt == NO_MODEL else None
    if MIXED in kinds and (window, stride) != (grouping, None):
        raise BitbyteError(f"--window and --stride do not belong to {MIXED}: it reads one stream")
    # In the mixer a model computes as it does when a file is compressed, on the CPU.
    place = choose_device("cpu" if kinds == [MIXED] and device == "auto" else device)
    if name == "":
        raise BitbyteError("an empty name is not that of a model; drop --name")
    folder = output_folder(out) if record and out is not None else None
    model, meta, kernels, run = _load_for_scoring(ckpt, place, window)
    if hasattr(model, "engine"):
        choose(model, engine)
        kernels["engine"] = described(model, choose_dtype(dtype, place))
    # All kinds are checked before the first is scored, which may take a while.
    kinds = [_kind_for(model, one) for one in kinds or (None,)]
    if draws is not None and "upper_bound" not in kinds:
        raise BitbyteError(f"--draws belongs to the upper bound, not to {', '.join(kinds)}")
    if per_pass is not None and not any(one.startswith(scoring.CHAIN_RULE) for one in kinds):
        raise BitbyteError(f"--per_pass belongs to the chain rules, not to {', '.join(kinds)}")
    draws, per_pass = 16 if draws is None else draws, 1 if per_pass is None else per_pass
    source, rows = find_data(data, split), []
    for one in kinds:
        row, _ = evaluation.evaluate(
            model, source, name=shown(run if name is None else name), split=split, window=window,
            stride=stride, batch_size=batch_size, dtype=choose_dtype(dtype, place), limit=limit,
            meta=meta, kernels=kernels, kind=one, draws=draws, per_pass=per_pass, seed=seed,
            mixed=_mixer(model, meta) if one == MIXED else None,
        )  # fmt: skip
        print(_evaluation_line(row))
        if row["trained_on_it"]:
            print("note: the model was trained on these bytes; tables of documents leave this out")
        path = write_record(row, folder) if record else None
        if path:
            print(shown(path))
        rows.append(row | {"record": path and str(path)})
    return rows


def _kind_for(model, kind: str | None) -> str:
    """The kind of number that a user asked for.  Raises BitbyteError if the model has none such."""
    from bitbyte import scoring
    from bitbyte.evaluate.records import MIXED

    known = (*scoring.KINDS, MIXED)
    if kind not in (None, *known):
        raise BitbyteError(f"no kind {kind!r}; choose from {', '.join(known)}")
    if kind != MIXED:
        if model is None:
            raise BitbyteError(f"{NO_MODEL} is the mixer alone, which has no kind but {MIXED}")
        return scoring.kind_of(model, kind)
    if hasattr(model, "bits") or (model is not None and not model.exact):
        raise BitbyteError("only a model that predicts the next byte, or none, can be mixed")
    return kind


def _mixer(model, meta: dict | None):
    """The mixer, with a model as an expert unless it is None."""
    from bitbyte.compress import costs

    return costs.Mixed(None if model is None else costs.expert_of(model, meta), progress=True)


def _evaluation_line(row: dict) -> str:
    from bitbyte.evaluate.records import MIXED

    interval = "too few bytes for an interval"
    if row["interval"]:
        interval = "95 % interval of these bytes {:.4f} to {:.4f}".format(*row["interval"])
    sign = "<= " if row["kind"] == "upper_bound" else ""
    kind = "" if row["kind"] == "exact" else f", {row['kind']}"
    if row["draws"]:
        kind += f" from {row['draws']['per_window']} draws a window"
    if row["per_pass"]:
        kind += f" with {row['per_pass']} byte{'s' * (row['per_pass'] > 1)} a pass"
    floor = "" if row["floor_bpb"] is None else f", floor {row['floor_bpb']:.4f}"
    context = row["context"]
    how = f"window {context['window']}, stride {context['stride']}, {row['dtype']}"
    how = "learnt as it goes" if row["kind"] == MIXED else how
    return (
        f"{row['model']}: {sign}{row['bpb']:.4f} bits per byte ({interval}){kind}{floor}; "
        f"{row['bytes']:,} bytes, {how}, {row['seconds']:.1f} s"
    )


def compare(a: argument(str, "A"), b: argument(str, "B"), /, json: Json = False) -> dict:
    """Tell which of two results is better.

    Uses a paired bootstrap over the same bytes.  Its interval covers the choice of bytes, not the
    choice of training seed.

    Args:
        a: result record: a file, its name in artifacts/results, or the name of a model or run
            with a single record there.
        b: the other result record.
    """
    from bitbyte.evaluate import bootstrap

    records = [_record(name) for name in (a, b)]
    result = bootstrap.paired_bootstrap(*records)
    names = (bootstrap.label(*records), bootstrap.label(*reversed(records)))
    result = dict(zip("ab", names, strict=True)) | result
    if not json:
        print(_comparison_line(result))
    return result


def _comparison_line(result: dict) -> str:
    interval = "no interval"
    if result["interval"]:
        interval = "95 % interval of these bytes {:+.4f} to {:+.4f}".format(*result["interval"])
    note = f" ({result['note']})" if result["note"] else ""
    return (
        f"{result['a']} - {result['b']}: {result['difference']:+.4f} bits per byte ({interval}): "
        f"{result['verdict']}{note}"
    )


def _record(name: str) -> dict:
    """The result record meant by a file, a file name in artifacts/results, a model or a run."""
    from bitbyte.evaluate.records import find_record, read_record

    path = find_record(name)
    if path is None:
        matches = _records_of(name)
        if len(matches) != 1:
            stems = ", ".join(match.stem for match in matches[:5])
            problem = f"{name} has several: {stems}" if matches else f"there is no record {name}"
            raise BitbyteError(f"{problem}; name a file in {artifacts('results')}")
        (path,) = matches
    kind, record = read_record(path)
    if kind != "evaluation" or "blocks" not in record:
        raise BitbyteError(
            f"{path} is not a record of bits per byte with block sums, which compare needs; "
            "bitbyte eval writes one"
        )
    return record


def _records_of(name: str) -> list[Path]:
    """Records in artifacts/results of the model ``name``, or else of the run's newest step."""
    from bitbyte import checkpoint, runs
    from bitbyte.evaluate.records import MIXED, read_record

    paths = (path for path in sorted(artifacts("results").glob("*.json")) if path.is_file())
    files = {path: read_record(path) for path in paths}
    rows = {p: row for p, (kind, row) in files.items() if kind == "evaluation" and "blocks" in row}
    named = [path for path, row in rows.items() if row["model"] in (name, shown(name))]
    if named:  # the name alone means the model itself, not the mixer that it was scored in
        return [path for path in named if rows[path]["kind"] != MIXED] or named
    with contextlib.suppress(BitbyteError, OSError):  # OSError: too long for a file name
        saved = checkpoint.read_meta(runs.resolve(name))["files"]
        weights = saved["model.safetensors"]["sha256"]
        return [path for path, row in rows.items() if row.get("checkpoint") == weights]
    return []


def _load_for_scoring(ckpt: str, device, window: int | None):
    """(model, meta, kernels, run name) of a checkpoint, or of a model that needs none."""
    from bitbyte import checkpoint, models, runs

    if ckpt == NO_MODEL:
        return None, None, {}, ckpt
    if ckpt == "stories-law":
        from bitbyte.stories.grammar import StoriesModel

        return StoriesModel(), None, {}, ckpt
    if ckpt == "uniform":
        from bitbyte.scoring import Uniform

        return Uniform(256 if window is None else window), None, {}, ckpt
    folder = runs.resolve(ckpt)
    model, meta = checkpoint.load_model(folder, device=device)
    return model, meta, models.use_kernels(model), runs.model_name(folder)


def tasks(
    data: argument(str, "DATA"),
    out: argument(str, "FOLDER"),
    /,
    name: str | None = None,
    split: str = "val",
    window: int = 1024,
    limit: int | None = None,
    allow_overwrite: bool = False,
    json: Json = False,
) -> dict:
    """Write a task for lm-evaluation-harness over the bytes of a file.

    Its bits_per_byte is the number of bitbyte eval, for models of bitbyte and of transformers:
    python -m bitbyte.interop.lm_eval run --model bitbyte --model_args pretrained=RUN --tasks NAME
    --include_path FOLDER, or lm_eval run --model hf --model_args pretrained=EXPORTED. The bytes
    must be UTF-8 text; they are copied into FOLDER.

    Args:
        data: packed folder or its name, folder or glob of .bin, or one file.
        out: folder of tasks; several may share one.
        name: of the task; default: the name of DATA.
        split: split of a packed folder.
        window: bytes of a document at most, which is scored on its own: the context of the model.
        limit: only the first so many bytes, less a character that is cut through.
        allow_overwrite: replace the task's files if they exist.
    """
    from bitbyte.data.readers import find_data
    from bitbyte.interop import lm_eval
    from bitbyte.shards import open_dataset

    if limit is not None and limit < 1:
        raise BitbyteError(f"limit is {limit}; it must be at least 1")
    source = find_data(data)
    opened = open_dataset(source, 1, split=split)
    n_bytes = opened.n_bytes if limit is None else min(limit, opened.n_bytes)
    whole = opened.read(0, n_bytes).tobytes()
    if n_bytes < opened.n_bytes:
        whole = lm_eval.whole_characters(whole)
    place = Path(source)
    name = name or (place.name if place.is_dir() else place.stem).replace(" ", "_")
    path = lm_eval.write_task(whole, out, name, window=window, overwrite=allow_overwrite)
    if not json:
        print(f"{shown(path)}: {len(whole):,} bytes")
    return {"task": name, "path": str(path), "bytes": len(whole)}


def results(
    runs: argument(tuple[str, ...], "[RUN|GRID ...]") = (),
    /,
    readme: str | None = None,
    plot: str | None = None,
    copy: bool = False,
    allow_overwrite: bool = False,
    json: Json = False,
) -> list[dict]:
    """Show all results as a table, write them to a document, plot curves.

    Args:
        runs: folders of grids, whose results to take instead of those in artifacts/results;
            runs or models, to show only theirs. With --plot: runs whose training curves to draw;
            without any it draws the scaling card.
        readme: Markdown file in which to replace the tables: the text between the lines
            <!-- results --> and <!-- end of results -->, and likewise for certificates, mixer,
            passports, judged, anchors (passports beside published figures) and models (the packed
            ones that are found by name).
        plot: path without suffix, for PNG, PDF and the data.
        copy: copy the grids' results to artifacts/results, where compare and papers look.
        allow_overwrite: replace these files if they exist.
    """
    from bitbyte.compress import certify, mixtable
    from bitbyte.evaluate import anchors, listing, scaling, tables
    from bitbyte.evaluate import judge as judging
    from bitbyte.evaluate.records import read_records, write_record
    from bitbyte.plots import figures, style
    from bitbyte.runs import PACKED, read_metrics, resolve
    from bitbyte.workbench.grid import is_grid, records_of

    grids = [name for name in runs if is_grid(user_path(name))]
    runs = tuple(name for name in runs if name not in grids)
    folders = [resolve(run).parent for run in (runs if plot else ())]
    records = [record for name in grids for record in records_of(name)]
    records = records if grids else read_records("evaluation")
    passports = [] if grids else read_records("passport")
    if runs and plot is None:
        names = {Path(run).name.removesuffix(PACKED) for run in runs}
        records = [record for record in records if record["model"] in names]
        passports = [record for record in passports if record["model"] in names]
        if not (records or passports):
            raise BitbyteError(f"no results of {', '.join(sorted(names))}; bitbyte eval makes some")
    if copy and not grids:
        raise BitbyteError("--copy takes the results of grids; name the folder of one")
    for path in map(write_record, records) if copy else ():
        print(shown(path))
    if not json:
        print(tables.bpb_table(records))
        if passports:
            print(f"\npassports, see docs/passport.md\n\n{tables.passport_table(passports)}")
    if readme is not None:
        path = user_path(readme)
        parts = {
            "results": lambda: tables.results_markdown(records),
            "certificates": certify.all_tables,
            "mixer": mixtable.tables,
            "passports": lambda: tables.passports_markdown(passports),
            "anchors": lambda: anchors.markdown(passports),
            "judged": lambda: judging.tables(read_records("judged")),
            "models": lambda: listing.models_markdown(records, read_records("certificate")),
        }
        text = read_text(path)
        for name in [name for name in parts if f"<!-- {name} -->" in text] or ["results"]:
            made = parts[name]()
            if made or name != "mixer":  # the others say so where there is nothing
                tables.write_between(path, name, made)
    if plot is not None:
        stem = user_path(plot)
        for suffix in (".pdf", ".png", ".json"):
            output(stem.with_name(stem.name + suffix), overwrite=allow_overwrite)
        if runs:
            rows = {folder.name: read_metrics(folder) for folder in folders}
            figure, data = figures.training_curve(rows), {"rows": rows}
        else:
            card = scaling.curves(records)
            figure, data = figures.scaling_card(card), {"curves": [c.summary() for c in card]}
        for path in style.save(figure, stem, data, follow=True):
            print(shown(path))
    long = {"blocks", "environment"}  # needed only by `compare` and for bug reports
    return [{key: value for key, value in row.items() if key not in long} for row in records]


def judge(
    ckpt: Ckpt,
    /,
    data: str,
    by: str = "wiki",
    samples: int = 20,
    length: int = 160,
    holes: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    engine: str = "auto",
    threads: int | None = None,
    name: str | None = None,
    record: bool = True,
    out: str | None = None,
    json: Json = False,
) -> dict:
    """Measure how a model writes and fills holes, by another model.

    Every way that the model has of continuing prompts, and of filling holes, with the bits per byte
    that a better model, the judge, pays for the outcome, and the processor time it took. Writes a
    record.

    Args:
        ckpt: run folder, step folder, run name, or packed model.
        data: packed folder or its name, or one file, whose validation part gives prompts and holes.
        by: the judge, an ar model.
        samples: prompts to continue; 0 leaves this out.
        length: bytes of a sample.
        holes: holes to fill; 0 leaves this out.
        temperature: of the draws when writing; holes are filled with the likeliest bytes.
        seed: of the draws.
        engine: how the model computes next bytes: auto, native or torch.
        threads: CPU threads.
        name: the model's name in tables.
        record: write a result record.
        out: folder of the record; default artifacts/results.
    """
    from bitbyte import checkpoint, runs
    from bitbyte.data.readers import find_data
    from bitbyte.device import prepare_process
    from bitbyte.evaluate import judge as judging
    from bitbyte.evaluate.records import write_record
    from bitbyte.evaluate.tables import text_table
    from bitbyte.kernels.engine import choose

    folder = output_folder(artifacts("results") if out is None else out) if record else None
    prepare_process(threads, deterministic=False)
    found = runs.resolve(ckpt)
    model, meta = checkpoint.load_model(found)
    judge_model, _ = checkpoint.load_model(runs.resolve(by))
    choose(model, engine, threads)
    made = judging.record(
        model, judge_model, str(find_data(data, "val")), name=name or runs.model_name(found),
        judge_name=by, meta=meta, samples=samples, length=length, holes=holes,
        temperature=temperature, seed=seed,
    )  # fmt: skip
    if not json:
        for rows in judging.rows_of(made):
            print(text_table(rows, right=rows[0][1:]) + "\n")
    if folder is not None:
        print(shown(write_record(made, folder)))
    return made


PAGE_BYTES = 1_000_000  # at about 16 bytes of page per byte


def entropy(
    ckpt: Ckpt,
    file: File,
    /,
    out: str | None = None,
    against: str | None = None,
    start: int = 0,
    limit: int = 100_000,
    window: int | None = None,
    stride: int | None = None,
    threshold: float | None = None,
    rule: str | None = None,
    mix: bool = False,
    device: str = "auto",
    threads: int | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Show what each byte of a file costs a model, as a web page.

    The page holds the text, tinted by what each byte cost (its surprisal), and shows the entropy
    and the likeliest bytes at each position.  It needs no server and makes no requests, and
    whatever the file contains is shown as plain text.

    Args:
        ckpt: run folder, step folder or run name.
        file: file to look at, or a pipe; - is standard input.
        out: HTML file to write; without it only the summary is printed.
        against: second model, to show the difference too.
        start: first byte.
        limit: maximum number of bytes to look at.
        window: bytes per window; default: the model's context.
        stride: bytes scored per window, the rest is context; default: the window.
        threshold: entropy in bits at which to draw patch boundaries, see --rule.
        rule: global (entropy above the threshold, the default) or jump (entropy rises by more than
            it).
        mix: show also what the byte costs in the mixer of bitbyte compress, which has the model as
            an expert and learns as it goes.
        device: auto, cpu, cuda, mps.
        threads: CPU threads.
        allow_overwrite: replace the HTML file if it exists.
    """
    from bitbyte import checkpoint, runs
    from bitbyte.device import choose_device, prepare_process
    from bitbyte.evaluate.entropy import boundaries, patch_stats, read
    from bitbyte.plots import lens_text
    from bitbyte.plots.page import START, page

    if not 1 <= limit <= PAGE_BYTES or not 0 <= start < 2**62:
        raise BitbyteError(
            f"start is {start} and limit {limit}; start must be at least 0 and limit from 1 to "
            f"{PAGE_BYTES:,}"
        )
    if threshold is None:
        refuse("without --threshold", rule=rule is not None)
    elif not math.isfinite(threshold):
        raise BitbyteError(f"threshold is {threshold}; it must be a number of bits")
    target = None if out is None else output(out, overwrite=allow_overwrite)
    name = "standard input" if file == "-" else shown(Path(file).name)
    data, size = _part(file, start, limit)
    of = f"of {size:,} bytes" if size is not None else "bytes"  # a pipe is not read to its end
    prepare_process(threads, deterministic=False)
    costs = []
    for model_name in (ckpt,) if against is None else (ckpt, against):
        folder = runs.resolve(model_name)
        model, meta = checkpoint.load_model(folder, device=choose_device(device))
        costs.append(read(model, data, window=window, stride=stride))
        run = shown(runs.model_name(folder))
        kind = costs[-1].kind.replace("_", " ")
        print(f"{run}: {costs[-1].bpb:.4f} bits per byte ({kind}) over {len(data):,} {of}")
        if mix:
            from bitbyte.compress.costs import with_mixed

            costs[-1] = with_mixed(costs[-1], model, meta)
            print(f"{run}: {costs[-1].mixed.mean():.4f} in the mixer, which learns as it goes")
    facts = {
        "file": name, "model": str(ckpt),
        "bytes": f"{len(data):,} from {start:,}" + (f", of {size:,}" if size is not None else ""),
        "bits per byte": f"{costs[0].bpb:.4f} ({costs[0].kind.replace('_', ' ')})",
        "window / stride": f"{costs[0].window} / {costs[0].stride}",
    }  # fmt: skip
    if mix:
        facts["in the mixer"] = f"{costs[0].mixed.mean():.4f}"
    (layers, *_) = lens_text.layers_of(costs)
    flags = None
    if against is not None:
        kind = costs[1].kind.replace("_", " ")
        facts["against"] = f"{against}, {costs[1].bpb:.4f} ({kind})"
    if threshold is not None:
        starts = boundaries(costs[0].entropy, threshold, rule or "global")
        stats = patch_stats(starts, data)
        flags = (starts * START).astype("uint8")
        facts["patches"] = lens_text.patch_words(stats)
        print(facts["patches"])
    if target is not None:
        html = page(
            data, layers, title=f"{name} under {ckpt}", top_ids=costs[0].top_ids,
            top_probs=costs[0].top_probs, flags=flags, facts=facts, start=start,
        )  # fmt: skip
        write_atomic(target, html.encode(), follow=True, overwrite=allow_overwrite)
        print(shown(target))


def _part(file: str, start: int, limit: int) -> tuple[bytes, int | None]:
    """(bytes from ``start``, size of the file); the size of a pipe, not read to its end, is None.

    Raises BitbyteError if there are no bytes.
    """
    with open_input(file) as (source, size):
        position = 0
        if size is not None:
            position = source.seek(start)
        while position < start and (piece := source.read(min(start - position, 1 << 20))):
            position += len(piece)
        data = source.read(limit)
    if not data:
        has = position if size is None else size
        raise BitbyteError(f"{shown(file)} has no byte at {start:,}: it has {has:,}")
    return data, size
