"""The other operations of a transformer: embedding, norms, rotary positions, attention, gate.

A row is one position of one lane (an independent stream); row m is position start + m % length of
lane m // length.  Keys are cached in blocks of 16 positions, (S / 16, K, 16), so that the scores of
16 positions need no sum over lanes of a register; values position by position, (S, K).

Shapes: M rows, D width, H heads, K head width, F feed-forward width, S cached positions.
"""

from bitbyte.config import NORM_EPS
from bitbyte.kernels.native.vector import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    exp,
    fma,
    magnitude,
    maximum,
    rint,
    select,
    sqrt,
)

SMALLEST = 1e-5  # smallest scale of a quantized row, as in `bitlinear.EPS`


def embed(k, rows, ids, table, out, width):
    """out_MD = table[ids_M]; ids are int64."""

    def row(m):
        source = table + k.load(I64, ids + 8 * m) * width * 4
        k.loop(width, lambda i: k.store(k.load(F32.x16, source + 4 * i), out + (m * width + i) * 4),
               step=LANES)

    k.loop(rows, row)


def _rate(k, x, width):
    """1 / rms of the ``width`` floats at x."""
    def body(i, total):
        v = k.load(F32.x16, x + 4 * i)
        return fma(v, v, total)

    total = k.loop(width, body, k.constant(F32.x16, 0), step=LANES).sum()
    return 1.0 / sqrt(total / width.to(F32) + NORM_EPS)


def norm(k, rows, x, weight, out, width):
    """out_MD = x / rms(x) * weight."""

    def row(m):
        start = m * width * 4
        rate = _rate(k, x + start, width)

        def body(i):
            y = k.load(F32.x16, x + start + 4 * i) * rate * k.load(F32.x16, weight + 4 * i)
            k.store(y, out + start + 4 * i)

        k.loop(width, body, step=LANES)

    k.loop(rows, row)


def _quantize(k, m, value, width, out, scale, total):
    """Round ``value(i)`` (16 floats from place i of the row) to int8 steps; see `bitlinear`."""
    largest = k.loop(
        width, lambda i, most: maximum(most, magnitude(value(i))), k.constant(F32.x16, 0),
        step=LANES,
    ).max()  # fmt: skip
    step = maximum(largest, SMALLEST) / 127.0

    def body(i, count):
        q = rint(value(i) / step).to(I32)
        k.store(q.to(I8), out + m * width + i)
        return count + q

    count = k.loop(width, body, k.constant(I32.x16, 0), step=LANES).sum()
    k.store(step, scale + 4 * m)
    k.store(count, total + 4 * m)


def quantize(k, rows, x, out, scale, total, width):
    """out_MD (int8), scale_M (float32) and total_M (int32 sum of out) of x_MD."""
    k.loop(rows, lambda m: _quantize(
        k, m, lambda i: k.load(F32.x16, x + (m * width + i) * 4), width, out, scale, total
    ))  # fmt: skip


def norm_quantize(k, rows, x, weight, out, scale, total, width):
    """`quantize` of `norm`."""

    def row(m):
        start = x + m * width * 4
        rate = _rate(k, start, width)

        def value(i):
            return k.load(F32.x16, start + 4 * i) * rate * k.load(F32.x16, weight + 4 * i)

        _quantize(k, m, value, width, out, scale, total)

    k.loop(rows, row)


def _gated(k, x, m, width):
    """silu(gate) * up at place i of row m, where x_M(2F) holds gate and up."""
    start = x + m * width * 8

    def value(i):
        gate = k.load(F32.x16, start + 4 * i)
        return gate / (1.0 + exp(0.0 - gate)) * k.load(F32.x16, start + (width + i) * 4)

    return value


def gate_quantize(k, rows, x, gated, out, scale, total, width):
    """`quantize` of `gate`, which stays in ``gated``."""

    def row(m):
        value, place = _gated(k, x, m, width), gated + m * width * 4
        k.loop(width, lambda i: k.store(value(i), place + 4 * i), step=LANES)
        _quantize(k, m, lambda i: k.load(F32.x16, place + 4 * i), width, out, scale, total)

    k.loop(rows, row)


def gate(k, rows, x, out, width):
    """out_MF = silu(gate) * up."""

    def row(m):
        value = _gated(k, x, m, width)
        k.loop(width, lambda i: k.store(value(i), out + (m * width + i) * 4), step=LANES)

    k.loop(rows, row)


def rotate(k, rows, start, length, qkv, keys, values, cos, sin, heads, width, cached):
    """Turn queries in place, and put turned keys and the values of each row into the cache.

    qkv_M(3HK); cos and sin (S, K / 2); keys (lanes, H, S / 16, K, 16), values (lanes, H, S, K).
    """
    half = width // 2

    def row(m):
        lane, place = m // length, start + m % length
        angle = place * half * 4

        def head(h):
            query = qkv + (m * heads * 3 + h) * width * 4
            key, value = query + heads * width * 4, query + heads * width * 8
            cache = (lane * heads + h) * cached * width * 4
            block = keys + cache + (place // LANES * width * LANES + place % LANES) * 4

            def body(i):
                c, s = (k.load(F32.x16, table + angle + 4 * i) for table in (cos, sin))
                for source in (query, key):
                    a = k.load(F32.x16, source + 4 * i)
                    b = k.load(F32.x16, source + (half + i) * 4)
                    turned = a * c - b * s, b * c + a * s
                    for part, v in enumerate(turned):
                        if source is query:
                            k.store(v, source + (half * part + i) * 4)
                        else:
                            for j in range(LANES):
                                at = (half * part + i + j) * (LANES * 4)
                                k.store(v.lane(j), block + at)

            k.loop(half, body, step=LANES)
            target = values + cache + place * width * 4
            k.loop(width, lambda i: k.store(k.load(F32.x16, value + 4 * i), target + 4 * i),
                   step=LANES)

        k.loop(heads, head)

    k.loop(rows, row)


def attend(k, rows, start, length, qkv, keys, values, scores, out, heads, width, cached):
    """out_MHK = softmax(q k / sqrt(K)) v over the positions up to each row's own.

    ``scores`` is room for S floats.  Positions beyond a row's own count as 0, so that sums do not
    depend on how many there are.
    """
    blocks_of = LANES * 4
    one = k.constant(F32, 1.0)

    def attend_one(m, h, lane, n):
        cache = (lane * heads + h) * cached * width * 4
        query = qkv + (m * heads * 3 + h) * width * 4
        shrink = one / sqrt(width.to(F32))
        blocks = (n + (LANES - 1)) // LANES

        def score(b, most):
            block = keys + cache + b * width * blocks_of

            def body(i, *parts):
                return tuple(
                    fma(k.load(F32.x16, block + (i + j) * blocks_of), k.load(F32, query + (i + j) * 4), part)
                    for j, part in enumerate(parts)
                )

            parts = k.loop(width, body, *[k.constant(F32.x16, 0)] * 4, step=4)
            s = ((parts[0] + parts[1]) + (parts[2] + parts[3])) * shrink
            seen = k.count() + (b * LANES).to(I32) < n.to(I32)
            s = select(seen, s, -1e30)
            k.store(s, scores + b * blocks_of)
            return maximum(most, s)

        most = k.loop(blocks, score, k.constant(F32.x16, -1e30)).max()

        def weigh(b, total):
            s = k.load(F32.x16, scores + b * blocks_of)
            p = select(s > -1e29, exp(s - most), 0.0)
            k.store(p, scores + b * blocks_of)
            return total + p

        total = k.loop(blocks, weigh, k.constant(F32.x16, 0)).sum()
        share = one / total

        def output(i):
            at = values + cache + 4 * i

            def body(t, *parts):
                return tuple(
                    fma(k.load(F32.x16, at + (t + j) * width * 4), k.load(F32, scores + (t + j) * 4), part)
                    for j, part in enumerate(parts)
                )

            parts = k.loop(blocks * LANES, body, *[k.constant(F32.x16, 0)] * 4, step=4)
            y = ((parts[0] + parts[1]) + (parts[2] + parts[3])) * share
            k.store(y, out + ((m * heads + h) * width + i) * 4)

        k.loop(width, output, step=LANES)

    def row(m):
        lane, n = m // length, start + m % length + 1
        k.loop(heads, lambda h: attend_one(m, h, lane, n))

    k.loop(rows, row)


KERNELS = [embed, norm, quantize, norm_quantize, gate, gate_quantize, rotate, attend]
