"""Commands for looking at a model: functions whose parameters are the options.

Heavy imports happen inside the command that needs them.
"""

import sys
from pathlib import Path

from tyro.conf import Positional

from bitbyte import hooks
from bitbyte.chat import chat
from bitbyte.files import (
    BitbyteError,
    artifacts,
    open_input,
    output,
    shown,
    user_path,
    write_atomic,
)

PAGE_BYTES = 1_000_000  # about 16 bytes of page a byte
# Voila's page would fetch icons from elsewhere; the browser is told not to.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self' ws://127.0.0.1:* blob: data:"
)
HEADERS = {"headers": {"Content-Security-Policy": POLICY}}


def entropy(
    ckpt: Positional[str],
    file: Positional[str],
    /,
    out: str | None = None,
    against: str | None = None,
    start: int = 0,
    limit: int = 100_000,
    window: int | None = None,
    stride: int | None = None,
    threshold: float | None = None,
    rule: str = "global",
    device: str = "auto",
    threads: int | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Surprisal and entropy of every byte of a file, as a page that needs no server.

    The page holds the text, tinted by what each byte cost, and shows the likeliest bytes at each
    place.  It makes no request, and what the file contains is shown as text.

    Args:
        ckpt: run folder, step folder or run name.
        file: file to look at, or a pipe; - is standard input.
        out: HTML file to write; without it only the summary is printed.
        against: second model; the page shows the difference too.
        start: first byte.
        limit: bytes to look at, at most.
        window: bytes of a window; default: the model's context.
        stride: bytes scored a window, the rest is context; default: the window.
        threshold: draw patch boundaries where the entropy is above so many bits.
        rule: global (entropy above the threshold) or jump (entropy rises by more than it).
        device: auto, cpu, cuda, mps.
        threads: CPU threads.
        allow_overwrite: replace the HTML file if it exists.
    """
    from bitbyte import byteview_page, checkpoint, lens_parts
    from bitbyte import entropy as lens
    from bitbyte.dist import choose_device, prepare_process

    if not 1 <= limit <= PAGE_BYTES or start < 0:
        raise BitbyteError(f"start is {start}, limit {limit}: from 0, and 1 to {PAGE_BYTES:,}")
    target = None if out is None else output(out, overwrite=allow_overwrite)
    name = "standard input" if file == "-" else shown(Path(file).name)
    data, size = _part(file, start, limit)
    of = f"of {size:,} bytes" if size is not None else "bytes"  # of a pipe the rest is not read
    prepare_process(threads, deterministic=False)
    costs = []
    for model_name in filter(None, (ckpt, against)):
        folder = checkpoint.resolve(model_name)
        model, _ = checkpoint.load_model(folder, device=choose_device(device))
        costs.append(lens.read(model, data, window=window, stride=stride))
        run = shown(folder.resolve().parent.name)
        kind = costs[-1].kind.replace("_", " ")
        print(f"{run}: {costs[-1].bpb:.4f} bits per byte ({kind}) over {len(data):,} {of}")
    facts = {
        "file": name, "model": str(ckpt),
        "bytes": f"{len(data):,} from {start:,}" + (f", of {size:,}" if size is not None else ""),
        "bits per byte": f"{costs[0].bpb:.4f} ({costs[0].kind.replace('_', ' ')})",
        "window / stride": f"{costs[0].window} / {costs[0].stride}",
    }  # fmt: skip
    (layers, *_) = lens_parts.layers_of(costs)
    flags = None
    if against:
        kind = costs[1].kind.replace("_", " ")
        facts["against"] = f"{against}, {costs[1].bpb:.4f} ({kind})"
    if threshold is not None:
        starts = lens.boundaries(costs[0].entropy, threshold, rule)
        stats = lens.patch_stats(starts, data)
        flags = (starts * byteview_page.START).astype("uint8")
        facts["patches"] = lens_parts.patch_words(stats)
        print(facts["patches"])
    if target is not None:
        page = byteview_page.page(
            data, layers, title=f"{name} under {ckpt}", top_ids=costs[0].top_ids,
            top_probs=costs[0].top_probs, flags=flags, facts=facts, start=start,
        )  # fmt: skip
        write_atomic(target, page.encode(), follow=True, overwrite=allow_overwrite)
        print(shown(target))


def _part(file: str, start: int, limit: int) -> tuple[bytes, int | None]:
    """(bytes from ``start``, how many the file has); None for a pipe, which is not read to the end.

    Raises BitbyteError if there are none.
    """
    with open_input(file) as (source, size):
        there = 0
        if size is not None:
            there = source.seek(start)
        while there < start and (piece := source.read(min(start - there, 1 << 20))):
            there += len(piece)
        data = source.read(limit)
    if not data:
        has = there if size is None else size
        raise BitbyteError(f"{shown(file)} has no byte at {start:,}: it has {has:,}")
    return data, size


def app(port: int = 8866, browser: bool = True) -> None:
    """Serve notebook 07 as a page with Voila; on this machine only, and it asks for a token.

    Args:
        port: port to listen on.
        browser: open a browser window.
    """
    import importlib.util

    if importlib.util.find_spec("voila") is None:
        raise BitbyteError('voila is missing: pip install "bitbyte[app]"')
    notebook = artifacts().parent / "notebooks" / "07_sample.ipynb"
    if not notebook.is_file():
        raise BitbyteError(f"there is no {notebook}; run this in a checkout of bitbyte")
    command = [
        sys.executable, "-m", "voila", str(notebook), f"--port={port}", "--Voila.ip=127.0.0.1",
        "--token", "--strip_sources=True", f"--Voila.tornado_settings={HEADERS}",
    ]  # fmt: skip
    if not browser:
        command.append("--no-browser")
    hooks.become(command)


def papers(
    names: Positional[tuple[str, ...]] = (),
    /,
    format: str = "html,pdf",
    engine: str = "typst",
    draft: bool = False,
    out: str | None = None,
) -> None:
    """Build the papers, their numbers and figures from records, as HTML and PDF.

    Everything is checked first: records, hashes of their data, citations, cross-references. What
    is wrong is named by paper and line, and nothing is written.

    Args:
        names: papers by name (those in papers/) or path; default: all, and then a reference that
            no paper cites is an error too.
        format: html, pdf, md (numbers and figures put in, for plain pandoc), with commas.
        engine: typst, or xelatex where it is installed.
        draft: mark what is wrong in the text, and write.
        out: folder to write to; default: artifacts/reports.
    """
    from bitbyte import papers as build

    formats = tuple(filter(None, (word.strip() for word in format.split(","))))
    names = [str(user_path(name)) for name in names]
    folder = None if out is None else user_path(out)
    paths, warnings = build.make(names, formats, engine, draft, folder)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for path in paths:
        print(shown(path))


COMMANDS = {"entropy": entropy, "chat": chat, "app": app, "papers": papers}
