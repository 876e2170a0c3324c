"""The commands of the command line, each a function whose parameters are its options.

Heavy imports happen inside the command that needs them.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from bitbyte.config import TrainConfig
from bitbyte.files import BitbyteError, artifacts, to_json, write_atomic
from bitbyte.generate import SamplingConfig
from bitbyte.vocab import printable

Flat = functools.partial(tyro.conf.arg, name="")


def pack(
    inputs: Positional[tuple[str, ...]],
    /,
    out: str | None = None,
    val_inputs: tuple[str, ...] = (),
    hf: str | None = None,
    name: str | None = None,
    field: str = "text",
    shard_size_gb: float = 1.0,
    sep_byte: int | None = None,
    val_fraction: float = 0.05,
    max_bytes: int | None = None,
    max_unpacked: int | None = None,
    seed: int = 0,
    allow_overwrite: bool = False,
) -> None:
    """Turn files, folders, TinyStories JSON, Hugging Face sets or a built-in corpus into shards.

    Args:
        inputs: files and folders, or the built-in names stories and stdlib.
        out: folder for the shards; default artifacts/datasets/NAME.
        val_inputs: files and folders that are the validation split.
        hf: Hugging Face data set instead of inputs, e.g. HuggingFaceTB/smollm-corpus.
        name: configuration of the Hugging Face set, e.g. cosmopedia-v2.
        field: text field of JSON and Hugging Face records.
        shard_size_gb: size of a shard, 10^9 bytes.
        sep_byte: byte after each document; default 0 for records and stories, none for files.
        val_fraction: share of the documents, by their hash, that is held out.
        max_bytes: stop after this many bytes.
        max_unpacked: largest size of an unpacked .gz .bz2 .xz .zst; default 2000 times it + 16 MiB.
        seed: of the built-in stories.
        allow_overwrite: replace the shards that are in the folder.
    """
    from bitbyte import corpora, shards

    if hf and inputs:
        raise BitbyteError("give inputs or --hf, not both")
    source = f"hf:{hf}" if hf else (inputs[0] if len(inputs) == 1 else list(inputs))
    if not source:
        raise BitbyteError("nothing to pack: name files, folders, stories, stdlib, or --hf SET")
    options = {
        "field": field, "name": name, "n_bytes": max_bytes, "seed": seed,
        "max_unpacked": max_unpacked,
    }  # fmt: skip
    documents, facts = corpora.open_corpus(source, **options)
    if sep_byte is None:
        sep_byte = facts.get("sep_byte")
    held_out = held_out_facts = None
    if val_inputs:
        held_out, held_out_facts = corpora.open_corpus(
            list(val_inputs), **options | {"split": "val"}
        )
    folder = Path(out) if out else artifacts("datasets", facts["name"])
    manifest = shards.pack(
        documents, folder, shard_size_gb=shard_size_gb, sep_byte=sep_byte,
        val_fraction=val_fraction, val_documents=held_out, val_source=held_out_facts,
        source=facts, max_bytes=max_bytes, overwrite=allow_overwrite,
    )  # fmt: skip
    print(f"{folder}: {manifest.summary()}")


def corpus(
    which: Positional[str],
    /,
    out: str,
    n_bytes: int = 10_000_000,
    seed: int = 0,
    split: str = "train",
    allow_overwrite: bool = False,
) -> None:
    """Write the built-in stories corpus as TinyStories JSON.

    Args:
        which: stories.
        out: JSON file to write.
        n_bytes: bytes of story text.
        seed: stories of another seed are other stories.
        split: train or val; the two never share a story by construction of their seeds.
        allow_overwrite: replace the file.
    """
    from bitbyte import stories

    if which != "stories":
        raise BitbyteError(f"no built-in corpus {which!r} to write as JSON; there is: stories")
    if Path(out).exists() and not allow_overwrite:
        raise BitbyteError(f"{out} exists; choose another --out, or --allow_overwrite")
    stories.write_json(Path(out), n_bytes=n_bytes, seed=seed, split=split)
    print(f"{out}: {Path(out).stat().st_size:,} bytes")


def train(config: Annotated[TrainConfig, Flat()], smoke_test: bool = False) -> None:
    """Train a model: bitbyte train ar --data DIR --steps 1000.

    Args:
        smoke_test: ten steps of the smallest model on synthetic bytes, on the CPU.
    """
    from bitbyte.train import train as run

    if not smoke_test:
        result = run(config)
        if os.environ.get("RANK", "0") == "0":
            _report_training(result)
        return
    import dataclasses

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "bytes.bin")
        data.write_bytes(bytes((i * i // 7 + i) % 251 for i in range(65536)))
        small = dataclasses.replace(
            config, preset="nano", seq_len=128, steps=10, minutes=None, epochs=None,
            curriculum=(), data=str(data), device="cpu", out=config.out or str(Path(folder, "run")),
        )  # fmt: skip
        result = run(small)
    print(f"smoke test passed: {result.step} steps, {result.bpb:.3f} bits per byte")


def _report_training(result) -> None:
    val = "" if result.val_bpb is None else f", validation {result.val_bpb:.4f}"
    rate = result.bytes_seen / max(result.seconds, 1e-9) / 1000
    print(
        f"step {result.step}: {result.bytes_seen:,} bytes in {result.seconds:.0f} s "
        f"({rate:.1f} kB/s), training {result.bpb:.4f} bits per byte{val}\n{result.run}"
    )


def evaluate(
    ckpt: Positional[str],
    /,
    data: str,
    split: str = "val",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    dtype: str = "fp32",
    device: str = "auto",
    threads: int | None = None,
    name: str | None = None,
    record: bool = True,
    out: str | None = None,
) -> None:
    """Exact bits per byte of a checkpoint on a whole split, with interval and result record.

    Args:
        ckpt: run folder, step folder or run name; stories-law is the built-in corpus' own law.
        data: packed folder, folder or glob of .bin, or one file.
        split: split of a packed folder.
        window: bytes of a window; default: the model's context.
        stride: bytes scored a window, the rest is context; default: the window.
        batch_size: windows at a time; changes the speed, not the number.
        limit: score only the first bytes.
        dtype: fp32, bf16, fp16 or auto.
        device: auto, cpu, cuda, mps.
        threads: CPU threads.
        name: what tables call the model; default: its run folder.
        record: write a result record.
        out: folder of the record; default artifacts/results.
    """
    from bitbyte import evaluate as evaluation
    from bitbyte.dist import choose_device, choose_dtype, prepare_process

    prepare_process(threads, deterministic=False)
    place = choose_device(device)
    model, meta, kernels, run = _load_for_scoring(ckpt, place)
    row, _ = evaluation.evaluate(
        model, data, name=name or run, split=split, window=window, stride=stride,
        batch_size=batch_size, dtype=choose_dtype(dtype, place), limit=limit, meta=meta,
        kernels=kernels,
    )  # fmt: skip
    interval = "too few windows for an interval"
    if row["interval"]:
        interval = "95 % {:.4f} to {:.4f}".format(*row["interval"])
    sign = "" if row["kind"] == "exact" else "<= "
    floor = "" if row["floor_bpb"] is None else f", floor {row['floor_bpb']:.4f}"
    print(
        f"{row['model']}: {sign}{row['bpb']:.4f} bits per byte "
        f"({interval}){floor}; {row['bytes']:,} bytes, window "
        f"{row['context']['window']}, stride {row['context']['stride']}, {row['dtype']}, "
        f"{row['seconds']:.1f} s"
    )
    if row["trained_on_it"]:
        print("note: the model was trained on these bytes; the results table leaves this out")
    if record:
        print(evaluation.write_record(row, Path(out) if out else None))


def _load_for_scoring(ckpt: str, device):
    """(model, meta, kernels, run name) of a checkpoint, or of the oracle."""
    from bitbyte import checkpoint, models

    if ckpt == "stories-law":
        from bitbyte.stories import StoriesLaw

        return StoriesLaw(), None, {}, ckpt
    folder = checkpoint.resolve(ckpt)
    model, meta = checkpoint.load_model(folder, device=device)
    return model, meta, models.use_kernels(model), folder.resolve().parent.name


def sample(
    ckpt: Positional[str],
    /,
    config: Annotated[SamplingConfig, Flat()],
    prompt: str = "",
    prompt_file: str | None = None,
    slide: str = "exact",
    out: str | None = None,
    device: str = "auto",
    metrics: bool = False,
    metrics_json: str | None = None,
) -> None:
    """Continue a prompt, byte by byte as the bytes come.

    Args:
        ckpt: run folder, step folder or run name.
        prompt: text to continue; may be empty.
        prompt_file: file whose bytes are the prompt.
        slide: past the context, "exact" uses all of it for every byte, "block" is faster.
        out: also write the generated bytes, unchanged, to this file.
        device: auto, cpu, cuda, mps.
        metrics: print time to the first byte, bytes/s and peak memory.
        metrics_json: write them to this file.
    """
    from bitbyte import checkpoint, generate
    from bitbyte.dist import choose_device

    model, _ = checkpoint.load_model(checkpoint.resolve(ckpt), device=choose_device(device))
    if prompt and prompt_file:
        raise BitbyteError("give --prompt or --prompt_file, not both")
    start = Path(prompt_file).read_bytes() if prompt_file else os.fsencode(prompt)
    shown, on_terminal = generate.Utf8Stream(), sys.stdout.isatty()

    def show(data: bytes) -> None:
        text = shown.push(data)
        if on_terminal:  # control characters could do anything to it
            text = "".join(ch if ch in "\n\t" else printable(ch.encode()) for ch in text)
        sys.stdout.write(text)
        sys.stdout.flush()

    show(start)
    result = generate.generate(
        model, start, config, slide=slide, on_byte=lambda byte: show(bytes([byte]))
    )
    sys.stdout.write(shown.flush() + "\n")
    for path, data in ((out, result.bytes), (metrics_json, to_json(result.metrics))):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(path), data)
    if metrics:
        print(json.dumps(result.metrics, indent=1), file=sys.stderr)


def run(
    notebooks: Positional[tuple[str, ...]] = (),
    /,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    out: str | None = None,
    resume: str | None = None,
    timeout: int = 7200,
) -> None:
    """Execute the numbered notebooks in order: bitbyte run --set corpus=FOLDER --set minutes=10.

    Args:
        notebooks: notebook files or numbers; default: all, in order.
        set: NAME=VALUE for the notebooks' parameters cells, repeatable; unknown names are errors.
        out: run folder; default: time-stamped under artifacts/runs.
        resume: run folder or "latest": go on after a failure, skipping what is done.
        timeout: seconds a cell may take.
    """
    from bitbyte.batch import run_notebooks

    settings = {}
    for item in set:
        key, equals, value = item.partition("=")
        if not equals:
            raise BitbyteError(f"--set {item!r} is not NAME=VALUE")
        settings[key] = value
    run_notebooks(
        notebooks or None, out=out, settings=settings, resume=resume, cell_timeout=timeout
    )


def lab(port: int = 8888, browser: bool = True) -> None:
    """Open JupyterLab on the notebooks; it listens on this machine only and asks for a token.

    Args:
        port: first port to try.
        browser: open a browser window.
    """
    folder = artifacts().parent / "notebooks"
    if not folder.is_dir():
        raise BitbyteError(f"there is no {folder}; run this in a checkout of bitbyte")
    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--notebook-dir=" + str(folder.parent), "--LabApp.default_url=/lab/tree/notebooks"]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    sys.exit(subprocess.call(command))


def results(
    runs: Positional[tuple[str, ...]] = (),
    /,
    readme: str | None = None,
    plot: str | None = None,
) -> None:
    """Show all result records as a table; write it into a README; draw training curves of runs.

    Args:
        runs: run folders whose curves --plot draws.
        readme: Markdown file whose results table is replaced.
        plot: path without suffix: writes PNG, PDF and the data.
    """
    from bitbyte import checkpoint, plots, report
    from bitbyte import evaluate as evaluation

    records = evaluation.read_records()
    print(report.bpb_table(records))
    if readme:
        report.write_results(Path(readme), records)
    if plot:
        folders = [checkpoint.resolve(run).parent for run in runs]
        if not folders:
            raise BitbyteError("nothing to plot: name the runs whose curves --plot should draw")
        rows = {folder.name: checkpoint.read_metrics(folder) for folder in folders}
        for path in plots.save(plots.training_curve(rows), Path(plot), {"rows": rows}):
            print(path)


def bench(
    rows: Positional[tuple[str, ...]] = (),
    /,
    repeats: int = 5,
    threads: int | None = None,
    out: str | None = None,
) -> None:
    """Time this package against its peers, alternately in one run, and print the ratios.

    Args:
        rows: loader, step, pack, import; default: all.
        repeats: measurements of each side; the median counts.
        threads: CPU threads.
        out: write the result as JSON to this file.
    """
    from bitbyte.bench import run_bench

    run_bench(rows, repeats=repeats, threads=threads, out=Path(out) if out else None)


def info(path: Positional[str] = "", /, verify: bool = False) -> None:
    """Say what this machine, a checkpoint or a data set is.

    Args:
        path: run folder, step folder, packed folder or file; empty: this machine.
        verify: hash every file and compare.
    """
    from bitbyte import checkpoint, shards

    if not path:
        print(to_json(checkpoint.environment()).decode(), end="")
        return
    manifest = shards.manifest_of(path)
    if manifest is not None:
        if verify:
            shards.verify(path)
        print(f"{path}: {manifest.summary()}" + (", all hashes match" if verify else ""))
        return
    if Path(path).is_file():
        data = shards.open_dataset(path, 1)
        print(f"{path}: {data.n_bytes:,} bytes, no manifest")
        return
    folder = checkpoint.resolve(path)
    meta = (
        checkpoint.load_step(folder, with_optim=True)[0] if verify else checkpoint.read_meta(folder)
    )
    print(to_json({k: v for k, v in meta.items() if k != "train"}).decode(), end="")


COMMANDS = {
    "pack": pack, "corpus": corpus, "train": train, "eval": evaluate, "sample": sample,
    "results": results, "run": run, "lab": lab, "bench": bench, "info": info,
}  # fmt: skip
