"""What to type next, for people: nothing where the output goes to a file or into a pipe."""

import shlex
import sys
from pathlib import Path

from bitbyte.files import artifacts, shown


def next_step(*commands: str) -> None:
    """Suggest commands."""
    if sys.stdout.isatty():
        for number, command in enumerate(commands):
            print(f"{'      ' if number else 'next: '}bitbyte {command}")


def named(path: Path, kind: str) -> str:
    """A run or data set as a command takes it: by name in artifacts/KIND, elsewhere by path."""
    known = path.resolve().parent == artifacts(kind).resolve()
    return shlex.quote(shown(path.name if known else path))
