"""Pieces of signatures that several commands share.

Each command is a function, and tyro makes its command line of its parameters: what stands before
``/`` is given by place, all else by name, and ``# comments`` or ``Args:`` are the help.
"""

import functools
from typing import Annotated

import tyro
from tyro.conf import Positional

Flat = functools.partial(tyro.conf.arg, name="")  # the fields of a config as options of the command


def argument(kind: type, metavar: str) -> object:
    """The annotation of an argument that is given by place, and what the usage line calls it."""
    return Annotated[kind, Positional, tyro.conf.arg(metavar=metavar)]


Ckpt = argument(str, "CKPT")
File = argument(str, "FILE")
Json = Annotated[  # what a command with this parameter returns is printed by `dispatch`
    bool,
    tyro.conf.arg(
        help="print one JSON document to standard output, and everything else to standard error"
    ),
]
