"""Counts n-grams in one pass with numba; the plain reference is `ngrams._count`."""

import functools
from collections.abc import Callable

import numpy as np

from bitbyte.kernels import jit

LONGEST_WORD = 12
MULTIPLIER, ONE = np.uint64(0x9E3779B97F4A7C15), np.uint64(1)


def _count(bytes_N, first, order, shift, counts_RV):
    shift = np.uint64(shift)
    for t in range(first, len(bytes_N)):
        h = np.uint64(0)
        newest = t - 1
        if order:
            for i in range(order):
                h = (h + np.uint64(bytes_N[newest - i]) + ONE) * MULTIPLIER
        else:
            for i in range(min(LONGEST_WORD, t)):
                byte = bytes_N[newest - i]
                lower = byte | 32
                if byte < 128 and (lower < 97 or lower > 122):
                    break
                h = (h + np.uint64(byte) + ONE) * MULTIPLIER
            h = (h + np.uint64(bytes_N[newest]) + ONE) * MULTIPLIER
        counts_RV[h >> shift, bytes_N[t]] += np.uint32(1)


@functools.cache
def _compiled() -> Callable:
    return jit.compiler(nogil=True)(_count)


def compiled_count(fast: bool | None) -> Callable | None:
    """The counter in machine code; None where numba does not work or is not wanted.

    Raises BitbyteError if ``fast`` is True and numba does not work.
    """
    wanted = jit.problem() is None if fast is None else fast
    return _compiled() if wanted else None
