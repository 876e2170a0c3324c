"""Commands for data, training and the workbench: functions whose parameters are the options.

Heavy imports happen inside the command that needs them.
"""

import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from bitbyte import hooks
from bitbyte.config import TrainConfig
from bitbyte.files import (
    BitbyteError,
    artifacts,
    is_stdout,
    output,
    read_text,
    replacing,
    shown,
    user_path,
)

Flat = functools.partial(tyro.conf.arg, name="")


def pack(
    inputs: Positional[tuple[str, ...]],
    /,
    out: str | None = None,
    val_inputs: tuple[str, ...] = (),
    hf: str | None = None,
    name: str | None = None,
    field: str | None = None,
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
        field: text field of JSON and Hugging Face records; default text, in JSON also story.
        shard_size_gb: size of a shard, 10^9 bytes.
        sep_byte: byte after each document; default 0 for records and stories, none for files.
        val_fraction: share of the documents, by their hash, that is held out.
        max_bytes: stop after this many bytes.
        max_unpacked: largest size of an unpacked .gz .bz2 .xz .zst; default 2000 times it + 16 MiB.
        seed: of the built-in stories.
        allow_overwrite: replace the shards that are in the folder.
    """
    from bitbyte import corpora, shards

    inputs, val_inputs = (tuple(str(user_path(name)) for name in x) for x in (inputs, val_inputs))
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
    folder = artifacts("datasets", facts["name"]) if out is None else user_path(out)
    manifest = shards.pack(
        documents, folder, shard_size_gb=shard_size_gb, sep_byte=sep_byte,
        val_fraction=val_fraction, val_documents=held_out, val_source=held_out_facts,
        source=facts, max_bytes=max_bytes, overwrite=allow_overwrite,
    )  # fmt: skip
    print(f"{shown(folder)}: {manifest.summary()}")


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
    target = output(out, overwrite=allow_overwrite)
    with tempfile.TemporaryDirectory(prefix="bitbyte-") as folder:
        made = Path(folder, "stories.json")
        stories.write_json(made, n_bytes=n_bytes, seed=seed, split=split)
        with open(made, "rb") as source, replacing(target, overwrite=allow_overwrite) as sink:
            shutil.copyfileobj(source, sink)
        size = made.stat().st_size
    print(f"{shown(target)}: {size:,} bytes", file=sys.stderr if is_stdout(target) else sys.stdout)


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
    exact = "masked_bpb" not in result.metrics[-1] if result.metrics else True
    sign, unit = ("", "bits per byte") if exact else ("<= ", "bits per masked byte")
    val = "" if result.val_bpb is None else f", validation {sign}{result.val_bpb:.4f}"
    rate = result.bytes_seen / max(result.seconds, 1e-9) / 1000
    print(
        f"step {result.step}: {result.bytes_seen:,} bytes in {result.seconds:.0f} s "
        f"({rate:.1f} kB/s), training {result.bpb:.4f} {unit}{val}\n{shown(result.run)}"
    )


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
    notebooks = [str(user_path(name)) for name in notebooks]
    out, resume = (None if name is None else str(user_path(name)) for name in (out, resume))
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
    command += ["--LabApp.news_url=None"]  # else it asks, in front of the notebook
    command += ["--notebook-dir=" + str(folder.parent), "--LabApp.default_url=/lab/tree/notebooks"]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    hooks.become(command)


def results(
    runs: Positional[tuple[str, ...]] = (),
    /,
    readme: str | None = None,
    plot: str | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Show all result records as a table; write it into a README; draw training curves of runs.

    Args:
        runs: run folders whose curves --plot draws.
        readme: Markdown file whose results table is replaced, and its certificates if it has the
            marks for them.
        plot: path without suffix: writes PNG, PDF and the data.
        allow_overwrite: replace these files if they exist.
    """
    from bitbyte import certify, checkpoint, plots, report
    from bitbyte.records import read_records

    records = read_records("evaluation")
    print(report.bpb_table(records))
    if readme is not None:
        path = user_path(readme)
        report.write_results(path, records)
        if "<!-- certificates -->" in read_text(path):
            report.write_between(path, "certificates", certify.all_tables())
    if plot is not None:
        folders = [checkpoint.resolve(run).parent for run in runs]
        if not folders:
            raise BitbyteError("nothing to plot: name the runs whose curves --plot should draw")
        stem = user_path(plot)
        for suffix in (".pdf", ".png", ".json"):
            output(stem.with_name(stem.name + suffix), overwrite=allow_overwrite)
        rows = {folder.name: checkpoint.read_metrics(folder) for folder in folders}
        for path in plots.save(plots.training_curve(rows), stem, {"rows": rows}):
            print(shown(path))


def bench(
    rows: Positional[tuple[str, ...]] = (),
    /,
    repeats: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    out: str | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Time this package against its peers, alternately in one run, and print the ratios.

    Args:
        rows: loader, step, mamba, pack, import; default: all.
        repeats: measurements of each side; the median counts.
        threads: CPU threads.
        device: cpu, or cuda for the row step.
        out: write the result as JSON to this file.
        allow_overwrite: replace the file if it exists.
    """
    from bitbyte.bench import run_bench

    target = None if out is None else output(out, overwrite=allow_overwrite)
    run_bench(rows, repeats=repeats, threads=threads, device=device, out=target)


COMMANDS = {
    "pack": pack, "corpus": corpus, "train": train, "results": results, "run": run, "lab": lab,
    "bench": bench,
}  # fmt: skip
