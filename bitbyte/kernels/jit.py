"""numba where it works: whether it does, and machine code that is kept on disk where it can be.

Needs no PyTorch, so that commands without a model start quickly.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from bitbyte.files import BitbyteError


def import_problem(module: str, install: str) -> str | None:
    """Why a module of an optional package cannot be used; None if it can, and then it is imported.

    Importing it is the only sure test: a package that is there may refuse this machine's NumPy or
    PyTorch.  ``install`` says how to get it.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return f"it is not installed ({install})"
        return f"it needs the module {error.name}"
    except Exception as error:  # compiled code built for another version may raise anything
        return f"it does not load ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


@functools.cache
def problem() -> str | None:
    """Why numba does not work here; None if it does.

    Asked only where numba would be used, as it imports it, which takes a while.
    """
    return import_problem("numba", "pip install 'bitbyte[fast]'")


def compiler(**options):
    """numba.njit with these options, which caches machine code on disk where it can.

    Where it cannot (a read-only package, no home) numba would refuse to compile at all, so there
    each process compiles anew, without a cache.  Raises BitbyteError without numba.
    """
    numba = load_numba()
    home = os.path.expanduser("~") != "~" or "NUMBA_CACHE_DIR" in os.environ

    def jit(function):
        # With no home at all, numba would make a folder called ~ in the current one.
        if home or os.access(Path(__file__).parent, os.W_OK):
            with contextlib.suppress(RuntimeError):
                compiled = numba.njit(function, cache=True, **options)
                save = compiled._cache.save_overload
                compiled._cache.save_overload = lambda *code: _try_to_save(save, *code)
                return compiled
        return numba.njit(function, **options)

    return jit


def _try_to_save(save: Callable, *code) -> None:
    """Put machine code into numba's cache if there is room: on a full disk it would not run."""
    with contextlib.suppress(OSError):
        save(*code)


def load_numba() -> ModuleType:
    """The module numba.  Raises BitbyteError where it does not work."""
    if why := problem():
        raise BitbyteError(f"this fast code needs numba: {why}")
    return importlib.import_module("numba")
