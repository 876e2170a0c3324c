"""Commands of the workbench: run, lab, app, bench, papers.

Their options are the parameters of functions, which import heavy modules inside.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import tyro

from bitbyte.cli.options import Json, argument, pairs
from bitbyte.files import (
    BitbyteError,
    artifacts,
    is_stdout,
    output,
    output_folder,
    shown,
    user_path,
    write_atomic,
)


def exec_command(command: list[str]) -> NoReturn:
    """Replace this process with ``command``, so that signals reach it directly.

    Its kernels run in other folders, where a relative $BITBYTE_ARTIFACTS would be another one.
    """
    if os.environ.get("BITBYTE_ARTIFACTS"):
        os.environ["BITBYTE_ARTIFACTS"] = os.path.abspath(artifacts())
    if os.name == "nt":
        sys.exit(subprocess.call(command))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def run(
    notebooks: argument(tuple[str, ...], "[NOTEBOOK ...]") = (),
    /,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    out: str | None = None,
    resume: str | None = None,
    timeout: int = 7200,
) -> None:
    """Run the numbered notebooks in order and keep a page of each.

    For example: bitbyte run --set corpus=FOLDER --set minutes=10

    Args:
        notebooks: notebook files or numbers; default: all, in order.
        set: NAME=VALUE for the notebooks' parameters cells, repeatable; unknown names are errors.
        out: run folder; default: a time-stamped one in artifacts/runs.
        resume: run folder or "latest": continue after a failure, skipping what is done.
        timeout: seconds a cell may take.
    """
    from bitbyte.workbench.runner import run_notebooks

    settings = pairs("--set", set)
    run_notebooks(
        notebooks or None, out=out, settings=settings, resume=resume, cell_timeout=timeout
    )


def lab(port: int = 8888, browser: bool = True) -> None:
    """Open copies of the notebooks in JupyterLab.

    The copies are in artifacts/notebooks: edit and run them as you like. Those you have changed are
    kept. JupyterLab listens on this machine only and asks for a token.

    Args:
        port: first port to try.
        browser: open a browser window.
    """
    from bitbyte.workbench.notebooks import need_workbench, originals, working_copies

    folder, target = originals(), Path(os.path.abspath(artifacts("notebooks")))
    need_workbench("jupyterlab")
    for name in working_copies(folder, target):
        print(f"{shown(target / name)} is yours and kept; {shown(folder / name)} has changed since")
    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--LabApp.news_url=None"]  # else a question about news covers the notebook
    root = folder.parent if target.is_relative_to(folder.parent) else target.parent
    first = f"{target.relative_to(root).as_posix()}/00_index.ipynb"
    command += [f"--notebook-dir={root}", f"--LabApp.default_url=/lab/tree/{first}"]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    exec_command(command)


def bench(
    rows: argument(tuple[str, ...], "[ROW ...]") = (),
    /,
    repeats: int = 5,
    presets: tuple[str, ...] = ("micro", "small", "base"),
    threads: int | None = None,
    device: str = "cpu",
    out: str | None = None,
    allow_overwrite: bool = False,
    json: Json = False,
) -> dict:
    """Time bitbyte against comparable software.

    Both sides run in turn; the result is the ratio of their times.

    Args:
        rows: loader, step, decode, prefill, compress, mixer, mamba, pack, import; default: all.
        repeats: measurements of each side, of which the median is taken.
        presets: models of decode and prefill: micro, small, base, large (6 GB of memory).
        threads: CPU threads.
        device: cpu, or cuda for the row step.
        out: write the result as JSON to this file.
        allow_overwrite: replace the file if it exists.
    """
    from bitbyte.bench.bench import measure_rows, table
    from bitbyte.bench.inference import TARGETS

    target = None if out is None else output(out, overwrite=allow_overwrite)
    if json and target and is_stdout(target):
        raise BitbyteError("with --json standard output is taken; name another file")
    for name in presets:
        if name not in TARGETS:
            raise BitbyteError(f"no preset {name!r} in the bench; choose from {', '.join(TARGETS)}")
    record = measure_rows(
        rows, repeats=repeats, threads=threads, device=device, out=target, decode=presets
    )
    if not json:
        print(table(record))
    return record


# Voila's page would fetch icons from other sites; this policy forbids it.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self' ws://127.0.0.1:* blob: data:"
)
HEADERS = {"headers": {"Content-Security-Policy": POLICY}}


def app(
    ckpt: argument(str, "[CKPT]") = "wiki-small", /, port: int = 8866, browser: bool = True
) -> None:
    """Serve the sampling notebook as a web page.

    It is notebook 07 under Voila; it listens on this machine only and asks for a token.

    Args:
        ckpt: run folder, step folder, run name, or packed model to sample from.
        port: port to listen on.
        browser: open a browser window.
    """
    import importlib.util

    from bitbyte import runs
    from bitbyte.workbench.notebooks import originals, with_parameters

    if importlib.util.find_spec("voila") is None:
        raise BitbyteError('voila is missing: pip install "bitbyte[app]"')
    notebook = originals() / "07_sample.ipynb"
    if not notebook.is_file():
        raise BitbyteError(f"there is no {notebook}; run this in a checkout of bitbyte")
    copy = output_folder(artifacts("app")) / f"07_sample-{port}.ipynb"  # each app has its own
    write_atomic(copy, with_parameters(notebook, ckpt=str(runs.resolve(ckpt).resolve())))
    command = [
        sys.executable, "-m", "voila", str(copy), f"--port={port}", "--Voila.ip=127.0.0.1",
        "--token", "--strip_sources=True", f"--Voila.tornado_settings={HEADERS}",
    ]  # fmt: skip
    if not browser:
        command.append("--no-browser")
    exec_command(command)


def papers(
    names: argument(tuple[str, ...], "[PAPER ...]") = (),
    /,
    format: str = "html,pdf",
    engine: str = "typst",
    draft: bool = False,
    out: str | None = None,
) -> None:
    """Build the papers from records, as HTML and PDF.

    Their numbers and figures come from records.  Everything is checked first: records, hashes of
    their data, citations, cross-references. Errors are reported by paper and line, and then
    nothing is written.

    Args:
        names: papers by name (those in papers/) or path; default: all, and then a reference that
            no paper cites is an error too.
        format: html, pdf, md (with numbers and figures filled in, for plain pandoc); separate
            several with commas.
        engine: typst, or xelatex if it is installed.
        draft: write even with errors, and mark them in the text.
        out: folder to write to; default: artifacts/reports.
    """
    from bitbyte.papers import build

    formats = tuple(filter(None, (word.strip() for word in format.split(",")))) or ("",)
    names = [str(user_path(name)) for name in names]
    folder = None if out is None else user_path(out)
    paths, warnings = build.make(names, formats, engine, draft, folder)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for path in paths:
        print(shown(path))
