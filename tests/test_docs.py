"""The documents: their links, commands, code, tables and trees are those of the package."""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support import ROOT
from tools import predictions

import bitbyte
from bitbyte.cli.dispatch import COMMANDS, main
from bitbyte.config import SamplingConfig, TrainConfig
from bitbyte.papers.source import find_papers

PAGES = sorted(
    path for name in ("*.md", "docs/*.md", "papers/README.md") for path in ROOT.glob(name)
)
README = ROOT / "README.md"


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks in these languages."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [code for language, code in fences if language in languages]


def anchors(text: str) -> set[str]:
    """What a link to a heading of a page may name, as GitHub makes it."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def broken_links(path: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    text = path.read_text("utf-8")
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
    broken = []
    for link in found:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        there = "://" in link or target.exists()
        if not there or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "# A b\n[x](a.md#a-b) [y](a.md#c) [z](no.md) [w](https://example.org/x) [v](a.md)\n"
    )
    assert broken_links(page) == ["a.md#c", "no.md"]


def test_the_readme_is_short():
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 175
    assert max(map(len, lines)) <= 140


def test_the_tree_in_the_readme_is_the_package():
    (tree,) = [code for code in blocks(README.read_text("utf-8"), "") if "bitbyte/" in code]
    named = set(re.findall(r"^  (\S+)", tree, re.M))
    package = ROOT / "bitbyte"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert named == files | folders
    for name in re.findall(r"\S+/", tree.splitlines()[-1]):
        assert (ROOT / name).is_dir()


def options_of(command: str) -> set[str]:
    """Names of the options of a command."""
    parameters = inspect.signature(COMMANDS[command]).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.name != "config"}
    if command in ("train", "plan"):
        names |= {field.name for field in dataclasses.fields(TrainConfig)}
    if command in ("sample", "infill"):
        names |= {field.name for field in dataclasses.fields(SamplingConfig)}
    return names | {f"no_{name}" for name in names} | {"help"}


def wrong_commands(text: str) -> list[str]:
    """Commands of bitbyte in a page that do not exist, or that lack one of their options."""
    wrong = []
    code = "\n".join(blocks(text, "bash", "console", "powershell"))
    spans = re.findall(r"`(bitbyte [^`]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
    for line in [*code.splitlines(), *spans]:
        for call in re.split(r"&&|#", line):
            found = re.search(r"(?:^|[\s/\\])bitbyte(?:\.exe)? +([a-z]\w*)(.*)", call)
            if not found:
                continue
            command, rest = found.groups()
            options = {name.replace("-", "_") for name in re.findall(r"\s--([\w-]+)", rest)}
            if command not in COMMANDS or options - options_of(command):
                wrong.append(call.strip())
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_exist(path):
    assert wrong_commands(path.read_text("utf-8")) == []


def test_a_wrong_command_is_found():
    page = (
        "```bash\nbitbyte pack x --out y  # --no\nbitbyte fly\n"
        "bitbyte pack x && bitbyte eval a --y\n```\n"
    )
    assert wrong_commands(page + "`bitbyte tag X --z` but `bitbyte train ar --no_act_quant`") == [
        "bitbyte fly", "bitbyte eval a --y", "bitbyte tag X --z",
    ]  # fmt: skip


# --- tables


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """An artifacts folder with the records and models in the repository, and none made since."""
    places = [
        path for part in ("results", "models") for path in (ROOT / "artifacts" / part).iterdir()
    ]
    if shutil.which("git") and (ROOT / ".git").exists():
        call = ["git", "ls-files", "artifacts/results", "artifacts/models"]
        listed = subprocess.check_output(call, cwd=ROOT, text=True)
        places = [ROOT / line for line in listed.split()]
    for path in places:
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["results", "compression", "passport", "diffusion", "models"])
def test_tables_are_those_of_the_records(name, committed, capsys):
    """If not: bitbyte results --readme docs/results.md (or docs/compression.md)."""
    page = ROOT / "docs" / f"{name}.md"
    copy = committed / page.name
    shutil.copy(page, copy)
    assert main(["results", "--readme", str(copy)]) == 0
    assert copy.read_text("utf-8") == page.read_text("utf-8")


def test_the_readme_has_numbers_of_the_results_only():
    results = [set(row) for row in rows((ROOT / "docs" / "results.md").read_text("utf-8"))]
    text = README.read_text("utf-8").partition("## Results")[2].partition("## ")[0]
    head, *table = rows(text)
    assert head == ["model", "parameters", "packed", "trained on", "BPB"] and len(table) == 10
    for row in table:
        assert any(set(row) <= other for other in results), row
    shown = re.findall(r"\*\*(\d\.\d{4})\*\*", text)
    assert all(any(f"**{n}**" in cell for row in results for cell in row) for n in shown)


def test_predictions_are_those_of_the_record():
    """If not: python tests/tools/predictions.py --table"""
    text = predictions.PAGE.read_text("utf-8").partition("<!-- predictions -->\n")[2]
    record = json.loads(predictions.RECORD.read_bytes())
    assert text.partition("\n<!-- end of predictions -->")[0] == predictions.table(record)


# --- other files


def test_the_guide_lists_the_notebooks_by_their_questions():
    titles = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))[1:]:  # the first one is the index
        first = "".join(json.loads(path.read_text("utf-8"))["cells"][0]["source"])
        titles[path.stem] = first.splitlines()[0].removeprefix("# ")
    table = rows((ROOT / "docs" / "guide.md").read_text("utf-8"))
    listed = {name.split("]")[0][1:]: title for name, title in (r for r in table if len(r) == 2)}
    assert titles == {name: listed.get(name) for name in titles}


def _warned(old: bool):
    return pytest.warns(DeprecationWarning, match="called") if old else contextlib.nullcontext()


def test_changelog_names_addresses_that_exist():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    moved, renamed = text.partition("### Where things went")[2].split("| old name | new name |")
    for old, new, works in rows(moved)[1:]:
        for name in re.findall(r"`([\w.]+)`", new):
            importlib.import_module(name)
        name = re.search(r"`([\w.]+)`", old)[1]
        parent, _, last = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(parent), last, None)
        except ImportError:
            found = None
        found = found or importlib.util.find_spec(name)
        assert (works == "yes") == (found is not None and "(" not in old), old
    for old, new in rows(renamed):
        values = []
        for name in (old, new):
            module, _, last = name.strip("`").rpartition(".")
            parent, _, child = module.rpartition(".")
            home = getattr(importlib.import_module(parent), child, None)
            home = home or importlib.import_module(module)
            with _warned(name == old):
                values.append(getattr(home, last))
        assert values[0] is values[1]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["version"] == bitbyte.__version__
    assert f"\n## {bitbyte.__version__} - " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_papers_are_not_their_readme():
    assert "README" not in {path.stem for path in find_papers()}
