"""The command line: ``bitbyte COMMAND ...`` or ``python -m bitbyte COMMAND ...``.

Dashes and underscores in options are the same.  Exit codes: 0 done; 1 the run or the system
failed; 2 the user's mistake, told in one line.  A traceback is a bug of ours.
"""

import contextlib
import functools
import io
import os
import re
import sys

import tyro

from bitbyte import (
    __version__,
    checkpoint_commands,
    commands,
    compress_commands,
    look_commands,
)
from bitbyte.files import BitbyteError, RunError

COMMANDS = (
    commands.COMMANDS | checkpoint_commands.COMMANDS | look_commands.COMMANDS
    | compress_commands.COMMANDS
)  # fmt: skip


def _usage() -> str:
    lines = ["usage: bitbyte COMMAND ... (bitbyte COMMAND --help tells its options)", ""]
    for name, function in COMMANDS.items():
        lines.append(f"  {name:8}{function.__doc__.splitlines()[0]}")
    return "\n".join(lines)


def _parse(name: str, arguments: list[str]):
    """The command as a call without arguments; parse errors become one line."""
    command = COMMANDS[name]

    @functools.wraps(command)
    def later(*args, **options):
        return functools.partial(command, *args, **options)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            prog = "bitbyte train ar" if name == "train" else f"bitbyte {name}"
            return tyro.cli(later, args=arguments, prog=prog)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise BitbyteError(f"{_one_line(said.getvalue())}; see bitbyte {name} --help") from None


def _named(arguments: list[str]) -> set[str]:
    """The fields that options name: --batch-size=8 and --no-act-quant are batch_size, act_quant."""
    names = {a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def _refuse_empty(arguments: list[str]) -> None:
    """Raise BitbyteError for an empty argument, mostly that of a variable that is not set.

    As a path it would be the folder here, as an option like none; only a prompt may be empty.
    """
    for before, word in zip(["", *arguments], arguments, strict=False):
        option, equals, value = word.partition("=")
        if word == "":
            option = before if before.startswith("--") else "an argument"
        elif value or not equals or not word.startswith("--"):
            continue
        if option != "--prompt":
            raise BitbyteError(f"{option} is empty, as of a variable that is not set")


def _one_line(text: str) -> str:
    """The sentence in the box that tyro draws around a parse error."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line for line in text.splitlines() if "\u256d" not in line]  # the box's title
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", " ".join(lines)).split())
    text = re.split(r"\.? (?:Got errors|Argument helptext|For full helptext|Perhaps you)", text)[0]
    if "Missing value" in text:
        text += " (a value that begins with - is written --name=-value)"
    return text.rstrip(".:- ")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    for stream in (sys.stdout, sys.stderr):  # a Windows code page lacks most characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        if name not in COMMANDS:
            raise BitbyteError(f"no command {name!r}; choose from {', '.join(COMMANDS)}")
        if name == "train" and rest and not rest[0].startswith("-"):
            rest = ["--family", *rest]  # "train ar" reads better than "train --family ar"
        _refuse_empty(rest)
        call = _parse(name, rest)
        if name == "train":
            call.keywords["config"] = call.keywords["config"].naming(_named(rest))
        call()
    except BitbyteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has gone, as with "| head"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nothing more can be said there
        return 1
    except (RunError, OSError, MemoryError) as error:
        strerror = getattr(error, "strerror", None)
        text = f"{strerror}: {error.filename}" if strerror and error.filename else str(error)
        print(f"failed: {text or 'out of memory'}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # how torch says that memory is short
        if "allocate memory" not in str(error) and type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"failed: out of memory: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
