"""The hashed table: what each context has seen of the byte that follows it.

A bucket of 16 integers (one cache line) serves a context and half a byte.  Integer 0 holds a check
of 16 bits, and of the byte that followed last, its value and how often in a row (8 bits each).
Integers 1 to 15 are the nodes of the binary tree of the half byte, the root first: probability of a
1 less one half (18 bits), sightings (6), history (8; see `tables`).  So an empty bucket is all
zeros.
"""

import numpy as np

from bitbyte.compress.mixer import memory
from bitbyte.compress.mixer.kernel import kernel

BUCKET = 16
TRIES = 4  # buckets that may serve a hash
NODE_HALF, NODE_MOST = 1 << 17, 63
HASH_MASK = (1 << 62) - 1
MULTIPLIER = 0x1E3779B97F4A7C15  # odd, below 2^62; a product's low 62 bits survive any wrapping


def new_buckets(n: int) -> np.ndarray:
    """``n`` empty buckets (a multiple of TRIES), each in a cache line of its own."""
    return memory.aligned(memory.LINE_BYTES * n).view(np.int32)


@kernel
def mixed(h, v):
    """Hash of a hash and a value, 62 bits."""
    h = ((h + v + 1) * MULTIPLIER) & HASH_MASK
    return h ^ (h >> 29)


@kernel
def home(h, n_buckets):
    """Start of the bucket where the search for a hash begins."""
    return (((h >> 30) * n_buckets) >> 32) * BUCKET


@kernel
def find(buckets, n_buckets, h):
    """Start of the bucket of a hash.  If it has none, one that is little used is cleared."""
    first = home(h, n_buckets)
    check = ((h >> 14) & 0xFFFF) - 0x8000
    worst, seen_least = 0, NODE_MOST + 1
    for j in range(TRIES):
        at = first ^ (j * BUCKET)
        if buckets[at] >> 16 == check:
            return at
        seen = (buckets[at + 1] >> 8) & NODE_MOST
        if seen < seen_least:
            worst, seen_least = at, seen
    for i in range(1, BUCKET):
        buckets[worst + i] = 0
    buckets[worst] = check << 16
    return worst


@kernel
def node_p(node):
    """Probability of a 1 out of 65536."""
    return ((node >> 14) + NODE_HALF) >> 2


@kernel
def node_after(node, bit, rate, after):
    """A node that has seen another bit."""
    seen, history = (node >> 8) & NODE_MOST, node & 0xFF
    p = (node >> 14) + NODE_HALF
    p += ((((bit << 18) - bit) - p) * int(rate[seen])) >> 16
    seen += seen < NODE_MOST
    return ((p - NODE_HALF) << 14) | (seen << 8) | int(after[2 * history + bit])


@kernel
def note_byte(buckets, at, byte):
    """Update a bucket's last byte and its run."""
    head = int(buckets[at])
    run = head & 0xFF
    same = run > 0 and (head >> 8) & 0xFF == byte
    run = min(run + 1, 255) if same else 1
    buckets[at] = (head & ~0xFFFF) | (byte << 8) | run
