"""What `prior.Prior` adds to a model, from the ids that each lane was fed.

``past`` holds the ids of every lane as int32, one lane after the other: GAP times START, then the
ids from position 0 on, then room for GAP more, so that vectors may reach over both ends.

Shapes: M rows, K contexts (orders 1.., then the word), r rank, D width.
"""

from bitbyte.kernels.native.vector import F32, I8, I32, I64, LANES, fma, maximum, select
from bitbyte.ngrams import MULTIPLIER, REACH
from bitbyte.prior import MATCH_REACH
from bitbyte.vocab import N_BYTES, START

GAP = 16  # ids before and after those of a lane; at least REACH


def _place(past, m, start, length, stride):
    """(address of row m's own id, its position)."""
    position = start + m % length
    return past + (m // length * stride + GAP + position) * 4, position


def remember(k, rows, start, length, ids, past, stride, late):
    """Put the ids of each row into ``past``, whose lanes are ``stride`` apart.

    With ``late`` 1 they go one place further: for models that predict the byte at a position.
    """

    def row(m):
        place, _ = _place(past, m, start, length, stride)
        k.store(k.load(I64, ids + 8 * m).to(I32), place + 4 * late)

    k.loop(rows, row)


def _is_letter(i):
    """As `ngrams.is_letter`, of an int64: 1 or 0."""
    lower = i | 32
    ascii = (lower > ord("a") - 1) & (lower < ord("z") + 1) & (i < 128)
    return ascii | ((i > 127) & (i < N_BYTES))


def features(k, rows, start, length, past, stride, codes, scale, out, orders, shift, rank):
    """f_MKr of `Prior.features`, of 4-bit codes (K, R, r / 2); ``shift`` leaves log2 R bits."""
    zero, one = k.constant(I64, 0), k.constant(I64, 1)
    size = one << (64 - shift)  # rows of a table

    def row(m):
        newest, _ = _place(past, m, start, length, stride)
        target = out + m * (orders + 1) * rank * 4

        def read(context, hashed, known):
            """The table's row, or zeros."""
            place = context * size + ((hashed >> shift) & (size - 1))
            source = codes + place * (rank // 2)
            whole = select(known > 0, k.constant(F32, 1.0), k.constant(F32, 0.0))

            def body(i):
                packed = k.load(I8.x16, source + i // 2)
                halves = (packed << 4) >> 4, packed >> 4
                for half in range(2):
                    order = [8 * half + j // 2 for j in range(LANES)]
                    low, high = (h.lanes(*order) for h in halves)
                    even = k.count() & 1
                    code = select(even.equals(0), low.to(I32), high.to(I32)).to(F32)
                    root = code * k.load(F32.x16, scale + (context * rank + i + LANES * half) * 4)
                    value = root * maximum(root, 0.0 - root) * whole
                    k.store(value, target + (context * rank + i + LANES * half) * 4)

            k.loop(rank, body, step=2 * LANES)

        def order(context, hashed, known):
            byte = k.load(I32, newest - 4 * context).to(I64)
            hashed = (hashed + byte + 1) * MULTIPLIER
            known = select(byte < N_BYTES, known, zero)
            read(context, hashed, known)
            return hashed, known

        k.loop(orders, order, zero, one)
        last = k.load(I32, newest).to(I64)

        def letter(i, hashed, inside):
            byte = k.load(I32, newest - 4 * i).to(I64)
            inside = select(_is_letter(byte), inside, zero)
            return select(inside > 0, (hashed + byte + 1) * MULTIPLIER, hashed), inside

        hashed, _ = k.loop(REACH, letter, zero, one)
        hashed = (hashed + last + 1) * MULTIPLIER
        read(orders, hashed, select(last < N_BYTES, one, zero))

    k.loop(rows, row)


def follow(k, rows, start, length, past, stride, table, out, span, width):
    """out_MD += the row of ``table`` for the id after the last match of the ``span`` newest ids.

    As `prior.followers`; ``table`` is (257, D).
    """

    def row(m):
        newest, position = _place(past, m, start, length, stride)
        first = newest - 4 * position
        lowest = select(position > MATCH_REACH, position - MATCH_REACH, position * 0)

        def whole(j, known):
            return select(k.load(I32, newest - 4 * j) < N_BYTES, known, k.constant(I64, 0))

        known = k.loop(span, whole, select(position > span - 1, position * 0 + 1, position * 0))

        def block(s, best):
            def same(j, hits):
                here = k.load(I32.x16, first + (s - j) * 4)
                return hits & select(
                    here.equals(k.load(I32, newest - 4 * j)), k.constant(I32.x16, -1), 0
                )

            hits = k.loop(span, same, k.constant(I32.x16, -1))
            places = k.count() + s.to(I32)
            hits = select(places < position.to(I32), hits, 0)
            return maximum(best, select(hits < 0, places, -1))

        best = k.loop(
            position, block, k.constant(I32.x16, -1), start=lowest, step=LANES
        ).max().to(I64)  # fmt: skip
        found = select(best > -1, known, k.constant(I64, 0))
        after = k.load(I32, first + (best + 1) * 4).to(I64)
        source = table + select(found > 0, after, k.constant(I64, START)) * width * 4
        place = out + m * width * 4
        k.loop(
            width,
            lambda i: k.store(
                k.load(F32.x16, place + 4 * i) + k.load(F32.x16, source + 4 * i), place + 4 * i
            ),
            step=LANES,
        )

    k.loop(rows, row)


def weigh(k, rows, f, normed, gate, out, contexts, rank, width):
    """out_MKr = f_MKr * (1 + normed_MD . gate_KD)."""

    def row(m):
        def context(c):
            def body(i, total):
                x = k.load(F32.x16, normed + (m * width + i) * 4)
                return fma(x, k.load(F32.x16, gate + (c * width + i) * 4), total)

            share = 1.0 + k.loop(width, body, k.constant(F32.x16, 0), step=LANES).sum()
            place = (m * contexts + c) * rank * 4
            k.loop(
                rank,
                lambda i: k.store(k.load(F32.x16, f + place + 4 * i) * share, out + place + 4 * i),
                step=LANES,
            )

        k.loop(contexts, context)

    k.loop(rows, row)


KERNELS = [remember, features, follow, weigh]
