"""Fill numbers, tables and figures into the text of a paper: Markdown in, Markdown out.

Placeholders may stand anywhere but in code.  ``::: {#tbl:x .records rows=... columns=...}`` is a
table of records, ``::: {#fig:x .figure draw=... data=...}`` a figure that `plots.figures` or
`plots.analysis` draws from saved arrays or from records.  No pandoc here.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import re
from pathlib import Path

from bitbyte.evaluate.records import runs_word
from bitbyte.files import BitbyteError
from bitbyte.papers.numbers import (
    SPACE,
    FailedRecordError,
    Numbers,
    Record,
    find,
    fresh_arrays,
    look_up,
    markdown_text,
    same_bytes,
    shown,
    windows_of,
)
from bitbyte.plots import analysis, figures, style

PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
OPEN = re.compile(r"(:{3,})\s*\{(.*)\}\s*")
CLOSE = re.compile(r":{3,}\s*")
SPAN = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)\1(?!`)", re.DOTALL)
ATTRIBUTE = re.compile(
    r'\s*(?:#(?P<id>[\w:.-]+)|\.(?P<cls>[\w-]+)|(?P<key>[\w-]+)="(?P<val>[^"]*)")'
)
NUMERIC = {"bpb", "bytes", "parameters", "packed_bytes", "bytes_seen", "train_seconds"}
HEADS = {
    "model": "model", "family": "family", "linear": "weights", "ssm": "SSM", "kind": "kind",
    "bpb": "BPB", "interval": "95 % interval", "bytes": "bytes", "data": "data",
    "windows": "windows", "parameters": "parameters", "packed_bytes": "packed",
    "bytes_seen": "trained on", "train_seconds": "training", "seed": "seed",
}  # fmt: skip
TEXTS = {"model", "family", "linear", "ssm", "kind", "data", "seed"}  # from records, unchanged
PICTURES: dict[tuple[str, str], bytes] = {}  # of this process, kept because they take time
MANY = 8  # columns; with more, cells may wrap
KINDS = {
    "exact": "exact", "upper_bound": "bound", "chain_rule:left_to_right": "left to right",
    "chain_rule:confidence": "by confidence", "exact:mixed": "in the mixer",
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Problems:
    """What is wrong with a paper, by line; a draft shows each problem in its place."""

    paper: str
    found: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def add(self, line: int, text: str | BitbyteError) -> str:
        """Record a problem, unless it only follows from another one.

        Returns the Markdown that shows it in a draft.
        """
        if (line, str(text)) not in self.found and not isinstance(text, FailedRecordError):
            self.found.append((line, str(text)))
        return f"[\\[?? {markdown_text(text)}\\]]{{.draft}}"

    def lines(self) -> list[str]:
        """One line each, in the order of the text."""
        return [f"{self.paper}:{line}: {text}" for line, text in sorted(self.found)]


@dataclasses.dataclass(kw_only=True)
class Figure:
    """A drawn figure: what it was drawn from, and its pictures by format."""

    name: str  # of its files, without suffix
    label: str
    draw: str
    records: list[str]
    arrays: str | None
    line: int
    drawn: object  # matplotlib's Figure
    key: str  # hash of what it shows

    def picture(self, kind: str) -> bytes:
        """As SVG or PDF, with text as outlines; the same data give the same bytes."""
        if (self.key, kind) not in PICTURES:
            PICTURES[self.key, kind] = picture(self.drawn, kind)
        return PICTURES[self.key, kind]


@dataclasses.dataclass(kw_only=True)
class Text:
    """Puts numbers, tables and figures into the text of one paper."""

    numbers: Numbers
    problems: Problems
    results: list[Path]  # folders of records
    arrays: list[Path]  # folders of saved arrays
    figures: list[Figure] = dataclasses.field(default_factory=list)

    def fill(self, text: str, first: int) -> str:
        """The Markdown with everything filled in; ``first`` is the number of its first line."""
        lines = text.split("\n")
        code = _code_lines(lines)
        out, at = [], 0
        while at < len(lines):
            found = None if code[at] else OPEN.fullmatch(lines[at])
            words = _attributes(found[2]) if found else None
            if words and words["cls"] in ("records", "figure"):
                end = next(
                    (i for i in range(at + 1, len(lines)) if CLOSE.fullmatch(lines[i])), None
                )
                if end is None:
                    out.append(self.problems.add(first + at, "this div is not closed"))
                    at += 1
                    continue
                body = self.inline("\n".join(lines[at + 1 : end]).strip(), first + at + 1)
                out.append(self._block(words, body, first + at))
                at = end + 1
                continue
            end = at + 1
            if not code[at]:
                while end < len(lines) and not code[end] and not OPEN.fullmatch(lines[end]):
                    end += 1
                out.append(self.inline("\n".join(lines[at:end]), first + at))
            else:
                out.append(lines[at])
            at = end
        return "\n".join(out)

    def inline(self, text: str, first: int) -> str:
        """Replace placeholders outside code spans; ``first`` is the number of the first line."""
        code = [found.span() for found in SPAN.finditer(text)]

        def put(found: re.Match) -> str:
            if any(a <= found.start() < b for a, b in code):
                return found[0]
            line = first + text.count("\n", 0, found.start())
            try:
                return self.numbers.render(" ".join(found[1].split()), line)
            except BitbyteError as error:
                return self.problems.add(line, error)

        filled = PLACEHOLDER.sub(put, text)
        spans = [found.span() for found in SPAN.finditer(filled)]
        for left in re.finditer(r"\{\{", filled):
            if not any(a <= left.start() < b for a, b in spans):
                line = first + text.count("\n", 0, max(0, text.find(left[0])))
                self.problems.add(line, "a {{ has no closing }}")
        return filled

    def _block(self, words: dict, caption: str, line: int) -> str:
        try:
            known = {
                "records": {"rows", "columns"},
                "figure": {"draw", "data", "rows", "width", "x"},
            }[words["cls"]]
            strange = set(words["rest"]) - known
            if strange:
                raise BitbyteError(f"unknown attribute {', '.join(sorted(strange))} of this div")
            prefix = "tbl:" if words["cls"] == "records" else "fig:"
            if not (words["id"] or "").startswith(prefix) or not caption:
                raise BitbyteError(f"this div needs an id #{prefix}name and a caption")
            if words["cls"] == "records":
                return self._table(words["id"], words["rest"], caption, line)
            return self._figure(words["id"], words["rest"], caption, line)
        except BitbyteError as error:
            return self.problems.add(line, error)

    # --- tables

    def _rows(self, words: str, line: int) -> list[list[Record]]:
        rows = [self.numbers.group(word) for word in words.split()]
        if not rows:
            raise BitbyteError("rows names no record")
        return rows

    def _table(self, label: str, options: dict, caption: str, line: int) -> str:
        rows = self._rows(options.get("rows", ""), line)
        columns = options.get("columns", "model kind bpb interval").split()
        for name in columns:
            if name not in HEADS:
                raise BitbyteError(f"unknown column {name}; known: {' '.join(HEADS)}")
        if "bpb" in columns:
            every = [record for row in rows for record in row]
            if "data" not in columns:
                same_bytes(every, windows="windows" not in columns)
        kinds = sorted({str(row[0].value.get("kind")) for row in rows}, key=_place_of_kind)
        layout = []  # (column, the one kind that it shows)
        for name in columns:  # costs of several kinds never share a column
            several = name == "bpb" and len(kinds) > 1
            layout += [(name, kind) for kind in kinds] if several else [(name, None)]
        body = []
        for row in rows:
            cells = []
            for name, kind in layout:
                if kind not in (None, row[0].value.get("kind")):
                    cells.append("")
                    continue
                text = cell(name, row)
                words = markdown_text(text) if name in TEXTS else text
                cells.append(words if len(layout) > MANY else words.replace(" ", SPACE))
                path = _path(name, row)
                if path:
                    sources = [(record, path) for record in row]
                    self.numbers.note(text, None, sources, line, f"{label} {name}")
            body.append("| " + " | ".join(cells) + " |")
        names = [f"BPB, {KINDS.get(kind, kind)}" if kind else HEADS[name] for name, kind in layout]
        if len(layout) <= MANY:
            names = [name.replace(" ", SPACE) for name in names]
        heads = "| " + " | ".join(names) + " |"
        rule = "|" + "|".join("--:" if name in NUMERIC else ":--" for name, _ in layout) + "|"
        caption = f": {_one_line(caption)} {{#{label}}}"
        table = "\n".join([heads, rule, *body])
        return f"\n::: {{.records-table}}\n{table}\n\n{caption}\n:::\n"

    # --- figures

    def _figure(self, label: str, options: dict, caption: str, line: int) -> str:
        draw = _drawer(options.get("draw", ""))
        if ("data" in options) == ("rows" in options):
            raise BitbyteError("a figure needs data= (saved arrays) or rows= (records)")
        if "rows" in options:
            rows = self._rows(options["rows"], line)
            value, extra = {"": [_mean(row) for row in rows]}, {}
            stems = [record.stem for row in rows for record in row]
        else:
            path = find(f"{options['data']}.json", self.arrays)
            value, stems = fresh_arrays(path, self.results)
            extra = {"x": options["x"]} if "x" in options else {}
            for alias, record in self.numbers.records.items():
                if record.stem in stems:
                    self.numbers.used.add(alias)
        what = json.dumps([options["draw"], value, extra], sort_keys=True)
        key = hashlib.sha256(what.encode()).hexdigest()
        figure = _call(draw, value, extra)
        self.figures.append(
            Figure(
                name=f"{Path(self.problems.paper).stem}-{label.replace(':', '-')}", label=label,
                draw=options["draw"], records=stems, line=line, drawn=figure, key=key,
                arrays=f"{options['data']}.json" if "data" in options else None,
            )
        )  # fmt: skip
        text = _one_line(caption)
        width = options.get("width", "100%")
        if not re.fullmatch(r"\d{1,3}(\.\d+)?%", width):
            raise BitbyteError(f"width is {width!r}; it must be a percentage")
        name = self.figures[-1].name
        return f"\n![{text}](figures/{name}){{#{label} width={width}}}\n"


def _code_lines(lines: list[str]) -> list[bool]:
    """Which lines belong to a fenced code block, including its fences."""
    inside, out = "", []
    for line in lines:
        found = FENCE.match(line)
        if inside:
            out.append(True)
            if found and found[1].startswith(inside) and not line.strip(" `~"):
                inside = ""
        else:
            inside = found[1] if found else ""
            out.append(bool(found))
    return out


def _attributes(text: str) -> dict | None:
    """{id, cls, rest} of the attributes in a div's braces; None if they cannot be read."""
    words, at = {"id": None, "cls": None, "rest": {}}, 0
    while at < len(text.rstrip()):
        found = ATTRIBUTE.match(text, at)
        if not found:
            return None
        if found["key"]:
            words["rest"][found["key"]] = found["val"]
        else:
            words[found.lastgroup] = found[found.lastgroup]
        at = found.end()
    return words


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _path(name: str, row: list[Record]) -> str | None:
    """The field behind a column; None if a record lacks it."""
    path = {"seed": "train_seed", "windows": "context.window", "data": "data.path"}.get(name, name)
    path = f"config.{name}" if name in ("linear", "ssm") else path
    try:
        for record in row:
            look_up(record, path)
    except BitbyteError:
        return None
    return path


def cell(name: str, row: list[Record]) -> str:
    """A table cell: one column of a record, or of the records of several seeds."""
    if name == "windows":
        return windows_of(row[0])
    path = _path(name, row)
    if path is None:
        if name in ("ssm", "linear", "seed", "train_seconds"):
            return ""  # not every family has it, nor every older record
        raise BitbyteError(f"{row[0].stem} has nothing for the column {name}")
    values = [look_up(record, path) for record in row]
    if name == "bpb":
        text = shown(math.fsum(values) / len(values), ".3f", side=int(row[0].is_bound))
        return text if len(row) == 1 else f"{text} ({shown(max(values) - min(values), '.3f')})"
    if name == "interval":
        if len(row) > 1 or values[0] is None:
            return ""
        return " to ".join(shown(value, ".3f") for value in values[0])
    if name == "kind":
        return KINDS.get(values[0], str(values[0]))
    if name == "seed":
        return ", ".join(str(value) for value in values)
    if values[0] is None:
        return ""
    if name in ("bytes", "parameters"):
        return shown(values[0], ",")
    if name in ("packed_bytes", "bytes_seen"):
        return shown(values[0], ".2f" if name == "packed_bytes" else ".1f", "MB")
    if name == "train_seconds":
        return shown(math.fsum(values) / len(values), ".0f", "min")
    return str(values[0])


def _place_of_kind(kind: str) -> int:
    return [*KINDS, kind].index(kind)


def _mean(row: list[Record]) -> dict:
    """One record for a figure: itself, or the mean of several runs with their range as bar."""
    if len(row) == 1:
        return row[0].value
    costs = [record.value["bpb"] for record in row]
    ends = {"bpb": math.fsum(costs) / len(costs), "interval": [min(costs), max(costs)]}
    several = f"{len(row)} {runs_word([record.value for record in row])} (bar: range)"
    return row[0].value | ends | {"model": f"{row[0].value['model']}, {several}"}


def _drawer(name: str):
    """The function of `plots.figures` or `plots.analysis` with this name."""
    for module in (figures, analysis):
        function = getattr(module, name, None) if re.fullmatch(r"[a-z]\w*", name) else None
        inside = inspect.isfunction(function) and function.__module__ == module.__name__
        if inside and name not in ("save", "png_bytes"):
            return function
    raise BitbyteError(f"no drawing function {name!r} in bitbyte.plots")


def _call(draw, arrays: dict, options: dict):
    """Call a drawing function with saved arrays: by name, as the only argument, or as a dict."""
    names = inspect.signature(draw).parameters
    if set(options) - set(names):
        raise BitbyteError(f"{draw.__name__} takes no {', '.join(options)}")
    try:
        if set(arrays) <= set(names):
            return draw(**arrays, **options)
        return draw(next(iter(arrays.values())) if len(arrays) == 1 else arrays, **options)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, BitbyteError):
            raise
        raise BitbyteError(f"{draw.__name__} cannot draw this ({error!r})") from None


def picture(figure, kind: str) -> bytes:
    """The figure as SVG or PDF, with text as outlines; the same data give the same bytes."""
    import matplotlib

    none = {"svg": {"Date": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}

    def render() -> bytes:
        matplotlib.rcParams["svg.hashsalt"] = "bitbyte"
        return style.rendered(figure, kind, none[kind])

    return style.styled(render)()
