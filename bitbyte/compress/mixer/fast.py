"""The mixer's functions in machine code, or as they are where llvmlite does not work."""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bitbyte.compress.mixer import pcm, stream
from bitbyte.files import BitbyteError
from bitbyte.kernels import jit

CHECKED = "BITBYTE_CHECK_INDICES"  # in the environment: code stops at an index out of bounds


@functools.cache
def problem() -> str | None:
    """Why nothing can be compiled here; None if it works."""
    if why := jit.import_problem("llvmlite", "pip install 'bitbyte[fast]'"):
        return why
    total = np.zeros(1, np.int64)
    try:
        _compiled(_double)(total, 21)
    except Exception as error:  # an llvmlite that is too old or broken, an unknown processor, ...
        return f"llvmlite does not work here ({type(error).__name__}: {error})"
    return None if total[0] == 42 else "llvmlite computes wrong numbers here"


def _double(total, n):
    total[0] = 2 * n


@functools.cache
def _sources() -> str:
    """Hash of the code that is compiled, and of what compiles it."""
    from bitbyte.kernels.native import translate

    digest = hashlib.sha256(Path(translate.__file__).read_bytes())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


@functools.cache
def _compiled(function: Callable) -> Callable:
    from bitbyte.kernels.native import translate

    return translate.Compiled(function, _sources(), bool(os.environ.get(CHECKED)))


def _function(function: Callable, fast: bool | None) -> Callable:
    """The function, compiled if that works (or fails if it must: ``fast`` is True)."""
    if fast is False or (fast is None and problem()):
        return function
    if why := problem():
        raise BitbyteError(f"this fast code needs llvmlite: {why}")
    return _compiled(function)


def code_bytes(fast: bool | None = None) -> Callable:
    """`stream.code_bytes`.  With ``fast`` it raises BitbyteError if llvmlite does not work."""
    return _function(stream.code_bytes, fast)


def decode_next(fast: bool | None = None) -> Callable | None:
    """`stream.decode_next` for models in machine code; None without machine code."""
    made = _function(stream.decode_next, fast)
    return None if made is stream.decode_next else made


def predict_sound(fast: bool | None = None) -> Callable:
    """`pcm.predict`, in the same way."""
    return _function(pcm.predict, fast)
