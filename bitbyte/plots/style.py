"""What all figures have in common: style, colors, checks of arrays, rendering, saving.

Figures are made without pyplot: they need no display, keep no global state, and the same data give
the same PNG bytes.  matplotlib comes with the extra: pip install "bitbyte[workbench]".
Colors: Okabe and Ito's set, which can be told apart with any color vision.
"""

import functools
import io
import math
import numbers
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitbyte.files import BitbyteError, to_json, write_atomic
from bitbyte.vocab import byte_label

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, GREY = "#E69F00", "#56B4E9", "#5F5F5F"
COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
DARK = "#222222"  # text and lines on white
# For HTML: text, errors and code in the style of the surrounding page, light or dark.
INK, ALARM = "var(--jp-ui-font-color1, inherit)", "var(--jp-error-color0, #c22)"
MONO = "var(--jp-code-font-family, monospace)"
LARGEST = 1e15  # beyond it a number is damage, and sums of such numbers overflow
WIDTH, HEIGHT = 7.0, 3.5  # inches: the width of a notebook page or a paper's column pair

STYLE = {
    "figure.facecolor": "white",  # and opaque: legible in a dark notebook too
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 9,
    "text.parse_math": False,  # names and bytes may hold a "$"
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": DARK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": DARK,
    "ytick.labelcolor": DARK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "pdf.fonttype": 42,  # text stays text
}

X_AXES = {"step": "optimizer steps", "bytes": "bytes seen", "seconds": "training time (s)"}

# First and last byte, name, shade.  C0, C1 and F5..FF never occur in valid UTF-8.
REGIONS = (
    (0x00, 0x1F, "control", "#F3F3F3"),
    (0x20, 0x7F, "ASCII", "#FFFFFF"),
    (0x80, 0xBF, "UTF-8 continuation", "#EDF4FA"),
    (0xC2, 0xF4, "UTF-8 lead", "#FDF3E7"),
)


def styled(function):
    """Run ``function`` with matplotlib's defaults and our style, whatever the user's settings."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            import matplotlib
        except ImportError:
            raise BitbyteError(
                'figures need matplotlib: pip install "bitbyte[workbench]"'
            ) from None
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return function(*args, **kwargs)

    return wrapper


@functools.cache
def _figure_class():
    """A matplotlib Figure that shows itself in a notebook, without pyplot's global state."""
    import matplotlib.figure

    class Figure(matplotlib.figure.Figure):
        def _repr_png_(self) -> bytes:
            return png_bytes(self)

    return Figure


def subplots(height: float = HEIGHT, columns: int = 1):
    """(figure, axes), ``height`` inches high; without pyplot, which would keep every figure.

    Of several ``columns`` there is an array of axes, which share the y axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure_class()(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=True)


def array(name: str, values, shape: tuple) -> np.ndarray:
    """float64 array of the given shape (None = any length).  Raises BitbyteError on any other."""
    numbers = np.asarray(values, dtype=np.float64)
    fits = numbers.ndim == len(shape) and numbers.size > 0
    if not fits or any(n not in (None, m) for n, m in zip(shape, numbers.shape, strict=True)):
        wanted = " x ".join("n" if n is None else str(n) for n in shape)
        raise BitbyteError(f"{name} has shape {numbers.shape}; this figure needs {wanted} numbers")
    return numbers


def drawable(value: object) -> bool:
    """Whether a value that anybody may have written is a number that a plot can show."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and abs(value) <= LARGEST  # False for nan


def glyph(byte: int) -> str:
    """`byte_label`, or hex for the control pictures, which the figure font lacks."""
    label = byte_label(byte)
    return f"{byte:02X}" if "\u2400" <= label <= "\u2421" else label


@styled
def png_bytes(figure) -> bytes:
    """The figure as PNG; the same data give the same bytes."""
    return rendered(figure, "png", {"Software": None})


def rendered(figure, kind: str, metadata: dict) -> bytes:
    """The figure as a file of this kind ("png", "pdf", "svg").  Call it inside `styled`."""
    figure.draw_without_rendering()  # lay out only once, as every layout moves things a bit
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _plain(value):
    """JSON-ready copy: arrays become lists, non-finite numbers become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@styled
def save(figure, stem: Path, data: Mapping, *, follow: bool = False) -> list[Path]:
    """Write STEM.pdf, STEM.png and, so that it can be drawn again, its data as STEM.json.

    ``data`` maps names to arrays, numbers, texts, lists or dicts.  Each file is replaced
    atomically; the folder is created if needed.  ``follow`` for a stem that the user named, as in
    `files.replacing`.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        ".pdf": rendered(figure, "pdf", {"CreationDate": None, "Creator": None, "Producer": None}),
        ".png": png_bytes(figure),
        ".json": to_json(_plain(data)),
    }
    paths = [stem.with_name(stem.name + suffix) for suffix in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_atomic(path, content, follow=follow)
    return paths
