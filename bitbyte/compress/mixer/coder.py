"""A binary arithmetic coder without carries: an interval of 48-bit integers.

The interval shrinks to the part of each bit; bytes that its two ends share are written at once.
``span`` holds its ends (low, high), the bytes that a decoder has read of the code, and how many
bytes of the code were written or read.
"""

import numpy as np

from bitbyte.compress.mixer.kernel import kernel

LOW, HIGH, CODE, AT = 0, 1, 2, 3
BITS = 48
ALL = (1 << BITS) - 1


def new_span() -> np.ndarray:
    return np.array([0, ALL, 0, 0], np.int64)


@kernel
def _middle(low, high, p):
    """Last value of the part of a 1, which has probability p out of 65536."""
    width = high - low
    return low + (width >> 16) * p + (((width & 0xFFFF) * p) >> 16)


@kernel
def encode_bit(span, out, bit, p):
    """Code a bit that is 1 with probability p / 65536.  Bytes that do not fit are only counted."""
    low, high, at = int(span[LOW]), int(span[HIGH]), int(span[AT])
    middle = _middle(low, high, p)
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> (BITS - 8) == 0:
        if at < len(out):
            out[at] = high >> (BITS - 8)
        at += 1
        low = (low << 8) & ALL
        high = ((high << 8) & ALL) | 0xFF
    span[LOW], span[HIGH], span[AT] = low, high, at


@kernel
def finish(span, out):
    """Write the byte that ends the code: after it a decoder may read zeros."""
    low, at = int(span[LOW]), int(span[AT])
    if low and at < len(out):
        out[at] = (low >> (BITS - 8)) + 1
    span[AT] = at + (1 if low else 0)


@kernel
def _next(code, at):
    return int(code[at]) if at < len(code) else 0


@kernel
def start_decoding(span, code):
    """Read the first bytes of the code; zeros follow after its end."""
    value = 0
    for at in range(BITS // 8):
        value = (value << 8) | _next(code, at)
    span[CODE], span[AT] = value, BITS // 8


@kernel
def decode_bit(span, code, p):
    """The next bit, which is 1 with probability p / 65536."""
    low, high, value, at = int(span[LOW]), int(span[HIGH]), int(span[CODE]), int(span[AT])
    middle = _middle(low, high, p)
    bit = 1 if value <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> (BITS - 8) == 0:
        low = (low << 8) & ALL
        high = ((high << 8) & ALL) | 0xFF
        value = ((value << 8) & ALL) | _next(code, at)
        at += 1
    span[LOW], span[HIGH], span[CODE], span[AT] = low, high, value, at
    return bit
