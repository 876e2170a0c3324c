"""Small plots as SVG text, for widgets that redraw them several times a second.

No library and no script: hovering shows ``<title>`` texts.  Text and axes take the text color of
the page, dark or light; lines differ by Okabe and Ito's colors and by dashes.  `figures` makes the
figures to keep.
"""

import itertools
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from bitbyte.files import shown
from bitbyte.plots.style import INK, LARGEST

COLORS = ("#0080C8", "#D55E00", "#009E73", "#CC79A7", "#C88A00", "#56A0D8")
DASHES = ("", "6 2", "2 2", "8 2 2 2", "1 3", "10 4")
BUCKETS = 300  # per line: each draws its lowest and highest point, so that no peak is lost
STRIPS = 60  # columns of a plot, each with its own hover text
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 20, 32  # pixels around the data


def extremes(x_n, y_n, buckets: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest point of each of ``buckets`` pieces of a line, in order.

    ``x_n`` must not decrease.  Points that are not finite, or are huge, are left out; a short line
    is kept whole.
    """
    x_n, y_n = np.asarray(x_n, float), np.asarray(y_n, float)
    drawable = (abs(x_n) <= LARGEST) & (abs(y_n) <= LARGEST)  # False for nan
    x_n, y_n = x_n[drawable], y_n[drawable]
    if len(y_n) <= 2 * buckets:
        return x_n, y_n
    edges = np.linspace(0, len(y_n), buckets + 1).astype(int)
    kept = {0, len(y_n) - 1}
    for start, stop in itertools.pairwise(edges):
        kept |= {start + int(y_n[start:stop].argmin()), start + int(y_n[start:stop].argmax())}
    rows = sorted(kept)
    return x_n[rows], y_n[rows]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number for an axis: 1,500, 2.5M, 0.0003."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def lines(
    series: dict[str, tuple[Sequence, Sequence]], *, width: int = 460, height: int = 180,
    xlabel: str = "", ylabel: str = "", levels: dict[str, float] | None = None,
    cursor: float | None = None, y_from_zero: bool = False,
    styles: dict[str, tuple[int, int]] | None = None,
) -> str:  # fmt: skip
    """Line plot of ``series`` (name -> x, y), with at most `BUCKETS` minima and maxima per line.

    ``levels`` are named horizontal lines, ``cursor`` is an x to mark with a vertical line.
    ``styles`` maps a series to its indices in `COLORS` and `DASHES`; by default each has its own.
    An empty plot keeps its size and says that there is nothing yet.
    """
    styles = {name: (i, i) for i, name in enumerate(series)} | (styles or {})
    drawn = {name: extremes(x, y) for name, (x, y) in series.items()}
    full = [(x, y) for x, y in drawn.values() if len(x)]
    if not full:
        return _frame([_text(width / 2, height / 2, "nothing yet", "middle")], width, height)
    heights = [y for _, y in full] + [np.array(list((levels or {}).values()), float)]
    x_low, x_high = _spread(np.concatenate([x for x, _ in full]))
    y_low, y_high = _spread(np.concatenate(heights), y_from_zero)

    def across(x):
        return LEFT + (x - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)

    def up(y):
        return height - BOTTOM - (y - y_low) / (y_high - y_low) * (height - TOP - BOTTOM)

    parts = _axes(width, height, xlabel, ylabel)
    parts += _y_ticks(y_low, y_high, up, width)
    for x in ticks(x_low, x_high, max(2, width // 90)):
        parts.append(_text(across(x), height - BOTTOM + 13, number(x), "middle"))
    for name, y in (levels or {}).items():
        parts.append(_line(LEFT, up(y), width - RIGHT, up(y), 'stroke-dasharray="4 3"'))
        parts.append(_text(width - RIGHT, up(y) - 3, name, "end"))
    for name, (x, y) in drawn.items():
        parts.append(_curve(across(x), up(y), *_look(styles[name])))
    if cursor is not None and x_low <= cursor <= x_high:
        x = across(cursor)
        parts.append(_line(x, TOP, x, height - BOTTOM, 'class="bb-cursor" stroke-width="1.5"'))
    parts += _legend({name: _look(styles[name]) for name in series})
    parts += _strips(drawn, x_low, x_high, across, height, xlabel)
    return _frame(parts, width, height, ylabel or "plot")


def bars(
    labels: Sequence[str], heights: Sequence[float], *, width: int = 460, height: int = 120,
    xlabel: str = "", ylabel: str = "",
) -> str:  # fmt: skip
    """Bar chart from zero; hovering shows label and height, and as many labels as fit are drawn."""
    values = np.asarray(heights, float)
    if not len(values):
        return _frame([_text(width / 2, height / 2, "nothing yet", "middle")], width, height)
    _, high = _spread(values, from_zero=True)
    room = (width - LEFT - RIGHT) / len(values)

    def up(y):
        return height - BOTTOM - y / high * (height - TOP - BOTTOM)

    parts = _axes(width, height, xlabel, ylabel) + _y_ticks(0, high, up, width, about=3)
    every = math.ceil(max(7 * max(map(len, labels)) + 4, 1) / room)
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        x = LEFT + i * room
        parts.append(
            f'<rect x="{x + 0.08 * room:.1f}" y="{up(value):.1f}" width="{0.84 * room:.1f}" '
            f'height="{up(0) - up(value):.1f}" fill="{COLORS[0]}">'
            f"<title>{escape(str(label))}: {number(value)}</title></rect>"
        )
        if i % every == 0:
            parts.append(_text(x + room / 2, height - BOTTOM + 13, label, "middle"))
    return _frame(parts, width, height, ylabel or "bars")


def _spread(values: np.ndarray, from_zero: bool = False) -> tuple[float, float]:
    """Lowest and highest value with a little room; never equal."""
    low, high = float(values.min()), float(values.max())
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = abs(high) or 1.0
    if high - low <= 1e-9 * room:
        return (low, low + room) if from_zero and low >= 0 else (low - room / 2, high + room / 2)
    return low, high


def _frame(parts: list[str], width: int, height: int, label: str = "empty plot") -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        'font-family="sans-serif" font-size="11" fill="currentColor" '
        f'style="color:{INK};max-width:100%;height:auto;display:block">' + "".join(parts) + "</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str, extra: str = "") -> str:
    if not text:
        return ""
    text = escape(shown(text))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{text}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, extra: str = "") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" '
        f"{extra}/>"
    )


def _axes(width: int, height: int, xlabel: str, ylabel: str) -> list[str]:
    floor, middle = height - BOTTOM, (TOP + height - BOTTOM) / 2
    return [
        _line(LEFT, floor, width - RIGHT, floor),
        _text((LEFT + width - RIGHT) / 2, height - 4, xlabel, "middle"),
        _text(11, middle, ylabel, "middle", f'transform="rotate(-90 11 {middle:.1f})"'),
    ]


def _y_ticks(low: float, high: float, up, width: int, about: int = 4) -> list[str]:
    parts = []
    for y in ticks(low, high, about):
        parts.append(_line(LEFT, up(y), width - RIGHT, up(y), 'stroke-opacity="0.15"'))
        parts.append(_text(LEFT - 4, up(y) + 4, number(y), "end"))
    return parts


def _look(style: tuple[int, int]) -> tuple[str, str]:
    """Color and dashes of a line."""
    return COLORS[style[0] % len(COLORS)], DASHES[style[1] % len(DASHES)]


def _curve(x_n: np.ndarray, y_n: np.ndarray, color: str, dash: str) -> str:
    if len(x_n) == 1:
        return f'<circle cx="{x_n[0]:.1f}" cy="{y_n[0]:.1f}" r="2.5" fill="{color}"/>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(x_n, y_n, strict=True))
    return (
        f'<polyline fill="none" stroke="{color}" stroke-width="1.4" '
        f'stroke-dasharray="{dash}" points="{points}"/>'
    )


def _legend(looks: dict[str, tuple[str, str]]) -> list[str]:
    parts, x = [], LEFT
    for name, (color, dash) in looks.items():
        parts.append(
            f'<line x1="{x}" y1="9" x2="{x + 18}" y2="9" stroke="{color}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
        parts.append(_text(x + 22, 13, name, "start"))
        x += 34 + 6 * len(name)
    return parts


def _strips(drawn: dict, x_low, x_high, across, height: int, xlabel: str) -> list[str]:
    """Transparent columns over the plot, titled with the range of every line in them."""
    parts = []
    edges = np.linspace(x_low, x_high, STRIPS + 1)
    for start, stop in itertools.pairwise(edges):
        texts = []
        for name, (x_n, y_n) in drawn.items():
            inside = y_n[(x_n >= start) & (x_n <= stop)]
            if len(inside):
                low, high = number(inside.min()), number(inside.max())
                texts.append(f"{shown(name)}: {low}" + (f" to {high}" if high != low else ""))
        if texts:
            texts.insert(0, f"{xlabel} {number(start)} to {number(stop)}".strip())
            parts.append(
                f'<rect x="{across(start):.1f}" y="{TOP}" fill="none" pointer-events="all" '
                f'width="{across(stop) - across(start):.1f}" height="{height - TOP - BOTTOM}">'
                f"<title>{escape(chr(10).join(texts))}</title></rect>"
            )
    return parts
