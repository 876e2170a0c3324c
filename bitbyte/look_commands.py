"""Commands for looking at a model: functions whose parameters are the options.

Heavy imports happen inside the command that needs them.
"""

import sys
from pathlib import Path

from tyro.conf import Positional

from bitbyte import hooks
from bitbyte.chat import chat
from bitbyte.files import BitbyteError, artifacts, write_atomic

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
) -> None:
    """Surprisal and entropy of every byte of a file, as a page that needs no server.

    The page holds the text, tinted by what each byte cost, and shows the likeliest bytes at each
    place.  It makes no request, and what the file contains is shown as text.

    Args:
        ckpt: run folder, step folder or run name.
        file: file to look at.
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
    """
    from bitbyte import byteview_page, checkpoint, lens_parts
    from bitbyte import entropy as lens
    from bitbyte.dist import choose_device, prepare_process

    path = Path(file)
    if not path.is_file():
        what = "a folder, give a file" if path.is_dir() else "not there"
        raise BitbyteError(f"{file} is {what}")
    if not 1 <= limit <= PAGE_BYTES or start < 0:
        raise BitbyteError(f"start is {start}, limit {limit}: from 0, and 1 to {PAGE_BYTES:,}")
    with open(path, "rb") as source:
        source.seek(start)
        data = source.read(limit)
    if not data:
        raise BitbyteError(f"{file} has no byte at {start:,}: it has {path.stat().st_size:,}")
    prepare_process(threads, deterministic=False)
    costs = []
    for name in filter(None, (ckpt, against)):
        folder = checkpoint.resolve(name)
        model, _ = checkpoint.load_model(folder, device=choose_device(device))
        costs.append(lens.read(model, data, window=window, stride=stride))
        run = folder.resolve().parent.name
        kind = costs[-1].kind.replace("_", " ")
        size = f"{len(data):,} of {path.stat().st_size:,} bytes"
        print(f"{run}: {costs[-1].bpb:.4f} bits per byte ({kind}) over {size}")
    facts = {
        "file": path.name, "model": str(ckpt),
        "bytes": f"{len(data):,} from {start:,}, of {path.stat().st_size:,}",
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
    if out:
        page = byteview_page.page(
            data, layers, title=f"{path.name} under {ckpt}", top_ids=costs[0].top_ids,
            top_probs=costs[0].top_probs, flags=flags, facts=facts, start=start,
        )  # fmt: skip
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(out), page.encode())
        print(out)


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
    paths, warnings = build.make(names, formats, engine, draft, out)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for path in paths:
        print(path)


COMMANDS = {"entropy": entropy, "chat": chat, "app": app, "papers": papers}
