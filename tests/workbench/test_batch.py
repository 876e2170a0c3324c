"""Batch runs, reference outputs and the pages they leave, on toy notebooks."""

import asyncio
import functools
import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import support
from jupyter_core.utils import ensure_event_loop
from support import ROOT, until

from bitbyte.evaluate.tables import bpb_table
from bitbyte.files import BitbyteError, RunError, to_json
from bitbyte.workbench import notebooks, pages, runner
from bitbyte.workbench.notebooks import (
    assign,
    find_notebooks,
    load_notebook,
    resolve,
    typed,
    write_references,
)
from bitbyte.workbench.runner import run_notebooks, time_left

PARAMETERS = """\
corpus: str = "stories"  # a built-in name, or the path of a file
steps: int = 3  # how many
rate: float = 1e-3  # step size
quick: bool = True  # less work
"""


def write(path: Path, *sources: str, parameters: str | None = PARAMETERS, tags=()) -> Path:
    """A notebook: title, parameters cell (if any), one code cell for each source."""
    new = nbformat.v4
    cells = [new.new_markdown_cell(f"# {path.stem}", id="title")]
    if parameters is not None:
        cells.append(new.new_code_cell(parameters, id="parameters"))
        cells[-1].metadata.tags = ["parameters"]
    for number, source in enumerate(sources):
        cells.append(new.new_code_cell(source, id=f"cell-{number}"))
        cells[-1].metadata.tags = list(tags)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new.new_notebook(cells=cells), path)
    return path


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """The caller's folder has notebooks/ and an artifacts folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITBYTE_ARTIFACTS", "art")
    monkeypatch.setattr(runner, "_code_hash", lambda: "code")  # the sources may change meanwhile
    return tmp_path


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_bytes())


def statuses(run: Path) -> list[str]:
    return [entry["status"] for entry in manifest(run)["notebooks"]]


# --- finding notebooks, parameters


def test_find_notebooks(workplace):
    for name in ("02_b", "01_a", "scratch"):
        write(workplace / "notebooks" / f"{name}.ipynb")
    names = ["01_a.ipynb", "02_b.ipynb"]
    assert [path.name for path in find_notebooks()] == names
    assert [path.name for path in find_notebooks(["notebooks"])] == names
    assert [path.name for path in find_notebooks(["02"])] == ["02_b.ipynb"]
    assert [path.name for path in find_notebooks("notebooks/scratch.ipynb")] == ["scratch.ipynb"]
    os.chdir(workplace / "notebooks")
    assert all(path.is_absolute() for path in find_notebooks(["02", "01_a.ipynb"]))
    for bad in (["03"], ["no.ipynb"], [workplace / "art"]):
        with pytest.raises(BitbyteError, match="no notebook"):
            find_notebooks(bad)
    other = write(workplace / "other" / "01_a.ipynb")
    with pytest.raises(BitbyteError, match="same name"):
        find_notebooks(["01", other])


def test_load_refuses_what_is_no_notebook(workplace):
    bad = workplace / "01_a.ipynb"
    for data in (b"", b"{}", b"{", b"\xff\xfe", b"[1]", b'{"cells": 1, "nbformat": 4}'):
        bad.write_bytes(data)
        with pytest.raises(BitbyteError, match="not a notebook"):
            load_notebook(bad)
    write(bad, "1", parameters=None, tags=["parameters"])
    assert load_notebook(bad).n_cells == 1
    write(bad, "1", tags=["parameters"])
    with pytest.raises(BitbyteError, match="2 cells are tagged `parameters`"):
        load_notebook(bad)
    for source in ("steps: int = 3  # a = b", "steps: int | None = 3  # n"):
        write(bad, parameters=source)
        with pytest.raises(BitbyteError, match="papermill cannot read the parameter steps"):
            load_notebook(bad)
    write(bad, parameters="steps = ")
    with pytest.raises(BitbyteError, match="not Python"):
        load_notebook(bad)
    write(bad, parameters=None)  # text only: nothing to set
    assert load_notebook(bad).parameters == {}


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({"kernelspec": {"name": "ir", "display_name": "R"}}, "for ir;"),
        ({"kernelspec": {"name": "ir", "display_name": "R", "language": "R"}}, "for R;"),
        ({"kernelspec": {"name": "x", "display_name": "x"}, "language_info": {"name": "julia"}},
         "for julia;"),
        ({}, None),
        ({"kernelspec": {"name": "conda-env-a-py", "display_name": "a"}}, None),
        ({"kernelspec": {"name": "x", "display_name": "x", "language": "python"}}, None),
        ({"language_info": {"name": "python"}}, None),
    ],
)  # fmt: skip
def test_notebooks_in_other_languages_are_refused(workplace, metadata, word):
    path = write(workplace / "01_a.ipynb")
    node = nbformat.read(path, 4)
    node.metadata.update(metadata)
    nbformat.write(node, path)
    if word is None:
        load_notebook(path)
        return
    with pytest.raises(BitbyteError, match=word):
        load_notebook(path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("ValueError", "what is wrong\n\n  middle\nhint: try x",
         "ValueError: what is wrong ... hint: try x"),
        ("ValueError", "\x1b[31mone\x1b[0m\ntwo\n", "ValueError: one ... two"),
        ("KeyError", "'a'", "KeyError: 'a'"),
        ("AssertionError", "", "AssertionError"),
        ("ValueError", "x" * 1000, "ValueError: " + "x" * 300),
        ("ValueError", "a \ud800 b", "ValueError: a ? b"),
        ("CellExecutionError", "", "CellExecutionError: an error that the kernel could not send, "
         "as its text is not Unicode"),
    ],
)  # fmt: skip
def test_failure_tells_the_first_and_the_last_line(name, text, said):
    error = Exception()
    error.ename, error.evalue = name, text
    assert notebooks.failure(error, 1) == said


def test_a_notebook_without_parameters_runs_without_settings(workplace):
    path = write(workplace / "01_a.ipynb", "open('ran', 'w').close()", parameters=None)
    with pytest.raises(BitbyteError, match="no notebook has this parameter; tag a code cell"):
        run_notebooks([path], settings={"steps": "1"})
    run = run_notebooks([path], out="run")
    assert statuses(run) == ["done"] and (workplace / "ran").exists()


def test_manifests_of_other_kinds_are_no_run(workplace):
    good = {
        "format": 1, "id": "x", "bitbyte": "1", "began": 1.0, "settings": {"steps": "1"},
        "notebooks": [{"name": "01_a.ipynb", "source": "/x/01_a.ipynb", "key": "k",
                       "parameters": {}, "status": "done", "error": None, "seconds": 1.5}],
    }  # fmt: skip
    run = workplace / "run"
    run.mkdir()

    def put(**changes):
        (run / "manifest.json").write_bytes(to_json(good | changes))

    put()
    assert runner._read_manifest(run) == good
    (entry,) = good["notebooks"]
    for changes in (
        {"settings": {"steps": 1}}, {"settings": []}, {"notebooks": {}}, {"notebooks": [3]},
        {"notebooks": [{}]}, {"began": "x"}, *(
            {"notebooks": [entry | {name: value}]}
            for name in entry for value in ([], True)
        ),
    ):  # fmt: skip
        put(**changes)
        for options in ({"resume": str(run)}, {"out": run}):
            with pytest.raises(BitbyteError, match=r"manifest.json is not that of a run"):
                run_notebooks(**options)


def test_a_run_writes_through_no_link(workplace):
    path = write(workplace / "notebooks" / "01_a.ipynb", "1")
    (workplace / "mine").write_text("mine")
    (workplace / "folder").mkdir()
    run = run_notebooks([path], out="run")
    for name in ("01_a.ipynb", "01_a.html", "figures", "results", "index.html", "new"):
        target = workplace / ("folder" if name in ("figures", "results") else "mine")
        if (run / name).is_file():
            (run / name).unlink()
        (run / name).symlink_to(target)
        for options in ({"resume": str(run)}, {"out": run}):
            with pytest.raises(BitbyteError, match=f"{name} is a link"):
                run_notebooks([path], **options)
        (run / name).unlink()
    assert (workplace / "mine").read_text() == "mine"
    (workplace / "art" / "runs" / "times.json").write_text('["broken"]')
    run_notebooks([path], out="again")


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("link", ["symlink", "link"])
def test_a_link_put_there_while_it_runs_is_replaced(workplace, link):
    """A second cell sees a copy of the run's own, and what the link leads to stays."""
    (workplace / "mine").write_text("mine")
    copy, mine = workplace / "run" / "01_a.ipynb", workplace / "mine"
    source = f"import os\nos.unlink({str(copy)!r})\nos.{link}({str(mine)!r}, {str(copy)!r})"
    look = f"import os\nassert not os.path.islink({str(copy)!r})"
    run_notebooks([write(workplace / "notebooks" / "01_a.ipynb", source, look)], out="run")
    assert mine.read_text() == "mine" and not copy.is_symlink()
    assert nbformat.read(copy, 4).metadata.papermill.output_path == str(copy)
    assert not list(copy.parent.glob(".tmp-*"))


def declared(kind: str, default: str = "", help: str = "") -> dict:
    return {"inferred_type_name": kind, "default": default, "help": help}


@pytest.mark.parametrize(
    ("text", "kind", "default", "value"),
    [
        ("7", "int", "3", 7),
        ("-7", "int", "3", -7),
        ("7", "float", "3.0", 7.0),
        ("1e-3", "float", "3.0", 0.001),
        ("true", "bool", "False", True),
        ("False", "bool", "True", False),
        ("0", "bool", "True", False),
        ("007", "str", "''", "007"),
        ("true", "str", "''", "true"),
        ("none", "str", "None", None),
        ("None", "float", "None", None),
        ("none", "str", "'x'", "none"),
        ("7", "None", "3", 7),  # papermill's word for "no annotation"
        ("7", "None", "3.0", 7.0),
        ("no", "None", "True", False),
        ("7", "None", "None", "7"),
    ],
)
def test_typed(text, kind, default, value):
    result = typed("x", text, declared(kind, default), "n.ipynb")
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("7.0", "int"), ("1e3", "int"), ("", "int"), ("nan", "float"), ("inf", "float"),
     ("x", "float"), ("2", "bool"), ("", "bool"), ("none", "int"), ("[1]", "list[int]")],
)  # fmt: skip
def test_typed_refuses(text, kind):
    with pytest.raises(BitbyteError, match=r"--set x") as caught:
        typed("x", text, declared(kind, "1"), "n.ipynb")
    assert "\n" not in str(caught.value) and "n.ipynb" in str(caught.value)


def test_assign_gives_each_notebook_its_own(workplace):
    first = load_notebook(write(workplace / "01_a.ipynb"))
    second = load_notebook(write(workplace / "02_b.ipynb", parameters="steps: float = 1.0  # s"))
    values = assign([first, second], {"steps": "5", "corpus": "stdlib"})
    assert values == [{"steps": 5, "corpus": "stdlib"}, {"steps": 5.0}]
    assert type(values[0]["steps"]) is int
    with pytest.raises(BitbyteError, match=r"--set step: .* did you mean steps"):
        assign([first, second], {"step": "5"})
    with pytest.raises(BitbyteError, match=r"known: corpus, quick, rate, steps"):
        assign([first, second], {"zzzzzz": "5"})


def test_paths_become_absolute(workplace):
    book = load_notebook(
        write(workplace / "01_a.ipynb", parameters=PARAMETERS + 'name: str = "x"  # label\n')
    )
    for name in ("my text", "stories", "steps"):
        (workplace / name).write_text("x")
    given = {"corpus": "my text", "name": "my text", "steps": "steps"}
    assert resolve([book], given) == given | {"corpus": str(workplace / "my text")}
    assert resolve([book], {"corpus": "stories"}) == {"corpus": "stories"}  # the default
    assert resolve([book], {"corpus": "./stories"}) == {"corpus": str(workplace / "stories")}
    assert resolve([book], {"corpus": "stdlib", "a-b": "1"}) == {"corpus": "stdlib", "a_b": "1"}
    with pytest.raises(BitbyteError, match="UTF-8"):
        resolve([book], {"corpus": "\udcff"})


# --- progress


def test_time_left():
    # All known: what the last run took, less what was spent.
    assert time_left([10.0, 20.0], [5, 5], 0, 2, 4.0, 4.0) == 6.0 + 20.0
    assert time_left([10.0, 20.0], [5, 5], 0, 2, 40.0, 40.0) == 20.0
    # Nothing known: seconds a cell so far times cells to go.
    assert time_left([None, None], [4, 6], 0, 2, 8.0, 8.0) == 4.0 * (2 + 6)
    assert time_left([None, None], [4, 6], 0, 0, 8.0, 8.0) is None
    # Mixed; a notebook that is skipped has no cells and costs nothing.
    assert time_left([None, 30.0], [4, 6], 0, 2, 8.0, 8.0) == 4.0 * 2 + 30.0
    assert time_left([0.0, None], [0, 6], 1, 3, 9.0, 9.0) == 9.0
    assert time_left([None], [4], 0, 4, 8.0, 8.0) == 0.0


def test_clock():
    assert [runner.clock(s) for s in (0, 61.4, 3599.6, 3661)] == [
        "0:00",
        "1:01",
        "1:00:00",
        "1:01:01",
    ]


# --- the table and the pages


record = functools.partial(
    support.record, bpb=2.31234, interval=[2.2, 2.4], bits=2.31234 * 912345, bytes=912345,
    bytes_seen=None, context={"window": 256, "stride": 128},
    data={"path": "stories", "split": "val", "sha256": "ab" * 32},
)  # fmt: skip


def test_bpb_table():
    table = bpb_table([
        record(bpb=2.5, kind="upper_bound", model="blur"),
        record(),
        record(kind="masked_only", bpb=0.1, model="hidden"),
        record(data={"path": "enwik8", "split": "val", "sha256": "cd" * 32}, bpb=1.9),
    ])  # fmt: skip
    head, rule, first, web, second, *rows, empty, note = table.splitlines()
    assert " ".join(head.split()) == ("model BPB 95 % interval windows kind step trained on seed")
    assert set(rule) == {"-", " "} and empty == "" and "these bytes" in note
    assert first == "enwik8 val cdcdcdcd: 912,345 bytes"
    assert " ".join(web.split()) == "tiny 1.9000 2.2000 to 2.4000 256/128 exact 0"
    assert second == "stories val abababab: 912,345 bytes"
    assert [row.split()[0] for row in rows] == ["tiny", "blur"]
    (_, _, seen, *_) = bpb_table([record(trained_on_it=True)]).splitlines()
    assert seen.startswith("stories val abababab, trained on it:") and "trained on it" not in table
    assert "  <= 2.5000  " in rows[1] and "<=" not in rows[0] and "hidden" not in table
    trained = record(step=1234, bytes_seen=2_500_000, train_seed=None, training={"seed": 9})
    assert bpb_table([trained]).splitlines()[3].endswith("1,234      2.5 MB     9")
    assert bpb_table([]) == "no BPB was measured"


def test_records_are_those_of_the_run(workplace):
    run, shared = workplace / "run", workplace / "art" / "results"
    for folder in (run / "results", shared):
        folder.mkdir(parents=True)
    (run / "results" / "a.json").write_bytes(to_json(record(model="mine")))
    (run / "results" / "bench.json").write_bytes(to_json({"rows": []}))
    (run / "results" / "manifest.json").write_bytes(to_json({"format": 1, "shards": []}))
    for name, when in (("old", 1000), ("new", 3000)):
        (shared / f"{name}.json").write_bytes(to_json(record(model=name)))
        os.utime(shared / f"{name}.json", (when, when))
    assert [r["model"] for r in pages.records_of(run, 2000)] == ["mine", "new"]


EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'


def test_index_escapes_everything(workplace):
    run = workplace / "run & <b>"
    (run / "results").mkdir(parents=True)
    (run / "figures").mkdir()
    (run / "figures" / "a'b #1%.png").write_bytes(b"x")
    (run / "figures" / "c.pdf").write_bytes(b"x")
    data = {"path": EVIL, "split": "val", "sha256": EVIL}
    evil = record(model=EVIL + "\n\x07", data=data, kind=EVIL)
    (run / "results" / "r.json").write_bytes(to_json(evil))
    entry = {"name": "01_<i>.ipynb", "status": "failed", "error": EVIL, "seconds": None,
             "parameters": {"corpus": EVIL}}  # fmt: skip
    pages.write_index(run, {"notebooks": [entry], "began": 0.0})
    page = (run / "index.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "<i>" not in page
    assert page.count("&lt;script&gt;") == 6 and "\\n\\x07" in page
    assert 'src="figures/a%27b%20%231%25.png"' in page and 'href="figures/c.pdf"' in page
    assert not re.search(r"https?://|//cdn", page)


def test_notebook_page_runs_nothing_and_fetches_nothing(workplace):
    path = write(workplace / "01_a.ipynb", "x < 1  # </style>")
    node = nbformat.read(path, 4)
    node.cells[0].source = f"# Title {EVIL}\n\n[x](javascript:alert(3)) <iframe src='http://x'>"
    node.cells[2].outputs = [
        nbformat.v4.new_output(
            "display_data", data={"text/html": f"<details><b onclick='y()'>hi</b></details>{EVIL}"}
        ),
        nbformat.v4.new_output("display_data", data={"application/javascript": "alert(4)"}),
        nbformat.v4.new_output("stream", name="stdout", text=EVIL),
    ]
    nbformat.write(node, path)
    pages.write_notebook_page(path)
    page = path.with_suffix(".html").read_text()
    assert "<details><b>hi</b></details>" in page
    for word in ("<script", "onclick='", "<img src", 'href="javascript', "<iframe", "alert(4)"):
        assert word not in page
    assert "script-src" not in page and "default-src 'none'" in page


# --- runs


def test_run_resume_and_skip(workplace, capfd):
    """One run with a failing second notebook, mended, resumed; then all unchanged."""
    folder = workplace / "notebooks"
    write(folder / "01_make.ipynb", SHOW)
    write(folder / "02_score.ipynb", "x = 1", "raise ValueError('no\\n  such \\x1b[31mthing')",
          parameters="steps: int = 1  # n")  # fmt: skip
    write(folder / "03_last.ipynb", "print('never')")
    (workplace / "my text").write_text("x")
    evil = "'; import os  # \"\\"
    settings = {"steps": "5", "corpus": evil, "quick": "no"}
    with pytest.raises(RunError) as caught:
        run_notebooks(settings=settings)
    message = str(caught.value)
    (run,) = [path.parent for path in (workplace / "art" / "runs").glob("*/manifest.json")]
    assert "02_score.ipynb, code cell 3 of 3: ValueError:" in message and "thing" in message
    assert f"bitbyte run --resume {run.name}" in message
    assert "\n" not in message and "\x1b" not in message
    assert statuses(run) == ["done", "failed", "waiting"]
    assert "ValueError" in manifest(run)["notebooks"][1]["error"]
    assert not (run / "03_last.ipynb").exists()
    assert "code cell 3" in (run / "index.html").read_text()
    node = nbformat.read(run / "01_make.ipynb", 4)
    (text,) = [o.text for cell in node.cells for o in cell.get("outputs", []) if "text" in o]
    assert text.startswith(f"{evil!r} 5 0.001 False notebooks {workplace / 'art'}")
    progress = capfd.readouterr().err
    assert "[1/3] 01_make.ipynb  cell 0/2  0:00 elapsed, time left not known yet" in progress
    assert "01_make.ipynb: done in" in progress and "WARNING" not in progress

    write(folder / "02_score.ipynb", RECORDS, parameters="steps: int = 1  # n")
    assert run_notebooks(resume="latest") == run
    assert statuses(run) == ["done"] * 3
    assert (folder / "ran").read_text() == "1"  # the first was not run again
    assert manifest(run)["settings"]["corpus"] == evil
    out, err = capfd.readouterr()
    assert "01_make.ipynb: done before, skipped" in err and "[2/3] 02_score.ipynb" in err
    assert re.search(r"stories val abababab.*\n  toy ", out) and str(run / "index.html") in out
    page = (run / "index.html").read_text()
    for target in ("01_make.html", "01_make.ipynb", "figures/curve.png"):
        assert f'"{target}"' in page and (run / target).is_file()

    # Unchanged: all skipped.  A changed parameter runs its notebook and those behind it.
    copies = {path: path.stat().st_mtime_ns for path in run.glob("*.ipynb")}
    run_notebooks(out=run)
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.ipynb")} == copies
    times = json.loads((workplace / "art" / "runs" / "times.json").read_bytes())
    assert all(seconds > 0 for seconds in times.values()) and len(times) == 3


SHOW = """\
import os
from pathlib import Path
with open("ran", "a") as file:
    file.write("1")
print(repr(corpus), steps, rate, quick, Path.cwd().name, os.environ["BITBYTE_ARTIFACTS"])"""
RECORDS = """\
import os, json
from pathlib import Path
run = Path(os.environ["BITBYTE_RUN"])
for name in ("results", "figures"):
    (run / name).mkdir(exist_ok=True)
(run / "figures" / "curve.png").write_bytes(b"png")
record = {"format": 1, "model": "toy", "kind": "exact", "bpb": 8.0, "interval": None, "bytes": 3,
          "bits": 24.0, "data": {"path": "stories", "split": "val", "sha256": "ab" * 32},
          "context": {"window": 3, "stride": 3}, "trained_on_it": False, "parameters": 1,
          "packed_bytes": 1, "bytes_seen": None}
(run / "results" / "toy.json").write_text(json.dumps(record))"""


def test_code_is_part_of_a_key(workplace, monkeypatch):
    book = load_notebook(write(workplace / "01_a.ipynb"))
    before = runner._keys([book], [{}])
    monkeypatch.setattr(runner, "_code_hash", lambda: "other code")
    assert runner._keys([book], [{}]) != before
    monkeypatch.undo()
    assert re.fullmatch("[0-9a-f]{64}", runner._code_hash())


def test_keys_follow_the_files_that_parameters_name(workplace):
    """Only those whose comments say that they are paths: a separator "/" names no folder here."""
    comments = 'corpus: str = "stories"  # a name or PATH\nsep: str = ""  # written between\n'
    book = load_notebook(write(workplace / "01_a.ipynb", parameters=comments))

    def keys(**settings: str) -> list[str]:
        return runner._keys([book], assign([book], resolve([book], settings)))

    (workplace / "folder").mkdir()
    for corpus, file in (("text", workplace / "text"), ("folder", workplace / "folder" / "a")):
        file.write_text("one")
        before = keys(corpus=corpus)
        assert keys(corpus=corpus) == before
        file.write_text("another text")
        assert keys(corpus=corpus) != before
    before = keys(corpus="folder")
    (workplace / "folder" / "b").write_text("more")
    assert keys(corpus="folder") != before
    before = keys(sep=str(workplace), corpus="stories")
    (workplace / "text").write_text("")
    assert keys(sep=str(workplace), corpus="stories") == before


def test_all_files_of_the_package_are_part_of_a_key(tmp_path, monkeypatch):
    monkeypatch.undo()
    package = tmp_path / "bitbyte"
    (package / "workbench").mkdir(parents=True)
    monkeypatch.setattr(runner, "__file__", str(package / "workbench" / "runner.py"))
    seen = {runner._code_hash()}
    names = ("a.py", "a.js", "workbench/a.js", "a.css", "a.html", "a.wasm.gz", "a.bbm")
    for number, name in enumerate(names, 1):
        (package / name).write_text("x")
        seen.add(runner._code_hash())
        assert len(seen) == number + 1
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_text("x")
    assert runner._code_hash() in seen


def test_keys_follow_source_parameters_and_what_came_before(workplace):
    paths = [write(workplace / f"0{k}_a.ipynb", f"print({k})") for k in (1, 2)]
    books = [load_notebook(path) for path in paths]
    keys = runner._keys(books, [{}, {}])
    assert keys == runner._keys(books, [{}, {}]) and keys[0] != keys[1]
    second = runner._keys(books, [{}, {"steps": 2}])
    assert second[0] == keys[0] and second[1] != keys[1]
    first = runner._keys(books, [{"steps": 2}, {}])
    assert first[0] != keys[0] and first[1] != keys[1]
    assert runner._keys(books, [{"a": 1, "b": 2}, {}]) == runner._keys(
        books, [{"b": 2, "a": 1}, {}]
    )


@pytest.mark.parametrize(
    ("source", "timeout", "words"),
    [
        ("import os\nos._exit(3)", 60, "DeadKernelError: the kernel died"),
        ("import time\ntime.sleep(60)", 1, "CellTimeoutError: not done after 1 seconds"),
    ],
)
def test_dead_kernel_and_timeout_fail(workplace, source, timeout, words):
    path = write(workplace / "01_a.ipynb", "x = 1", source)
    out = workplace / "a {run} 50%"
    with pytest.raises(
        RunError, match=re.escape(f"01_a.ipynb, code cell 3 of 3: {words}")
    ) as caught:
        run_notebooks([path], out=out, cell_timeout=timeout)
    assert f"--resume {out}" in str(caught.value)
    assert statuses(out) == ["failed"]


def test_mistakes_are_found_before_anything_runs(workplace):
    write(workplace / "notebooks" / "01_a.ipynb", "open('ran', 'w')")
    bad = write(workplace / "notebooks" / "02_b.ipynb", "1", tags=["parameters"])
    with pytest.raises(BitbyteError, match="parameters"):
        run_notebooks()
    bad.unlink()
    (workplace / "full").mkdir()
    (workplace / "full" / "x").write_text("mine")
    (workplace / "future").mkdir()
    (workplace / "future" / "manifest.json").write_bytes(to_json({"format": 99}))
    for options, words in (
        ({"settings": {"stepz": "1"}}, "did you mean steps"),
        ({"settings": {"steps": "x"}}, "not a int"),
        ({"resume": "latest"}, "no run to resume"),
        ({"resume": "20990101-000000"}, "no run to resume"),
        ({"resume": "latest", "out": "x"}, "not both"),
        ({"out": "full"}, "is not a run"),
        ({"out": "future"}, "another format"),
    ):
        with pytest.raises(BitbyteError, match=words):
            run_notebooks(**options)
    assert not (workplace / "art").exists()
    assert not (workplace / "notebooks" / "ran").exists()


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(notebooks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BitbyteError, match=re.escape('pip install "bitbyte[workbench]"')):
        run_notebooks()


def test_command_line_takes_settings_one_by_one(monkeypatch):
    from bitbyte.cli import dispatch

    seen = {}
    monkeypatch.setattr(runner, "run_notebooks", lambda *_, **options: seen.update(options))
    assert (
        dispatch.main(["run", "--set", "corpus=a b", "--set", "minutes=2", "--resume", "latest"])
        == 0
    )
    assert seen["settings"] == {"corpus": "a b", "minutes": "2"}
    assert seen["resume"] == "latest"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_text(workplace, monkeypatch, capsys):
    """The working folder, the run, whose name is in its copies, and a character cut in half."""
    odd = os.fsdecode(b"caf\xe9")
    path = write(workplace / odd / "notebooks" / "01_a.ipynb", "import os\nprint(os.getcwd())")
    path.write_bytes(path.read_bytes().replace(b"# 01_a", rb"# \ud83d"))
    monkeypatch.chdir(workplace / odd)
    run = run_notebooks(out=odd)
    assert statuses(run) == ["done"] and "caf\\xe9/index.html" in capsys.readouterr().out
    for file in (run / "01_a.ipynb", *write_references()):
        cells = nbformat.read(file, 4).cells
        assert cells[0].source == "# \ud83d" and "/notebooks" in cells[-1].outputs[0].text


def test_new_folders_never_meet(workplace):
    found = {runner._new_folder() for _ in range(3)}
    assert len(found) == 3 and all(folder.is_dir() for folder in found)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT to one child is a POSIX thing")
def test_interrupt_leaves_a_run_to_resume_and_says_so_last(workplace):
    write(workplace / "notebooks" / "01_a.ipynb", "import time\nopen('up', 'w')\ntime.sleep(60)")
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; from bitbyte.cli.dispatch import main; sys.exit(main(['run', '--out', 'run']))"
    )  # a parent may have told its children to ignore Ctrl-C
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    until((workplace / "notebooks" / "up").exists, child)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err.endswith("/run\nstopped\n"), err
    assert err.count("\n") <= 4 and "continue with: bitbyte run --resume" in err
    assert statuses(workplace / "run") == ["interrupted"]


def test_what_an_interrupted_cell_answers_is_not_reported(monkeypatch, caplog, tmp_path):
    """The task of a cell that nobody waits for any more fails when its kernel is shut down."""
    tasks = []

    async def answer():
        raise RuntimeError("KeyboardInterrupt in the cell")

    def interrupted(*args, **options):
        loop = ensure_event_loop()
        tasks.append(loop.create_task(answer()))
        loop.run_until_complete(asyncio.wait(tasks))
        raise KeyboardInterrupt

    monkeypatch.setattr("papermill.execute_notebook", interrupted)
    book = load_notebook(write(tmp_path / "01_a.ipynb", "1"))
    with pytest.raises(KeyboardInterrupt):
        runner.execute(book, {}, tmp_path / "out.ipynb", None, 1)
    tasks.clear()
    gc.collect()
    assert caplog.text == ""
    ensure_event_loop().set_exception_handler(None)


# --- reference outputs

NASTY = """\
import sys
from IPython.display import HTML, display
print("one"); print("two", file=sys.stderr); print("three")
display(HTML("<table><tr><td>1</td></tr></table>"))
display({"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}, raw=True)
display({"text/plain": "IntSlider()", "application/vnd.jupyter.widget-view+json": {}}, raw=True)
import matplotlib.pyplot as plt
plt.figure(figsize=(1, 1)); plt.plot([1, 2]); plt.show()
steps"""


def test_references_are_normalised_and_repeat(workplace):
    write(workplace / "notebooks" / "01_a.ipynb", NASTY)
    path = write(workplace / "notebooks" / "02_b.ipynb", "import time\nprint(time.time())",
                 "import os\n'BITBYTE_RUN' in os.environ, os.path.exists('art')",
                 tags=["nbval-ignore-output"])  # fmt: skip
    node = nbformat.read(path, 4)
    node.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    node.cells[2].metadata["collapsed"] = True
    nbformat.write(node, path)
    assert [path.name for path in write_references()] == ["01_a.ipynb", "02_b.ipynb"]
    first, second = (path.read_bytes() for path in find_notebooks())
    assert write_references() == []  # byte for byte the same
    node = nbformat.reads(first.decode(), 4)
    cells = [cell for cell in node.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [1, 2]
    assert [cell.metadata for cell in cells] == [{"tags": ["parameters"]}, {}]
    outputs = cells[1].outputs
    streams = {o.name: o.text for o in outputs if o.output_type == "stream"}
    assert streams == {"stdout": "one\nthree\n", "stderr": "two\n"}
    data = [o.data for o in outputs if "data" in o]
    assert [sorted(d) for d in data] == [
        ["text/html", "text/plain"], ["text/plain"], ["image/png", "text/plain"], ["text/plain"],
    ]  # fmt: skip
    assert outputs[-1].execution_count == 2
    node = nbformat.reads(second.decode(), 4)
    assert all(not cell.outputs for cell in node.cells if cell.cell_type == "code")
    assert set(node.metadata) == {"kernelspec", "language_info"}
    assert not (workplace / "art").exists()

    # nbval agrees with what was stored, and sees a change.
    sanitize = ROOT / "tests" / "nbval_sanitize.cfg"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval",
               "--nbval-current-env", f"--nbval-sanitize-with={sanitize}", "notebooks"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    good = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert good.returncode == 0, good.stdout
    edited = workplace / "notebooks" / "01_a.ipynb"
    edited.write_bytes(first.replace(b'"three\\n"', b'"four\\n"'))
    bad = subprocess.run(
        [*command[:-1], str(edited)], check=False, capture_output=True, text=True, env=environment
    )
    assert bad.returncode == 1 and "1 failed" in bad.stdout


def test_a_failing_notebook_keeps_its_file(workplace):
    path = write(workplace / "notebooks" / "01_a.ipynb", "1", "raise KeyError('x')")
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"01_a\.ipynb, code cell 3 of 3: KeyError: 'x'"):
        write_references()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
