"""Counts which bytes follow the contexts of `ngrams`, in one pass with numba or in NumPy.

Both give the same counts.  `ngrams.context_rows` says what the contexts are.
"""

import functools
from collections.abc import Callable

import numpy as np

from bitbyte.kernels import jit
from bitbyte.vocab import N_BYTES

LONGEST_WORD = 12
MULTIPLIER, ONE, ONE32 = np.uint64(0x9E3779B97F4A7C15), np.uint64(1), np.uint32(1)


def _passed(bytes_N, first, order, shift, counts_RV):
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
        counts_RV[h >> shift, bytes_N[t]] += ONE32


@functools.cache
def _compiled() -> Callable:
    return jit.compiler(nogil=True)(_passed)


def counter(fast: bool | None) -> Callable:
    """(bytes_N, first, order, shift, counts_RV): counts bytes first.. after their contexts.

    ``fast``: in machine code; None means where numba works.  Raises BitbyteError if it is True and
    numba does not work.
    """
    wanted = jit.problem() is None if fast is None else fast
    return _compiled() if wanted else _count


def _count(bytes_N: np.ndarray, first: int, order: int, shift: int, counts_RV: np.ndarray) -> None:
    rows_N = rows_before(bytes_N, first, order, shift)
    np.add.at(counts_RV.reshape(-1), rows_N * N_BYTES + bytes_N[first:], ONE32)


def rows_before(bytes_N: np.ndarray, first: int, order: int, shift: int) -> np.ndarray:
    """Rows (int64) of the contexts before bytes first..; order 0 is the word.

    A row is what ``shift`` leaves of a hash.  ``first`` is at least the order, and at least 1.
    """
    terms_N = np.zeros(LONGEST_WORD + len(bytes_N), np.uint64)  # 0 stands before the data
    terms_N[LONGEST_WORD:] = bytes_N
    terms_N[LONGEST_WORD:] += ONE
    value_V = np.arange(N_BYTES)
    lower_V = value_V | 32
    letter_V = np.append(False, (lower_V >= 97) & (lower_V <= 122) | (value_V >= 128))  # by term
    hash_N = np.zeros(len(bytes_N) - first, np.uint64)
    inside_N = np.ones(len(hash_N), bool)  # the word
    for back in range(1, 1 + (order or LONGEST_WORD)):
        term_N = terms_N[LONGEST_WORD + first - back : len(terms_N) - back]
        if order:
            hash_N = (hash_N + term_N) * MULTIPLIER
        else:
            inside_N &= letter_V[term_N]
            hash_N = np.where(inside_N, (hash_N + term_N) * MULTIPLIER, hash_N)
    if not order:
        hash_N = (hash_N + terms_N[LONGEST_WORD + first - 1 : -1]) * MULTIPLIER
    return (hash_N >> np.uint64(shift)).astype(np.int64)
