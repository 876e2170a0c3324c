"""Figures: arrays in, matplotlib `Figure` out, one style for notebooks and papers.

Draws data that was computed elsewhere and saved; never runs a model.  See `style` for how figures
are made.  In a notebook a figure shows itself.

matplotlib comes with the extra: pip install "bitbyte[workbench]".
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bitbyte import face
from bitbyte.config import PRESETS
from bitbyte.evaluate.records import MIXED
from bitbyte.evaluate.scaling import Curve
from bitbyte.files import BitbyteError, shown
from bitbyte.plots.style import (
    BLUE,
    COLORS,
    DARK,
    GREY,
    ORANGE,
    REGIONS,
    X_AXES,
    array,
    drawable,
    glyph,
    styled,
    subplots,
)
from bitbyte.vocab import N_BYTES


def _column(rows: Sequence[dict], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """(x_N, y_N) of the rows that have a number to draw for both."""
    pairs = [(row.get(x), row.get(y)) for row in rows]
    pairs = [pair for pair in pairs if all(map(drawable, pair))]
    return np.array([a for a, _ in pairs], float), np.array([b for _, b in pairs], float)


def _smooth(values_N: np.ndarray) -> np.ndarray:
    """Running mean over about 4 % of the points.

    Centred, and narrower at the start, which is steep.  The last points average over earlier ones
    only, so that the end, which is flat and noisy, is as smooth as the rest.
    """
    n = len(values_N)
    half = max(1, n // 50)
    sums = np.concatenate(([0.0], np.cumsum(values_N)))
    back = np.minimum(half, np.arange(n))
    start, stop = np.arange(n) - back, np.minimum(n, np.arange(n) + back + 1)
    return (sums[stop] - sums[start]) / (stop - start)


def _reference_line(axes, value: float, label: str) -> None:
    """A dashed horizontal line, labelled with its name and value."""
    axes.axhline(value, color=DARK, linewidth=1, linestyle=(0, (4, 2)), zorder=1.5)
    axes.annotate(
        f"{label} {value:.3f}", (0, value), xycoords=("axes fraction", "data"),
        xytext=(5, 2), textcoords="offset points", va="bottom", fontsize=8.5,
    )  # fmt: skip


@styled
def training_curve(
    runs: Mapping[str, Sequence[dict]], floor: float | None = None, x: str = "bytes"
):
    """Bits per byte over training: training as a light running mean, validation as markers.

    ``runs`` maps a name to metric rows (dicts with the key ``x``, which is "step", "bytes" or
    "seconds", and ``bpb`` or ``val_bpb`` or both; other rows are ignored).  A diffusion run has
    ``masked_bpb``, drawn dashed as it is not a BPB, and ``val_bound``, drawn hollow; in blocks its
    validation is a ``val_bpb`` like any other.  ``floor`` is
    the entropy of the data in bits per byte.  The steep start may leave the frame at the top.
    Raises BitbyteError if there is nothing to draw.
    """
    if x not in X_AXES:
        raise BitbyteError(f"no x axis {x!r}; choose from {', '.join(X_AXES)}")
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    figure, axes = subplots()
    handles, highest, bounds, masked = [], [], False, False
    for i, (name, rows) in enumerate((shown(name), rows) for name, rows in runs.items()):
        color = COLORS[i % len(COLORS)]
        own = not any("masked_bpb" in row for row in rows)  # else training is no BPB
        exact = own or any("val_bpb" in row for row in rows)
        masked = masked or not own
        train_x, train_y = _column(rows, x, "bpb" if own else "masked_bpb")
        val_x, val_y = _column(rows, x, "val_bpb" if exact else "val_bound")
        if len(train_y):
            smooth_y = _smooth(train_y)
            look = {"alpha": 0.5, "linewidth": 1.3, "marker": "." if len(train_y) == 1 else ""}
            look["linestyle"] = "-" if own else "--"
            axes.plot(train_x, smooth_y, color=color, label=f"{name} train", **look)
            highest.append(np.quantile(smooth_y, 0.9))
        if len(val_y):
            fill = color if exact else "white"
            look = {"color": color, "markerfacecolor": fill, "markersize": 4}
            axes.plot(val_x, val_y, "o", label=f"{name} val", **look)
            bounds = bounds or not exact
            highest.append(np.quantile(val_y, 0.9))
        look = {} if exact else {"markerfacecolor": "white"}
        look |= {} if own else {"linestyle": "--"}
        look |= {"marker": "o", "markersize": 4, "label": name}
        handles.append(Line2D([], [], color=color, **look))
    if not highest:
        raise BitbyteError(
            f"no row has {x} together with bpb or val_bpb: there is no curve to draw"
        )
    if floor is not None:
        _reference_line(axes, floor, "entropy floor")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, min(top, max(highest) + 0.15 * (max(highest) - bottom)))
    title = "line: training, running mean\ndots: validation"
    title += "\ndashed: masked bytes" * masked + "\nhollow: a bound" * bounds
    options = {"title": title, "title_fontsize": 8, "alignment": "left"}
    if len(runs) > 3:  # a legend inside would cover the curves
        figure.legend(handles=handles, loc="outside right upper", **options)
    else:
        axes.legend(handles=handles, **options)
    axes.set_xlabel(X_AXES[x])
    axes.set_ylabel("bits per byte")
    if x != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter(unit="B" if x == "bytes" else ""))
    axes.set_xlim(left=0)
    return figure


@styled
def writing_figure(ways: Sequence[dict], truth: float | None = None):
    """Speed of ways of writing against what a judge pays for the text: lower right is best.

    ``ways`` are rows of `evaluate.judge.judged`: dicts with ``way``, ``bytes_per_cpu_second`` and
    ``bpb``.  ``truth`` is the judge's cost of real text.  Raises BitbyteError if there are none.
    """
    if not ways:
        raise BitbyteError("there are no ways of writing to draw")
    figure, axes = subplots()
    axes.set_xscale("log")
    for row in ways:
        where = (row["bytes_per_cpu_second"], row["bpb"])
        axes.plot(*where, "o", color=BLUE, markersize=5)
        axes.annotate(shown(row["way"]), where, xytext=(6, 3), textcoords="offset points")
    if truth is not None:
        _reference_line(axes, truth, "true text")
    axes.margins(x=0.25)
    axes.set_xlabel("bytes per CPU second")
    axes.set_ylabel("bits per byte under the judge")
    return figure


@styled
def bpb_by_position(curves, reference: float | None = None):
    """Mean bits per byte by position in the window (log axis): what context is worth.

    ``curves`` is one array (T,) or a dict of them; NaN = position not scored.  Light line: each
    position; bold: means over ranges of a quarter octave.  ``reference`` is a level in bits per
    byte to compare with; default for a single curve: its mean.
    """
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    if not isinstance(curves, Mapping):
        curves = {"": curves}
    figure, axes = subplots()
    longest = 1
    for i, (name, values) in enumerate((shown(name), bits) for name, bits in curves.items()):
        bits_T = array("bits by position", values, (None,))
        position_T = np.arange(1, len(bits_T) + 1)
        scored = np.isfinite(bits_T)
        if not scored.any():
            raise BitbyteError(f"no position of {name or 'the window'} was scored: nothing to draw")
        bits_T, position_T = bits_T[scored], position_T[scored]
        color = COLORS[i % len(COLORS)]
        axes.plot(position_T, bits_T, color=color, alpha=0.3, linewidth=0.8)
        bin_T = np.round(4 * np.log2(position_T)).astype(int)
        bins = np.unique(bin_T)
        mean_x = [np.exp(np.log(position_T[bin_T == b]).mean()) for b in bins]
        mean_y = [bits_T[bin_T == b].mean() for b in bins]
        axes.plot(mean_x, mean_y, color=color, label=name)
        longest = max(longest, position_T[-1])
    if reference is None and len(curves) == 1:
        _reference_line(axes, bits_T.mean(), "mean of the window")
    elif reference is not None:
        _reference_line(axes, reference, "reference")
    if any(curves):
        axes.legend()
    axes.set_xscale("log")
    axes.set_xlim(1, max(2, longest))
    axes.xaxis.set_major_locator(FixedLocator(2 ** np.arange(0, 31)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position in the window (bytes, first = 1)")
    axes.set_ylabel("bits per byte")
    return figure


@styled
def byte_histogram(counts, top: int = 8):
    """Share of each of the 256 byte values (log axis), with the ``top`` commonest ones named.

    ``counts`` (256,) are numbers of occurrences, not all 0.
    """
    counts_V = array("counts", counts, (N_BYTES,))
    total = counts_V.sum()
    if not total > 0 or counts_V.min() < 0:
        raise BitbyteError("a byte histogram needs counts of at least one byte, none negative")
    from matplotlib.ticker import NullLocator

    share_V = 100 * counts_V / total
    figure, axes = subplots()
    axes.set_yscale("log")
    low, high = min(0.6 * share_V[share_V > 0].min(), share_V.max() / 100), 8 * share_V.max()
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:g}" if share <= 100 else "")
    axes.yaxis.set_minor_locator(NullLocator())
    for first, last, name, shade in REGIONS:
        axes.axvspan(first - 0.5, last + 0.5, color=shade, linewidth=0, zorder=0)
        axes.annotate(
            name, ((first + last) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", fontsize=8, color=GREY,
        )  # fmt: skip
    axes.bar(np.arange(N_BYTES), share_V, width=1.0, color=BLUE, linewidth=0)
    points = 190 / math.log(high / low)  # points per factor e; the axes are about 190 points high
    placed: list[tuple[int, float]] = []  # byte and height in points of each name
    for byte in np.argsort(-counts_V, kind="stable")[:top].tolist():
        if counts_V[byte] == 0:
            break
        height = base = points * math.log(share_V[byte] / low)
        for other, taken in sorted(placed, key=lambda item: item[1]):
            room = 3 if len(glyph(byte) + glyph(other)) == 2 else 6  # width of the names, in bytes
            if abs(byte - other) <= room and abs(height - taken) < 9:
                height = taken + 9  # above its neighbor's name
        placed.append((byte, height))
        axes.annotate(
            glyph(byte), (byte, share_V[byte]), xytext=(0, 3 + height - base), ha="center",
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    ticks = range(0, N_BYTES + 1, 32)
    axes.set_xticks(list(ticks), [f"{b:02X}" for b in ticks])
    axes.set_xlim(-0.5, N_BYTES - 0.5)
    axes.set_xlabel("byte value (hex)")
    axes.set_ylabel("share of all bytes (%)")
    axes.grid(axis="x", visible=False)
    return figure


@styled
def byte_probs(before, after, top: int = 16):
    """The ``top`` likeliest next bytes: probabilities (256,) of the model and after the filters."""
    before_V = array("before", before, (N_BYTES,))
    after_V = array("after", after, (N_BYTES,))
    bytes_R = np.argsort(-before_V, kind="stable")[:top]
    figure, axes = subplots()
    place_R = np.arange(len(bytes_R))
    axes.bar(place_R - 0.2, before_V[bytes_R], width=0.38, color=BLUE, label="model")
    axes.bar(place_R + 0.2, after_V[bytes_R], width=0.38, color=ORANGE, label="after the filters")
    axes.set_xticks(place_R, [glyph(byte) for byte in bytes_R.tolist()])
    axes.set_xlabel("next byte")
    axes.set_ylabel("probability")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


@styled
def ternary_histogram(fractions: Mapping[str, Sequence[float]]):
    """Shares of the weights -1, 0 and +1 in each ternary layer, as one stacked bar per layer.

    ``fractions`` maps a layer's name to three numbers that sum to 1; the first layer is on top.
    """
    shares_L3 = array("fractions", list(fractions.values()), (None, 3))
    if shares_L3.min() < 0 or not np.allclose(shares_L3.sum(1), 1, atol=1e-6):
        raise BitbyteError("fractions of -1, 0 and +1 must sum to 1 in every layer")
    n = len(shares_L3)
    figure, axes = subplots(0.9 + 0.24 * n)
    left_L = np.zeros(n)
    looks = (("\u22121", BLUE, "white"), ("0", "#DDDDDD", DARK), ("+1", ORANGE, DARK))
    for (label, color, ink), share_L in zip(looks, 100 * shares_L3.T, strict=True):
        bars = axes.barh(np.arange(n), share_L, left=left_L, height=0.78, color=color, label=label)
        texts = [f"{share:.1f} %" if share >= 7 else "" for share in share_L]
        axes.bar_label(bars, texts, label_type="center", color=ink, fontsize=7.5)
        left_L = left_L + share_L
    axes.set_yticks(np.arange(n), list(fractions))
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the layer's weights (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, title=None)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


BUDGET, SHAPE = {"steps", "epochs", "minutes"}, {"preset", "d_model", "n_layer"}
GRID_AXES = {  # of `grid_figure`: name -> (label, value of a record, options that it stands for)
    "bytes": ("training bytes (MB)", lambda r: r["bytes_seen"] / 1e6, BUDGET),
    "size": ("packed model (MB)", lambda r: r["packed_bytes"] / 1e6, SHAPE),
    "minutes": ("training time (min)", lambda r: r["train_seconds"] / 60, BUDGET),
}


@styled
def grid_figure(records: Sequence[Mapping], x: str = "bytes"):
    """Bits per byte of the trainings of a grid against "bytes", "size" or "minutes".

    A dot is a training, hollow if its cost is a bound.  Those that differ in nothing but the seed
    and what ``x`` shows have one color, and a line joins the means of their settings.
    """
    if x not in GRID_AXES:
        raise BitbyteError(f"no axis {x!r}; choose from {', '.join(GRID_AXES)}")
    label, value, own = GRID_AXES[x]
    series: dict[str, dict[tuple, list[tuple[float, float]]]] = {}
    bounds: dict[str, bool] = {}
    for r in records:
        options = r.get("grid", {}).get("parameters", {"": r["model"]})
        rest = {k: v for k, v in options.items() if k not in own | {"seed"}}
        name = " ".join(v if isinstance(v, str) else f"{k} {v}" for k, v in rest.items()) or "all"
        setting = tuple(str(v) for k, v in options.items() if k in own)
        series.setdefault(name, {}).setdefault(setting, []).append((value(r), r["bpb"]))
        bounds[name] = r["kind"] == "upper_bound"
    if not series:
        raise BitbyteError("there are no records to draw; a grid that is done has some")
    figure, axes = subplots()
    for i, (name, settings) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        dots = [dot for dots in settings.values() for dot in dots]
        axes.plot(
            *zip(*dots, strict=True), "o", color=color, label=shown(name), markersize=4,
            markerfacecolor="white" if bounds[name] else color,
        )  # fmt: skip
        means = sorted(tuple(np.mean(dots, axis=0)) for dots in settings.values())
        axes.plot(*zip(*means, strict=True), "-", color=color, linewidth=1)
    axes.set_xlabel(label)
    axes.set_ylabel("bits per byte")
    axes.legend()
    return figure


@styled
def scaling_card(curves: Sequence[Curve]):
    """Bits per byte against bytes of training: one panel dense, one ternary.

    A color is a preset; filled dots and lines are models with n-gram counts, hollow dots and
    dashes plain ones.  Dots are records, lines are fits, and a band is the 95 % interval of a fit.
    """
    if not curves:
        raise BitbyteError(
            "there are no curves to draw: they need records of three lengths of training, "
            "of models called card-PRESET-LINEAR-PRIOR-STEPS"
        )
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, NullFormatter

    presets = [name for name in PRESETS if any(c.preset == name for c in curves)]
    colors = dict(zip(presets, COLORS, strict=False))
    panels = [kind for kind in ("dense", "ternary") if any(c.linear == kind for c in curves)]
    lengths: list[int] = []  # that have room for their labels
    for n_bytes in sorted({n_bytes for c in curves for n_bytes, _ in c.points}):
        if not lengths or n_bytes >= 2 * lengths[-1]:
            lengths.append(n_bytes)
    figure, axes = subplots(columns=len(panels))
    for ax, linear in zip(np.atleast_1d(axes), panels, strict=True):
        for c in (c for c in curves if c.linear == linear):
            color, plain = colors[c.preset], c.prior == "none"
            ax.plot(
                *zip(*c.points, strict=True), "o", color=color, markersize=4,
                markerfacecolor="white" if plain else color,
            )  # fmt: skip
            x = np.geomspace(*c.n_bytes, 50)
            mid, low, high = np.transpose([c.at(n_bytes) for n_bytes in x])
            ax.plot(x, mid, "--" if plain else "-", color=color, linewidth=1.2)
            ax.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        ax.set_title(linear, fontsize=9)
        ax.set_xscale("log")
        if len(lengths) <= 6:  # a decade or two have too few powers of ten
            ax.set_xticks(lengths)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(EngFormatter(unit="B", places=1))
        ax.set_xlabel("training bytes")
    np.atleast_1d(axes)[0].set_ylabel("bits per byte")
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    kinds = (("with n-gram counts", "-", GREY), ("plain", "--", "white"))
    for name, style, fill in kinds:
        look = {"linestyle": style, "marker": "o", "markersize": 4, "markerfacecolor": fill}
        handles.append(Line2D([], [], color=GREY, label=name, **look))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _bytes_of(record: Mapping) -> tuple[str, str, int]:
    """Which bytes a record is of: data set, split, how many."""
    data = record["data"]
    return data["path"], data.get("split") or "", record.get("bytes") or 0


@styled
def bpb_table_figure(records: Sequence[Mapping]):
    """Result records as a dot plot: BPB with the 95 % interval of its bytes, the best on top.

    Uses ``model``, ``bpb``, ``interval`` [low, high], ``kind`` and ``data`` of each record: an
    exact value is a filled dot, an upper bound a hollow one marked <=, a chain rule a hollow
    square with its order, a cost in the mixer a hollow diamond.  Records of different bytes are
    grouped by them and labelled, as their values cannot be compared.  Records on training data
    are labelled, too.
    """
    if not records:
        raise BitbyteError("there are no result records to draw; run an evaluation first")
    records = sorted(records, key=lambda record: (*_bytes_of(record), record["bpb"]))
    n = len(records)
    names = [
        record["model"] + ", trained on it" * bool(record.get("trained_on_it"))
        for record in records
    ]
    places = [_bytes_of(record) for record in records]
    several = [len({place[i] for place in places}) > 1 for i in range(3)]
    for i, (path, split, n_bytes) in enumerate(places):
        about = [path] * any(several) + [split] * several[1] + [f"{n_bytes:,} bytes"] * several[2]
        names[i] += f" on {', '.join(about)}" if about else ""
    orders = [record["kind"].partition("chain_rule:")[2].replace("_", " ") for record in records]
    mixed = ["in the mixer" * (record["kind"] == MIXED) for record in records]
    names = [
        shown(", ".join(filter(None, words))) for words in zip(names, orders, mixed, strict=True)
    ]
    figure, axes = subplots(0.8 + 0.3 * n)
    for row, record in enumerate(records):
        bpb = record["bpb"]
        low, high = record["interval"] or (bpb, bpb)
        exact = record["kind"] == "exact"
        axes.plot([low, high], [row, row], color=BLUE, linewidth=2, solid_capstyle="butt")
        shape = "s" if orders[row] else "D" if mixed[row] else "o"
        axes.plot(bpb, row, shape, color=BLUE, markerfacecolor=BLUE if exact else "white")
        axes.annotate(
            ("\u2264 " if record["kind"] == "upper_bound" else "") + f"{bpb:.3f}", (1, row),
            xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8.5,
        )  # fmt: skip
    axes.set_yticks(range(n), names)
    axes.set_ylim(n - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.set_xlabel("bits per byte (lower is better; bar = 95 % interval of these bytes)")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


__getattr__ = face(__name__, {"plots.figures": "byte_probs"}, renamed="byte_laws:byte_probs")
