"""Matrix products: ternary weights by int8 activations, and float32 by float32.

Ternary weights lie in memory as w + 1 in two bits.  A panel of 32 outputs by 16 inputs takes 128
bytes: output r of a panel has the four bytes 4r..4r + 3, and byte b of them holds input 4c + b in
its bits 2c, 2c + 1 (c, b in 0..3).  So one AND leaves four inputs of 16 outputs in a register,
scaled by 4^c, as `dot4` wants them; the scale is shifted out at the end, since all sums are exact.

Dense weights lie in panels of 32 outputs: (O / 32, I, 32) float32.

Rows (positions) are independent: a row's sums do not depend on how many rows there are.

Shapes: M rows, I inputs, O outputs.
"""

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from torch import Tensor, nn

from bitbyte.bitlinear import BitLinear, Linear
from bitbyte.kernels.fixed import ternary_weight
from bitbyte.kernels.native.vector import F32, I8, I16, I32, I64, Kernel, Value, fma

PANEL = 32  # outputs of a panel
HEIGHTS = 8, 4, 2  # rows that share the unpacking of ternary weights
UNROLL = 4  # partial sums of a dense product
HEIGHT = 3  # rows that share the loading of dense weights: 24 sums in 32 registers


def pack_ternary(q_OI: np.ndarray) -> np.ndarray:
    """Ternary values (int8) in panels, as the module docstring says: uint8, O * I / 4."""
    panels, chunks = q_OI.shape[0] // PANEL, q_OI.shape[1] // 16
    crumbs = (q_OI + 1).astype(np.uint8).reshape(panels, PANEL, chunks, 4, 4)
    byte = np.zeros((panels, PANEL, chunks, 4), np.uint8)
    for c in range(4):
        byte |= crumbs[:, :, :, c] << 2 * c
    return np.ascontiguousarray(byte.transpose(0, 2, 1, 3)).reshape(-1)


def pack_dense(w_OI: np.ndarray) -> np.ndarray:
    """Dense weights in panels: float32 (O / 32, I, 32)."""
    panels_PRI = w_OI.reshape(-1, PANEL, w_OI.shape[1])
    return np.ascontiguousarray(panels_PRI.transpose(0, 2, 1), np.float32)


class Weight:
    """A packed matrix; dense ones may have any shape and are filled up with zeros.

    A ternary layer without quantized activations is a dense one here.
    """

    def __init__(self, layer: "Linear | Tensor"):
        w_OI = array(layer.weight if isinstance(layer, nn.Module) else layer)
        self.scale_O = None
        if isinstance(layer, BitLinear):
            q_OI, scale_O = (t.numpy() for t in ternary_weight(layer.matrices().detach()))
            if layer.act_quant:
                self.packed, self.scale_O = pack_ternary(q_OI), scale_O
            else:
                w_OI = q_OI * scale_O[:, None]
        if self.scale_O is None:
            outputs, inputs = w_OI.shape
            w_OI = np.pad(w_OI, ((0, -outputs % PANEL), (0, -inputs % UNROLL)))
            self.packed = pack_dense(w_OI)
        self.outputs, self.inputs = w_OI.shape


def array(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor as contiguous float32, whose address can be handed on."""
    return np.array(tensor.detach().float().cpu().numpy(), order="C")


def dot4(k: Kernel, total: Value, w: Value, x: Value) -> Value:
    """total (16 int32) + products of 64 unsigned bytes by 64 signed ones, four to a lane.

    The unsigned ones are at most 128, and total's sums must not leave 32 bits.
    """
    i8, i16, i32 = (ir.IntType(n) for n in (8, 16, 32))
    if "avx512vnni" in k.features or "avxvnni" in k.features:
        lanes = 16 if "avx512vnni" in k.features else 8
        parts = []
        for i in range(0, 16, lanes):
            words = ir.VectorType(i32, lanes)
            operand = ir.VectorType(i8, 4 * lanes) if llvm.llvm_version_info[0] >= 21 else words
            pair = [_cast(_part(v, 4 * i, 4 * lanes), operand) for v in (w, x)]
            sums = _part(total, i, lanes)
            kind = ir.FunctionType(words, [words, operand, operand])
            name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
            parts.append(k.call(name, kind, sums, *pair))
        return _joined(parts)
    if "avx2" in k.features:  # products of two bytes, then sums of two: no pair leaves 16 bits
        parts = []
        for i in (0, 8):
            a, b = _part(w, 4 * i, 32), _part(x, 4 * i, 32)
            kind = ir.FunctionType(ir.VectorType(i16, 16), [ir.VectorType(i8, 32)] * 2)
            pairs = k.call("llvm.x86.avx2.pmadd.ub.sw", kind, a, b)
            kind = ir.FunctionType(ir.VectorType(i32, 8), [ir.VectorType(i16, 16)] * 2)
            ones = k.constant(I16.x16, 1)
            parts.append(_part(total, i, 8) + k.call("llvm.x86.avx2.pmadd.wd", kind, pairs, ones))
        return _joined(parts)
    if "simd128" in k.features:  # WebAssembly: products of two 16-bit numbers, added in pairs
        pairs, numbers = w.bits(I16.x(32)), x.bits(I16.x(32))
        halves = (
            (pairs & 255, (numbers << 8) >> 8),
            (pairs.unsigned_shift(8), numbers >> 8),
        )
        parts = []
        kind = ir.FunctionType(ir.VectorType(i32, 4), [ir.VectorType(i16, 8)] * 2)
        for i in range(4):
            part = _part(total, 4 * i, 4)
            for a, b in halves:
                part = part + k.call("llvm.wasm.dot", kind, _part(a, 8 * i, 8), _part(b, 8 * i, 8))
            parts.append(part)
        return _joined([_joined(parts[:2]), _joined(parts[2:])])
    words, numbers = w.bits(I32.x16), x.bits(I32.x16)
    for b in range(4):
        byte = (numbers << 24 - 8 * b) >> 24
        total = total + (words.unsigned_shift(8 * b) & 255) * byte
    return total


def _part(v: Value, first: int, n: int) -> Value:
    return v if n == v.ir.type.count else v.lanes(*range(first, first + n))


def _cast(v: Value, llvm_type: ir.Type) -> Value:
    return Value(v.kernel, v.kernel.builder.bitcast(v.ir, llvm_type))


def _joined(parts: list[Value]) -> Value:
    if len(parts) == 1:
        return parts[0]
    a, b = parts
    n = 2 * a.ir.type.count
    places = ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(n)))
    return Value(a.kernel, a.kernel.builder.shuffle_vector(a.ir, b.ir, places))


def ternary(
    k, rows, x, x_scale, x_sum, weight, scale, out, inputs, outputs, add, part, parts
):  # fmt: skip
    """out_MO = (x_MI w^T) * x_scale_M * scale_O, plus what is in out if ``add``.

    x is int8 with a scale and a sum of each row; scale (float32) has one number per output.
    """
    chunks = inputs // 16
    k.share(
        outputs // PANEL,
        lambda p: _panel(
            k, p, chunks, rows, x, x_scale, x_sum, weight, scale, out, inputs, outputs, add
        ),
        part,
        parts,
    )


def _panel(k, p, chunks, rows, x, x_scale, x_sum, weight, scale, out, inputs, outputs, add):
    start = weight + p * chunks * (PANEL * 4)
    zero = k.constant(I32.x16, 0)
    crumb = [k.constant(I8.x(64), 3 << 2 * c if c < 3 else -64) for c in range(4)]
    scales = [k.load(F32.x16, scale + (p * PANEL + 16 * half) * 4) for half in range(2)]

    def finish(m, half, total):
        """Remove the sum that w + 1 has too much, scale, and store 16 outputs of row m."""
        total = total - k.load(I32, x_sum + 4 * m)
        y = (total.to(F32) * k.load(F32, x_scale + 4 * m)) * scales[half]
        place = out + (m * outputs + p * PANEL + 16 * half) * 4
        with k.builder.if_else(add.equals(0).ir) as (alone, onto):
            with alone:
                k.store(y, place)
            with onto:
                k.store(k.load(F32.x16, place) + y, place)

    def tile(m, height):
        def body(i, *totals):
            made = list(totals)
            w = [k.load(I32.x16, start + i * 128 + 64 * half) for half in range(2)]
            for c in range(4):
                small = [((v.unsigned_shift(2 * c)) & 0x03030303).bits(I8.x(64)) for v in w]
                for t in range(height):
                    four = k.load(I32, x + (m + t) * inputs + i * 16 + 4 * c)
                    four = four.splat(16).bits(I8.x(64))
                    for half in range(2):
                        n = 2 * t + half
                        made[n] = dot4(k, made[n], small[half], four)
            return tuple(made)

        totals = k.loop(chunks, body, *[zero] * (2 * height))
        for t in range(height):
            for half in range(2):
                finish(m + t, half, totals[2 * t + half])

    def single(m):
        def body(i, *totals):
            made = list(totals)
            k.prefetch(start + i * 128 + (1 << 14))
            k.prefetch(start + i * 128 + (1 << 14) + 64)
            w = [k.load(I8.x(64), start + i * 128 + 64 * half) for half in range(2)]
            for c in range(4):
                four = k.load(I32, x + m * inputs + i * 16 + 4 * c).splat(16).bits(I8.x(64))
                for half in range(2):
                    n = 4 * half + c
                    made[n] = dot4(k, made[n], w[half] & crumb[c], four)
            return tuple(made)

        totals = k.loop(chunks, body, *[zero] * 8)
        for half in range(2):
            four = totals[4 * half : 4 * half + 4]
            finish(m, half, (four[0] + (four[1] >> 2)) + ((four[2] >> 4) + (four[3] >> 6)))

    done = k.constant(I64, 0)
    for height in HEIGHTS:
        stop = done + (rows - done) // height * height
        k.loop(stop, lambda m, height=height: tile(m, height), start=done, step=height)
        done = stop
    k.loop(rows, single, start=done)


def dense(k, rows, x, across, weight, out, inputs, outputs, add, part, parts):
    """out_MO = x_MI w^T in float32, plus what is in out if ``add``; I a multiple of UNROLL.

    The rows of x are ``across`` numbers apart.  Input i is added to partial sum i mod UNROLL; these
    are added in pairs at the end.
    """

    def panel(p):
        start = weight + p * inputs * (PANEL * 4)

        def tile(m, height):
            def body(i, *totals):
                made = list(totals)
                for u in range(UNROLL):
                    w = [
                        k.load(F32.x16, start + ((i + u) * PANEL + 16 * half) * 4)
                        for half in range(2)
                    ]
                    for t in range(height):
                        one = k.load(F32, x + ((m + t) * across + i + u) * 4)
                        for half in range(2):
                            n = (t * UNROLL + u) * 2 + half
                            made[n] = fma(w[half], one, made[n])
                return tuple(made)

            zero = k.constant(F32.x16, 0)
            totals = k.loop(inputs, body, *[zero] * (2 * UNROLL * height), step=UNROLL)
            for t in range(height):
                for half in range(2):
                    a, b, c, d = (totals[(t * UNROLL + u) * 2 + half] for u in range(UNROLL))
                    y = (a + b) + (c + d)
                    place = out + ((m + t) * outputs + p * PANEL + 16 * half) * 4
                    with k.builder.if_else(add.equals(0).ir) as (alone, onto):
                        with alone:
                            k.store(y, place)
                        with onto:
                            k.store(k.load(F32.x16, place) + y, place)

        whole = rows // HEIGHT * HEIGHT
        k.loop(whole, lambda m: tile(m, HEIGHT), step=HEIGHT)
        k.loop(rows, lambda m: tile(m, 1), start=whole)

    k.share(outputs // PANEL, panel, part, parts)
