"""A transformer's blocks, and their operations: norms, rotary positions, attention, gate.

A row is one position of one lane (an independent stream); row m is position start + m % length of
lane m // length.  Keys are cached in blocks of 16 positions, (S / 16, K, 16), so that the scores of
16 positions need no sum over lanes of a register; values position by position, (S, K).

Shapes: M rows, D width, H heads, K head width, F feed-forward width, S cached positions.
"""

from typing import NamedTuple

import numpy as np

from bitbyte.config import NORM_EPS
from bitbyte.kernels.fixed import rope_tables
from bitbyte.kernels.native.machine import CONTEXT
from bitbyte.kernels.native.products import Weight, array
from bitbyte.kernels.native.vector import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    exp,
    fma,
    magnitude,
    maximum,
    rint,
    select,
    silu,
    sqrt,
)

TILE = 4  # rows of a lane whose attention is computed together
UNROLL = 4  # partial sums, added in pairs
TOGETHER = 256  # ids that one thread computes at once: their scratch fits into its cache
ROPE_BITS = 30  # fraction bits of cosines and sines, before they become float32
AHEAD = 4096  # bytes of a cache that a single row asks for before it needs them
UNSEEN = -1e30  # score of a position that a row does not see
SMALLEST = 1e-5  # smallest scale of a quantized row, as in `bitlinear.EPS`


def embed(k, rows, ids, table, out, width):
    """out_MD = table[ids_M]; ids are int64."""

    def row(m):
        source = table + k.load(I64, ids + 8 * m) * width * 4
        k.loop(
            width,
            lambda i: k.store(k.load(F32.x16, source + 4 * i), out + (m * width + i) * 4),
            step=LANES,
        )

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
    # Compared as integers, which orders them alike and puts NaN above all.
    largest = k.loop(
        width, lambda i, most: maximum(most, magnitude(value(i)).bits(I32.x16)),
        k.constant(I32.x16, 0), step=LANES,
    ).max().bits(F32)  # fmt: skip
    step = maximum(k.constant(F32, SMALLEST), largest) / 127.0

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
        return silu(gate) * k.load(F32.x16, start + (width + i) * 4)

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


def keep_last(k, rows, length, last, x, width):
    """If ``last``, move the last row of each lane to the front of x_MD: x_SD."""

    def lane(s):
        source = x + ((s + 1) * length - 1) * width * 4
        target = x + s * width * 4
        k.loop(
            width, lambda i: k.store(k.load(F32.x16, source + 4 * i), target + 4 * i), step=LANES
        )

    k.loop(rows // length * last, lane)


def go_on_with_last(k, rows, length, last, context):
    """If ``last``, the operations that follow see the rows of `keep_last` only."""
    k.store(select(last > 0, rows // length, rows), context + CONTEXT.index("rows") * 8)
    k.store(select(last > 0, 1, length), context + CONTEXT.index("length") * 8)


def rotate(
    k, rows, start, length, qkv, keys, values, cos, sin, heads, width, cached, part, parts
):  # fmt: skip
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
                    for end, v in enumerate(turned):
                        if source is query:
                            k.store(v, source + (half * end + i) * 4)
                        else:
                            for j in range(LANES):
                                at = (half * end + i + j) * (LANES * 4)
                                k.store(v.lane(j), block + at)

            k.loop(half, body, step=LANES)
            target = values + cache + place * width * 4
            k.loop(
                width, lambda i: k.store(k.load(F32.x16, value + 4 * i), target + 4 * i), step=LANES
            )

        k.share(heads, head, part, parts)

    k.loop(rows, row)


def attend(
    k, rows, start, length, qkv, keys, values, scores, out, heads, width, cached, causal, part,
    parts,
):  # fmt: skip
    """out_MHK = softmax(q k / sqrt(K)) v over the positions up to each row's own.

    With ``causal`` 0 every row sees all positions.  ``scores`` is room for TILE S floats for each
    part.  TILE neighboring rows of a lane share what is loaded.
    Positions beyond a row's own count as 0, so that its sums do not depend on how many there are.
    """
    block_bytes = LANES * 4
    zero, nothing = k.constant(F32.x16, 0), k.constant(F32.x16, UNSEEN)
    shrink = k.constant(F32, 1.0) / sqrt(width.to(F32))

    def tile(m, height, lane, h):
        """Rows m to m + height of one head."""
        cache = (lane * heads + h) * cached * width * 4
        tall = range(height)
        # The positions that row m sees; row m + j sees j more if causal.
        seen = select(causal > 0, start + m % length + 1, start + length)
        blocks = (seen + causal * (height - 1) + (LANES - 1)) // LANES
        query = [qkv + ((m + j) * heads * 3 + h) * width * 4 for j in tall]
        score = [scores + (part * TILE + j) * cached * 4 for j in tall]

        def score_block(b, *most):
            source = keys + cache + b * width * block_bytes

            def body(i, *sums):
                made = list(sums)
                for u in range(UNROLL):
                    key = k.load(F32.x16, source + (i + u) * block_bytes)
                    if height == 1:
                        k.prefetch(source + (i + u) * block_bytes + AHEAD)
                    for j in tall:
                        q = k.load(F32, query[j] + (i + u) * 4)
                        made[j * UNROLL + u] = made[j * UNROLL + u] + key * q
                return tuple(made)

            sums = k.loop(width, body, *[zero] * (UNROLL * height), step=UNROLL)
            places, made = k.count() + (b * LANES).to(I32), []
            for j in tall:
                s = _paired(sums[j * UNROLL : (j + 1) * UNROLL]) * shrink
                s = select(places < (seen + causal * j).to(I32), s, UNSEEN)
                k.store(s, score[j] + b * block_bytes)
                made.append(maximum(most[j], s))
            return tuple(made)

        most = _several(k.loop(blocks, score_block, *[nothing] * height))
        shares = []
        for j in tall:
            top = most[j].max()

            def weigh(b, total, j=j, top=top):
                s = k.load(F32.x16, score[j] + b * block_bytes)
                p = select(s > UNSEEN / 2, exp(s - top), 0.0)
                k.store(p, score[j] + b * block_bytes)
                return total + p

            shares.append(1.0 / k.loop(blocks, weigh, zero).sum())

        wide = 2 if height == 1 else 1  # vectors of a value that one pass over them sums

        def output(i):
            source = values + cache + 4 * i

            def body(t, *sums):
                made = list(sums)
                for u in range(UNROLL):
                    for v in range(wide):
                        place = source + ((t + u) * width + LANES * v) * 4
                        value = k.load(F32.x16, place)
                        if height == 1:
                            k.prefetch(place + AHEAD)
                        for j in tall:
                            p, n = k.load(F32, score[j] + (t + u) * 4), (j + v) * UNROLL + u
                            made[n] = made[n] + value * p
                return tuple(made)

            sums = k.loop(
                blocks * LANES, body, *[zero] * (UNROLL * height * wide), step=UNROLL
            )  # fmt: skip
            for n in range(height * wide):
                y = _paired(sums[n * UNROLL : (n + 1) * UNROLL]) * shares[n // wide]
                row, v = (m, n) if wide == 2 else (m + n, 0)
                k.store(y, out + ((row * heads + h) * width + i + LANES * v) * 4)

        k.loop(width, output, step=LANES * wide)

    def lane_of_rows(lane):
        first = lane * length
        whole = length // TILE * TILE

        def head(h):
            k.loop(whole, lambda t: tile(first + t, TILE, lane, h), step=TILE)
            k.loop(length, lambda t: tile(first + t, 1, lane, h), start=whole)

        k.share(heads, head, part, parts)

    k.loop(rows // length, lane_of_rows)


def _paired(parts):
    a, b, c, d = parts
    return (a + b) + (c + d)


def _several(values):
    """What a loop returns, as a tuple also if it is one value."""
    return values if isinstance(values, tuple) else (values,)


class _Block(NamedTuple):
    attn_norm: np.ndarray
    qkv: Weight
    out: Weight
    mlp_norm: np.ndarray
    gate_up: Weight
    down: Weight


class Transformer:
    """The blocks of a causal transformer."""

    together, causal = TOGETHER, 1

    def __init__(self, model, machine):
        c = model.config
        self.context = self.remembered = c.seq_len  # ids of a lane
        self.layers, self.d_ff = c.n_layer, c.d_ff
        self.width = c.d_model // c.n_head
        self.widest = max(c.d_model, c.d_ff)  # of what products take
        cached = -(-c.seq_len // LANES) * LANES
        self.heads = {"heads": c.n_head, "width": self.width, "cached": cached}
        cos, sin = rope_tables(c.seq_len, self.width, c.rope_theta, ROPE_BITS)
        half = self.width // 2
        self.angles = {"cos": array(cos[:, :half]), "sin": array(sin[:, :half])}
        self.blocks = [
            _Block(
                array(b.attn_norm.weight), Weight(b.attn.qkv), Weight(b.attn.out),
                array(b.mlp_norm.weight), Weight(b.mlp.gate_up), Weight(b.mlp.down),
            )
            for b in model.body.blocks
        ]  # fmt: skip

    def caches(self, lanes: int) -> list[np.ndarray]:
        """Keys and values of all layers, see `rotate`."""
        heads, cached = self.heads["heads"], self.heads["cached"]
        shape = (self.layers, lanes, heads, cached * self.width)
        return [np.zeros(shape, np.float32) for _ in range(2)]

    def clear(self, caches: list[np.ndarray]) -> None:
        """Nothing: what lies beyond a position is never read."""

    def add(self, step, caches: list[np.ndarray]) -> None:
        """Append the operations of all blocks to an `engine.Step`."""
        D, F = self.heads["heads"] * self.width, self.d_ff
        wide = step.floats(max(3 * D, 2 * F))
        scores = np.zeros((step.threads, TILE, self.heads["cached"]), np.float32)
        for block, keys, values in zip(self.blocks, *caches, strict=True):
            step.normed(block.attn_norm, block.qkv, wide)
            step.add(rotate, qkv=wide, keys=keys, values=values, **self.angles, **self.heads)
            step.add(
                attend,
                qkv=wide,
                keys=keys,
                values=values,
                scores=scores,
                out=step.y,
                **self.heads,
                causal=self.causal,
            )
            step.product(block.out, step.y, step.h_MD, add=1)
            step.normed(block.mlp_norm, block.gate_up, wide)
            if block.down.scale_O is None:
                step.add(gate, x=wide, out=step.y, width=F)
            else:
                step.add(gate_quantize, x=wide, gated=step.y, **step.q, width=F)
            step.product(block.down, step.y, step.h_MD, add=1, quantized=True)


class Bidirectional(Transformer):
    """The blocks of a transformer that sees whole windows."""

    causal = 0

    def __init__(self, model, machine):
        super().__init__(model, machine)
        self.together = max(TOGETHER, self.context)  # windows are never cut


KERNELS = [
    embed, norm, quantize, norm_quantize, gate, gate_quantize, keep_last, go_on_with_last, rotate,
    attend,
]  # fmt: skip
