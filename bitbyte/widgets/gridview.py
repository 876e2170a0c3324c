"""How far a grid is, in a notebook.

view = GridView()
engines.run_grid(grid, "local:2", show=view)
"""

from html import escape
from typing import Any

import ipywidgets as W

from bitbyte.files import shown
from bitbyte.plots.style import ALARM
from bitbyte.widgets.base import inked, paragraph

ROWS = 40  # shown at most
COLORS = {"done": "#2a7f62", "running": "#0a58ca", "failed": ALARM, "waiting": "#8884"}


class GridView:
    """A bar of the cells by their state, and a table; call it with the states of a grid."""

    def __init__(self):
        self.box = W.HTML()
        self.states: list[Any] = []

    def __call__(self, states: list) -> None:
        self.states = states
        self.box.value = self.to_html()

    def __repr__(self) -> str:
        done = sum(s.state == "done" for s in self.states)
        return f"GridView({done} of {len(self.states)} cells done)"

    def _repr_mimebundle_(self, **options) -> dict:
        bundle = self.box._repr_mimebundle_(**options) | {"text/plain": repr(self)}
        return bundle | {"text/html": self.to_html()}

    def to_html(self) -> str:
        """The state as HTML without scripts."""
        counts = {name: sum(s.state == name for s in self.states) for name in COLORS}
        total = max(1, len(self.states))
        bar = "".join(
            f'<span title="{n} {name}" style="display:inline-block;height:10px;'
            f'width:{100 * n / total:.2f}%;background:{COLORS[name]}"></span>'
            for name, n in counts.items()
        )
        said = ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "no cells"
        rows = [self._row(s) for s in self.states[:ROWS]]
        if len(self.states) > ROWS:
            rows.append(f"<tr><td>and {len(self.states) - ROWS} more</td></tr>")
        table = f'<table style="border-spacing:12px 0">{"".join(rows)}</table>'
        body = f"{bar}{paragraph(escape(said))}{inked(table)}"
        return f'<div class="bitbyte-static">{body}</div>'

    @staticmethod
    def _row(s) -> str:
        words = ", ".join(f"{k} {v}" for k, v in s.cell.parameters.items()) or s.cell.label
        share = f" {s.progress:.0%}" if s.state == "running" and s.progress is not None else ""
        cells = (shown(words), s.state + share, s.bpb_text, shown(s.error or "")[:80])
        return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
