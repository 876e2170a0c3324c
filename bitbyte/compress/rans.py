"""Interleaved rANS: integer frequency tables in, 32-bit words out, and back (arXiv:1311.2540).

A state is a 64-bit number, at least LOW = 2^32, that holds the bits not yet written.  Coding a
symbol with frequency f (out of TOTAL = 2^24) and cumulative start c,

    x -> (x div f) * TOTAL + x mod f + c,

is undone exactly by the decoder, last symbol first.  So the encoder runs backwards, and the decoder
meets the words in file order.  Everything is integer arithmetic: the same on every machine.

A stream is a sequence of steps, each of any number n of symbols.  Symbol i of a step belongs to
state i mod K.  The work is vectorized across states, and a state costs about 6 bytes; with a single
state, plain Python is faster than numpy on vectors of length 1.

Shapes: N symbols of a stream, K states, n symbols of a step, V values of a symbol.
"""

from collections.abc import Sequence

import numpy as np

from bitbyte.files import BitbyteError

TOTAL_BITS = 24
TOTAL = 1 << TOTAL_BITS  # the frequencies of one symbol's values sum to this
LOW = 1 << 32  # smallest state
WORD = (1 << 32) - 1
ROOM = 40  # a state of at least f << ROOM emits a word before it codes a symbol of frequency f


def encode(
    starts_N: np.ndarray, freqs_N: np.ndarray, steps: Sequence[int], n_states: int
) -> tuple[np.ndarray, np.ndarray]:
    """(states_K uint64, words uint32) that code N symbols, in steps of the given sizes.

    ``starts`` and ``freqs`` are the cumulative starts and frequencies of the symbols; every
    frequency lies in 1..TOTAL - 1.
    """
    if n_states == 1:
        return _encode_one(starts_N, freqs_N)
    starts, freqs = starts_N.astype(np.uint64), freqs_N.astype(np.uint64)
    states_K = np.full(n_states, LOW, np.uint64)
    shift, total_bits, room = np.uint64(32), np.uint64(TOTAL_BITS), np.uint64(ROOM)
    rows, stop = [], len(freqs)
    for size in reversed(steps):
        first = stop - size
        for row in range(first + (size - 1) // n_states * n_states, first - 1, -n_states):
            f, c = freqs[row : min(row + n_states, stop)], starts[row : min(row + n_states, stop)]
            x = states_K[: len(f)]
            full = x >= f << room
            if full.any():
                rows.append(x[full].astype(np.uint32))  # the low half
                x = np.where(full, x >> shift, x)
            times, rest = np.divmod(x, f)
            states_K[: len(f)] = (times << total_bits) + rest + c
        stop = first
    words = np.concatenate(rows[::-1]) if rows else np.empty(0, np.uint32)
    return states_K, words


def _encode_one(starts_N: np.ndarray, freqs_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, words = LOW, []
    for c, f in zip(starts_N[::-1].tolist(), freqs_N[::-1].tolist(), strict=True):
        if x >= f << ROOM:
            words.append(x & WORD)
            x >>= 32
        times, rest = divmod(x, f)
        x = (times << TOTAL_BITS) + rest + c
    return np.array([x], np.uint64), np.array(words[::-1], np.uint32)


class Decoder:
    """Returns, step by step, the symbols given to `encode`.

    Damaged input yields wrong symbols or a BitbyteError; `finish` detects what is left over.
    """

    def __init__(self, states_K: np.ndarray, words: np.ndarray):
        if not len(states_K) or (states_K < LOW).any():
            raise BitbyteError("a coder state is out of range: the data is damaged")
        self.n_states = len(states_K)
        self._x = int(states_K[0]) if self.n_states == 1 else states_K.astype(np.uint64)
        self._words = words.tolist() if self.n_states == 1 else words.astype(np.uint64)
        self._next = 0

    def step(self, ends_nV: np.ndarray) -> np.ndarray:
        """symbols_n (int64) of a step; row i of ``ends`` is the cumulative table of its symbol i.

        Each row is increasing and ends with TOTAL.
        """
        if self.n_states == 1:
            return self._step_one(ends_nV)
        symbols_n = np.empty(len(ends_nV), np.int64)
        mask, total_bits = np.uint64(TOTAL - 1), np.uint64(TOTAL_BITS)
        for first in range(0, len(ends_nV), self.n_states):
            ends = ends_nV[first : first + self.n_states]
            x = self._x[: len(ends)]
            slot = x & mask
            symbol = (ends <= slot[:, None].astype(ends.dtype)).sum(1)
            row = np.arange(len(ends))
            end = ends[row, symbol].astype(np.uint64)
            start = np.where(symbol > 0, ends[row, symbol - 1], 0).astype(np.uint64)
            x = (end - start) * (x >> total_bits) + slot - start
            short = x < LOW
            n_short = np.count_nonzero(short)
            if n_short:
                words = self._words[self._next : self._next + n_short]
                self._next += n_short
                if len(words) < n_short:
                    raise BitbyteError("the coder words end too early: the data is damaged")
                x[short] = (x[short] << np.uint64(32)) | words
            self._x[: len(ends)] = x
            symbols_n[first : first + len(ends)] = symbol
        return symbols_n

    def _step_one(self, ends_nV: np.ndarray) -> np.ndarray:
        x, symbols = self._x, []
        for ends in ends_nV:
            slot = x & (TOTAL - 1)
            symbol = int(ends.searchsorted(slot, "right"))
            start = int(ends[symbol - 1]) if symbol else 0
            x = (int(ends[symbol]) - start) * (x >> TOTAL_BITS) + slot - start
            if x < LOW:
                if self._next == len(self._words):
                    raise BitbyteError("the coder words end too early: the data is damaged")
                x = x << 32 | self._words[self._next]
                self._next += 1
            symbols.append(symbol)
        self._x = x
        return np.array(symbols, np.int64)

    def finish(self) -> None:
        """Check that no word is left over and that every state is back where it began."""
        if self._next != len(self._words) or (np.asarray(self._x, np.uint64) != LOW).any():
            raise BitbyteError("the coder's data does not end where its symbols end")


def n_states_for(n_symbols: int, lanes: int) -> int:
    """Number of coder states for a stream of ``n_symbols`` coded ``lanes`` at a time.

    One for short streams, otherwise a power of two from 8 to 64.  Each state then serves 2^16 or
    more symbols, so that its 6 bytes are less than 0.04 % of the size at two bits a symbol.
    """
    wanted = 1 << max(0, (n_symbols >> 16).bit_length() - 1)
    useful = 1 << max(0, lanes.bit_length() - 1)
    n_states = min(wanted, useful, 64)
    return n_states if n_states >= 8 else 1
