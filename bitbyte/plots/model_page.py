"""A model in one HTML file: it writes, shows what bytes cost it, and compresses files, offline.

The page holds the kernels of the native engine as WebAssembly (engine.wasm.gz, made by
tests/tools/build_wasm.py), the operations of one step, and the memory they work on.  So its numbers
have the same bits as Python's.  Its content security policy allows this one script and no network.
"""

import base64
import ctypes
import gzip
import hashlib
import html
import re
from pathlib import Path

import numpy as np

from bitbyte.config import SamplingConfig
from bitbyte.files import BitbyteError
from bitbyte.plots.page import PAGE_CSS, SCRIPT, STYLE, _text, in_script

HERE = Path(__file__).parent
WASM = HERE / "engine.wasm.gz"
FIRST = 1 << 16  # bytes of the page's memory that stay empty, so that no address is near 0
ALIGN = 64
SOURCES = ("model_page_codec.js", "model_page.js")


def native_engine(model):
    """The engine that runs a model in a page as it does here.  Raises BitbyteError if none does."""
    import torch

    from bitbyte.kernels import engine

    if not model.exact:
        raise BitbyteError(
            "a page writes byte by byte, which a diffusion model of whole windows cannot; "
            "use bitbyte infill or app"
        )
    with torch.no_grad():
        native = engine.engine_for(model.eval())
    if native is None:
        raise BitbyteError(f"a page needs the native engine: {engine.described(model)}")
    if model.config.seq_len > native.blocks.remembered:
        raise BitbyteError(
            f"a page runs Mambas with windows of at most {native.blocks.remembered} bytes, "
            f"not {model.config.seq_len}"
        )
    return native


def memory(model) -> tuple[dict, bytes]:
    """(the engine of a model as JSON, its weights) for model_page.js.

    ``parts`` are [address, size, place in the weights], ``caches`` [address, size] of what is zero
    at the start of a window; ``operations`` are lists of a kernel's number and its arguments; the
    other numbers are addresses.  Raises BitbyteError.
    """
    native = native_engine(model)
    from bitbyte.kernels.native.engine import KERNELS, PIECE

    state = native.state(1)
    state.run(np.zeros((1, PIECE), np.int64), kind=np.uint32)
    step, (counting, counts_MV) = state.step, state.step._counting
    state.draw(np.zeros(1), SamplingConfig())
    drawing = state.sampler
    state.clear()
    programs = {"step": step.program, "count": counting, "draw": drawing.program}
    contexts = [program.context for program in programs.values()]  # the page fills them itself
    arrays = [a for program in programs.values() for a in program.kept] + contexts
    spans, size = _laid_out(arrays)

    def address(place: int) -> int:
        return next(place - start + at for start, stop, at in spans if start <= place < stop)

    numbers = {step.program.machine.addresses[k.__name__]: i for i, k in enumerate(KERNELS)}
    known = {a.ctypes.data for a in arrays}
    operations = {
        name: [
            [numbers[row[0]], *(address(v) if v in known else v for v in row[1:])]
            for row in program.rows
        ]
        for name, program in programs.items()
    }
    parts, weights = _filled([a for a in arrays if all(a is not c for c in contexts)], address)
    named = {
        "ids": step.ids_M, "logits": step.logits_MV, "counts": counts_MV,
        "points": drawing.points_N, "chosen": drawing.chosen_N, "kept": drawing.kept_NV,
        "settings": drawing.settings, "seen": drawing.seen, "context": step.program.context,
        "drawing": drawing.program.context,
    }  # fmt: skip
    facts = {
        "kernels": [k.__name__ for k in KERNELS], "size": size, "parts": parts,
        "operations": operations, "window": model.config.seq_len, "piece": PIECE,
        "caches": [[address(a.ctypes.data), a.nbytes] for kind in state.caches for a in kind],
    }  # fmt: skip
    return facts | {name: address(a.ctypes.data) for name, a in named.items()}, weights


def _laid_out(arrays: list[np.ndarray]) -> tuple[list[tuple[int, int, int]], int]:
    """([(start, stop, address in the page)] of memory that arrays lie in, where it ends).

    Arrays that share memory, as a part of another one does, stay together.
    """
    joined: list[list[int]] = []
    for start, stop in sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays):
        if joined and start < joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    first: dict[int, int] = {}  # in the order of the arrays
    for array in arrays:
        place = next(i for i, (a, b) in enumerate(joined) if a <= array.ctypes.data < b)
        first.setdefault(place, len(first))
    spans, at = [], FIRST
    for place in first:
        start, stop = joined[place]
        spans.append((start, stop, at))
        at += -(-(stop - start) // ALIGN) * ALIGN
    return spans, at


def _filled(arrays: list[np.ndarray], address) -> tuple[list[list[int]], bytes]:
    """([address, size, place in the weights], weights) of the arrays that are not all zero."""
    parts, pieces, size, seen = [], [], 0, set()
    for array in arrays:
        raw = ctypes.string_at(array.ctypes.data, array.nbytes)
        if array.ctypes.data not in seen and raw.strip(b"\0"):
            parts.append([address(array.ctypes.data), len(raw), size])
            pieces.append(raw)
            size += len(raw)
        seen.add(array.ctypes.data)
    return parts, b"".join(pieces)


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def source() -> str:
    """The page's own script."""
    return "\n".join((HERE / name).read_text("utf-8") for name in SOURCES)


def page(
    model, title: str, facts: dict[str, str], prompt: str = "The ", names: bytes = bytes(32)
) -> str:
    """The HTML file.  ``facts`` are rows of a table.  Raises BitbyteError; see `memory`.

    ``names`` are those of the model and its arithmetic in the header of a compressed file.
    """
    engine, weights = memory(model)
    engine["names"] = names.hex()
    script = f"\n{SCRIPT}\n{source()}\nstart();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}' 'wasm-unsafe-eval'; "
        "style-src 'unsafe-inline'"
    )
    rows = "\n".join(
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items()
    )
    typed = prompt.encode("utf-8", "replace").decode()
    values = {
        "policy": policy, "title": _text(title), "css": PAGE_CSS + STYLE, "facts": rows,
        "prompt": "\n" + html.escape(typed),  # HTML drops the first line break of a textarea
        "engine": in_script(engine), "kernels": base64.b64encode(WASM.read_bytes()).decode(),
        "weights": _packed(weights), "script": script,
    }  # fmt: skip
    body = (HERE / "model_page.html").read_text("utf-8")
    # In one pass, so that braces in a value stay as they are.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], body)
