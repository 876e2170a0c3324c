"""Next-byte probabilities before and after the filters: bars as HTML, and a sentence."""

import html

from bitbyte.config import SamplingConfig
from bitbyte.generate import FilterEffect
from bitbyte.plots.style import INK, MONO, ORANGE, SKY
from bitbyte.vocab import N_BYTES, byte_label

N_BARS = 12  # bytes that get a bar
CUT = "rgba(128, 128, 128, 0.5)"  # color of bars that the filters cut


def sentence(effect: FilterEffect, config: SamplingConfig) -> str:
    """What the settings do to a distribution, in words."""
    words = (
        f"keeps {effect.kept} of {N_BYTES} bytes, {100 * effect.mass:.1f} % of the probability, "
        f"entropy {effect.bits_before:.2f} to {effect.bits_after:.2f} bits"
    )
    return f"greedy, always the likeliest byte: {words}" if config.temperature == 0 else words


def probs_html(title: str, effect: FilterEffect) -> str:
    """Bars of the likeliest bytes before and after the filters; cut bytes name the filter."""
    order = effect.before.argsort(descending=True, stable=True).tolist()
    top = max(float(effect.before.max()), float(effect.after.max()))
    rows = [_row("th", "byte", "model", "after your settings")]
    for byte in order[:N_BARS]:
        before, after = float(effect.before[byte]), float(effect.after[byte])
        rule = html.escape(effect.rules[byte])
        rows.append(
            _row(
                "td",
                f"<b>{html.escape(byte_label(byte))}</b> <i>{byte:02x}</i>",
                _bar(before / top, CUT if rule else SKY, f"{100 * before:.1f} %"),
                _bar(after / top, ORANGE, f"cut by {rule}" if rule else f"{100 * after:.1f} %"),
            )
        )
    rest = order[N_BARS:]
    sums = [float(p_V[rest].sum()) for p_V in (effect.before, effect.after)]
    bars = (_bar(0, CUT, f"{100 * p:.1f} %") for p in sums)
    rows.append(_row("td", f"{len(rest)} others", *bars))
    return (
        f'<div style="color:{INK};line-height:22px;white-space:nowrap;overflow:hidden">'
        f"{html.escape(title)}</div>"
        f'<table style="color:{INK};font:12px/18px {MONO};border-spacing:0;table-layout:fixed;'
        f'width:100%">{"".join(rows)}</table>'
    )


def _row(tag: str, *cells: str) -> str:
    style = "text-align:left;padding:0 4px;white-space:nowrap;overflow:hidden;width"
    widths = zip(("20%", "35%", "45%"), cells, strict=True)
    row = "".join(f'<{tag} style="{style}:{width}">{cell}</{tag}>' for width, cell in widths)
    return f"<tr>{row}</tr>"


def _bar(share: float, color: str, text: str) -> str:
    return (
        '<span style="display:inline-block;width:42%"><span style="display:inline-block;'
        f"height:11px;vertical-align:middle;background:{color};width:{100 * share:.1f}%"
        f'"></span></span> {text}'
    )
