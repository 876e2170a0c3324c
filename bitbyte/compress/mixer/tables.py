"""Constant tables of the mixer, made by integers so that they are the same everywhere.

Probabilities of a 1 are integers out of 65536.  ``stretch`` takes one to the logistic domain, in
steps of 1 / 256 nat, and ``squash`` takes it back.
"""

import functools
import hashlib
from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer import memory

STEPS = 256  # of the logistic domain in a nat
EDGE = 12 * STEPS  # stretched probabilities lie between -EDGE and EDGE
ONE = 1 << 16  # a probability of 1
WORK_BITS = 96  # fraction bits while computing
RATES = 1024  # counts that `Tables.rate` covers

# Histories: the most that the likelier bit may have been seen, by sightings of the rarer one.
MOST_SEEN = (40, 30, 14, 7, 6, 5)
NEWEST_KEPT = 17  # histories of at most so many bits also know the newest one
FORGET = (1, 2, 3, 4, 5, 7, 8)  # a bit's count falls to how many of these it reaches
N_STATES = 256  # of the histories, rounded up


class Tables(NamedTuple):
    """Constants that the compiled functions take as arguments."""

    squash: np.ndarray  # (2 * EDGE + 1,) int32: probability of stretched value - EDGE
    stretch: np.ndarray  # (65536,) int16
    coarse: np.ndarray  # (4096,) int16: of probability / 16
    rate: np.ndarray  # (RATES,) int32: 65536 / (n + 1.6), the step of a map seen n times
    after: np.ndarray  # (2 * N_STATES,) int32: history after a bit, at 2 * history + bit
    first_p: np.ndarray  # (N_STATES,) int32: probability of a history before anything is learnt
    only: np.ndarray  # (N_STATES,) int32: 1 for histories of one bit value, more than none
    level: np.ndarray  # (64,) int32: class of a node's sightings, 0 to 15
    log: np.ndarray  # (257,) int32: 256 log2(1 + i / 256)
    kind: np.ndarray  # (256,) int32: class of a byte, 0 to 7


def _exp_minus(n: int, steps: int) -> list[int]:
    """exp(-i / steps) for i < n, with WORK_BITS fraction bits."""
    term, rate, i = 1 << WORK_BITS, 0, 0
    while term:  # Taylor series of exp(-1 / steps)
        rate += -term if i % 2 else term
        i += 1
        term //= i * steps
    values = [1 << WORK_BITS]
    while len(values) < n:
        values.append(values[-1] * rate >> WORK_BITS)
    return values


def logistic(steps: int, bits: int) -> np.ndarray:
    """Sigmoid of i / steps for i from -12 steps to 12 steps, rounded to ``bits`` fraction bits."""
    one, n = 1 << WORK_BITS, 12 * steps + 1
    upper = [(one << bits) // (one + value) for value in _exp_minus(n, steps)]
    return np.array([(1 << bits) - p for p in upper[:0:-1]] + upper, np.int64)


def _squash_and_stretch() -> tuple[np.ndarray, np.ndarray]:
    fine = logistic(2 * STEPS, 40)
    squash = np.clip((fine[::2] + (1 << 23)) >> 24, 1, ONE - 1)
    # A probability stretches to the nearest step: compare it with those half a step away.
    stretch = np.searchsorted(fine[1::2], np.arange(ONE) << 24, side="left") - EDGE
    return squash.astype(np.int32), np.clip(stretch, 1 - EDGE, EDGE - 1).astype(np.int16)


def _counts() -> list[tuple[int, int]]:
    """(zeros, ones) that a history can hold, fewest bits first."""
    pairs = [
        (n, total - n)
        for total in range(MOST_SEEN[0] + 2)
        for n in range(total + 1)
        if _allowed(n, total - n)
    ]
    return pairs


def _allowed(n0: int, n1: int) -> bool:
    rare = min(n0, n1)
    return rare < len(MOST_SEEN) and max(n0, n1) <= MOST_SEEN[rare]


def _seen(n0: int, n1: int, bit: int) -> tuple[int, int]:
    """Counts after another bit: an unexpected bit makes the history forget most of the others."""
    other = sum(n >= step for n in [n0 if bit else n1] for step in FORGET)
    n0, n1 = (other, n1 + 1) if bit else (n0 + 1, other)
    while not _allowed(n0, n1):  # keep the proportion
        if n1 > n0:
            n0, n1 = (n0 * (n1 - 1) + n1 // 2) // n1, n1 - 1
        else:
            n0, n1 = n0 - 1, (n1 * (n0 - 1) + n0 // 2) // n0
    return n0, n1


def _histories() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(after, first_p, only): histories are (zeros, ones) and, of short ones, the newest bit."""

    def named(n0: int, n1: int, bit: int) -> tuple[int, int, int]:
        return n0, n1, bit if n0 and n1 and n0 + n1 <= NEWEST_KEPT else 0

    states = list(dict.fromkeys(named(*pair, bit) for pair in _counts() for bit in (0, 1)))
    number = {state: i for i, state in enumerate(states)}
    after = np.zeros(2 * N_STATES, np.int32)
    first_p = np.full(N_STATES, ONE // 2, np.int32)
    only = np.zeros(N_STATES, np.int32)
    for i, (n0, n1, _) in enumerate(states):
        for bit in (0, 1):
            after[2 * i + bit] = number[named(*_seen(n0, n1, bit), bit)]
        only[i] = bool(n0) != bool(n1)
        first_p[i] = ONE * (2 * n1 + 1) // (2 * (n0 + n1) + 2)
    return after, first_p, only


def _levels() -> np.ndarray:
    n = np.arange(64)
    return np.where(n < 8, n, 7 + (n >> 3)).astype(np.int32)


def _logs() -> np.ndarray:
    """By repeated squaring: each square shows the next bit of a logarithm."""
    values = []
    for i in range(256):
        x, log = (256 + i) << 32, 0
        for _ in range(8):
            x, log = x * x >> 40, log << 1
            if x >> 41:
                x, log = x >> 1, log | 1
        values.append(log)
    return np.array([*values, 256], np.int32)


def _kinds() -> np.ndarray:
    """Class of each byte: control, line end, space, lower, upper, digit, other ASCII, above."""
    kind = np.full(256, 6, np.int32)
    kind[:32] = 0
    kind[[10, 13]] = 1
    kind[[9, 32]] = 2
    kind[ord("a") : ord("z") + 1] = 3
    kind[ord("A") : ord("Z") + 1] = 4
    kind[ord("0") : ord("9") + 1] = 5
    kind[128:] = 7
    return kind


@functools.cache
def tables() -> Tables:
    """The constant tables; they are never written to."""
    squash, stretch = _squash_and_stretch()
    rate = np.array([10 * ONE // (10 * n + 16) for n in range(RATES)], np.int32)
    after, first_p, only = _histories()
    made = Tables(
        squash=squash, stretch=stretch, coarse=stretch[8::16].copy(), rate=rate, after=after,
        first_p=first_p, only=only, level=_levels(), log=_logs(), kind=_kinds(),
    )  # fmt: skip
    made = memory.in_one_block(made)
    for table in made:
        table.flags.writeable = False
    return made


@functools.cache
def tables_hash() -> bytes:
    """SHA-256 of all constant tables, part of what a compressed file depends on."""
    parts = (table.astype("<i4").tobytes() for table in tables())
    return hashlib.sha256(b"".join(parts)).digest()
