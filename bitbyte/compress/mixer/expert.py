"""A model as an expert: its counts of the 256 bytes, as inputs for each bit."""

from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer import maps
from bitbyte.compress.mixer.kernel import kernel
from bitbyte.compress.mixer.maps import map_p, moved
from bitbyte.compress.mixer.tables import EDGE, ONE, Tables

N_INPUTS = 4
ENTROPIES = 16  # classes, half a bit wide
BINS, BIN_BITS = 48, 7  # of a stretched probability
FIRST_CONTEXTS = ENTROPIES * 8
CONTEXTS = FIRST_CONTEXTS + 512
LIMIT = 255


class Expert(NamedTuple):
    sums: np.ndarray  # (512,) int64: counts below each node of the byte's tree, the root at 1
    about: np.ndarray  # (2,) int64: class of the entropy, likeliest byte
    maps: np.ndarray  # (CONTEXTS * BINS,) maps: what the model's probability has meant
    at: np.ndarray  # (2,) int64: this bit's maps


def new_expert(t: Tables) -> Expert:
    bins = (np.arange(BINS) << BIN_BITS) + (1 << BIN_BITS - 1)
    return Expert(
        np.zeros(512, np.int64), np.zeros(2, np.int64),
        np.tile(maps.packed(t.squash[bins], 6), CONTEXTS), np.zeros(2, np.int64),
    )  # fmt: skip


@kernel
def _log2(value, log):
    """256 log2 of an integer from 1 to 2^24, rounded down to a table's step."""
    bits = value.bit_length() - 1
    part = (value << 8) >> bits
    return (bits << 8) + int(log[part - 256])


@kernel
def read(e, counts_TV, i, log):
    """Take the model's counts for the next byte, row ``i``."""
    total, mean, top = 0, 0, 0
    for v in range(256):
        n = int(counts_TV[i, v])
        e.sums[256 + v] = n
        total += n
        mean += n * _log2(max(n, 1), log)
        if n > e.sums[256 + top]:
            top = v
    for node in range(255, 0, -1):
        e.sums[node] = e.sums[2 * node] + e.sums[2 * node + 1]
    total = max(total, 1)
    entropy = _log2(total, log) - mean // total  # in 1 / 256 bit
    e.about[0] = max(0, min(ENTROPIES - 1, entropy >> 7))
    e.about[1] = top


@kernel
def predict(e, t, x, to, partial, bit):
    """Fill four inputs from x[to] on."""
    p = int(e.sums[2 * partial + 1]) * ONE // max(int(e.sums[partial]), 1)
    p = max(1, min(ONE - 1, p))
    st = int(t.stretch[p])
    bins = (st + EDGE) >> BIN_BITS
    top = (int(e.about[1]) | 256) >> (8 - bit)
    likeliest = 256 if top == partial else 0
    e.at[0] = (int(e.about[0]) * 8 + bit) * BINS + bins
    e.at[1] = (FIRST_CONTEXTS + likeliest + (partial & 0xFF)) * BINS + bins
    x[to] = st
    x[to + 1] = t.stretch[map_p(int(e.maps[e.at[0]]))]
    x[to + 2] = t.stretch[map_p(int(e.maps[e.at[1]]))]
    x[to + 3] = (p - ONE // 2) >> 5


@kernel
def learn(e, t, value):
    for k in range(2):
        e.maps[e.at[k]] = moved(int(e.maps[e.at[k]]), value, t.rate, LIMIT, 1)
