"""Pieces of signatures that several commands share.

Each command is a function whose parameters tyro turns into a command line: those before ``/`` are
positional, all others are options, and ``# comments`` or ``Args:`` are the help.
"""

import functools
from typing import Annotated

import tyro
from tyro.conf import Positional

from bitbyte.files import BitbyteError

NO_MODEL = "none"  # in place of a checkpoint
Flat = functools.partial(tyro.conf.arg, name="")  # the fields of a config as options of the command


def argument(kind: type, metavar: str) -> object:
    """The annotation of a positional argument, called ``metavar`` in the usage line."""
    return Annotated[kind, Positional, tyro.conf.arg(metavar=metavar)]


def pairs(option: str, items: tuple[str, ...]) -> dict[str, str]:
    """Of an option that is given as NAME=VALUE, perhaps several times.  Raises BitbyteError."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise BitbyteError(f"{option} {item!r} is not NAME=VALUE")
        found[name] = value
    return found


def refuse(where: str, **given: bool) -> None:
    """Raise BitbyteError for options that were given and would be ignored, as ``where`` says."""
    if names := ", ".join(f"--{name}" for name, value in given.items() if value):
        raise BitbyteError(f"{names}: no effect {where}; leave it out")


Ckpt = argument(str, "CKPT")
File = argument(str, "FILE")
Json = Annotated[  # `dispatch` prints what a command with this parameter returns
    bool,
    tyro.conf.arg(
        help="print one JSON document to standard output, and everything else to standard error"
    ),
]
