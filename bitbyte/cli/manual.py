"""What ``bitbyte COMMAND --help`` prints: tyro's help, set as a person would write it.

tyro names the types of Python (``{None}|INT``), shows defaults that say nothing (None, an empty
list) and draws boxes as wide as the terminal.  Every command goes through `page`, which keeps the
words and changes the rest, and every wrong command line through `mistake`.
"""

import re
import textwrap
from collections.abc import Mapping

ASKED = 120  # columns tyro is asked for: from 130 on it may set boxes side by side
WIDEST = 100  # columns that are used, however wide the terminal
NARROWEST = 40
NAMES = 26  # columns for the name of an option; the text of a longer name begins below it
UNSAID = {"None", "", "''", "False"}  # defaults that go without saying


def page(text: str, columns: int, sections: Mapping[str, str]) -> str:
    """The help of a command for a terminal of so many columns.

    ``text`` is what tyro printed, without colors, in `ASKED` columns.  ``sections`` are headings
    by the name of the option below them.
    """
    if not text.startswith("usage"):  # a script for a shell, say
        return text
    columns = max(NARROWEST, min(columns, WIDEST))
    head, *boxes = re.split(r"^\u256d\u2500+ ", text, flags=re.MULTILINE)
    usage, _, about = head.partition("\n\n")
    usage = re.sub(r"\[(--\w+) \| --no_\w+\]", r"[\1]", usage.replace(" [-h]", ""))
    out = _wrapped(_typed(usage), columns, " " * 7)
    for paragraph in re.split(r"\n\s*\n", about.strip()):
        out += ["", *_wrapped(paragraph, columns)]
    for box in boxes:
        heading = "Arguments" if box.startswith("positional") else "Options"
        for names, words in _items(box):
            heading = sections.get(names.split()[0].lstrip("-"), heading)
            if heading:
                out += ["", f"{heading}:"]
                heading = ""
            out += _item(names, words, columns)
    return "\n".join(out) + "\n"


def mistake(text: str) -> str:
    """What is wrong with a command line, in one line, from what tyro printed about it."""
    title, _, text = re.sub(r"\x1b\[[0-9;]*m", "", text).partition("\n")
    name = re.compile(r"^\u2502 {5}(\S+)", re.MULTILINE)  # of an option, above its help
    names, unknown = (name.findall(part) for part in (text, text.partition("Unrecognized")[2]))
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", text).split())
    text = re.split(r"\.? (?:Got errors|Argument helptext|For full helptext|Perhaps you)", text)[0]
    text = _typed(text).rstrip(".:- ")
    text = text.replace("could not convert string to float: ", "no type matching FLOAT of ")
    wrong = r"Error parsing (\S+): no type matching (.+?) (?:could be instantiated from|of) (.*)"
    if found := re.fullmatch(wrong, text):
        return f"{found[1]} takes {found[2]}, not {found[3].strip('[]')}"
    if "Missing from" in text:
        missing = names[: names.index(unknown[0] if unknown else "bitbyte")]
        said = f"{text.partition(':')[0]}: {', '.join(missing)}"
        wrong = ", ".join(unknown[: -1 - unknown[::-1].index("bitbyte")]) if unknown else ""
        return f"{said}; unrecognized: {wrong}" if wrong else said
    if "Missing value" in text:
        text += " (a value that begins with - is written --name=-value)"
    if "Unrecognized" in title and names and names[0].startswith("--"):
        text += f"; did you mean {names[0]}?"
    return text


def _wrapped(text: str, columns: int, indent: str = "") -> list[str]:
    """Lines of a paragraph; names with hyphens stay whole."""
    words = " ".join(text.split())
    return textwrap.wrap(words, columns, subsequent_indent=indent, break_on_hyphens=False)


def _items(box: str) -> list[tuple[str, str]]:
    """(what is typed, what it means) for everything in one of tyro's boxes."""
    items: list[tuple[str, str]] = []
    for line in box.splitlines()[1:]:
        inside = line.strip("\u2502\u2500\u2570\u256f").rstrip()[1:]
        names, _, words = inside.partition("  ")
        if names:
            items.append((names, words.strip()))
        elif words:
            names, before = items.pop()
            items.append((names, f"{before} {words.strip()}".strip()))
    return [item for item in items if not item[0].startswith("-h,")]


def _item(names: str, words: str, columns: int) -> list[str]:
    """The lines of an argument or option."""
    said = re.search(r" ?\((required|default: ([^()]*))\)$", words)
    if said:
        words, value = words[: said.start()].removesuffix("."), said[2]
        if ", --no" in names:  # a switch: as what changes something
            names = names.partition(",")[0]
            names = f"--[no_]{names[2:]}" if value == "True" else names
        if value is not None and value not in UNSAID:
            value = "yes" if value == "True" else value.removesuffix(".0")
            words += f" (default: {value})"
        elif value is None and names.startswith("-"):  # arguments are all required
            words += " (required)"
    names = f"  {_typed(names)}"
    lines = _wrapped(words, columns - NAMES) or [""]
    below = [" " * NAMES + line for line in lines]
    if len(names) > NAMES - 2:
        return [names, *below]
    return [f"{names:{NAMES}}{lines[0]}".rstrip(), *below[1:]]


def _typed(names: str) -> str:
    """What is typed, without tyro's brackets: ``{None}|INT``, ``[STR [STR ...]]``."""
    names = names.replace("{None}|", "")
    return re.sub(r"\[?(\w+) \[\1 \.\.\.\]\]?", r"\1 ...", names)
