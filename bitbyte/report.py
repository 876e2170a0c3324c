"""What a run shows: the table of bits per byte and HTML pages that need nothing but themselves.

Not the evaluation (``bitbyte.evaluate`` writes the result records read here).  Record fields,
file names and notebook contents are strangers' text: everything is escaped, nothing runs, nothing
is fetched.
"""

import html
from pathlib import Path
from urllib.parse import quote

from bitbyte.files import BitbyteError, read_text, write_atomic
from bitbyte.records import LEAST_BYTES, read_records, runs_word
from bitbyte.vocab import printable

COLUMNS = ("model", "data", "bytes", "BPB", "95 % interval of these bytes", "windows", "kind")
TAGS = [
    "a", "abbr", "b", "blockquote", "br", "code", "del", "div", "em", "h1", "h2", "h3", "h4", "h5",
    "h6", "hr", "i", "li", "ol", "p", "pre", "s", "span", "strong", "sub", "sup", "table", "tbody",
    "td", "th", "thead", "tr", "ul",
]  # fmt: skip
CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #667; --line: #d8dee4; --paper: #fff;
  --tint: #f6f8fa; --link: #0a58ca }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e6ea; --dim: #99a; --line: #3a4049;
  --paper: #16191d; --tint: #1f242a; --link: #7ab0ff } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
a { color: var(--link) } h1, h2 { line-height: 1.2 } .dim { color: var(--dim) }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
figure { margin: 1.5rem 0 } pre { overflow-x: auto; margin: 0; font-size: 85% }
.jp-InputArea, .input { background: var(--tint); padding: .6rem .8rem; border-radius: 4px;
  margin: 1rem 0 .4rem }
.anchor-link, .prompt, .jp-InputPrompt, .jp-OutputPrompt, .jp-Collapser { display: none }
.failed { color: #c22 }
"""


# --- bits per byte


def records_of(run: Path, since: float) -> list[dict]:
    """Evaluations that a run made: those in its ``results/``, and those written to
    artifacts/results after ``since`` (seconds since 1970).
    """
    return read_records("evaluation", run / "results") + read_records("evaluation", since=since)


def bpb_rows(records: list[dict]) -> list[tuple[str, ...]]:
    """Cells of the table, best first within each data set; a bound is shown as ``<=``.

    A BPB over masked bytes only is no BPB of the data and is left out.
    """
    rows = []
    for r in records:
        data, bpb = r["data"], f"{r['bpb']:.4f}"
        if r["kind"] != "masked_only":
            bpb = f"<= {bpb}" if r["kind"] == "upper_bound" else bpb
            place = (data["path"], data["split"], data["sha256"], r["bpb"])
            name = f"{data['path']} {data['split']} {data['sha256'][:8]}"
            name += ", trained on it" if r["trained_on_it"] else ""
            cells = (r["model"], name, f"{r['bytes']:,}", bpb, _interval(r), _windows(r), r["kind"])
            rows.append((place, cells))
    rows.sort(key=lambda row: row[0])
    return [
        tuple(printable(cell.encode("utf-8", "replace")) for cell in cells) for _, cells in rows
    ]


def _interval(record: dict) -> str:
    bounds = record["interval"]
    return f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "no interval"


def _windows(record: dict) -> str:
    return f"{record['context']['window']}/{record['context']['stride']}"


def bpb_table(records: list[dict]) -> str:
    """Result records as a text table, one line each."""
    rows = bpb_rows(records)
    if not rows:
        return "no BPB was measured"
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = []
    for row in (COLUMNS, tuple("-" * width for width in widths), *rows):
        cells = [
            cell.rjust(width) if name in ("bytes", "BPB") else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# --- pages


def _page(title: str, body: str, css: str = "") -> bytes:
    """A whole document.  The policy forbids scripts and anything fetched, whatever the body has."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data: file: 'self'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{CSS}{css}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    ).encode("utf-8", "replace")


def _href(path: str) -> str:
    """A path in a link: the bytes of the name, whatever they are."""
    return quote(path, errors="surrogateescape")


def _link(path: str, text: str) -> str:
    return f'<a href="{_href(path)}">{html.escape(text)}</a>'


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], numbers: tuple[str, ...]) -> str:
    """Cells are HTML already."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for row in rows:
        cells = (
            f'<td class="n">{cell}</td>' if name in numbers else f"<td>{cell}</td>"
            for name, cell in zip(head, row, strict=True)
        )
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _clean(text: str | bytes) -> str:
    """HTML with only the tags that Markdown and tables make; anything else becomes text."""
    import bleach

    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    attributes = {"*": ["class", "id"], "a": ["href", "title"], "th": ["align"], "td": ["align"]}
    return bleach.clean(text, tags=TAGS, attributes=attributes)


def write_notebook_page(path: Path) -> None:
    """Render NN_name.ipynb to NN_name.html beside it: no script, no network, outputs sanitised."""
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    node = nbformat.read(path, 4)
    # The template "basic" is a fragment: the others load scripts from the network.
    exporter = HTMLExporter(template_name="basic", sanitize_html=True)
    exporter.register_filter("clean_html", _clean)
    body, _ = exporter.from_notebook_node(node)
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    css = (
        HtmlFormatter(style="default").get_style_defs(".highlight")
        + f"\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
        + ".highlight { background: none !important }\n"
    )
    back = f"<p>{_link('index.html', 'back to the run')}</p>"
    write_atomic(path.with_suffix(".html"), _page(path.stem, back + body, css))


def write_index(run: Path, manifest: dict) -> None:
    """Write index.html of a run, and the page of each notebook executed since the last time."""
    rows = []
    for entry in manifest["notebooks"]:
        path = run / entry["name"]
        page = path.with_suffix(".html")
        links = html.escape(entry["name"])
        if path.is_file():
            if not page.is_file() or page.stat().st_mtime < path.stat().st_mtime:
                write_notebook_page(path)
            links = f"{_link(page.name, path.stem)} ({_link(path.name, 'ipynb')})"
        parameters = ", ".join(f"{name}={value!r}" for name, value in entry["parameters"].items())
        status = html.escape(entry["error"] or entry["status"])
        status = f'<span class="failed">{status}</span>' if entry["error"] else status
        seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.1f}"
        rows.append((links, status, seconds, html.escape(parameters)))
    body = [f"<h1>bitbyte run {html.escape(run.name)}</h1>", "<h2>Notebooks</h2>"]
    body.append(_table(("notebook", "status", "seconds", "parameters"), rows, ("seconds",)))
    body.append("<h2>Bits per byte</h2>")
    cells = [tuple(map(html.escape, row)) for row in bpb_rows(records_of(run, manifest["began"]))]
    nothing = '<p class="dim">No BPB was measured.</p>'
    body.append(_table(COLUMNS, cells, ("bytes", "BPB")) if cells else nothing)
    figures: dict[str, list[str]] = {}  # path without suffix -> files of one picture
    for path in sorted((run / "figures").rglob("*")):
        if path.suffix in (".png", ".pdf"):
            name = path.relative_to(run).as_posix()
            figures.setdefault(name.removesuffix(path.suffix), []).append(name)
    body.append("<h2>Figures</h2>" if figures else "")
    for title, names in figures.items():
        image = "".join(f'<img src="{_href(n)}" alt=""><br>' for n in names if n.endswith(".png"))
        links = ", ".join(_link(name, name.rpartition(".")[2]) for name in names)
        caption = f"<figcaption>{html.escape(title)} ({links})</figcaption>"
        body.append(f"<figure>{image}{caption}</figure>")
    write_atomic(run / "index.html", _page(f"bitbyte run {run.name}", "\n".join(body)))


# --- README


KIND_COLUMNS = {
    "exact": "exact",
    "upper_bound": "bound",
    "chain_rule:left_to_right": "left to right",
    "chain_rule:confidence": "confidence",
}


def results_markdown(records: list[dict]) -> str:
    """Markdown tables of the records on bytes that the model has not seen, one for each data set.

    A row is a model, a column a kind of BPB.  Checkpoints of one name are trainings of one model
    and are shown as their mean and range; of several records of one checkpoint one counts, see
    `_one_each`.
    """
    tables: dict[tuple, dict[tuple, list[dict]]] = {}
    for r in records:
        if not r["trained_on_it"]:
            data = (r["data"]["path"], r["data"]["split"], r["bytes"], r["data"]["sha256"])
            row = (r["model"], r["parameters"], r["packed_bytes"], r["bytes_seen"])
            table = tables.setdefault((*data, _windows(r)), {})
            table.setdefault(row, []).append(r)
    return "\n\n".join(
        _results_table(key, rows) for key, rows in sorted(tables.items(), key=lambda t: t[0])
    )


def _results_table(key: tuple, rows: dict[tuple, list[dict]]) -> str:
    path, split, n_bytes, sha256, windows = key
    about = "; too few bytes for intervals" if n_bytes < LEAST_BYTES else ""
    if any(r["interval"] for group in rows.values() for r in group):
        about = "; 95 % intervals of these bytes"
    kinds = [k for k in KIND_COLUMNS if any(r["kind"] == k for rs in rows.values() for r in rs)]
    head = ["model", "parameters", "packed", "trained on", "kB/s", *map(KIND_COLUMNS.get, kinds)]
    data = f"**{_cell(path)}, {_cell(split)}**: {n_bytes:,} bytes (sha256 {_cell(sha256[:8])})"
    lines = [
        f"{data}, windows {windows}{about}",
        "",
        f"| {' | '.join(head)} |",
        "|---|" + "--:|" * 4 + "---|" * len(kinds),
    ]
    order = sorted(rows.items(), key=lambda item: min(r["bpb"] for r in item[1]))
    for (name, parameters, packed, seen), group in order:
        runs = {r.get("checkpoint"): r for r in group if r.get("train_seconds")}.values()
        speeds = [r["bytes_seen"] / r["train_seconds"] for r in runs]
        cells = [
            _cell(name),
            f"{parameters:,}",
            f"{packed / 1e6:.2f} MB",
            f"{seen / 1e6:.1f} MB" if seen else "",
            f"{sum(speeds) / len(speeds) / 1e3:.1f}" if speeds else "",
            *(_kind_cell([r for r in group if r["kind"] == kind]) for kind in kinds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _one_each(group: list[dict]) -> list[dict]:
    """One record a checkpoint: that of most draws, fewest bytes a pass and, of these, in fp32.

    Scores of one checkpoint differ by how they were taken, not by how well a training went.
    """

    def care(r: dict) -> tuple:
        draws = r["draws"]["per_window"] if r.get("draws") else 0
        return draws, -(r.get("per_pass") or 1), r.get("dtype") == "fp32"

    found: dict[str | None, dict] = {}
    for r in group:
        found[r.get("checkpoint")] = max(found.get(r.get("checkpoint"), r), r, key=care)
    return [*found.values()]


def _kind_cell(group: list[dict]) -> str:
    """BPB and its 95 % interval; for several trainings of one model their mean and range."""
    if not group:
        return ""
    group = _one_each(group)
    values = [r["bpb"] for r in group]
    sign = "<= " if group[0]["kind"] == "upper_bound" else ""
    several = {r["per_pass"] for r in group if r.get("per_pass")} - {1}
    note = f", {several.pop()} bytes a pass" if several else ""
    text = f"{sign}**{sum(values) / len(values):.4f}**"
    if len(group) > 1:
        word = runs_word(group)
        return f"{text} ({len(group)} {word}, {min(values):.4f} to {max(values):.4f}{note})"
    about = [_interval(group[0])] * bool(group[0]["interval"]) + [note.removeprefix(", ")]
    return f"{text} ({', '.join(filter(None, about))})".removesuffix(" ()")


def _cell(text: str) -> str:
    """Any text as the inside of a cell of a Markdown table."""
    text = html.escape(printable(text.encode("utf-8", "replace")))
    return text.replace("|", "&#124;")


def write_results(readme: Path, records: list[dict]) -> None:
    """Replace the results table in a Markdown file, between its two marks."""
    write_between(readme, "results", results_markdown(records))


def write_between(readme: Path, name: str, markdown: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end of name -->`` in a file.

    All else stays as it is, line ends included.  Raises BitbyteError if it lacks these lines or is
    not UTF-8.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = read_text(readme)
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise BitbyteError(f"{readme} lacks the lines {start} and {end}")
    part = f"{start}\n{markdown}\n{end}"
    if "\r\n" in text:
        part = part.replace("\n", "\r\n")
    write_atomic(readme, f"{before}{part}{after}".encode(), follow=True)
