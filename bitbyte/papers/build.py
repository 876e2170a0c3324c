"""Papers: Markdown with placeholders in, self-contained HTML and byte-reproducible PDF out.

The whole paper is checked before anything is written: records and their data, numbers, figures,
citations, cross-references.  pandoc and typst come with the extra:
pip install "bitbyte[papers]".  The text of a paper is trusted: raw HTML in it is passed through.
But nothing is fetched, and every picture must be drawn from records.
"""

import datetime
import functools
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from bitbyte.files import (
    BitbyteError,
    RunError,
    artifacts,
    output_folder,
    shown,
    to_json,
    write_atomic,
)
from bitbyte.papers.numbers import sources_line
from bitbyte.papers.source import Paper, find_papers, line_of, need_extra, read_paper, read_text

ASSETS = Path(__file__).parent / "assets"
FORMATS = ("html", "pdf", "md")
ENGINES = ("typst", "xelatex")
KEY = re.compile(r"^\s*@(?!(?:comment|string|preamble)\b)\w+\s*\{\s*([^\s,]+)\s*,", re.I | re.M)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
UNKNOWN = "\U0010fffd"  # a private-use character that no font has
LABELLED = ("fig:", "tbl:", "eq:")  # the text must refer to each of these


def pandoc_program() -> str:
    """The pandoc of the extra, whose output is tested, or else the one on PATH."""
    need_extra("pypandoc")
    import pypandoc

    bundled = Path(pypandoc.__file__).parent / "files"
    found = shutil.which("pandoc", path=str(bundled))
    return found or pypandoc.get_pandoc_path()


def _pandoc(paper: Paper, work: Path, to: str, *options: str, strict: bool) -> bytes:
    """Run pandoc on a paper in the folder ``work``; problems go to the paper."""
    (work / "meta.json").write_bytes(to_json(_words(paper)))
    (work / "paper.md").write_text(paper.body, "utf-8")
    bibliography = bibliography_of(paper)
    keys = _keys(bibliography)
    command = [
        pandoc_program(), "paper.md", "--from=markdown", f"--to={to}", "--standalone",
        "--metadata-file=meta.json", f"--lua-filter={ASSETS / 'xref.lua'}", "--citeproc",
        *options,
    ]  # fmt: skip
    if not re.search(r"\n#+ [^\n]*\s*$", paper.body):  # the text has no heading for them
        command.append("--metadata=reference-section-title:References")
    if bibliography.is_file():  # copied: without BOM and CRLF, in a safe folder
        (work / "references.bib").write_text(read_text(bibliography), "utf-8")
        command.append("--bibliography=references.bib")
    command += ["--fail-if-warnings"] if strict else []
    command += ["--toc"] if paper.meta.get("toc") == "true" else []
    for word in command[1:]:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise BitbyteError(
                f"{shown(word)} is not UTF-8, as pandoc's paths must be; rename the folder"
            ) from None
    report = work / "xref.txt"
    # Nothing may be fetched, so name a proxy that does not exist.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"BITBYTE_XREF": str(report)}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, check=False)
    lines = report.read_text("utf-8").splitlines() if report.is_file() else []
    _check(paper, [line.split("\t", 1) for line in lines if line], keys, bibliography)
    message = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode and (strict or done.returncode != 3) and not paper.problems.found:
        paper.problems.add(1, f"pandoc: {' '.join(message.split())}")
    return done.stdout


def _words(paper: Paper) -> dict:
    """The front matter as pandoc and our templates expect it."""
    meta = {k: v for k, v in paper.meta.items() if k not in ("toc", "numbersections")}
    day = paper.date
    meta["date"] = f"{day.day} {MONTHS[day.month - 1]} {day.year}"
    meta["link-citations"] = "true"
    meta["title-text"] = meta["pagetitle"] = _plain(meta["title"])
    meta["author-text"] = _plain(meta["author"]).replace('"', "")
    return meta


def _plain(text: str) -> str:
    """Markdown as plain text, for a title bar."""
    return re.sub(r"[*_`\\]", "", text)


def bibliography_of(paper: Paper) -> Path:
    """Where a paper's references must be: beside the folder that holds the paper."""
    return paper.path.parent.parent / "references.bib"


def _keys(bibliography: Path) -> list[str]:
    """The keys of a bibliography; none if there is no such file."""
    return KEY.findall(read_text(bibliography)) if bibliography.is_file() else []


def _check(paper: Paper, report: list[list[str]], keys: list[str], bibliography: Path) -> None:
    """Turn what the filter found into problems."""
    labels = [text for kind, text in report if kind == "label"]
    refs = {text for kind, text in report if kind == "ref"}
    add, at = paper.problems.add, lambda word: line_of(paper, word)
    for kind, text in report:
        if kind == "unknown":
            add(at(f"@{text}"), f"broken cross-reference @{text}: no such label")
        elif kind == "twice":
            add(at(f"#{text}"), f"the label {text} is defined twice")
        elif kind == "mixed":
            add(at(f"@{text}"), f"@{text}: one bracket cannot hold both labels and citations")
        elif kind == "image":
            add(at(text), f"the picture {text!r} is not drawn from records; use a .figure div")
        elif kind == "cite":
            paper.cited.add(text)
            if text not in keys:
                where = f"not in {shown(bibliography)}"
                if not bibliography.is_file():
                    where = f"there is no {shown(bibliography)}"
                add(at(f"@{text}"), f"unknown citation @{text}: {where}")
    for label in labels:
        if label.startswith(LABELLED) and label not in refs:
            add(at(f"#{label}"), f"nothing refers to {label}")


def _numbered(paper: Paper) -> bool:
    return paper.meta.get("numbersections", "true") != "false"


def to_html(paper: Paper, work: Path, *, strict: bool = True) -> bytes:
    """The paper as one self-contained HTML page."""
    return _pandoc(
        paper, work, "html5", "--embed-resources", "--mathml", f"--css={ASSETS / 'style.css'}",
        f"--include-in-header={ASSETS / 'header.html'}", "--default-image-extension=svg",
        "--metadata=abstract-title:Abstract", *(["--number-sections"] if _numbered(paper) else []),
        strict=strict,
    )  # fmt: skip


def to_typst(paper: Paper, work: Path, *, strict: bool = True) -> bytes:
    """The paper as typst source; its figures lie in ``work``."""
    return _pandoc(
        paper, work, "typst", f"--template={ASSETS / 'paper.typst'}",
        *(["--variable=section-numbering:1.1"] if _numbered(paper) else []),
        "--default-image-extension=svg", strict=strict,
    )  # fmt: skip


@functools.cache
def _without_glyph(characters: str) -> set[str]:
    """Those of the characters that no font of typst has, which it does not report.

    Each is drawn alone, and compared with the box drawn for a character that no font can have.
    """
    import typst

    pages = [f'#text("\\u{{{ord(ch):x}}}")' for ch in f"{UNKNOWN}{characters}"]
    size = "#set page(width: auto, height: auto, margin: 0pt)\n"
    source = (size + "\n#pagebreak()\n".join(pages)).encode()
    drawn = typst.compile(source, format="svg", ignore_system_fonts=True)
    box, *others = drawn if isinstance(drawn, list) else [drawn]
    return {ch for ch, picture in zip(characters, others, strict=True) if picture == box}


def _refuse_boxes(paper: Paper, missing: set[str]) -> None:
    """Report characters that the PDF would show as empty boxes as problems of their lines."""
    by_line: dict[int, list[str]] = {}
    for ch in sorted(missing):
        line = paper.source.count("\n", 0, max(0, paper.source.find(ch))) + 1
        by_line.setdefault(line, []).append(f"{ch} (U+{ord(ch):04X})")
    for line, names in by_line.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        text = f"no font has {', '.join(names[:5])}{more}: the PDF would show empty boxes"
        paper.problems.add(line, text)


def typst_compile(paper: Paper, source: bytes, work: Path, **options):
    """Compile the typst source of a paper; warnings of typst are problems of the paper.

    ``options`` go to typst: ``format="png", ppi=60`` gives pictures of the pages.
    """
    need_extra("typst")
    import typst

    others = {ch for ch in source.decode() if not ch.isascii()}
    _refuse_boxes(paper, _without_glyph("".join(sorted(others))) if others else set())
    stamp = datetime.datetime.combine(paper.date, datetime.time(), datetime.UTC)
    try:
        data, warnings = typst.compile_with_warnings(
            source, root=str(work), timestamp=stamp, ignore_system_fonts=True, **options
        )
    except typst.TypstError as error:
        paper.problems.add(1, f"typst: {' '.join(str(error).split())}")
        return b""
    for warning in warnings:
        paper.problems.add(1, f"typst: {' '.join(str(warning.message).split())}")
    return data


def _to_pdf(paper: Paper, work: Path, engine: str, strict: bool) -> bytes:
    if engine == "typst":
        source = to_typst(paper, work, strict=strict)
        return typst_compile(paper, source, work) if source else b""
    program = shutil.which("xelatex")
    if program is None:
        raise BitbyteError(
            "xelatex is not on PATH; install it (Debian: texlive-xetex texlive-latex-recommended "
            "texlive-fonts-recommended lmodern) or use --engine typst"
        )
    source = _pandoc(
        paper, work, "latex", f"--include-in-header={ASSETS / 'header.tex'}",
        "--default-image-extension=pdf", "--variable=papersize:a4", "--variable=colorlinks",
        f"--variable=geometry:margin={paper.meta.get('margin', '2.5cm')}",
        f"--variable=fontsize:{paper.meta.get('fontsize', '10pt')}",
        *(["--number-sections"] if _numbered(paper) else []), strict=strict,
    )  # fmt: skip
    put_figures(paper, work, "pdf")
    (work / "paper.tex").write_bytes(source)
    seconds = datetime.datetime.combine(paper.date, datetime.time(), datetime.UTC).timestamp()
    fixed = {"SOURCE_DATE_EPOCH": f"{seconds:.0f}", "FORCE_SOURCE_DATE": "1"}
    command = [program, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper"]
    auxiliary, before = work / "paper.aux", b""
    for _ in range(4):  # until positions and table widths have settled
        done = subprocess.run(
            command, cwd=work, env=os.environ | fixed, capture_output=True, check=False
        )
        now = auxiliary.read_bytes() if auxiliary.is_file() else b""
        if done.returncode or now == before:
            break
        before = now
    log = (work / "paper.log").read_text("utf-8", "replace") if source else ""
    for line in re.findall(r"^! .*", log, re.M):
        paper.problems.add(1, f"xelatex: {line}")
    _refuse_boxes(paper, set(re.findall(r"^Missing character: There is no (.)", log, re.M)))
    if done.returncode:
        paper.problems.add(1, f"xelatex ended with {done.returncode}")
    pdf = work / "paper.pdf"
    return pdf.read_bytes() if pdf.is_file() else b""


def page_images(paper: Paper, ppi: float = 60) -> list[bytes]:
    """The pages of a checked paper as PNG images, typeset by typst."""
    with tempfile.TemporaryDirectory(prefix="bitbyte-paper-") as folder:
        put_figures(paper, Path(folder))
        source = to_typst(paper, Path(folder))
        images = typst_compile(paper, source, Path(folder), format="png", ppi=ppi)
    if paper.problems.found:
        raise BitbyteError("\n".join(paper.problems.lines()))
    return images if isinstance(images, list) else [images]


def summary_markdown(paper: Paper, n_pages: int) -> str:
    """Title, facts and abstract (else the first paragraph) of a paper, as Markdown."""
    abstract = paper.meta.get("abstract") or paper.body.strip().split("\n\n", 1)[0]
    facts = f"{_words(paper)['date']}, {n_pages} page{'s' * (n_pages > 1)}"
    title = ": ".join(filter(None, (paper.meta["title"], paper.meta.get("subtitle"))))
    return f"### {title}\n\n{facts}\n\n{' '.join(abstract.split())}"


def numbers_markdown(value: dict, rows: int | None = None) -> str:
    """The result of `numbers_of` as a Markdown table: line, text shown, record and field.

    Of the table only the first ``rows``.
    """
    lines = ["| line | shown | record | field |", "|--:|---|---|---|"]
    for number in value["numbers"]:
        records = sources_line([s["record"].removesuffix(".json") for s in number["sources"]])
        fields = ", ".join(dict.fromkeys(source["field"] for source in number["sources"]))
        cells = (number["text"].replace("\u00a0", " "), records, fields)
        cells = (html.escape(cell).replace("|", "&#124;") for cell in cells)
        lines.append(f"| {number['line']} | {' | '.join(cells)} |")
    for figure in value["figures"]:
        records = sources_line([stem.removesuffix(".json") for stem in figure["records"]])
        what = html.escape(f"{figure['draw']} {figure['arrays'] or ''}".strip())
        lines.append(f"| {figure['line']} | {figure['label']} | {html.escape(records)} | {what} |")
    return "\n".join(lines if rows is None else lines[: 2 + rows])


def numbers_of(paper: Paper) -> dict:
    """All numbers and figures of a paper, with the records they come from."""
    figures = [
        {"label": f.label, "draw": f.draw, "arrays": f.arrays, "line": f.line,
         "records": [f"{stem}.json" for stem in f.records]}
        for f in paper.text.figures
    ]  # fmt: skip
    numbers = sorted(paper.text.numbers.list, key=lambda number: number["line"])
    return {"paper": shown(paper.path.name), "numbers": numbers, "figures": figures}


def _markdown(paper: Paper) -> bytes:
    """The text with everything filled in, for plain pandoc."""
    meta = _words(paper)
    lines = [f"{name}: {json.dumps(text, ensure_ascii=False)}" for name, text in meta.items()]
    return "\n".join(["---", *lines, "---", "", paper.body.lstrip("\n")]).encode()


def put_figures(paper: Paper, work: Path, kind: str = "svg") -> None:
    """Write the pictures of a paper's figures to ``work``/figures."""
    (work / "figures").mkdir(exist_ok=True)
    for figure in paper.text.figures:
        (work / "figures" / f"{figure.name}.{kind}").write_bytes(figure.picture(kind))


def build(paper: Paper, formats=("html", "pdf"), engine: str = "typst", draft: bool = False):
    """{file name: bytes} of a paper; nothing is written.

    Raises BitbyteError with one line for each problem, unless ``draft``.
    """
    out = {}
    with tempfile.TemporaryDirectory(prefix="bitbyte-paper-") as folder:
        work = Path(folder)
        put_figures(paper, work)
        if "md" in formats:
            put_figures(paper, work, "pdf")
            out = {
                f"figures/{path.name}": path.read_bytes() for path in (work / "figures").iterdir()
            }
        if "md" in formats:
            out[f"{paper.name}.md"] = _markdown(paper)
        # Made for PDF alone, too: it is fast, and finds everything wrong with references.
        page = to_html(paper, work, strict=not draft)
        if "html" in formats:
            out[f"{paper.name}.html"] = page
        if "pdf" in formats and (draft or not paper.problems.found):
            out[f"{paper.name}.pdf"] = _to_pdf(paper, work, engine, strict=not draft)
    out[f"{paper.name}.numbers.json"] = to_json(numbers_of(paper))
    if paper.problems.found and not draft:
        raise BitbyteError("\n".join(paper.problems.lines()))
    return out


def unused_references(papers: list[Paper]) -> list[str]:
    """Keys of references.bib that none of these papers cites."""
    bibliography = bibliography_of(papers[0])
    keys = _keys(bibliography)
    cited = set().union(*(paper.cited for paper in papers))
    return [key for key in keys if key not in cited]


def make(
    names=(), formats=("html", "pdf"), engine: str = "typst", draft: bool = False, out=None
) -> tuple[list[Path], list[str]]:
    """Build papers and write them to ``out`` (default artifacts/reports): (paths, warnings).

    All papers together are also checked for references that none of them cites.  Nothing is
    written if anything is wrong, unless ``draft``: then problems are marked and returned.
    """
    for word, known in (*((f, FORMATS) for f in formats), (engine, ENGINES)):
        if word not in known:
            raise BitbyteError(f"no format or engine {word!r}; choose from {', '.join(known)}")
    need_extra("yaml", "pypandoc", *(["typst"] if engine == "typst" else []))
    files, warnings, papers = {}, [], []
    for path in find_papers(names):
        paper = read_paper(path)
        papers.append(paper)
        try:
            files |= build(paper, formats, engine, draft)
            warnings += paper.problems.lines()
        except BitbyteError as error:
            warnings += str(error).splitlines()
    if not names:
        unused = unused_references(papers)
        warnings += [f"references.bib: no paper cites {key}" for key in unused]
    if warnings and not draft:
        raise BitbyteError("\n".join(warnings))
    folder = output_folder(artifacts("reports") if out is None else out)
    for paper in papers:
        made = folder / f"{paper.name}.md"
        if made.name in files and made.exists() and made.samefile(paper.path):
            raise BitbyteError(f"{shown(made)} is the paper's source; name another --out")
    paths = []
    for name, data in files.items():
        if not data:
            raise RunError(f"{name} could not be made: {'; '.join(warnings) or 'no output'}")
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomic(folder / name, data)
        paths.append(folder / name)
    return paths, warnings
