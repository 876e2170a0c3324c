"""The command line: ``bitbyte COMMAND ...`` or ``python -m bitbyte COMMAND ...``.

Dashes and underscores in options are the same.  Exit codes: 0 done; 1 the run or the system
failed; 2 the user's mistake, told in one line.  A traceback is always a bug.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import sys

import tyro

from bitbyte import __version__, process
from bitbyte.cli import data, files, score, text, train, workbench
from bitbyte.files import BitbyteError, RunError, reason, shown

GROUPS = {  # what a person wants to do: commands by name
    "data and checkpoints": {
        "pack": data.pack, "corpus": data.corpus, "info": data.info, "tag": data.tag,
    },
    "train": {"train": train.train},
    "score": {
        "eval": score.evaluate, "compare": score.compare, "entropy": score.entropy,
        "results": score.results,
    },
    "write": {"sample": text.sample, "infill": text.infill, "chat": text.chat},
    "compress": {
        "compress": files.compress, "decompress": files.decompress, "certify": files.certify,
    },
    "workbench": {
        "run": workbench.run, "lab": workbench.lab, "app": workbench.app,
        "papers": workbench.papers, "bench": workbench.bench,
    },
}  # fmt: skip
COMMANDS = {name: function for group in GROUPS.values() for name, function in group.items()}
MIN_COLUMNS = 40  # of a terminal


def _usage() -> str:
    lines = ["usage: bitbyte COMMAND ... (bitbyte COMMAND --help lists its options)"]
    width = max(map(len, COMMANDS)) + 2
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        for name, function in commands.items():
            lines.append(f"  {name:{width}}{function.__doc__.splitlines()[0]}")
    return "\n".join(lines)


def _parse(name: str, arguments: list[str]):
    """The command as a call without arguments; parse errors become one line."""
    command = COMMANDS[name]

    @functools.wraps(command)
    def later(*args, **options):
        return functools.partial(command, *args, **options)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _wide_enough():
            prog = "bitbyte train ar" if name == "train" else f"bitbyte {name}"
            return tyro.cli(later, args=arguments, prog=prog)
    except SystemExit as stop:
        if stop.code in (0, None):
            _flush()
            raise
        raise BitbyteError(f"{_one_line(said.getvalue())}; see bitbyte {name} --help") from None


def _named(arguments: list[str]) -> set[str]:
    """The fields that options name: --batch-size=8 and --no-act-quant are batch_size, act_quant."""
    names = {a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def _one_line(text: str) -> str:
    """The sentence in the box that tyro draws around a parse error."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line for line in text.splitlines() if "\u256d" not in line]  # the box's title
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", " ".join(lines)).split())
    text = re.split(r"\.? (?:Got errors|Argument helptext|For full helptext|Perhaps you)", text)[0]
    if "Missing value" in text:
        text += " (a value that begins with - is written --name=-value)"
    return text.rstrip(".:- ")


@contextlib.contextmanager
def _wide_enough():
    """A terminal of a few columns is taken for a wider one: tyro's help never ends there."""
    before = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


class _Notes:
    """Standard error: progress and notes that nobody can read any more are no reason to stop."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def _streams():
    """Standard streams that take everything, for the time of a command.

    A stream that is not there (``2>&-``, pythonw) is opened on nothing, which also takes its
    number: a file with number 2 would get what C libraries print.  What cannot be written in the
    end is dropped, else Python would fail at it once more on its way out.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # numbers 0, 1, 2
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a Windows code page lacks most characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    notes, sys.stderr = sys.stderr, _Notes(sys.stderr)
    try:
        yield
    finally:
        sys.stderr = notes
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)


def _run(arguments: list[str]) -> None:
    """Do what a command line says.  Raises what `main` turns into an exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
    elif arguments[0] == "--version":
        print(__version__)
    else:
        name, rest = arguments[0], arguments[1:]
        if name not in COMMANDS:
            raise BitbyteError(f"no command {name!r}; choose from {', '.join(COMMANDS)}")
        if name == "train" and rest and not rest[0].startswith("-"):
            rest = ["--family", *rest]  # "train ar" reads better than "train --family ar"
        call = _parse(name, rest)
        if name == "train":
            call.keywords["config"] = call.keywords["config"].naming(_named(rest))
        call()
    _flush()


def _flush() -> None:
    """A full disk or a closed pipe is an error of the command, not of Python on its way out."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with _streams():
        try:
            with process.stoppable():
                _run(list(sys.argv[1:] if argv is None else argv))
        except BitbyteError as error:
            _say("error", str(error))
            return 2
        except BrokenPipeError:  # the reader of a pipe has gone, as with "| head"
            return 1
        except (RunError, OSError) as error:
            _say("failed", reason(error) if isinstance(error, OSError) else str(error))
            return 1
        except MemoryError as error:
            _say("failed", str(error) or "out of memory")
            return 1
        except RuntimeError as error:  # how torch says that memory is short
            if "allocate memory" not in str(error) and type(error).__name__ != "OutOfMemoryError":
                raise
            _say("failed", f"out of memory: {' '.join(str(error).split())[:300]}")
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        return 0


def _say(what: str, text: str) -> None:
    """An error; what a name in it holds does nothing to the terminal."""
    print(f"{what}: " + "\n".join(map(shown, text.split("\n"))), file=sys.stderr)
