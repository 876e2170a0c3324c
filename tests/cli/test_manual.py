"""The help of the commands and what they say about a wrong command line."""

import inspect
import os
import re
import shlex
import subprocess
import sys

import pytest

from bitbyte.cli import manual
from bitbyte.cli.dispatch import COMMANDS, SECTIONS, main
from bitbyte.config import PRESETS


def said(capsys, monkeypatch, name: str, columns: int = 100) -> str:
    """The help of a command in a terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def options_of(name: str) -> set[str]:
    """Names of the options of a command, without those of a config in it."""
    parameters = inspect.signature(COMMANDS[name]).parameters.values()
    options = [p for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name != "config"]
    return {p.name for p in options if not re.search("Suppress|Positional", str(p.annotation))}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_there_once_and_reads_well(name, capsys, monkeypatch):
    text = said(capsys, monkeypatch, name)
    assert text.startswith(f"usage: bitbyte {name}")
    assert not re.search(r"None|[\u2500-\u257f\x1b]|\(default: (False|True|''|)\)", text)
    assert max(map(len, text.splitlines())) <= manual.WIDEST
    shown = re.findall(r"^  --(?:\[no_\])?(\w+)", text, re.MULTILINE)
    assert len(set(shown)) == len(shown) and options_of(name) <= {*shown}


@pytest.mark.parametrize("name", SECTIONS)
def test_headings_stand_above_their_options(name, capsys, monkeypatch):
    text = said(capsys, monkeypatch, name)
    for option, heading in SECTIONS[name].items():
        assert f"\n\n{heading}:\n  --{option} " in text


def test_the_words_of_an_option(capsys, monkeypatch):
    text = said(capsys, monkeypatch, "eval")
    assert "  --limit INT             score only the first so many bytes\n" in text
    assert "  --split STR             split of a packed folder (default: val)\n" in text
    assert "  --[no_]record           write a result record (default: yes)\n" in text
    assert "  --kind STR ...          exact, " in text and "or one file (required)\n" in text
    assert all(f"  {name} " in said(capsys, monkeypatch, "train") for name in PRESETS)


@pytest.mark.parametrize("columns", [1, 40, 70])
def test_narrow_terminals(columns, capsys, monkeypatch):
    text = said(capsys, monkeypatch, "eval", columns)
    assert max(map(len, text.splitlines())) <= max(columns, manual.NARROWEST)
    assert os.environ["COLUMNS"] == str(columns)


def test_the_same_where_standard_output_is_not_utf8(capsys, monkeypatch):
    call = [sys.executable, "-m", "bitbyte", "eval", "--help"]
    for encoding in ("ascii", "utf-8"):
        env = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "100"}
        done = subprocess.run(call, env=env, capture_output=True, check=True, text=True)
        assert done.stdout == said(capsys, monkeypatch, "eval")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("eval", "Missing from bitbyte eval: CKPT, --data"),
        ("eval x", "Missing from bitbyte eval: --data"),
        ("eval x --dta y", "Missing from bitbyte eval: --data; unrecognized: --dta, y"),
        ("eval x --data y --lmit 3", "Unrecognized options: --lmit, 3; did you mean --limit?"),
        ("eval x --data y --qqqq 3", "Unrecognized options: --qqqq, 3"),
        ("eval x --data y --limit a", "--limit takes INT, not 'a'"),
        ("sample x --temperature hot", "--temperature takes FLOAT, not 'hot'"),
        ("sample x --prompt", "Missing value for argument '--prompt'. Expected 1 values"),
    ],
)
def test_a_mistake_is_one_line(line, answer, capsys):
    assert main(shlex.split(line)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {answer}") and error.count("\n") == 1
    assert error.endswith(f"see bitbyte {line.split()[0]} --help\n")
