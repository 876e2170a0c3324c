"""What the next byte may depend on: the newest bytes, words, columns, records, indirect contexts.

`Past` holds what came before; `fill` hashes it into one number per context.
"""

from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer.kernel import kernel
from bitbyte.compress.mixer.memory import zeros
from bitbyte.compress.mixer.slots import mixed

# Places in `Past.now`.
AT, LAST4, LAST8, WORD, WORD1, WORD2, LINE, ABOVE_LINE, CLASSES, MASK, SIZES = range(11)
N_NOW = 16
RING = 1 << 24  # bytes, at most
# Places in `shape`: what the encoder has found about a frame.
KIND, RECORD, RECORD2, WIDTH, START = range(5)
GENERAL, SOUND, BITMAP = range(3)  # kinds


class Past(NamedTuple):
    """The newest bytes and what was noted of them."""

    ring: np.ndarray  # uint8; as many are used as now[MASK] says
    now: np.ndarray  # (N_NOW,) int64
    after1: np.ndarray  # (256,) int32: the last two bytes that followed a byte
    after2: np.ndarray  # (65536,) int32: the last three that followed two bytes


def new_past(ring_bits: int) -> Past:
    now = np.zeros(N_NOW, np.int64)
    now[MASK] = (1 << ring_bits) - 1
    return Past(zeros(RING, np.uint8), now, zeros(256, np.int32), zeros(1 << 16, np.int32))


@kernel
def back(past, n):
    """The byte n back (1: the newest); 0 before the beginning."""
    return int(past.ring[(past.now[AT] - n) & past.now[MASK]])


@kernel
def note(past, kind, byte):
    """Append a byte."""
    now = past.now
    last4 = int(now[LAST4])
    c1, c2 = last4 & 0xFF, last4 & 0xFFFF
    past.after1[c1] = ((int(past.after1[c1]) << 8) & 0xFF00) | byte
    past.after2[c2] = ((int(past.after2[c2]) << 8) & 0xFFFF00) | byte
    past.ring[now[AT] & now[MASK]] = byte
    now[AT] += 1
    now[LAST8] = ((int(now[LAST8]) << 8) | (last4 >> 24)) & 0xFFFFFFFF
    now[LAST4] = ((last4 << 8) | byte) & 0xFFFFFFFF
    now[CLASSES] = ((int(now[CLASSES]) << 3) | int(kind[byte])) & 0xFFFFFF
    _note_word(now, byte)
    if byte == 10:
        now[ABOVE_LINE], now[LINE] = now[LINE], now[AT]


@kernel
def _note_word(now, byte):
    """Words are runs of letters, upper case as lower, and of bytes above 127."""
    if 65 <= byte <= 90:
        byte += 32
    if 97 <= byte <= 122 or byte >= 128:
        now[WORD] = mixed(int(now[WORD]), byte)
    elif now[WORD]:
        now[WORD2], now[WORD1], now[WORD] = now[WORD1], now[WORD], 0


@kernel
def above(past, record):
    """How many bytes back is what lies above the next byte: a record, or in the line before it."""
    if record:
        return record
    now = past.now
    column = int(now[AT] - now[LINE])
    length = int(now[LINE] - now[ABOVE_LINE])
    return length if column < length else column + 1


@kernel
def column(past, record):
    """Place of the next byte in its record or line."""
    if record:
        return int(past.now[AT]) % record
    return min(int(past.now[AT] - past.now[LINE]), 255)


@kernel
def fill(past, shape, expected, hash_C):
    """Hash the contexts of the next byte.  ``expected``: the matched byte and its length class."""
    now = past.now
    last4, last8 = int(now[LAST4]), int(now[LAST8])
    word, word1, word2 = int(now[WORD]), int(now[WORD1]), int(now[WORD2])
    record, record2 = int(shape[RECORD]), int(shape[RECORD2])
    c1, c2, c3, c4 = last4 & 0xFF, last4 & 0xFF00, last4 & 0xFF0000, last4 & 0xFF000000
    classes = int(now[CLASSES])
    up = above(past, record)
    n, ne = back(past, up), back(past, up - 1)
    for i in range(7):  # orders 1 to 7
        low = last4 if i > 2 else last4 & ((1 << (8 * i + 8)) - 1)
        high = last8 & ((1 << (8 * i - 24)) - 1) if i > 3 else 0
        hash_C[i] = mixed(mixed(i, low), high)
    hash_C[7] = mixed(7, 0)
    hash_C[8] = mixed(mixed(8, word), c1)
    hash_C[9] = mixed(mixed(mixed(9, word), word1), c1)
    hash_C[10] = mixed(mixed(10, word), word2)
    hash_C[11] = mixed(11, c2 | c3)
    hash_C[13] = mixed(13, c3 | c4)
    col = column(past, record)
    if record:
        nw = back(past, up + 1)
        hash_C[12] = mixed(mixed(12, c1 | n << 8), nw | ne << 8)
        hash_C[14] = mixed(14, c1 | n << 8)
        hash_C[16] = mixed(16, n | back(past, 2 * up) << 8 | ne << 16)
    else:
        hash_C[12] = mixed(12, c1 | c3 | c4)
        lower = 97 <= c1 <= 122
        hash_C[14] = mixed(mixed(14, classes), 0 if lower else c1)
        hash_C[16] = mixed(16, c1 | c2 | n << 16)
    hash_C[15] = mixed(15, n | col << 8)
    hash_C[17] = mixed(17, c1 | int(past.after1[c1]) << 8)
    hash_C[18] = mixed(18, int(past.after2[last4 & 0xFFFF]))
    hash_C[22] = mixed(22, last4 & 0xF0F0F0F0 | c1)
    hash_C[19] = mixed(19, expected)
    hash_C[20] = mixed(20, (expected & 0x1FF) | c1 << 9)
    if record2:
        hash_C[21] = mixed(mixed(21, record2), c1 | back(past, record2) << 8)
    else:
        hash_C[21] = mixed(21, c2 | c4 | (classes & 0x3F))
