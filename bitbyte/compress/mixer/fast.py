"""The mixer's functions in machine code, or as they are where numba does not work."""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from bitbyte.compress.mixer import pcm, stream
from bitbyte.compress.mixer.kernel import KERNELS, OPTIONS
from bitbyte.kernels import jit


@functools.cache
def _sources() -> str:
    """Hash of this folder's code; numba's cache looks only at the file of the outer function."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _compiled(function: Callable) -> Callable:
    jit.load_numba()
    from numba.extending import register_jitable

    for inner in KERNELS:
        _register(register_jitable, inner)
    made = jit.compiler(nogil=True, **OPTIONS)(function)
    with contextlib.suppress(AttributeError):
        made._cache._cache_file._source_stamp = _sources()
    return made


@functools.cache
def _register(register_jitable: Callable, function: Callable) -> None:
    register_jitable(no_cpython_wrapper=True, **OPTIONS)(function)


def _function(function: Callable, fast: bool | None) -> Callable:
    """The function, compiled if numba works (or fails if it must: ``fast`` is True)."""
    wanted = jit.problem() is None if fast is None else fast
    return _compiled(function) if wanted else function


def code_bytes(fast: bool | None = None) -> Callable:
    """`stream.code_bytes`.  With ``fast`` it raises BitbyteError if numba does not work."""
    return _function(stream.code_bytes, fast)


def predict_sound(fast: bool | None = None) -> Callable:
    """`pcm.predict`, in the same way."""
    return _function(pcm.predict, fast)
