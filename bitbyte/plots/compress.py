"""Figures for `compress` and `certify`: numbers in, matplotlib `Figure` out, as in `figures`."""

from collections.abc import Mapping

import numpy as np

from bitbyte.files import BitbyteError
from bitbyte.plots.style import (
    BLUE,
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


@styled
def saved_bits(data: bytes, bits, stop: int = 96, *, start: int = 0, by=None, names=()):
    """8 - cost of each byte from ``start`` to ``stop``: bits are saved above the line, lost below.

    ``bits`` are the costs (surprisals) of the bytes of ``data``.  ``by`` (a row for each byte, a
    column for each of ``names``) divides what was saved among the savers: bars on top of one
    another, and below the line what they lost.
    """
    saved_N = 8 - array("bits", bits, (len(data),))[start:stop]
    data, place_N = data[start:stop], np.arange(len(saved_N))
    figure, axes = subplots()
    if by is None:
        colors = [BLUE if saved >= 0 else VERMILLION for saved in saved_N]
        axes.bar(place_N, saved_N, width=0.85, color=colors, linewidth=0)
    else:
        by_NG = np.asarray(by, float)[start:stop]
        for sign in (1, -1):
            end_N = np.zeros(len(saved_N))
            for name, color, part_N in zip(names, _colors(names), by_NG.T, strict=True):
                part_N = np.maximum(sign * part_N, 0) * sign  # noqa: PLW2901
                label = name if sign > 0 else None
                axes.bar(place_N, part_N, 0.85, end_N, color=color, linewidth=0, label=label)
                end_N = end_N + part_N
        axes.plot(place_N, saved_N, "_", color=DARK, markersize=4, label="saved in all")
        _legend_above(axes, len(names) + 1)
    axes.axhline(0, color=DARK, linewidth=0.8)
    axes.set_xticks(place_N, [glyph(byte) for byte in data], fontsize=6)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.7, len(saved_N) - 0.3)
    axes.set_xlabel("bytes of the file, in order" + f", from byte {start:,}" * bool(start))
    axes.set_ylabel("bits saved (of 8)")
    axes.grid(axis="x", visible=False)
    return figure


def _colors(names) -> list[str]:
    """One color each; the model, where there is one, has its own."""
    rest = iter((BLUE, SKY, GREEN, PURPLE, GREY, VERMILLION))
    return [ORANGE if name == "model" else next(rest) for name in names]


def _legend_above(axes, columns: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, columnspacing=1, handlelength=1,
        fontsize=7.5, borderaxespad=0.2,
    )  # fmt: skip


@styled
def paid_so_far(costs: Mapping[str, object]):
    """Bits per byte of the first n bytes, for every n: how fast each coder learns.

    ``costs``: the cost of every byte, by the names of up to four coders.
    """
    figure, axes = subplots()
    for (name, bits), color in zip(costs.items(), (ORANGE, GREY, BLUE, GREEN), strict=False):
        bits_N = array("bits", bits, (None,))
        n_N = np.arange(1, len(bits_N) + 1)
        label = f"{name}, {bits_N.mean():.2f} in the end"
        axes.plot(n_N, bits_N.cumsum() / n_N, color=color, label=label)
    axes.set_ylim(0, 8)
    axes.margins(x=0.01)
    axes.set_xlabel("bytes coded")
    axes.set_ylabel("bits per byte so far")
    axes.legend()
    return figure


@styled
def weights_over_text(weights, names, smooth: int = 64):
    """Weights of the groups of experts at each byte, as means of ``smooth`` bytes up to there."""
    weights_NG = np.asarray(weights, float)
    figure, axes = subplots()
    sums_NG = np.vstack([np.zeros(len(names)), weights_NG.cumsum(0)])
    stop_N = np.arange(1, len(weights_NG) + 1)
    start_N = np.maximum(0, stop_N - smooth)
    means_NG = (sums_NG[stop_N] - sums_NG[start_N]) / (stop_N - start_N)[:, None]
    for name, color, mean_N in zip(names, _colors(names), means_NG.T, strict=True):
        axes.plot(stop_N, mean_N, color=color, label=name)
    axes.axhline(0, color=DARK, linewidth=0.8)
    axes.margins(x=0.01)
    axes.set_xlabel("bytes coded")
    axes.set_ylabel("weight")
    _legend_above(axes, len(names))
    return figure


@styled
def size_bars(rates: Mapping[str, float | None], own: str = ""):
    """Bits per byte of compressors by name, smallest first; ``own`` is drawn in another color.

    A compressor that is not installed has the rate None, and a row without a bar.
    """
    known = {name: rate for name, rate in rates.items() if rate is not None}
    if not known:
        raise BitbyteError("there are no compressors to draw")
    missing = [name for name in rates if name not in known]
    names = [*sorted(known, key=known.get), *missing]
    values_N = array("rates", [known.get(name, 0.0) for name in names], (None,))
    figure, axes = subplots(0.9 + 0.26 * len(names))
    colors = [ORANGE if name == own else GREY for name in names]
    bars = axes.barh(np.arange(len(names)), values_N, height=0.72, color=colors)
    texts = [f"{known[name]:.3f}" if name in known else "not installed" for name in names]
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * values_N.max())
    axes.set_xlabel("bits per byte")
    axes.grid(axis="y", visible=False)
    return figure
