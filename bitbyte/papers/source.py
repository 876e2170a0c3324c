"""A paper as a file: find it, read its front matter, check its records, fill in its numbers.

The result is Markdown, ready for pandoc (which `build` runs).  YAML comes with the extra:
pip install "bitbyte[papers]".
"""

import dataclasses
import datetime
import importlib.util
import re
from pathlib import Path

from bitbyte.files import BitbyteError, artifacts, shown
from bitbyte.papers.blocks import Problems, Text
from bitbyte.papers.numbers import Numbers, load
from bitbyte.vocab import printable

KEYS = {
    "title", "subtitle", "author", "date", "abstract", "records", "lang", "toc", "numbersections",
    "fontsize", "margin",
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Paper:
    """A paper with everything filled in, ready for pandoc."""

    name: str
    path: Path
    source: str
    meta: dict
    body: str
    text: Text
    problems: Problems
    cited: set[str] = dataclasses.field(default_factory=set)

    @property
    def date(self) -> datetime.date:
        """The day printed on it and stamped into the PDF."""
        return datetime.date.fromisoformat(self.meta["date"])


def need_extra(*modules: str) -> None:
    """Raise BitbyteError naming the extra if a package is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise BitbyteError(f'{module} is missing: pip install "bitbyte[papers]"')


def find_papers(names=()) -> list[Path]:
    """The papers with these names or paths, else all in the folder ``papers`` but its README.md.

    That folder is the nearest one here or upwards, else that of the checkout bitbyte runs from.
    """
    here = Path.cwd()
    checkout = Path(__file__).parents[2]
    folders = [folder / "papers" for folder in (here, *here.parents, checkout)]
    home = next((folder for folder in folders if folder.is_dir()), folders[0])
    there = [path for path in sorted(home.glob("*.md")) if path.name != "README.md"]
    paths = []
    for name in names:
        path = Path(name) if str(name).endswith(".md") else home / f"{name}.md"
        if not path.is_file():
            known = ", ".join(path.stem for path in there) or "none"
            raise BitbyteError(f"there is no paper {name}; in {home.name}/: {known}")
        paths.append(path.absolute())
    paths = paths or there
    if not paths:
        raise BitbyteError("there is no folder papers with .md files here or upwards")
    return paths


def places(paper: Path, kind: str) -> list[Path]:
    """Where records and arrays are: the artifacts in use, then those beside the paper's folder."""
    beside = paper.parent.parent / "artifacts" / kind
    return list(dict.fromkeys([artifacts(kind).absolute(), beside]))


def read_text(path: Path) -> str:
    """A text file, with or without a byte order mark.  Raises BitbyteError if it is not UTF-8."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BitbyteError(
            f"{shown(path.name)}:{line}: byte {error.start} is not UTF-8 "
            f"({printable(data[error.start : error.start + 1])}); save the file as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_paper(path: Path, source: str | None = None) -> Paper:
    """Read a paper, check its records and fill in its numbers, tables and figures.

    ``source`` replaces the text of the file, to try out a change.
    """
    need_extra("yaml")
    import yaml

    path = Path(path).absolute()
    source = read_text(path) if source is None else source
    problems = Problems(paper=path.name)
    found = re.match(r"---[ \t]*\n(.*?\n)(?:---|\.\.\.)[ \t]*\n", source, re.DOTALL)
    if not found:
        raise BitbyteError(f"{path.name}:1: a paper begins with front matter between two lines ---")
    try:
        node = yaml.compose(found[1], Loader=yaml.SafeLoader)
        fields = {key.value: value for key, value in node.value}
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 2 if mark else 1
        raise BitbyteError(f"{path.name}:{line}: front matter is not a YAML mapping") from None
    for name, value in fields.items():
        if name not in KEYS:
            problems.add(value.start_mark.line + 2, f"unknown key {name}; known: {_list(KEYS)}")
    records, failed = {}, set()
    entries = fields.pop("records", None)
    for key, value in entries.value if isinstance(entries, yaml.MappingNode) else ():
        line = key.start_mark.line + 2
        try:
            if not isinstance(value, yaml.MappingNode):
                raise BitbyteError(f"{key.value}: write {{record: name, data: digits}}")
            if key.value in records:
                raise BitbyteError(f"{key.value} is defined twice")
            entry = {k.value: v.value for k, v in value.value}
            records[key.value] = load(key.value, entry, line, places(path, "results"))
        except BitbyteError as error:
            problems.add(line, error)
            failed.add(key.value)
    numbers = Numbers(records)
    numbers.failed = failed - set(records)
    text = Text(
        numbers=numbers, problems=problems,
        results=places(path, "results"), arrays=places(path, "plots"),
    )  # fmt: skip
    meta = {"lang": "en-GB"}
    for name, value in fields.items():
        if isinstance(value, yaml.ScalarNode):
            first = value.start_mark.line + 2 + (value.style in ("|", ">"))
            meta[name] = text.inline(value.value.strip(), first)
        elif name == "author" and isinstance(value, yaml.SequenceNode):
            meta[name] = ", ".join(item.value for item in value.value)
        elif name in KEYS:
            problems.add(value.start_mark.line + 2, f"{name} must be text")
    for name in ("title", "author", "date"):
        if not meta.get(name):
            problems.add(1, f"the front matter has no {name}")
            meta[name] = "1980-01-01" if name == "date" else f"no {name}"
    try:
        datetime.date.fromisoformat(meta["date"])
    except ValueError:
        problems.add(1, f"date is {meta['date']!r}, not like 2026-11-21")
        meta["date"] = "1980-01-01"
    first = source[: found.end()].count("\n") + 1
    body = text.fill(source[found.end() :], first)
    for alias, record in records.items():
        if alias not in numbers.used:
            what = f"record {alias} ({record.stem}) is used by no number, table or figure"
            problems.add(record.line, what)
    return Paper(
        name=path.stem, path=path, source=source, meta=meta, body=body, text=text,
        problems=problems,
    )  # fmt: skip


def _list(words) -> str:
    return ", ".join(sorted(words))


def line_of(paper: Paper, word: str) -> int:
    """The number of the first line of the source that has this word, as a whole."""
    found = re.search(re.escape(word) + r"(?![\w:-])", paper.source)
    return paper.source.count("\n", 0, found.start()) + 1 if found else 1
