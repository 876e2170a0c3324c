"""Final maps: what the mixed probability has meant in four small contexts.

Each context has maps at 25 points of the stretched probability, interpolated; the nearer of the two
learns.  They hold the difference from the point's own probability, so that zeros change nothing.
"""

from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer.kernel import kernel, prefetch
from bitbyte.compress.mixer.memory import zeros
from bitbyte.compress.mixer.tables import EDGE

N_FINAL = 4
CONTEXTS = 1 << 16
POINTS, GAP_BITS = 25, 8
ROW = 32  # maps of a context, of which the first ones are used: two cache lines
LIMIT = 511
SEEN_BITS = 9
AHEAD = 6


class Final(NamedTuple):
    maps: (
        np.ndarray
    )  # (N_FINAL * CONTEXTS * ROW,) int32, like `maps` but less the point's probability
    point: np.ndarray  # (POINTS,) int64: probabilities of the points, 22 bits
    row: np.ndarray  # (N_FINAL,) int64: this bit's maps
    at: np.ndarray  # (N_FINAL,) int64: the nearer ones of them


def new_final(t) -> Final:
    point = t.squash[np.arange(POINTS) << GAP_BITS].astype(np.int64) << 6
    return Final(
        zeros(N_FINAL * CONTEXTS * ROW, np.int32),
        point,
        zeros(N_FINAL, np.int64),
        zeros(N_FINAL, np.int64),
    )


@kernel
def ask_for(f, which, context):
    """Choose the context of the map ``which``."""
    row = (which * CONTEXTS + context) * ROW
    f.row[which] = row
    prefetch(f.maps, row)
    prefetch(f.maps, row + ROW // 2)


@kernel
def refine(f, st, which):
    """Probability out of 65536 that the map ``which`` makes of a stretched one in its context."""
    position = st + EDGE
    low, share = position >> GAP_BITS, position & ((1 << GAP_BITS) - 1)
    start = int(f.row[which])
    below = int(f.point[low]) + (int(f.maps[start + low]) >> SEEN_BITS)
    above = int(f.point[low + 1]) + (int(f.maps[start + low + 1]) >> SEEN_BITS)
    f.at[which] = start + low + (share >> (GAP_BITS - 1))
    return (below * ((1 << GAP_BITS) - share) + above * share) >> (GAP_BITS + 6)


@kernel
def learn(f, t, value):
    for k in range(N_FINAL):
        at = f.at[k]
        point = int(f.point[at & (ROW - 1)])
        now = int(f.maps[at])
        seen, change = now & LIMIT, now >> SEEN_BITS
        change += ((value * ((1 << 22) - 1) - point - change) * int(t.rate[seen + AHEAD])) >> 16
        f.maps[at] = (change << SEEN_BITS) | (seen + (seen < LIMIT))
