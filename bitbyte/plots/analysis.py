"""Figures of `evaluate.analysis`: arrays in, matplotlib `Figure` out, in the style of `figures`.

Each draws the dict that a function of `evaluate.analysis` returns;
``plots.save(figure, stem, data)`` writes both.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from bitbyte import face
from bitbyte.files import BitbyteError, shown
from bitbyte.plots.style import (
    BLUE,
    COLORS,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    array,
    glyph,
    styled,
    subplots,
)
from bitbyte.vocab import N_BYTES

MARKS = {  # class of byte values -> color and marker; "" = drawn as its glyph
    "letter": (BLUE, ""),
    "digit": (VERMILLION, ""),
    "white space": (DARK, ""),
    "punctuation": (GREEN, ""),
    "control": (GREY, "v"),
    "UTF-8 continuation": (SKY, "o"),
    "UTF-8 lead": (ORANGE, "s"),
    "not UTF-8": (PURPLE, "x"),
}


@styled
def calibration_curve(curves: Mapping):
    """Observed frequency against predicted probability, on log axes; the diagonal is perfect.

    ``curves`` is one `analysis.calibration` or a dict of them by name.  Bars are two standard
    errors, sqrt(hits) / pairs; hollow triangles are bins of which no byte occurred.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    if "predicted" in curves:
        curves = {"": curves}
    figure, axes = subplots(4.2)
    lowest = 1.0
    for i, (name, curve) in enumerate((shown(name), curve) for name, curve in curves.items()):
        predicted_Q = array("predicted", curve["predicted"], (None,))
        observed_Q = array("observed", curve["observed"], predicted_Q.shape)
        hits_Q = array("hits", curve["hits"], predicted_Q.shape)
        hit_Q, color = hits_Q > 0, COLORS[i % len(COLORS)]
        if not hit_Q.any():
            raise BitbyteError(f"the calibration {name} has no hits: there is nothing to draw")
        error_Q = 2 * observed_Q[hit_Q] / np.sqrt(hits_Q[hit_Q])
        down_Q = np.minimum(error_Q, 0.99 * observed_Q[hit_Q])  # a log axis has no 0
        label = f"{name}: " if name else ""
        axes.errorbar(
            predicted_Q[hit_Q], observed_Q[hit_Q], (down_Q, error_Q), color=color, marker="o",
            markersize=3.5, linewidth=1.2, elinewidth=0.9,
            label=f"{label}{100 * curve['error']:.1f} % of the probability misplaced",
        )  # fmt: skip
        never_Q = predicted_Q[(hits_Q == 0) & np.isfinite(predicted_Q)]
        axes.plot(
            never_Q, np.full(len(never_Q), 0.015), "v", markersize=4, color=color,
            markerfacecolor="white", transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        lowest = min(lowest, predicted_Q[hit_Q].min(), observed_Q[hit_Q].min())
    lowest /= 3
    axes.plot([lowest, 1], [lowest, 1], color=DARK, linewidth=1, linestyle=(0, (4, 2)), zorder=1.5)
    axes.set(xscale="log", yscale="log", xlim=(lowest, 1.3), ylim=(lowest, 1.3))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=12))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda share, _: f"{share:g}")
    title = "bars: 2 standard errors\nhollow: none came"
    axes.legend(loc="upper left", title=title, title_fontsize=8, alignment="left")
    axes.set_xlabel("predicted probability of a byte value")
    axes.set_ylabel("share of times that it came")
    return figure


@styled
def class_costs(costs: Mapping):
    """Mean surprisal of each class of byte as bars, with the predicted entropy marked on them.

    ``costs`` is an `analysis.by_class`; classes that do not occur are left out.  Beside each bar:
    the number of bytes, and their share of all bits.
    """
    counts_C = array("counts", costs["counts"], (None,))
    bits_C = array("bits", costs["bits"], counts_C.shape)
    entropy_C = array("entropy", costs["entropy"], counts_C.shape)
    seen = counts_C > 0
    if not seen.any():
        raise BitbyteError("no class has any bytes: there is nothing to draw")
    names = [name for name, has in zip(costs["classes"], seen, strict=True) if has]
    counts_C, bits_C, entropy_C = counts_C[seen], bits_C[seen], entropy_C[seen]
    share_C = 100 * counts_C * bits_C / (counts_C * bits_C).sum()
    row_C = np.arange(len(names))
    figure, axes = subplots(0.9 + 0.27 * len(names))
    axes.barh(row_C, bits_C, height=0.7, color=SKY, label="surprisal")
    axes.plot(
        entropy_C, row_C, "|", color=DARK, markersize=12, markeredgewidth=2,
        label="predicted entropy",
    )  # fmt: skip
    for row, count, share in zip(row_C, counts_C, share_C, strict=True):
        axes.annotate(
            f"{count:,.0f} bytes, {share:.1f} % of the bits", (1, row),
            xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    _name_rows(axes, names, legend_columns=2)
    axes.set_xlabel("bits per byte")
    return figure


def _name_rows(axes, names: list[str], legend_columns: int) -> None:
    """A horizontal bar chart's frame: a name for each row, the first on top, the legend above."""
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=legend_columns)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


@styled
def staircase(stages: Mapping[str, float], floor: float | None = None):
    """Bits per byte of one stage after the other as bars, each with what it saves on the last.

    ``stages`` maps a name to its bits per byte, the first on top; ``floor`` is the entropy of the
    data.
    """
    bpb_S = array("bits per byte", list(stages.values()), (None,))
    figure, axes = subplots(0.9 + 0.27 * len(bpb_S))
    row_S = np.arange(len(bpb_S))
    saved_S = np.append(0, bpb_S[:-1] - bpb_S[1:])
    axes.barh(row_S, bpb_S, height=0.7, color=SKY, label="bits per byte")
    axes.barh(
        row_S, np.maximum(saved_S, 0), left=bpb_S, height=0.7, color="#DDDDDD",
        label="saved by this step",
    )  # fmt: skip
    for row, (bpb, saved) in enumerate(zip(bpb_S, saved_S, strict=True)):
        axes.annotate(
            f"{bpb:.3f}" + (f"  ({-saved:+.3f})" if row else ""), (1, row),
            xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    if floor is not None:
        look = {"color": DARK, "linewidth": 1, "linestyle": (0, (4, 2))}
        axes.axvline(floor, label=f"entropy floor {floor:.3f}", **look)
    _name_rows(axes, list(map(shown, stages)), legend_columns=3)
    axes.set_xlabel("bits per byte (in brackets: the change)")
    return figure


@styled
def costs_by_byte(data: Sequence[int], costs: Mapping[str, object]):
    """Bits of each byte of a short text under several predictors: a row each, a column a byte.

    ``data`` are n bytes, and ``costs`` maps a name to the bits (n,) that each of them cost.
    """
    bits_RN = array("bits", list(costs.values()), (len(costs), len(data)))
    label, height = "bits", 1.0 + 0.26 * len(costs)
    top = max(bits_RN.max(), 1e-9)
    figure, axes = _heat_map(bits_RN, list(map(shown, costs)), map(glyph, data), height, top, label)
    for (row, column), bits in np.ndenumerate(bits_RN):
        ink = "white" if bits < 0.25 * top else DARK
        text = f"{bits:.0f}" if bits >= 0.5 else ""
        axes.annotate(text, (column, row), ha="center", va="center", color=ink, fontsize=6)
    axes.set_xlabel("byte (numbers: bits, none below a half)")
    return figure


def _heat_map(mass_RQ: np.ndarray, rows, columns, height: float, top: float, label: str):
    """(figure, axes) of a matrix of numbers from 0 to ``top``, on a square-root color scale."""
    from matplotlib.colors import PowerNorm

    figure, axes = subplots(height)
    image = axes.imshow(mass_RQ, cmap="cividis", norm=PowerNorm(0.5, 0, top), aspect="auto")
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.02)
    bar.outline.set_visible(False)
    axes.set_yticks(np.arange(len(mass_RQ)), rows, fontsize=7.5)
    axes.set_xticks(np.arange(len(mass_RQ.T)), list(columns), fontsize=7.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure, axes


@styled
def confusion_map(table: Mapping):
    """Probability given to the column's bytes where a byte of the row occurred: rows sum to 1.

    ``table`` is an `analysis.among_commonest` or an `analysis.among_classes`.
    """
    rows, columns = ([_plain_label(name) for name in table[key]] for key in ("rows", "columns"))
    mass_RQ = array("mass", table["mass"], (len(rows), len(columns)))
    long = max(map(len, rows)) > 2
    height = 1.2 + (0.34 if long else 0.19) * len(rows)
    figure, axes = _heat_map(mass_RQ, rows, columns, height, 1, "mean probability given")
    if long:
        axes.set_xticklabels([name.replace(" ", "\n", 1) for name in columns])
        for (row, column), mass in np.ndenumerate(mass_RQ):
            ink = "white" if mass < 0.25 else DARK
            axes.annotate(
                f"{100 * mass:.1f}", (column, row), ha="center", va="center", color=ink, fontsize=8
            )
        axes.set_xlabel("class that was expected (numbers: %)")
        axes.set_ylabel("class that came")
    else:
        axes.set_xlabel("byte that was expected")
        axes.set_ylabel("byte that came")
    return figure


def _plain_label(label: str) -> str:
    """A byte's label, in characters that the figure font has."""
    return glyph(ord(label) - 0x2400) if "\u2400" <= label <= "\u241f" else label


@styled
def embedding_map(points: Mapping):
    """The 256 byte embeddings on their first two principal components, as glyphs or markers.

    ``points`` is an `analysis.embedding_map`.
    """
    from matplotlib.lines import Line2D

    points_V2 = array("points", points["points"], (N_BYTES, 2))
    figure, axes = subplots(5.0)
    handles = []
    for name, (color, mark) in MARKS.items():
        member = np.flatnonzero([other == name for other in points["classes"]]).tolist()
        look = {"color": color, "marker": mark, "linestyle": ""}
        axes.plot(*points_V2[member].T, markersize=4.5, alpha=0.75, **look)
        for byte in member if not mark else ():
            axes.annotate(
                glyph(byte), points_V2[byte], ha="center", va="center", color=color,
                fontsize=8.5, fontweight="bold",
            )  # fmt: skip
        label = name if mark else f"{name}: itself"
        handles.append(Line2D([], [], label=label, **look))
    legend = figure.legend(handles=handles, loc="outside right upper")
    for text, (color, mark) in zip(legend.get_texts(), MARKS.values(), strict=True):
        text.set_color(DARK if mark else color)
    axes.margins(0.06)
    first, second = (100 * share for share in points["explained"])
    axes.set_xlabel(f"first principal component ({first:.0f} % of the variance)")
    axes.set_ylabel(f"second principal component ({second:.0f} %)")
    return figure


@styled
def probs_at(probs, actual: int | None = None, top: int = 16):
    """The ``top`` likeliest bytes of one distribution (256,), with the actual byte marked.

    If it is not among them, it takes the last place.
    """
    probs_V = array("probabilities", probs, (N_BYTES,))
    order_V = np.argsort(-probs_V, kind="stable")
    shown = order_V[:top].tolist()
    if actual is not None and actual not in shown:
        shown[-1] = actual
    figure, axes = subplots()
    colors = [VERMILLION if byte == actual else BLUE for byte in shown]
    bars = axes.bar(np.arange(len(shown)), probs_V[shown], width=0.75, color=colors)
    texts = [f"{100 * p:.1f}" if p >= 0.0005 else f"{100 * p:.1g}" for p in probs_V[shown]]
    axes.bar_label(bars, texts, fontsize=7.5, padding=1)
    axes.set_xticks(np.arange(len(shown)), [glyph(byte) for byte in shown])
    nonzero_V = probs_V[probs_V > 0]
    title = f"entropy {-(nonzero_V * np.log2(nonzero_V)).sum():.2f} bits"
    if actual is not None:
        rank = int(np.flatnonzero(order_V == actual)[0]) + 1
        title += f"; {glyph(actual)} came: number {rank}, {-np.log2(probs_V[actual]):.2f} bits"
        axes.get_xticklabels()[shown.index(actual)].set_color(VERMILLION)
    axes.set_title(title, loc="right", fontsize=9, color=DARK)
    axes.set_xlabel("byte value")
    axes.set_ylabel("probability (numbers: %)")
    axes.grid(axis="x", visible=False)
    return figure


__getattr__ = face(__name__, {"plots.analysis": "probs_at"}, renamed="law_at:probs_at")
