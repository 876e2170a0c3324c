"""Experts: what each context predicts about the next bit, and how it learns.

Each context has five inputs: what its history means (a map learns that), the same once more if the
history holds one bit value only, its own probability (and what that means), how certain the history
is, and the byte that has followed in a row.
"""

from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer import maps, slots
from bitbyte.compress.mixer.kernel import kernel, prefetch
from bitbyte.compress.mixer.maps import map_p, moved
from bitbyte.compress.mixer.slots import NODE_MOST, find, home, mixed, node_after, node_p, note_byte
from bitbyte.compress.mixer.tables import EDGE, N_STATES, ONE, Tables

N_CONTEXTS = 23
INPUTS = 5  # of a context
LIMIT = 1022
BINS, BIN_BITS = 24, 8  # of a stretched probability in ``direct``
LEVELS = 16  # of sightings in ``direct``
RUNS = 32


class Experts(NamedTuple):
    """The contexts' memory.  C contexts."""

    hash_C: np.ndarray  # int64: of this byte's contexts
    half_C: np.ndarray  # int64: of this half byte's
    first_C: np.ndarray  # int64: bucket of the byte's first half
    at_C: np.ndarray  # int64: bucket of this half
    history: np.ndarray  # (C * 256,) maps: of a bit's history
    direct: np.ndarray  # (C * LEVELS * BINS,) maps: of a node's sightings and probability
    run: np.ndarray  # (C * RUNS * 8,) maps: whether a run goes on, by its length and the bit
    direct_C: np.ndarray  # int64: indices of this bit's maps
    run_C: np.ndarray  # int64


def new_experts(t: Tables) -> Experts:
    C = N_CONTEXTS
    bins = (np.arange(BINS) << BIN_BITS) + (1 << BIN_BITS - 1)
    direct = np.tile(maps.packed(t.squash[bins], 6), C * LEVELS)
    run = np.tile(maps.packed(t.squash[EDGE + 256 + 32 * np.arange(RUNS)], 6).repeat(8), C)
    return Experts(
        hash_C=np.zeros(C, np.int64),
        half_C=np.zeros(C, np.int64), first_C=np.zeros(C, np.int64),
        at_C=np.zeros(C, np.int64), history=np.tile(maps.packed(t.first_p, 6), C), direct=direct,
        run=run, direct_C=np.zeros(C, np.int64), run_C=np.zeros(C, np.int64),
    )  # fmt: skip


@kernel
def ask_for_buckets(e, buckets, partial, own):
    """Hash the contexts of a half byte, the first if ``partial`` is 1, else that after 4 bits.

    With ``own`` the hashes are those of this half byte, else those of the byte.  Their buckets are
    asked for, because memory takes as long as some thousand instructions.
    """
    n_buckets = len(buckets) // slots.BUCKET
    for i in range(N_CONTEXTS):
        h = int(e.hash_C[i])
        if partial > 1 and not own:
            h = mixed(h, partial)
        e.half_C[i] = h
        prefetch(buckets, home(h, n_buckets))


@kernel
def find_buckets(e, buckets, partial):
    """Find the buckets that were asked for."""
    n_buckets = len(buckets) // slots.BUCKET
    for i in range(N_CONTEXTS):
        at = find(buckets, n_buckets, int(e.half_C[i]))
        if partial == 1:
            e.first_C[i] = at
        e.at_C[i] = at


@kernel
def _node(partial, bit):
    """Node of the half byte's tree, 1 to 15, after ``bit`` bits of the byte."""
    if bit < 4:
        return partial
    return (partial & ((1 << (bit - 4)) - 1)) | (1 << (bit - 4))


@kernel
def predict(e, buckets, t, x, partial, bit, known):
    """Fill the inputs of a bit (its number, 0 first); returns how many of the first ``known``
    contexts were seen before.  ``partial`` is 1 followed by the byte's bits so far.

    There are no branches that a processor would guess wrong: what is unknown is multiplied by 0.
    """
    half, n_known = _node(partial, bit), 0
    for i in range(N_CONTEXTS):
        node = int(buckets[e.at_C[i] + half])
        history = node & 0xFF
        seen = min(history, 1)
        n_known += seen if i < known else 0
        p = map_p(int(e.history[i * N_STATES + history]))
        own = int(t.coarse[node_p(node) >> 4])
        at = (i * LEVELS + int(t.level[(node >> 8) & NODE_MOST])) * BINS + (
            (own + EDGE) >> BIN_BITS
        )
        to = i * INPUTS
        st = int(t.coarse[p >> 4])
        x[to] = seen * st
        x[to + 1] = seen * int(t.coarse[map_p(int(e.direct[at])) >> 4])
        x[to + 2] = seen * ((p - ONE // 2) >> 5)
        x[to + 3] = int(t.only[history]) * st
        e.direct_C[i] = at
    for i in range(N_CONTEXTS):
        head = int(buckets[e.first_C[i]])
        byte = ((head >> 8) & 0xFF) | 0x100
        agrees = 1 if byte >> (8 - bit) == partial else 0
        run = min(head & 0xFF, RUNS - 1) * agrees  # the maps of run 0 are never believed
        at = (i * RUNS + run) * 8 + bit
        sign = (2 * ((byte >> (7 - bit)) & 1) - 1) * min(run, 1)
        x[i * INPUTS + 4] = sign * int(t.coarse[map_p(int(e.run[at])) >> 4])
        e.run_C[i] = at
    return n_known


@kernel
def learn(e, buckets, t, partial, bit, value):
    """Teach the contexts a bit's value; the other arguments are those of `predict`."""
    half = _node(partial, bit)
    for i in range(N_CONTEXTS):
        at = e.at_C[i] + half
        node = int(buckets[at])
        to = e.direct_C[i]
        e.direct[to] = moved(int(e.direct[to]), value, t.rate, LIMIT, 1)
        to = i * N_STATES + (node & 0xFF)
        e.history[to] = moved(int(e.history[to]), value, t.rate, LIMIT, 1)
        buckets[at] = node_after(node, value, t.rate, t.after)
    for i in range(N_CONTEXTS):
        byte = int(buckets[e.first_C[i]]) >> 8
        right = 1 if (byte >> (7 - bit)) & 1 == value else 0
        to = e.run_C[i]
        e.run[to] = moved(int(e.run[to]), right, t.rate, LIMIT, 1)


@kernel
def end_byte(e, buckets, byte):
    """Note the byte in all contexts' buckets."""
    for i in range(N_CONTEXTS):
        note_byte(buckets, e.first_C[i], byte)
