"""Contexts of pictures with one bit a pixel: windows of pixels around the next four.

Rows are ``shape[RECORD]`` bytes long.  The contexts are found anew for each half byte, so that
every window lies around the pixels it is about.
"""

from bitbyte.compress.mixer.contexts import AT, RECORD, SIZES, back
from bitbyte.compress.mixer.kernel import kernel
from bitbyte.compress.mixer.mixing import FIRST_ROW
from bitbyte.compress.mixer.slots import mixed


@kernel
def _row(past, n):
    """24 pixels of a row above: the byte ``n`` back between its neighbors."""
    return back(past, n + 1) << 16 | back(past, n) << 8 | back(past, n - 1)


@kernel
def _window(row, first, left, right):
    """``left`` pixels before, four around ``first``, and ``right`` pixels after."""
    return (row >> (20 - first - right)) & ((1 << (left + 4 + right)) - 1)


@kernel
def fill(past, shape, partial, hash_C):
    """Contexts of a half byte: the first if ``partial`` is 1, else the second."""
    record = int(shape[RECORD])
    first = 8 if partial == 1 else 12  # place of the next four pixels in 24 of a row
    a, b = _row(past, record), _row(past, 2 * record)
    c, d = _row(past, 3 * record), _row(past, 4 * record)
    left = back(past, 2) << 8 | back(past, 1)
    if partial > 1:
        left = (left << 4 | partial & 15) & 0xFFFF
    a1, a2, a4 = _window(a, first, 1, 1), _window(a, first, 2, 2), _window(a, first, 4, 4)
    b0, b2, b4 = _window(b, first, 0, 0), _window(b, first, 2, 2), _window(b, first, 4, 4)
    c0, c2 = _window(c, first, 0, 0), _window(c, first, 2, 2)
    l2, l4, l6, l8 = left & 3, left & 15, left & 63, left & 255
    past.now[SIZES], past.now[SIZES + 1] = a4, b4
    hash_C[0] = mixed(40, l4 << 8 | a2)
    hash_C[1] = mixed(41, l4 << 16 | a1 << 8 | _window(b, first, 1, 1))
    hash_C[2] = mixed(42, l6 << 16 | _window(a, first, 3, 3) << 4 | b0)
    hash_C[3] = mixed(mixed(43, l8 << 16 | a4), b2 << 4 | c0)
    hash_C[4] = mixed(mixed(44, l8 << 4 | left >> 12), a4 << 16 | b4)
    hash_C[5] = mixed(45, _window(a, first, 6, 6) << 16 | b4)
    hash_C[6] = mixed(46, a2 << 16 | b2 << 8 | c2)
    hash_C[7] = mixed(47, l2 << 8 | _window(a, first, 0, 1))
    hash_C[8] = mixed(
        mixed(48, l4 << 8 | _window(a, first, 0, 0) << 4 | b0), c0 << 8 | d >> 8 & 255
    )
    hash_C[9] = mixed(49, left)
    hash_C[10] = mixed(50, l8 << 16 | _window(a, first, 8, 4))
    hash_C[11] = mixed(mixed(51, l4 << 8 | a1), _window(b, first, 1, 1) << 8 | c2)
    hash_C[12] = mixed(mixed(52, a1 << 8 | l4), int(past.now[AT]) % record << 3 | first >> 2)
    hash_C[13] = mixed(mixed(53, l8 << 16 | a4), b4 << 16 | _window(c, first, 4, 4))
    hash_C[14] = mixed(54, l4 << 16 | b2 << 4 | c0)
    hash_C[15] = mixed(mixed(55, l6), a2 << 16 | b2)
    hash_C[16] = mixed(mixed(56, left), a << 4 & 0xFFFFFF | first >> 2)
    hash_C[21] = mixed(mixed(57, l8 << 16 | _window(a, first, 1, 4)), _window(b, first, 1, 4))


@kernel
def around(past, partial, bit):
    """The pixels nearest to the next one: 4 to the left, 5 above, and 3 above those."""
    after = 3 - (bit & 3)  # pixels of the half byte after it
    left = (back(past, 1) << bit | (partial & ((1 << bit) - 1))) & 15
    above = (int(past.now[SIZES]) >> (after + 2)) & 31
    return left << 8 | above << 3 | (int(past.now[SIZES + 1]) >> (after + 3)) & 7


@kernel
def choose_rows(pixels, row_S):
    """Choose weights by pixels instead of by bytes."""
    row_S[2] = FIRST_ROW[2] + (pixels & 255)
    row_S[4] = FIRST_ROW[4] + (pixels >> 3 & 511)
    row_S[5] = FIRST_ROW[5] + (pixels & 2047)
