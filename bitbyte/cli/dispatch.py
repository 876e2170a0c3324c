"""The command line: ``bitbyte COMMAND ...`` or ``python -m bitbyte COMMAND ...``.

Dashes and underscores in options are interchangeable.  Exit codes: 0 success; 1 the run or the
system failed; 2 the user's mistake, explained in one line.  A traceback is always a bug.
"""

import contextlib
import difflib
import functools
import io
import json
import os
import shutil
import sys
from collections.abc import Callable

import tyro

from bitbyte import __version__, process
from bitbyte.cli import (
    data,
    files,
    grid,
    manual,
    passport,
    runs,
    score,
    text,
    train,
    workbench,
)
from bitbyte.files import BitbyteError, RunError, reason, shown

GROUPS = {  # by what the user wants to do: commands by name
    "Prepare data": {"pack": data.pack, "corpus": data.corpus},
    "Train models": {
        "train": train.train, "plan": train.plan, "grid": grid.grid, "runs": runs.list_runs,
        "runs rm": runs.remove_runs, "models": runs.list_models, "export": runs.export,
        "import": runs.import_model,
        "info": data.info,
    },
    "Measure them": {
        "eval": score.evaluate, "compare": score.compare, "passport": passport.passport,
        "results": score.results, "entropy": score.entropy, "judge": score.judge,
        "tasks": score.tasks,
    },
    "Write with them": {
        "sample": text.sample, "infill": text.infill, "chat": text.chat, "page": text.page,
    },
    "Compress files": {
        "compress": files.compress, "decompress": files.decompress, "test": files.verify,
        "certify": files.certify,
    },
    "Use the notebooks": {
        "lab": workbench.lab, "run": workbench.run, "app": workbench.app,
        "papers": workbench.papers,
    },
    "Look after bitbyte": {"bench": workbench.bench, "tag": data.tag},
}  # fmt: skip
COMMANDS = {name: function for group in GROUPS.values() for name, function in group.items()}
FIRST_STEPS = """\
With a model that comes with bitbyte:
  bitbyte sample wiki-small --prompt "The city of"
With a folder of texts:
  bitbyte pack my_texts
  bitbyte train ar --data my_texts --minutes 5
  bitbyte runs
  bitbyte sample NAME_OF_THE_RUN --prompt "Once upon"
"""
DRAWING = {"temperature": "How bytes are drawn"}
PLACES = """\
Everything is kept in the folder artifacts, here or in a parent;
BITBYTE_ARTIFACTS names another."""
SECTIONS = {  # headings in the help of a command, by the option below them
    "train": train.SECTIONS, "plan": train.SECTIONS,
    "sample": DRAWING, "infill": DRAWING, "chat": DRAWING,
}  # fmt: skip


def summary(command: Callable) -> str:
    """What a command does in a few words: the first line of its help."""
    return command.__doc__.splitlines()[0].removesuffix(".")


def _usage() -> str:
    lines = ["usage: bitbyte COMMAND ...", "       bitbyte COMMAND --help lists its options"]
    width = max(map(len, COMMANDS)) + 2
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:{width}}{summary(function)}" for name, function in commands.items()]
    return "\n".join([*lines, "", FIRST_STEPS.rstrip(), PLACES])


def _parse(name: str, arguments: list[str], **defaults):
    """The command with its parsed arguments bound; parse errors become one line.

    ``defaults`` override the defaults of its parameters.
    """
    command = COMMANDS[name]

    @functools.wraps(command)
    def bind(*args, **options):
        return functools.partial(command, *args, **options)

    # tyro draws its boxes in ASCII, which no one could find again, if standard output is not UTF-8.
    errors, said = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")
    columns = shutil.get_terminal_size().columns
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(said), _wide():
            prog = f"bitbyte {name}{' ar' * (name in ('train', 'plan'))}"
            call = functools.partial(bind, **defaults) if defaults else bind
            return tyro.cli(call, args=arguments, prog=prog, use_underscores=True)
    except SystemExit as stop:
        if stop.code in (0, None):
            said.seek(0)
            print(manual.page(said.read(), columns, SECTIONS.get(name, {})), end="")
            if name in ("train", "plan"):
                print(train.presets())
            sys.stdout.flush()  # see `_run`
            raise
        problem = manual.mistake(errors.getvalue())
        raise BitbyteError(f"{problem}; see bitbyte {name} --help") from None


def _named(arguments: list[str]) -> set[str]:
    """The fields named by options: --batch-size=8 and --no-act-quant are batch_size, act_quant."""
    names = {a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


@contextlib.contextmanager
def _wide():
    """Pretend that the terminal has the width that `manual` reads; also, in a few columns tyro's
    help never ends."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(manual.ASKED)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


class _Stream:
    """A standard stream with another `write` and `flush`."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class _Results(_Stream):
    """Standard output that names itself where writing fails, as on a full disk."""

    def write(self, text: str) -> int:
        return self._named(self._stream.write, text)

    def flush(self) -> None:
        self._named(self._stream.flush)

    @staticmethod
    def _named(call: Callable, *arguments):
        try:
            return call(*arguments)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None


class _Notes(_Stream):
    """Standard error that ignores write errors: progress nobody can read is no reason to stop."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


@contextlib.contextmanager
def _streams():
    """Make the standard streams safe to write to while a command runs.

    A closed stream (``2>&-``, pythonw) is opened on the null device, which also occupies its file
    descriptor: a file that got number 2 would receive what C libraries print.  Output that cannot
    be flushed at the end is dropped, or Python would fail on it once more at exit.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # numbers 0, 1, 2
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # Windows code pages lack most characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    results, notes = sys.stdout, sys.stderr
    sys.stderr = _Notes(notes)
    if not results.isatty():  # input() edits lines only on the real one
        sys.stdout = _Results(results)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = results, notes
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def _run(arguments: list[str]) -> None:
    """Run a command line.  Raises exceptions that `main` turns into exit codes."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
    elif arguments[0] == "--version":
        print(__version__)
    else:
        name, rest = _command(arguments)
        _answer(_training(name, rest) if name in ("train", "plan") else _parse(name, rest))
    sys.stdout.flush()  # so that a full disk or closed pipe fails the command, not Python's exit


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """(name of the command, its arguments); a name may be two words."""
    n = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:n])
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}"
        raise BitbyteError(f"no command {name!r}; {hint}")
    return name, arguments[n:]


def _training(name: str, arguments: list[str]) -> functools.partial:
    """The bound command train or plan, whose config knows which of its fields were named."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--family", *arguments]  # "train ar" reads better than "train --family ar"
    named, defaults = _named(arguments), {}
    run = _value_of("--like", arguments)
    if run is not None:  # read first, so that named fields are checked together with the rest
        defaults["config"] = train.config_like(run, named)
    call = _parse(name, arguments, **defaults)
    call.keywords["config"] = call.keywords["config"].naming(named)
    return call


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The value of --option VALUE or --option=VALUE; None without the option."""
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def _answer(call: functools.partial) -> None:
    """Run a command.  With --json only the document it returns goes to standard output."""
    if not call.keywords.get("json"):
        call()
        return
    failed = None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            document = call()
        except RunError as error:  # a result that is a failure has a document, too
            document, failed = getattr(error, "document", None), error
            if document is None:
                raise
    print(json.dumps(document, indent=1, allow_nan=False))  # ASCII, which any pipe accepts
    if failed:
        raise failed


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with _streams():
        try:
            with process.stoppable():
                _run(list(sys.argv[1:] if argv is None else argv))
        except BitbyteError as error:
            _say("error", str(error))
            return 2
        except BrokenPipeError:  # the reader has closed the pipe, as with "| head"
            return 1
        except (RunError, OSError) as error:
            _say("failed", reason(error) if isinstance(error, OSError) else str(error))
            return 1
        except MemoryError as error:
            _say("failed", str(error) or "out of memory")
            return 1
        except RuntimeError as error:  # torch's way to say out of memory
            if "allocate memory" not in str(error) and type(error).__name__ != "OutOfMemoryError":
                raise
            _say("failed", f"out of memory: {' '.join(str(error).split())[:300]}")
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        return 0


def _say(what: str, text: str) -> None:
    """Print an error, escaped: it may quote a name that holds control characters."""
    print(f"{what}: " + "\n".join(map(shown, text.split("\n"))), file=sys.stderr)
