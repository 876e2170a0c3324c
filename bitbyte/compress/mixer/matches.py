"""Matches: the byte that followed the longest earlier text equal to the newest bytes.

Two searches, for matches of at least 5 and 9 bytes.  After a wrong byte a match is followed on for
a while, because what differs is often one number in a repeated line.
"""

from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer import maps
from bitbyte.compress.mixer.kernel import kernel
from bitbyte.compress.mixer.maps import map_p, moved
from bitbyte.compress.mixer.slots import mixed
from bitbyte.compress.mixer.tables import EDGE, Tables

LEAST = np.array([9, 5])  # bytes of a match
N_MATCHES = 2
HEAD_BITS = 18
LONGEST_CHECKED = 32
MOST_MISSES = 8
LONG = 65535
LENGTHS = 32
LIMIT = 1000


class Matches(NamedTuple):
    """M searches."""

    heads: np.ndarray  # (M << HEAD_BITS,) int64: where a hash of bytes was last, plus one; 0: never
    at_M: np.ndarray  # int64: position of the predicted byte, -1: no match
    length_M: np.ndarray  # int64: bytes verified since the last wrong one
    missed_M: np.ndarray  # int64: wrong bytes lately
    map: np.ndarray  # (M * 2 * LENGTHS,) maps: whether a predicted bit is right
    map_M: np.ndarray  # int64: index of this bit's map; -1: nothing is predicted
    byte_M: np.ndarray  # int64: predicted byte, with a 1 before its bits; 0: none


def new_matches(t: Tables) -> Matches:
    M = N_MATCHES
    first = t.squash[EDGE + np.minimum(256 + 100 * np.arange(LENGTHS), 2400)]
    start = np.concatenate([maps.packed(first, 6), maps.packed(first // 2 + 16384, 6)])
    return Matches(
        heads=np.zeros(M << HEAD_BITS, np.int64), at_M=np.full(M, -1, np.int64),
        length_M=np.zeros(M, np.int64), missed_M=np.zeros(M, np.int64), map=np.tile(start, M),
        map_M=np.full(M, -1, np.int64), byte_M=np.zeros(M, np.int64),
    )  # fmt: skip


@kernel
def bucket(length):
    """Length class of a match, 0 to 31."""
    if length < 16:
        return length
    if length < 32:
        return 16 + ((length - 16) >> 2)
    if length < 512:
        return 20 + min((length - 32) >> 6, 7)
    return 28 + min((length - 512) >> 9, 3)


@kernel
def _verified(past, mask, position, at):
    """How many bytes before ``at`` equal the newest ones, at most LONGEST_CHECKED."""
    n = 0
    while n < LONGEST_CHECKED and n < at:
        if past[(at - 1 - n) & mask] != past[(position - 1 - n) & mask]:
            break
        n += 1
    return n


@kernel
def follow(m, past, mask, position):
    """After a byte: follow the matches on, or look for new ones.  ``position``: bytes so far."""
    newest = int(past[(position - 1) & mask])
    for k in range(N_MATCHES):
        at, least = int(m.at_M[k]), 9 if k == 0 else 5
        if at >= 0:
            if m.byte_M[k] & 0xFF == newest:
                m.length_M[k] = min(m.length_M[k] + 1, LONG)
                if m.length_M[k] >= 16:
                    m.missed_M[k] = 0
            else:
                m.missed_M[k] += 1
                m.length_M[k] = 0
            at += 1
            if m.missed_M[k] > MOST_MISSES:
                at = -1
        h = 0
        for j in range(least):
            h = mixed(h, int(past[(position - 1 - j) & mask]))
        head = (k << HEAD_BITS) + (h >> (62 - HEAD_BITS))
        if position >= least and (at < 0 or m.length_M[k] < least):
            candidate = int(m.heads[head]) - 1
            if candidate >= 0 and position - candidate <= mask:
                length = _verified(past, mask, position, candidate)
                if length >= least and length > m.length_M[k]:
                    at = candidate
                    m.length_M[k], m.missed_M[k] = length, 0
        m.heads[head] = position + 1
        if at >= 0 and position - at > mask:
            at = -1
        m.at_M[k] = at
        if at < 0:
            m.length_M[k], m.missed_M[k], m.byte_M[k] = 0, 0, 0
        else:
            m.byte_M[k] = int(past[at & mask]) | 0x100


@kernel
def predict(m, t, x, to, partial, bit):
    """Fill two inputs of each match from x[to] on."""
    for k in range(N_MATCHES):
        byte = int(m.byte_M[k])
        if byte and byte >> (8 - bit) == partial:
            length = int(m.length_M[k])
            missed = 1 if m.missed_M[k] else 0
            at = (k * 2 + missed) * LENGTHS + bucket(length)
            st = int(t.stretch[map_p(int(m.map[at]))])
            sure = 16 * min(length, 32)
            ahead = (byte >> (7 - bit)) & 1
            x[to] = st if ahead else -st
            x[to + 1] = sure if ahead else -sure
            m.map_M[k] = at
        else:
            x[to], x[to + 1] = 0, 0
            m.map_M[k] = -1
        to += 2


@kernel
def learn(m, t, bit, value):
    for k in range(N_MATCHES):
        at = m.map_M[k]
        if at >= 0:
            right = ((int(m.byte_M[k]) >> (7 - bit)) & 1) == value
            m.map[at] = moved(int(m.map[at]), 1 if right else 0, t.rate, LIMIT, 1)
