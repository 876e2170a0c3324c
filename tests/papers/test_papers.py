"""Papers: numbers from records, every failure by name, both formats, reproducible bytes."""

import contextlib
import datetime
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import support
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from bitbyte.cli.dispatch import main
from bitbyte.files import BitbyteError, artifacts
from bitbyte.papers import build
from bitbyte.papers.blocks import HEADS, cell
from bitbyte.papers.numbers import Numbers, Record, markdown_text, stamp
from bitbyte.papers.source import read_paper

OWN = sorted((ROOT / "papers").glob("[A-Z]*_*.md")) or [ROOT / "papers" / "there-is-none.md"]
SHA = "16b8b889" + "0" * 56
HEAD = """---
title: A *small* paper
author: The bitbyte developers
date: 2026-11-21
abstract: |
  It costs {{ar.bpb:.3f}} bits.
records:
  ar: {record: ar-1, data: 16b8b889}
  dense: {record: dense-1, data: 16b8b889}
  bound: {record: bound-1, data: 16b8b889, kind: upper_bound}
  bench: {record: bench}
---

"""
BODY = """# First {#sec:first}

See @sec:first, [@fig:curve; @tbl:costs], @fig:costs, @eq:bpb, and [@one2020work, p. 3].
{{dense.bpb:.3f}} {{bound.bpb:.2f}} {{bench.rows.0.seconds:.2f s}} `{{ar.bpb}}`

::: {#tbl:costs .records rows="ar dense bound" columns="model kind bpb interval parameters seed"}
Costs.
:::

::: {#fig:curve .figure draw="training_curve" data="curve" width="60%"}
A curve.
:::

::: {#fig:costs .figure draw="bpb_table_figure" rows="ar dense bound"}
Costs.
:::

So $$ B = \\frac{1}{n} \\sum_i -\\log_2 p_i $$ {#eq:bpb}

```python
x = {{1: 2}}  # no placeholder
```
"""
BIB = """@misc{one2020work, title={{One} work}, author={One, Ann}, year={2020},
  url={https://example.org/1}}
"""


record = functools.partial(
    support.record, model="ar ternary", family="ar", bits=25600.0 * 64, bytes=10240 * 64,
    parameters=1377792, packed_bytes=396348, bytes_seen=2097152, train_seconds=941.4,
    data={"path": "enwik8", "split": "val", "sha256": SHA}, config={"linear": "ternary"},
    blocks=[16384.0 + i for i in range(100)],
)  # fmt: skip


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with a paper, its records and arrays; returns a builder for changed text."""
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.chdir(tmp_path)
    for folder in ("papers", "artifacts/results", "artifacts/plots"):
        (tmp_path / folder).mkdir(parents=True)
    results = tmp_path / "artifacts" / "results"
    blocks = [14400.0 + i for i in range(100)]
    values = {
        "ar-1": record(),
        "dense-1": record(model="ar dense", bpb=2.2, blocks=blocks, checkpoint="b"),
        "bound-1": record(model="diffusion", kind="upper_bound", bpb=3.5, checkpoint="c"),
        "bench": {"kind": "bench", "rows": [{"seconds": 1.25}]},
        "certificate-ar": {"format": "certificate 0", "sha256": "77" * 32},
    }
    for name, value in values.items():
        (results / f"{name}.json").write_text(json.dumps(value))
    curve = tmp_path / "artifacts" / "plots" / "curve.json"
    rows = [{"bytes": n, "bpb": 8 / n} for n in range(1, 30)]
    curve.write_text(json.dumps({"rows": {"ar": rows}}))
    stamp(curve, [results / "ar-1.json"])
    (tmp_path / "references.bib").write_text(BIB)

    def write(text=HEAD + BODY) -> Path:
        path = tmp_path / "papers" / "SMALL.md"
        path.write_text(text, "utf-8")
        return path

    write.results, write.curve = results, curve
    write()
    return write


def numbers(**records) -> Numbers:
    return Numbers(
        {
            alias: Record(alias=alias, stem=alias, value=value, line=1)
            for alias, value in records.items()
        }
    )


def shown(inner: str, **records) -> str:
    return numbers(**(records or {"ar": record()})).render(inner, 1).replace("\u00a0", " ")


# --- numbers


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        ("ar.bpb:.3f", "2.500"),
        ("ar.packed_bytes:,.2f MB", "0.40 MB"),
        ("ar.packed_bytes:.1f KiB", "387.1 KiB"),
        ("ar.parameters:.2f M", "1.38 M"),
        ("ar.parameters:,", "1,377,792"),
        ("ar.parameters:,d", "1,377,792"),
        ("ar.parameters", "1377792"),
        ("ar.train_seconds:.0f min", "16 min"),
        ("ar.interval:.3f", "2.400 to 2.600"),
        ("ar.interval.1:.1f", "2.6"),
        ("ar.blocks.3:.0f", "16387"),
        ("ar.bpb / dense.bpb:.3f", "1.136"),
        ("ar.bpb - dense.bpb:+.3f", "+0.300"),
        ("dense.bpb - ar.bpb:+.3f", "\u22120.300"),
        ("(ar.bpb - dense.bpb) / dense.bpb:.1f %", "13.6 %"),
        ("100e6 / ar.bytes_seen * ar.train_seconds:.1f h", "12.5 h"),
        ("ar.bpb / dense.bpb:.1f x", "1.1\u00d7"),
        ("ar+seed.bpb:.2f", "2.60"),
        ("bound.bpb:.2f", "\u2264 3.50"),
        ("bound.bpb - ar.bpb:.2f", "\u2264 1.00"),
        ("ar.bpb - bound.bpb:.2f", "\u2265 \u22121.00"),
        ("bound.bpb / bound2.bpb:.2f", "1.00"),
        ("verdict ar dense", "worse"),
        ("verdict dense ar", "better"),
        ("verdict ar ar", "not distinguishable"),
        ("ar.context.start", "\\<b\\> \\\\u2028 \\|"),
        ("ar.data.path", "enwik8"),
    ],
)
def test_numbers(inner, text):
    records = {
        "ar": record(context={"window": 256, "stride": 256, "start": "<b> \u2028 |"}),
        "seed": record(
            bpb=2.7, context={"window": 256, "stride": 256, "start": ""}, checkpoint="s"
        ),
        "dense": record(bpb=2.2, blocks=[14400.0 + i for i in range(100)], checkpoint="d"),
        "bound": record(kind="upper_bound", bpb=3.5, checkpoint="c"),
        "bound2": record(kind="upper_bound", bpb=3.5, checkpoint="e"),
    }
    assert shown(inner, **records) == text


def test_paired_difference_has_its_interval():
    dense = record(bpb=2.2, blocks=[14400.0 + 20 * i for i in range(100)], checkpoint="d")
    text = shown("paired ar dense:+.4f", ar=record(), dense=dense)
    assert re.fullmatch(r"\+0\.3000 \(95 % interval 0\.\d{4} to 0\.\d{4}\)", text)


@pytest.mark.parametrize(
    ("inner", "word"),
    [
        ("no.bpb:.3f", "unknown alias no"),
        ("ar.bpd:.3f", "no field bpd"),
        ("ar.blocks.100:.3f", "a list of 100"),
        ("ar.bpb:3.f", "bad format"),
        ("ar.bpb:", "bad format"),
        ("ar.bpb", "needs a format"),
        ("ar.bpb:.2f parsec", "no unit 'parsec'"),
        ("ar.bpb:d", "is not a whole number"),
        ("ar.data:.2f", "dict"),
        ("ar.model:.2f", "is text"),
        ("ar.blocks:.2f", "list of 100"),
        ("ar.bpb - other.bpb:.2f", "not about the same bytes"),
        ("ar.bpb - cut.bpb:.2f", "different windows"),
        ("ar+bound.bpb:.2f", "one model and one kind"),
        ("paired ar bench", "no sums of blocks"),
        ("paired few few2:.3f", "too few to tell; it takes 327,680 or more; without an interval"),
        ("verdict few few2", "cannot be paired"),
        ("ar+again.bpb:.2f", "scores of one checkpoint, so they are not seeds"),
        ("ar.bpb / zero.bpb:.2f", "division by 0"),
        ("(ar.bpb:.2f", "bracket"),
        ("ar.bpb ar.bpb:.2f", "from 'ar.bpb' on"),
        ("ar.bpb - :.2f", "expected"),
        ("ar; rm:.2f", "cannot read"),
        ("", "empty"),
    ],
)
def test_wrong_numbers(inner, word):
    records = {
        "ar": record(),
        "bound": record(kind="upper_bound"),
        "other": record(data={"sha256": "f" * 64}),
        "cut": record(context={"window": 256, "stride": 128}),
        "zero": record(bpb=0.0),
        "bench": {"kind": "bench"},
        "few": record(bytes=8192, blocks=[1.0] * 32),
        "few2": record(bytes=8192, blocks=[1.0] * 32),
        "again": record(),
    }
    with pytest.raises(BitbyteError, match=re.escape(word)):
        shown(inner, **records)


@given(st.text(max_size=30))
def test_any_placeholder_is_a_number_or_an_error(inner):
    with contextlib.suppress(BitbyteError):
        shown(inner)


@given(st.text(max_size=40))
def test_any_text_of_a_record_is_harmless(text):
    escaped = markdown_text(text)
    assert escaped.isascii() and "\n" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[<>|`$@*]", escaped)


def test_columns_of_tables():
    rows = numbers(a=record(), b=record(bpb=2.7, train_seed=1, checkpoint="b"))
    one, two = rows.group("a"), rows.group("a+b")
    assert cell("bpb", one) == "2.500"
    assert cell("bpb", two) == "2.600 (0.200)"
    assert cell("interval", one) == "2.400 to 2.600"
    assert cell("interval", two) == ""
    assert cell("seed", two) == "0, 1"
    assert cell("windows", one) == "256/256"
    assert cell("ssm", one) == ""
    assert cell("parameters", one) == "1,377,792"
    for name in HEADS:
        cell(name, one)


@pytest.mark.parametrize("field", ["context", "data", "blocks", "bits", "bytes"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}])
def test_records_of_another_shape_are_no_traceback(field, value):
    odd, good = record(**{field: value}), record()
    for inner in ("paired a b", "verdict a b", "a.bpb / b.bpb:.3f"):
        with contextlib.suppress(BitbyteError):
            shown(inner, a=odd, b=good)


# --- what stops a build

UNUSED = "  other: {record: dense-1, data: 16b8b889}\n---\n"


@pytest.mark.parametrize(
    ("old", "new", "line", "word"),
    [
        ("{{dense.bpb:.3f}}", "{{dens.bpb:.3f}}", 17, "unknown alias dens"),
        ("{{dense.bpb:.3f}}", "{{dense.bpd:.3f}}", 17, "no field bpd"),
        ("{{dense.bpb:.3f}}", "{{dense.bpb:.3f yd}}", 17, "no unit"),
        ("{{dense.bpb:.3f}}", "{{dense.bpb", 17, "no closing"),
        ("{{ar.bpb:.3f}} bits", "{{ar.bpd:.3f}} bits", 6, "no field bpd"),
        ("record: ar-1", "record: ar-9", 8, "no ar-9.json"),
        ("record: ar-1", "record: ../ar-1", 8, "not a valid file name"),
        ("{record: ar-1, data: 16b8b889}", "{record: ar-1, data: 26b8b889}", 8, "the paper pins"),
        ("{record: ar-1, data: 16b8b889}", "{record: ar-1, data: 16b8}", 8, "the paper pins"),
        ("{record: ar-1, data: 16b8b889}", "{record: ar-1}", 8, "pin the bytes"),
        ("{record: bench}", "{record: bench, data: 16b8b889}", 11, "has no data hash"),
        ("{record: bench}", "{record: certificate-ar}", 11, "with data: 77777777"),
        ("kind: upper_bound", "kind: exact", 10, "is of kind upper_bound"),
        ("---\n\n# First", UNUSED + "\n# First", 12, "record other (dense-1) is used"),
        ("[@one2020work, p. 3]", "[@one2020work; @two2021work]", 16, "unknown citation @two2021"),
        ("@eq:bpb", "@eq:bbp", 16, "broken cross-reference @eq:bbp"),
        (", @eq:bpb", "", 31, "nothing refers to eq:bpb"),
        (", @fig:costs", "", 27, "nothing refers to fig:costs"),
        ("@fig:curve; @tbl:costs", "@fig:curve", 19, "nothing refers to tbl:costs"),
        ("[@fig:curve;", "[@one2020work; @fig:curve;", 16, "one bracket"),
        ("{#eq:bpb}", "{#eq:bpb}\n\nA $$ x $$ {#eq:bpb}", 31, "is defined twice"),
        ("kind bpb", "kind bpp", 19, "unknown column bpp"),
        ('rows="ar dense', 'rows="ar densest', 19, "unknown alias densest"),
        ('"training_curve"', '"save"', 23, "no drawing function 'save'"),
        ('"training_curve"', '"byte_probs"', 23, "cannot draw"),
        ('data="curve"', 'data="kurve"', 23, "no kurve.json"),
        (' width="60%"', ' size="60%"', 23, "unknown attribute size"),
        ("# First", "![x](http://example.org/a.png)\n\n# First", 14, "not drawn from records"),
        ("date: 2026-11-21", "date: today", 1, "not like 2026-11-21"),
        ("author:", "autor:", 3, "unknown key autor"),
    ],
)
def test_what_is_wrong_is_named(desk, capsys, old, new, line, word):
    text = (HEAD + BODY).replace(old, new, 1)
    assert text != HEAD + BODY
    desk(text)
    assert main(["papers", "SMALL", "--format", "html"]) == 2
    said = [text for text in capsys.readouterr().err.splitlines() if word in text]
    assert said and f"SMALL.md:{line}: " in said[0], said
    assert not artifacts("reports").exists()
    assert main(["papers", "SMALL", "--draft", "--format", "html"]) == 0
    assert word in capsys.readouterr().err


def test_a_draft_marks_what_is_wrong(desk):
    desk((HEAD + BODY).replace("{{dense.bpb:.3f}}", "{{nope.bpb:.3f}}").replace("@eq:bpb", "@eq:x"))
    _, warnings = build.make(["SMALL"], draft=True)
    assert len(warnings) == 3  # and nothing refers to eq:bpb
    page = artifacts("reports", "SMALL.html").read_text("utf-8")
    marks = re.findall(r'<span class="draft">(.*?)</span>', page, re.DOTALL)
    marks = sorted(" ".join(mark.split()) for mark in marks)
    assert marks[0] == "[?? no label eq:x]" and marks[1].startswith("[?? unknown alias nope;")
    assert artifacts("reports", "SMALL.pdf").read_bytes().startswith(b"%PDF")


def test_changed_records_make_figures_stale(desk, capsys):
    path = desk.results / "ar-1.json"
    path.write_text(json.dumps(record(bpb=2.51)))
    assert main(["papers", "SMALL"]) == 2
    assert "SMALL.md:23: curve.json is stale: the record ar-1" in capsys.readouterr().err
    value = json.loads(desk.curve.read_text())
    value["records"] = {"gone-1": "0" * 64}
    desk.curve.write_text(json.dumps(value))
    assert main(["papers", "SMALL"]) == 2
    assert "no gone-1.json" in capsys.readouterr().err
    del value["records"]
    desk.curve.write_text(json.dumps(value))
    assert main(["papers", "SMALL"]) == 2
    assert "names no records" in capsys.readouterr().err


def test_unused_references_count_when_all_papers_are_built(desk, capsys):
    Path("references.bib").write_text(BIB + BIB.replace("one2020", "two2021"))
    assert main(["papers", "SMALL", "--format", "html"]) == 0
    assert main(["papers", "--format", "html"]) == 2
    assert "references.bib: no paper cites two2021work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["papers", "NONE"], "no paper NONE"),
        (["papers", "--format", "docx"], "no format or engine 'docx'"),
        (["papers", "--engine", "word"], "no format or engine 'word'"),
    ],
)
def test_wrong_words(desk, capsys, words, said):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_no_front_matter(desk, capsys):
    for text, word in (("# x\n", "front matter"), ("---\n{a\n---\n", "not a YAML mapping")):
        desk(text)
        assert main(["papers", "SMALL"]) == 2
        assert word in capsys.readouterr().err


def test_missing_extra_and_engine_are_one_line(desk, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if path is None else path)
    monkeypatch.setattr(build, "pandoc_program", lambda: str(next(_pandocs())))
    assert main(["papers", "--engine", "xelatex", "--format", "pdf"]) == 2
    assert "xelatex is not on PATH" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "typst", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["papers"]) == 2
    assert 'pip install "bitbyte[papers]"' in capsys.readouterr().err


def _pandocs():
    import pypandoc

    return (Path(pypandoc.__file__).parent / "files").glob("pandoc*")


# --- what comes out


def test_a_paper(desk):
    paths, warnings = build.make()
    assert warnings == []
    assert [path.name for path in paths] == ["SMALL.html", "SMALL.pdf", "SMALL.numbers.json"]
    page = paths[0].read_text("utf-8")
    flat = " ".join(page.replace("\u00a0", " ").split())
    for words in (
        "It costs 2.500 bits", "\u2264 3.50", "1.25 s", "<code>{{ar.bpb}}</code>", "Section 1</a>",
        "Figure 1</a> and <a", "Table 1.</strong> Costs.",
        '<span class="number">(1)</span>', "{{", "One, Ann. 2020",
    ):  # fmt: skip
        assert words in flat, words
    assert "<math" in page and 'src="data:image/svg+xml' in page
    assert "<script" not in page and not re.search(r'(?:src|link href)="(?!data:)', page)
    numbers = json.loads(paths[2].read_text())
    assert numbers["paper"] == "SMALL.md" and len(numbers["figures"]) == 2
    (first,) = [n for n in numbers["numbers"] if n["line"] == 6]
    assert first["text"] == "2.500" and first["sources"] == [
        {"alias": "ar", "record": "ar-1.json", "field": "bpb", "value": 2.5}
    ]
    assert any(n["expression"] == "tbl:costs bpb" for n in numbers["numbers"])
    heads = re.findall(r"<th[^>]*>(.*?)</th>", flat)
    assert heads[2:4] == ["BPB, exact", "BPB, bound"]  # kinds never share a column


def test_pdf_bytes_repeat(desk):
    again = [build.build(read_paper(desk())) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0]["SMALL.pdf"].startswith(b"%PDF")


def test_markdown_for_plain_pandoc(desk, tmp_path):
    paths, _ = build.make(formats=("md",))
    names = {path.relative_to(artifacts("reports")).as_posix() for path in paths}
    assert {"SMALL.md", "figures/SMALL-fig-curve.svg", "figures/SMALL-fig-curve.pdf"} <= names
    filter_ = ROOT / "bitbyte" / "papers" / "assets" / "xref.lua"
    command = [
        build.pandoc_program(), "SMALL.md", f"--lua-filter={filter_}", "--citeproc",
        f"--bibliography={tmp_path / 'references.bib'}", "--mathml", "--fail-if-warnings", "-s",
    ]  # fmt: skip
    where = artifacts("reports")
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Table\u00a01." in done.stdout
    (where / "SMALL.md").write_text("See @fig:none.")
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no label fig:none" in done.stderr


def test_a_paper_is_not_written_over_its_source(desk, tmp_path, capsys):
    before = (tmp_path / "papers" / "SMALL.md").read_bytes()
    words = ["papers", "--format", "md", "--out", str(tmp_path / "papers")]
    assert main(words) == 2
    assert "SMALL.md is the paper's source; name another --out" in capsys.readouterr().err
    assert [*(tmp_path / "papers").iterdir()] == [tmp_path / "papers" / "SMALL.md"]
    assert (tmp_path / "papers" / "SMALL.md").read_bytes() == before


def test_names_of_records_are_only_text(desk):
    evil = "<script>alert(1)</script> | $x$ [a](http://b) \u4e2d @eq:bpb `c`"
    (desk.results / "ar-1.json").write_text(json.dumps(record(model=evil)))
    stamp(desk.curve, [desk.results / "ar-1.json"])
    text = (HEAD + BODY).replace("{{dense", "{{ar.model}} {{dense").replace(", @fig:costs", "")
    desk(text[: text.index("::: {#fig:costs")] + text[text.index("So $$") :])
    paths, warnings = build.make()
    page = paths[0].read_text("utf-8")
    assert warnings == [] and "<script" not in page and 'href="http://b"' not in page
    assert page.count("&lt;script&gt;") == 2 and "\\u4e2d" in page


@pytest.mark.skipif(not shutil.which("xelatex"), reason="xelatex is not installed")
def test_xelatex(desk):
    (again, files) = (build.build(read_paper(desk()), ("pdf",), "xelatex") for _ in "ab")
    assert files["SMALL.pdf"].startswith(b"%PDF") and files == again


# --- the project's own papers


def pages(pdf: bytes) -> int:
    (count,) = re.findall(rb"/Type\s*/Pages\s*/Count (\d+)", pdf)
    return int(count)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_own_papers(path):
    paper = read_paper(path)
    files = build.build(paper)
    assert paper.problems.lines() == []
    page = files[f"{path.stem}.html"].decode()
    assert "[??" not in page and "{{" not in re.sub(r"<code.*?</code>", "", page, flags=re.DOTALL)
    count = pages(files[f"{path.stem}.pdf"])
    if path.stem == "POSITION_PAPER_PUBLIC":
        assert count == 1
    elif path.stem == "POSITION_PAPER":
        assert 6 <= count <= 10


def test_a_summary_has_the_title_and_one_paragraph_with_its_numbers():
    for path in OWN:
        head, facts, text = build.summary_markdown(read_paper(path), 3).split("\n\n")
        assert head.startswith("### ") and facts.endswith(" 2026, 3 pages")
        assert len(text) > 100 and "{{" not in text
    table = build.numbers_markdown(build.numbers_of(read_paper(OWN[0])), rows=4)
    assert table.count("\n") == 5


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_no_empty_boxes_in_own_papers(path, tmp_path):
    """PDF/A refuses a character that no font has."""
    paper = read_paper(path)
    build.put_figures(paper, tmp_path)
    source = build.to_typst(paper, tmp_path)
    pdf = build.typst_compile(paper, source, tmp_path, pdf_standards=["a-2b"])
    assert paper.problems.lines() == []
    assert pdf == build.typst_compile(paper, source, tmp_path, pdf_standards=["a-2b"])


def test_characters_that_no_font_has_are_named_with_their_line(desk, capsys):
    good = "\u00e9 \u0416 \u03b1 \u05d0 \u2192 \u25a1 \u2264 e\u0301 x\u200dy \u2713"
    boxes = "\u65e5\u672c \U0001f600"
    text = (HEAD + BODY).replace("# First", f"{good}\n\n{boxes}\n\n# First")
    desk(text)
    assert main(["papers", "SMALL", "--format", "pdf"]) == 2
    said = capsys.readouterr().err
    line = text[: text.index(boxes)].count("\n") + 1
    assert f"SMALL.md:{line}: no font has \u65e5 (U+65E5), \u672c (U+672C), " in said
    assert said.count("no font has") == 1 and said.count("U+") == 3
    assert not artifacts("reports").exists()
    assert main(["papers", "SMALL", "--format", "html"]) == 0  # a browser has fonts of its own
    assert main(["papers", "SMALL", "--format", "pdf", "--draft"]) == 0
    with pytest.raises(BitbyteError, match="no font has"):
        build.page_images(read_paper(Path("papers/SMALL.md")))


@pytest.mark.parametrize(
    "ch", "\u00e9\u0416\u03b1\u05d0\u0639\u2192\u25a1\u2713\u65e5\u20ac\U0001f600\U0001d504"
)
def test_what_no_font_has_is_what_typst_says(ch):
    """PDF/A must show every character; otherwise typst silently draws a box."""
    typst = pytest.importorskip("typst", reason="needs the extra papers")
    source, refused = f'#set document(title: "x")\n#text("{ch}")'.encode(), False
    day = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    try:
        typst.compile(source, pdf_standards=["a-2b"], ignore_system_fonts=True, timestamp=day)
    except typst.TypstError as error:
        assert "could not be displayed" in str(error)
        refused = True
    assert (ch in build._without_glyph(ch)) == refused


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_files_of_other_editors(desk, mark, ends, tmp_path):
    path = desk()
    for file in (path, tmp_path / "references.bib"):
        file.write_bytes(mark + file.read_bytes().replace(b"\n", ends))
    paths, warnings = build.make()
    assert warnings == [] and "One" in paths[0].read_text("utf-8")


@pytest.mark.parametrize("name", ["papers/SMALL.md", "references.bib"])
def test_a_text_that_is_not_utf8_is_one_line(desk, name, tmp_path, capsys):
    desk()
    file = tmp_path / name
    n, lines = len(file.read_bytes()), file.read_bytes().count(b"\n")
    file.write_bytes(file.read_bytes() + b"caf\xe9\n")
    assert main(["papers", "SMALL"]) == 2
    said = capsys.readouterr().err
    assert f"{file.name}:{lines + 1}: byte {n + 3} is not UTF-8 (\\xe9)" in said
    assert said.count("\n") == 1


def test_where_references_were_looked_for_is_said(desk, tmp_path, capsys):
    desk()
    (tmp_path / "references.bib").rename(tmp_path / "papers" / "references.bib")
    assert main(["papers", "SMALL", "--format", "html"]) == 2
    assert f"there is no {tmp_path / 'references.bib'}" in capsys.readouterr().err


def test_a_relative_path_is_enough(desk):
    desk()
    images = build.page_images(read_paper(Path("papers/SMALL.md")))
    assert images and images[0].startswith(b"\x89PNG")


def test_folders_whose_name_is_not_utf8(desk, tmp_path, monkeypatch):
    """In the paper's path they do not matter; in those of our own files they are refused."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    desk()
    shutil.move(tmp_path / "papers", odd)
    shutil.move(tmp_path / "references.bib", odd)
    path = odd / "papers" / "SMALL.md"
    assert build.build(read_paper(path))["SMALL.pdf"].startswith(b"%PDF")
    monkeypatch.setattr(build, "ASSETS", odd)
    with pytest.raises(BitbyteError, match=r"caf\\xe9.* is not UTF-8, as pandoc's paths must be"):
        build.build(read_paper(path))


def test_every_reference_is_cited_by_some_own_paper():
    keys = set(build.KEY.findall((ROOT / "references.bib").read_text("utf-8")))
    texts = "\n".join(path.read_text("utf-8") for path in OWN)
    assert keys - set(re.findall(r"@([A-Za-z][\w:.-]*\w)", texts)) == set()
    assert len(keys) >= 30
