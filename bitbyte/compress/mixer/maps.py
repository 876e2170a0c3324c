"""Adaptive probabilities in one int32: 22 bits of probability and 10 of how often it was updated.

The probability is kept less one half, so that 0 is one half, never updated.
"""

import numpy as np

from bitbyte.compress.mixer.kernel import kernel
from bitbyte.compress.mixer.tables import ONE

HALF = 1 << 21  # 22 bits
TOP = (1 << 22) - 1
MOST_SEEN = 1023


def packed(p16: np.ndarray, seen: int) -> np.ndarray:
    """Maps with these probabilities (out of 65536), as if each had been updated ``seen`` times."""
    return (((np.asarray(p16, np.int64) - ONE // 2) << 16) | seen).astype(np.int32)


@kernel
def map_p(value):
    """Probability of a 1 out of 65536."""
    return ((value >> 10) + HALF) >> 6


@kernel
def moved(value, bit, rate, limit, ahead):
    """A map that has seen another bit: it moves by 1 / (n + ahead + 1.6), n at most ``limit``."""
    seen = value & MOST_SEEN
    p = (value >> 10) + HALF
    p += ((bit * TOP - p) * int(rate[seen + ahead])) >> 16
    seen += seen < limit
    return ((p - HALF) << 10) | seen
