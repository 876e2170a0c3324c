"""The shape of every notebook in notebooks/, however many there are; nbval compares outputs."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from support import ROOT

from bitbyte.cli import workbench
from bitbyte.files import BitbyteError
from bitbyte.workbench.notebooks import KERNELSPEC, STORED, normalize, originals, working_copies

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES, MAX_CELLS, MAX_LINES, MAX_CELL_LINES = 440_000, 26, 150, 20
ALLOWED = {"bitbyte", "numpy", "torch", "matplotlib", "IPython", "pathlib"}
ALLOWED |= set(sys.stdlib_module_names)
TAGS = {"parameters", "nbval-ignore-output", "nbval-skip", "keep-output", "checks"}
FOLDED = {"tags": ["checks"], "jupyter": {"source_hidden": True}}
LOCAL_PATH = re.compile(
    r"(?<![\w.<:/])/(?:home|Users|root|tmp|var|work|mnt|opt|usr|private|srv)/\S|\b[A-Z]:\\"
)
VALUE = r"(?:int|float|bool|str) = [^=#]+?  # \S.*"


def code_problems(cells) -> list[str]:
    found = []
    for number, cell in enumerate(cells, 1):
        source = TransformerManager().transform_cell(cell.source)
        tree = ast.parse(source)
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or "."]
            found += [
                f"cell {number}: imports {module}"
                for module in modules
                if module.split(".")[0] not in ALLOWED
            ]
            if isinstance(node, ast.ClassDef):
                found.append(f"cell {number}: defines a class; it belongs in the package")
        if len(cell.source.splitlines()) > MAX_CELL_LINES:
            found.append(f"cell {number}: more than {MAX_CELL_LINES} lines")
    if sum(len(cell.source.splitlines()) for cell in cells) > MAX_LINES:
        found.append(f"more than {MAX_LINES} lines of code")
    return found


def parameter_problems(node, cells) -> list[str]:
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if not cells:
        return []
    if tagged != cells[:1]:
        return ["the parameters cell must be the first code cell, and the only one tagged so"]
    lines = [line for line in tagged[0].source.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("#")]
    found = [
        f"parameter line {line!r} is not `name: type = value  # comment`"
        for line in lines
        if not re.fullmatch(rf"[a-z_0-9]+: {VALUE}", line)
    ]
    # papermill reads the cell with a regex: what it misses could not be set.
    names = {line.split(":")[0] for line in lines}
    node.metadata.kernelspec = KERNELSPEC
    found += [
        f"papermill does not see the parameter {name}: no = in its comment, one simple type"
        for name in sorted(names - set(papermill.inspect_notebook(node)))
    ]
    return found


def output_problems(cells) -> list[str]:
    found = []
    for number, cell in enumerate(cells, 1):
        if cell.execution_count != number:
            found.append(f"cell {number}: count is {cell.execution_count}; run make references")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number}: holds an error, {output.ename}")
            data = output.get("data", {"text/plain": output.get("text", "")})
            if not set(data) <= STORED:
                found.append(f"cell {number}: output of kind {sorted(set(data) - STORED)}")
            texts = [str(value) for kind, value in data.items() if kind.startswith("text/")]
            if any(LOCAL_PATH.search(text) for text in texts):
                found.append(f"cell {number}: its output names a path of one machine")
    ignored = [c for c in cells if "nbval-ignore-output" in c.metadata.get("tags", [])]
    if len(ignored) > len(cells) / 4:
        found.append(f"{len(ignored)} of {len(cells)} cells are not compared")
    return found


def problems(path: Path) -> list[str]:
    """Everything that is wrong with the shape of one notebook."""
    data = path.read_bytes()
    node = nbformat.reads(data.decode(), 4)
    nbformat.validate(node)
    cells = [cell for cell in node.cells if cell.cell_type == "code"]
    found = []
    if not re.fullmatch(r"\d\d_[a-z]+(_[a-z0-9]+)*\.ipynb", path.name):
        found.append("name is not NN_verb_object.ipynb")
    if len(data) > MAX_BYTES:
        found.append(f"{len(data)} bytes, more than {MAX_BYTES}")
    if len(node.cells) > MAX_CELLS:
        found.append(f"{len(node.cells)} cells, more than {MAX_CELLS}")
    if node.cells[0].cell_type != "markdown" or not node.cells[0].source.startswith("# "):
        found.append("the first cell is no heading")
    headings = [c for c in node.cells if c.cell_type == "markdown" and c.source.startswith("# ")]
    if len(headings) > 1:
        found.append("more than one title")
    if node.metadata.get("kernelspec") != KERNELSPEC:
        found.append("the kernel is not python3 as the reference writer stores it")
    if set(node.metadata) != {"kernelspec", "language_info"}:
        found.append(f"metadata {sorted(node.metadata)}; run make references")
    for cell in node.cells:
        tags = cell.metadata.get("tags", [])
        allowed = cell.metadata == FOLDED if "checks" in tags else not set(cell.metadata) - {"tags"}
        if not allowed or set(tags) - TAGS:
            found.append(f"cell {cell.get('id')}: metadata or tags beyond {sorted(TAGS)}")
    folded = [i for i, c in enumerate(cells, 1) if "checks" in c.metadata.get("tags", [])]
    if folded not in ([], [len(cells)]):
        found.append(f"cells {folded} are folded; only the last one may be, with all checks")
    return found + parameter_problems(node, cells) + code_problems(cells) + output_problems(cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_shape(path):
    assert problems(path) == []


def test_numbers_are_unique():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)


def test_index_links_every_other_notebook():
    index = FOLDER / "00_index.ipynb"
    cells = nbformat.read(index, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    linked = set(re.findall(r"\]\((?:\./)?([\w.]+\.ipynb)\)", text))
    assert linked == {path.name for path in NOTEBOOKS} - {index.name}


# --- the checks themselves, on toy notebooks


def toy(*sources: str, **changes) -> nbformat.NotebookNode:
    """Title, parameters cell, then one code cell for each source; normalised."""
    new = nbformat.v4
    cells = [new.new_markdown_cell("# Toy", id="title")]
    parameters = new.new_code_cell("steps: int = 3  # how many", id="parameters")
    parameters.metadata.tags = ["parameters"]
    cells += [parameters, *(new.new_code_cell(s, id=f"c{k}") for k, s in enumerate(sources))]
    node = new.new_notebook(cells=cells)
    normalize(node)
    for name, value in changes.items():
        node[name] = value
    return node


def check(folder: Path, node, name="01_make_toy.ipynb") -> list[str]:
    (folder / name).write_text(nbformat.writes(node))
    return problems(folder / name)


def test_a_good_toy_passes(tmp_path):
    assert check(tmp_path, toy("import bitbyte.vocab\nimport numpy as np", "print(steps)")) == []


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("import scipy", "imports scipy"),
        ("from pandas import DataFrame", "imports pandas"),
        ("class A:\n    pass", "class"),
        ("x = 1\n" * 21, "more than 20 lines"),
    ],
)
def test_bad_code_is_found(tmp_path, source, word):
    assert word in "\n".join(check(tmp_path, toy(source)))


@pytest.mark.parametrize(
    "line",
    [
        "steps = 3  # no type",
        "steps: int = 3",
        "steps: list = [1]  # not a scalar",
        "steps: int = 3  # a = b",
        "steps: int | None = 3  # papermill cannot read it",
        "import os",
    ],
)
def test_bad_parameters_are_found(tmp_path, line):
    node = toy("1")
    node.cells[1].source = line
    assert "parameter" in "\n".join(check(tmp_path, node))


def broken(node, kind: str):
    """Put one fault into a toy."""
    new = nbformat.v4
    text = new.new_output
    if kind == "count":
        node.cells[2].execution_count = None
    elif kind == "error":
        node.cells[2].outputs = [text("error", ename="ValueError", evalue="x", traceback=[])]
    elif kind == "path":
        node.cells[2].outputs = [text("stream", name="stdout", text="saved in /home/me/x")]
    elif kind == "kind":
        node.cells[2].outputs = [text("display_data", data={"image/svg+xml": "<svg/>"})]
    elif kind == "metadata":
        node.metadata["widgets"] = {}
    elif kind == "not compared":
        node.cells[2].metadata.tags = ["nbval-ignore-output"]
    elif kind == "folded":
        node.cells[2].metadata = dict(FOLDED)
    elif kind == "tags":
        node.cells[2].metadata.tags = ["raises-exception"]
    elif kind == "heading":
        node.cells.pop(0)
    elif kind == "title":
        node.cells.append(new.new_markdown_cell("# Again", id="again"))
    elif kind == "first code cell":
        node.cells.insert(1, node.cells.pop(2))
    elif kind == "cells, more":
        node.cells += [new.new_markdown_cell("x", id=f"m{k}") for k in range(26)]
    elif kind == "bytes":
        node.cells[0].source += "x" * MAX_BYTES
    return node


@pytest.mark.parametrize(
    "kind",
    [
        "count", "error", "path", "kind", "metadata", "not compared", "tags", "heading", "title",
        "folded", "first code cell", "cells, more", "bytes",
    ],
)  # fmt: skip
def test_bad_outputs_and_structure_are_found(tmp_path, kind):
    node = broken(toy("1", "2"), kind)
    found = "\n".join(check(tmp_path, node))
    assert {"path": "path of one machine", "kind": "svg"}.get(kind, kind) in found


def test_the_last_cell_may_be_folded(tmp_path):
    node = toy("1", "2")
    node.cells[-1].metadata.tags = ["checks"]
    normalize(node)
    assert node.cells[-1].metadata == FOLDED and check(tmp_path, node) == []


def test_bad_names_are_found(tmp_path):
    for name in ("make_toy.ipynb", "1_make.ipynb", "01_Make.ipynb", "01-make.ipynb"):
        assert "NN_verb_object" in "\n".join(check(tmp_path, toy("1"), name))


def test_ids_are_unique_and_readable():
    for path in NOTEBOOKS:
        ids = [cell["id"] for cell in json.loads(path.read_bytes())["cells"]]
        assert len(set(ids)) == len(ids)
        assert all(re.fullmatch(r"[a-z][a-z0-9_-]+", name) for name in ids), path.name


def test_working_copies(tmp_path):
    """An edited copy is never touched; an untouched one follows its original."""
    source, target = tmp_path / "notebooks", tmp_path / "artifacts" / "notebooks"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").touch()
    source.mkdir()
    for name in ("00_index", "01_first"):
        (source / f"{name}.ipynb").write_text(
            "[docs](../docs/a.md) [next](01_first.ipynb)", "utf-8"
        )
    assert working_copies(source, target) == []
    text = (target / "01_first.ipynb").read_text("utf-8")
    assert "[next](01_first.ipynb)" in text
    assert (target / re.search(r"docs\]\((.*?)\)", text)[1]).resolve() == tmp_path / "docs" / "a.md"
    (target / "01_first.ipynb").write_text("mine", "utf-8")
    assert working_copies(source, target) == []  # the original has not changed: nothing to say
    for path in source.iterdir():
        path.write_text("new", "utf-8")
    for _ in range(2):
        assert working_copies(source, target) == ["01_first.ipynb"]
    assert (target / "00_index.ipynb").read_text("utf-8") == "new"
    assert (target / "01_first.ipynb").read_text("utf-8") == "mine"
    (target / "01_first.ipynb").unlink()
    assert working_copies(source, target) == []
    assert (target / "01_first.ipynb").read_text("utf-8") == "new"


def test_lab_opens_the_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITBYTE_ARTIFACTS", raising=False)
    for folder in ("notebooks", "artifacts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notebooks" / "00_index.ipynb").write_text("{}", "utf-8")
    commands = []
    monkeypatch.setattr(workbench, "exec_command", commands.append)
    workbench.lab(browser=False)
    assert "--LabApp.default_url=/lab/tree/artifacts/notebooks/00_index.ipynb" in commands[0]
    assert f"--notebook-dir={tmp_path}" in commands[0]
    (tmp_path / "artifacts" / "notebooks" / "00_index.ipynb").write_text("mine", "utf-8")
    (tmp_path / "notebooks" / "00_index.ipynb").write_text("new", "utf-8")
    workbench.lab(browser=False)
    assert "00_index.ipynb is yours and kept" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="no exec there")
def test_lab_finds_the_notebooks_wherever_the_artifacts_are(tmp_path, monkeypatch):
    """Also from inside of the working copies, and with a relative $BITBYTE_ARTIFACTS."""
    home, art = tmp_path / "checkout", tmp_path / "elsewhere" / "art"
    for folder in (home / "notebooks", home / "artifacts"):
        folder.mkdir(parents=True)
    (home / "notebooks" / "00_index.ipynb").write_text("{}", "utf-8")
    monkeypatch.chdir(home)
    monkeypatch.setenv("BITBYTE_ARTIFACTS", os.path.relpath(art))
    seen = []
    monkeypatch.setattr(os, "execv", lambda _, command: seen.append(command))
    workbench.lab(browser=False)
    assert f"--notebook-dir={art}" in seen[0] and (art / "notebooks" / "00_index.ipynb").is_file()
    assert "--LabApp.default_url=/lab/tree/notebooks/00_index.ipynb" in seen[0]
    assert os.environ["BITBYTE_ARTIFACTS"] == str(art)
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(home / "artifacts"))
    for place in (home, home / "artifacts" / "notebooks", tmp_path):
        monkeypatch.chdir(place)
        workbench.lab(browser=False)
        assert originals() == home / "notebooks" and f"--notebook-dir={home}" in seen.pop()
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(art))
    with pytest.raises(BitbyteError, match="no folder notebooks, here or in a parent"):
        workbench.lab()


def test_links_of_copies_on_another_drive(tmp_path, monkeypatch):
    def relpath(*_):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    source = tmp_path / "notebooks"
    source.mkdir()
    (source / "00_index.ipynb").write_text("[docs](../docs/a.md)", "utf-8")
    monkeypatch.setattr(os.path, "relpath", relpath)
    working_copies(source, tmp_path / "copies")
    text = (tmp_path / "copies" / "00_index.ipynb").read_text("utf-8")
    assert text == f"[docs]({tmp_path.as_uri()}/docs/a.md)"
