"""Figures for `compress` and `certify`: numbers in, matplotlib `Figure` out, as in `figures`."""

from collections.abc import Mapping

import numpy as np

from bitbyte.files import BitbyteError
from bitbyte.plots.style import BLUE, DARK, GREY, ORANGE, VERMILLION, array, glyph, styled, subplots


@styled
def saved_bits(data: bytes, bits, stop: int = 96):
    """8 - cost of each of the first ``stop`` bytes: bits are saved above the line, lost below.

    ``bits`` are the costs (surprisals) of the bytes of ``data`` under the model.
    """
    saved_N = 8 - array("bits", bits, (len(data),))[:stop]
    figure, axes = subplots()
    place_N = np.arange(len(saved_N))
    colors = [BLUE if saved >= 0 else VERMILLION for saved in saved_N]
    axes.bar(place_N, saved_N, width=0.85, color=colors, linewidth=0)
    axes.axhline(0, color=DARK, linewidth=0.8)
    axes.set_xticks(place_N, [glyph(byte) for byte in data[: len(saved_N)]], fontsize=6)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.7, len(saved_N) - 0.3)
    axes.set_xlabel("bytes of the file, in order")
    axes.set_ylabel("bits saved (of 8)")
    axes.grid(axis="x", visible=False)
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
