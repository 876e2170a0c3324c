"""Self-contained HTML pages of a run: an index, and a page for each notebook.

Record fields, file names and notebook contents are untrusted: everything is escaped, and the pages
run no scripts and fetch nothing.
"""

import html
from pathlib import Path
from urllib.parse import quote

from bitbyte.evaluate.records import read_records
from bitbyte.evaluate.tables import COLUMNS, NUMBERS, bpb_rows
from bitbyte.files import write_atomic

TAGS = [
    "a", "abbr", "b", "blockquote", "br", "code", "del", "details", "div", "em", "h1", "h2", "h3",
    "h4", "h5", "h6", "hr", "i", "li", "mark", "ol", "p", "pre", "s", "small", "span", "strong",
    "sub", "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul",
]  # fmt: skip
STYLES = [  # used by what widgets leave; the page's policy blocks anything a value would fetch
    "background", "border-bottom", "border-left", "border-top", "color", "display", "height",
    "line-height", "overflow-wrap", "text-decoration", "white-space", "width",
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


def records_of(run: Path, since: float) -> list[dict]:
    """Evaluations made by a run: those in its ``results/``, and those in artifacts/results that
    were written after ``since`` (seconds since 1970).
    """
    return read_records("evaluation", run / "results") + read_records("evaluation", since=since)


def _page(title: str, body: str, css: str = "") -> bytes:
    """A whole document, whose policy forbids scripts and fetching, whatever the body holds."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data: file: 'self'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{CSS}{css}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    ).encode("utf-8", "replace")


def _href(path: str) -> str:
    """A path for a link; any bytes in a name are kept."""
    return quote(path, errors="surrogateescape")


def _link(path: str, text: str) -> str:
    return f'<a href="{_href(path)}">{html.escape(text)}</a>'


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], numbers: tuple[str, ...]) -> str:
    """An HTML table; the cells must already be HTML."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for row in rows:
        cells = (
            f'<td class="n">{cell}</td>' if name in numbers else f"<td>{cell}</td>"
            for name, cell in zip(head, row, strict=True)
        )
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _clean(text: str | bytes) -> str:
    """HTML with only the tags of Markdown, tables and byte views; other tags become text."""
    import bleach
    from bleach.css_sanitizer import CSSSanitizer

    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    attributes = {"*": ["class", "id"], "a": ["href", "title"], "th": ["align"], "td": ["align"]}
    attributes |= {tag: ["class", "style", "title"] for tag in ("mark", "pre", "span")}
    css = CSSSanitizer(allowed_css_properties=STYLES, allowed_svg_properties=[])
    return bleach.clean(text, tags=TAGS, attributes=attributes, css_sanitizer=css)


def write_notebook_page(path: Path) -> None:
    """Render NN_name.ipynb to NN_name.html beside it: no scripts, no network, clean outputs."""
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    node = nbformat.read(path, 4)
    # The template "basic" makes a fragment; the others load scripts from the network.
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
    """Write index.html of a run, and the pages of notebooks executed since the last call."""
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
    body.append(_table(COLUMNS, cells, NUMBERS) if cells else nothing)
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
