"""Bytes with numbers on them as HTML: a static view and a self-contained page.

`Columns` hold what is shown for N bytes.  `pack` is their only binary form: the widget (`ByteView`)
sends it to the browser, `page` stores it in the file, and byteview.js reads both.

Every byte of a file is untrusted: it is escaped here, the script only ever turns it into text
nodes, and the page's content security policy forbids other scripts and the network.
"""

import base64
import dataclasses
import hashlib
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unicodedata import category

import numpy as np

from bitbyte import files
from bitbyte.files import BitbyteError
from bitbyte.vocab import byte_label

GIVEN = 1  # not made by a model: no tint, a line below
MASKED = 2  # a hidden byte: a hatched box
START = 4  # a patch begins here: a line before the byte
CHANGED = 8  # underlined
LOCKED = 16  # a line above
FLAG_NAMES = {
    GIVEN: "given",
    MASKED: "hidden",
    START: "patch start",
    CHANGED: "changed",
    LOCKED: "locked",
}
HERE = Path(__file__).parent
PARTS = ("byteview_bytes.js", "byteview_rows.js", "byteview.js")  # joined, one ES module
SCRIPT = "".join(HERE.joinpath(name).read_text("utf-8") for name in PARTS)
STYLE = HERE.joinpath("byteview.css").read_text("utf-8")
UNITLESS = ("rank", "step")  # every other layer is in bits unless units say otherwise
UNSEEN = ("Cc", "Cf", "Cn", "Co", "Zl", "Zp")  # invisible, or move their neighbors
WARM, COLD = "213,94,0", "0,114,178"  # Okabe-Ito vermillion and blue: above and below zero
HATCHED = "repeating-linear-gradient(45deg,#8888 0 2px,transparent 2px 5px)"
STATIC_LIMIT = 8192  # bytes; about 200 characters of HTML each
PAGE_STATE = {
    "cursor": -1,
    "selection": [0, 0],
    "choice": [],
    "hex": False,
    "wrap": True,
    "low": None,
    "high": None,
    "height": 560,
    "controls": True,
    "locked": True,
}
MEANING = (  # of the tint, for whoever gets a page by mail
    "<p>The darker a byte, the more bits it cost: the less the model had expected it. Point at a "
    "byte, or go to it with the arrow keys, to see what the model expected instead.</p>\n"
)
PAGE_CSS = """
:root { color-scheme: light dark; --jp-ui-font-color1: #222; --jp-layout-color1: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --jp-ui-font-color1: #e8e8e8; --jp-layout-color1: #181818; }
}
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1100px; margin: 1em auto; padding: 0 1em;
       color: var(--jp-ui-font-color1); background: var(--jp-layout-color1); }
h1 { font-size: 1.3em; overflow-wrap: anywhere; }
th, td { text-align: left; padding: 0 1em 0 0; vertical-align: top; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """N bytes and what is known about each; NaN in a layer and probability 0 mean unknown."""

    data: np.ndarray  # uint8 (N,)
    flags: np.ndarray  # uint8 (N,)
    layers: dict[str, np.ndarray]  # float32 (N,) each
    ids: np.ndarray  # uint8 (N, K), the likeliest bytes at this position
    probs: np.ndarray  # float32 (N, K)

    def __len__(self) -> int:
        return len(self.data)

    def take(self, where) -> "Columns":
        """The rows ``where`` (a slice or positions)."""
        return Columns(
            self.data[where],
            self.flags[where],
            {name: values[where] for name, values in self.layers.items()},
            self.ids[where],
            self.probs[where],
        )


def columns(
    data: bytes,
    layers: Mapping[str, Sequence[float]] | None = None,
    *,
    top_ids=None,
    top_probs=None,
    flags=None,
) -> Columns:
    """Checked copies of everything.  Raises BitbyteError if a column has another length."""
    n = len(data)
    flags = np.zeros(n, np.uint8) if flags is None else np.array(flags, np.uint8)
    values = {str(name): np.array(layer, np.float32) for name, layer in (layers or {}).items()}
    if (top_ids is None) != (top_probs is None):
        raise BitbyteError("top_ids and top_probs belong together; give both or neither")
    ids = np.zeros((n, 0), np.uint8) if top_ids is None else np.array(top_ids, np.uint8)
    probs = np.zeros((n, 0), np.float32) if top_ids is None else np.array(top_probs, np.float32)
    for name, values_N in {**values, "flags": flags}.items():
        if values_N.shape != (n,):
            raise BitbyteError(f"{name!r} has shape {values_N.shape} for {n} bytes")
    if n == 0:
        ids, probs = ids.reshape(0, ids.shape[-1]), probs.reshape(0, probs.shape[-1])
    if ids.shape != probs.shape or ids.ndim != 2 or len(ids) != n:
        raise BitbyteError(f"top_ids {ids.shape} and top_probs {probs.shape} must be ({n}, K)")
    return Columns(np.frombuffer(data, np.uint8).copy(), flags, values, ids, probs)


def join(parts: Sequence[Columns]) -> Columns:
    """Concatenate.  A layer that a part lacks is NaN there; missing alternatives are 0."""
    names = list(dict.fromkeys(name for part in parts for name in part.layers))
    k = max(part.ids.shape[1] for part in parts)

    def wide(table_NK: np.ndarray) -> np.ndarray:
        return np.pad(table_NK, ((0, 0), (0, k - table_NK.shape[1])))

    def layer(part: Columns, name: str) -> np.ndarray:
        return part.layers.get(name, np.full(len(part), np.nan, np.float32))

    return Columns(
        np.concatenate([part.data for part in parts]),
        np.concatenate([part.flags for part in parts]),
        {name: np.concatenate([layer(part, name) for part in parts]) for name in names},
        np.concatenate([wide(part.ids) for part in parts]),
        np.concatenate([wide(part.probs) for part in parts]),
    )


def pack(shown: Columns) -> tuple[dict, list[bytes]]:
    """(JSON part, buffers): data, flags, layers one after the other (float32), ids, probabilities
    in units of 1/65535 (uint16); all little-endian.
    """
    values = [shown.layers[name].astype("<f4") for name in shown.layers]
    probs_NK = np.round(np.nan_to_num(shown.probs).clip(0, 1) * 65535).astype("<u2")
    buffers = [
        shown.data.tobytes(),
        shown.flags.tobytes(),
        b"".join(layer.tobytes() for layer in values),
        shown.ids.tobytes(),
        probs_NK.tobytes(),
    ]
    return {"names": list(shown.layers), "k": shown.ids.shape[1]}, buffers


def label(byte: int) -> str:
    """`byte_label`, with hex in lower case as everywhere in a view."""
    return byte_label(byte) if byte < 0x80 else f"{byte:02x}"


def in_words(byte: int) -> str:
    """A byte for a sentence: 0x6c l, or just 0xff, which is not a character on its own."""
    return f"0x{byte:02x} {byte_label(byte)}" if byte < 0x80 else f"0x{byte:02x}"


def unit(name: str, units: Mapping[str, str] | None = None) -> str:
    return (units or {}).get(name, "" if name in UNITLESS else "bits")


def scale(values_N: np.ndarray) -> tuple[float, float]:
    """(low, high) of the tint: mean +- 2.5 standard deviations, so that one outlier does not
    flatten the rest, but no wider than the data; symmetric about 0 if any value is negative.
    """
    known = values_N[np.isfinite(values_N)].astype(np.float64)
    if not len(known):
        return 0.0, 1.0
    reach = 2.5 * known.std()
    low, high = max(known.min(), known.mean() - reach), min(known.max(), known.mean() + reach)
    if known.min() < 0:
        high = max(-low, high)
        low = -high
    return float(low), float(high if high > low else low + 1)


def characters(data: bytes, flags=None) -> Iterator[tuple[int, int, str]]:
    """(position, number of bytes, text to show) of each character or lone byte of ``data``.

    Characters that are invisible or move their neighbors (bidirectional marks, zero-width and
    unassigned characters), and bytes that are not UTF-8, come byte by byte as two hex digits.
    """
    hidden = np.zeros(len(data), bool) if flags is None else (np.asarray(flags) & MASKED) > 0
    i = 0
    while i < len(data):
        byte, size, text = data[i], 1, label(data[i])
        if hidden[i] or byte == 0x20:
            text = " "
        elif byte >= 0xC2:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            decoded = data[i : i + length].decode("utf-8", "ignore")
            whole = len(decoded) == 1 and len(decoded.encode()) == length
            if whole and not hidden[i : i + length].any() and category(decoded) not in UNSEEN:
                size, text = length, decoded
        yield i, size, text
        i += size


def describe(shown: Columns, i: int, units: Mapping[str, str] | None = None, start: int = 0) -> str:
    """A line to read: position, byte, every layer with its unit, the likeliest bytes.

    ``start`` is the offset of the first byte in its source.
    """
    byte, flags = int(shown.data[i]), int(shown.flags[i])
    parts = ["hidden" if flags & MASKED else in_words(byte)]
    for name, values in shown.layers.items():
        if math.isfinite(values[i]):
            parts.append(f"{name} {values[i]:.4g} {unit(name, units)}".rstrip())
    parts += [word for flag, word in FLAG_NAMES.items() if flags & flag and flag != MASKED]
    top = zip(shown.ids[i].tolist(), shown.probs[i].tolist(), strict=True)
    likely = ", ".join(f"{label(b)} {100 * p:.3g} %" for b, p in top if p > 0)
    return f"byte {start + i:,}: " + "; ".join(parts) + (f"; expected {likely}" if likely else "")


def tint(value: float, low: float, high: float) -> float:
    """How strongly a value tints: from -1 (cold) to 1 (warm); 0 if unknown."""
    if not math.isfinite(value):
        return 0.0
    if low < 0 < high:
        return max(-1.0, min(1.0, value / (high if value > 0 else -low)))
    return max(0.0, min(1.0, (value - low) / (high - low)))


def _style(strength: float, flags: int) -> str:
    """CSS of a byte."""
    color = COLD if strength < 0 else WARM
    tinted = abs(strength) >= 0.02 and not flags & (GIVEN | MASKED)
    styles = [
        f"background:rgba({color},{0.75 * abs(strength):.2f})" if tinted else "",
        "border-bottom:2px solid #888" if flags & GIVEN else "",
        f"background:{HATCHED}" if flags & MASKED else "",
        "border-left:2px solid" if flags & START else "",
        "text-decoration:underline" if flags & CHANGED else "",
        "border-top:2px solid #888" if flags & LOCKED else "",
    ]
    return ";".join(filter(None, styles))


def _with_tips(shown: Columns, strengths: list[float], units, start: int) -> str:
    """One element per character, for the bytes that have a strength, with `describe` as its tip."""
    cells, n = [], len(strengths)
    for i, size, text in characters(shown.data[:n].tobytes(), shown.flags[:n]):
        style = _style(strengths[i], int(shown.flags[i]))
        tip = " | ".join(describe(shown, j, units, start) for j in range(i, i + size))
        cells.append(
            f'<span title="{html.escape(tip)}"' + (f' style="{style}"' if style else "") + ">"
            f"{html.escape(text)}</span>" + ("\n" if shown.data[i] == 0x0A else "")
        )
    return "".join(cells)


def _merged(shown: Columns, strengths: list[float]) -> str:
    """The same without tips: neighbors that look alike share an element.

    A strong tint is a <mark>, which stands out even where styles are dropped, as on GitHub.
    """
    cells, n = [("", "", "")], len(strengths)  # start of an element, its text, its end
    for i, _, text in characters(shown.data[:n].tobytes(), shown.flags[:n]):
        flags, strength = int(shown.flags[i]), round(8 * strengths[i]) / 8  # few distinct looks
        style, tag = _style(strength, flags), "span"
        if abs(strength) >= 0.5 and "rgba" in style:
            style, tag = style + ";color:inherit", "mark"
        start, end = (f'<{tag} style="{style}">', f"</{tag}>") if style else ("", "")
        drawn = "\u25a1" if flags & MASKED else html.escape(text)
        drawn += "\n" if shown.data[i] == 0x0A else ""
        same = cells[-1][0] == start and not flags & START
        cells.append((start, cells.pop()[1] + drawn if same else drawn, end))
    return "".join(map("".join, cells))


def static(
    shown: Columns,
    title: str = "",
    *,
    layer: str = "",
    low: float | None = None,
    high: float | None = None,
    units: Mapping[str, str] | None = None,
    limit: int = STATIC_LIMIT,
    start: int = 0,
    tips: bool = True,
) -> str:
    """The first ``limit`` bytes as an HTML fragment without scripts.

    Each has `describe` as its tip, with the same ``start``.  Without ``tips`` it is much smaller.
    """
    values_N = shown.layers.get(layer, np.full(len(shown), np.nan, np.float32))
    auto = scale(values_N)
    low, high = auto[0] if low is None else low, auto[1] if high is None else high
    strengths = [tint(float(value), low, high) for value in values_N[:limit]]
    text = _with_tips(shown, strengths, units, start) if tips else _merged(shown, strengths)
    notes = [f"{len(shown):,} bytes" + (f" from byte {start:,}" if start else "")]
    if layer in shown.layers:
        measure = unit(layer, units)
        notes.append(f"tint: {layer} from {low:.3g} to {high:.3g} {measure}".rstrip())
    if len(shown) > limit:
        notes.append(f"only the first {limit:,} are shown here")
    heading = f"<strong>{html.escape(title)}</strong> " if title else ""
    return (
        f'<div class="bitbyte-static">{heading}<small>{html.escape("; ".join(notes))}</small>\n'
        '<pre style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5">'
        f"{text}</pre></div>\n"
    )


def page(
    data: bytes,
    layers: Mapping[str, Sequence[float]] | None = None,
    *,
    title: str,
    top_ids=None,
    top_probs=None,
    flags=None,
    facts: Mapping[str, str] | None = None,
    layer: str = "",
    units: Mapping[str, str] | None = None,
    start: int = 0,
) -> str:
    """A self-contained HTML file with the widget's view in it.

    facts: rows of a table above the view.  layer: the one that tints, by default the first.
    start: the offset of the first byte in its source; displayed offsets count from there.
    The content security policy allows this one script by its hash and no network at all.
    """
    shown = columns(data, layers, top_ids=top_ids, top_probs=top_probs, flags=flags)
    layer = layer if layer in shown.layers else next(iter(shown.layers), "")
    fields, buffers = pack(shown)
    stored = {
        "state": {"layer": layer, "units": dict(units or {}), "start": start, **PAGE_STATE},
        "message": {"op": "all", "serial": 0, **fields},
        "buffers": [base64.b64encode(buffer).decode() for buffer in buffers],
    }
    script = "\n" + SCRIPT + "\nopenPage();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    rows = [
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>"
        for name, value in (facts or {}).items()
    ]
    table = f"<table>\n{chr(10).join(rows)}\n</table>\n" if rows else ""
    still = static(shown, layer=layer, units=units, limit=2048, start=start)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_text(title)}</title>\n<style>\n{PAGE_CSS}{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n{table}{MEANING * (layer == 'surprisal')}"
        f'<div id="bitbyte-view"></div>\n<noscript>\n{still}</noscript>\n'
        f'<script type="application/json" id="bitbyte-data">{in_script(stored)}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n</html>\n'
    )


def _text(value: object) -> str:
    """A name or number as HTML; file names need not be valid text."""
    return html.escape(files.shown(value))


def in_script(value: object) -> str:
    """JSON that cannot close the script element that holds it."""
    return json.dumps(value).replace("<", "\\u003c")
