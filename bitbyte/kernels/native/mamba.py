"""The blocks of Mamba-1 and Mamba-2, and their operations: convolution and recurrence.

A row is one position of one lane, as in `transformer`.  Rows of a lane follow each other in the
recurrence (see `bitbyte.scans`), however many are fed at once.  Its state h lies in blocks of 16
channels, (D / 16, N, 16): as (N, D), the N numbers of a channel would be a power of two apart and
compete for the same few places of the processor's cache.

Shapes: M rows, D inner channels (H heads of P in Mamba-2), N state size, K taps of the convolution,
R rank of delta's projection, W numbers in a row of a padded projection.
"""

import math
import sys

import numpy as np

from bitbyte.kernels.native.machine import Program
from bitbyte.kernels.native.products import Weight, array
from bitbyte.kernels.native.transformer import norm
from bitbyte.kernels.native.vector import F32, LANES, exp, exp2, fma, select, silu, softplus
from bitbyte.prior import PAST

TOGETHER = 256  # ids that one thread computes at once: their scratch fits into its cache
TILE = 4  # rows of a lane whose recurrence is computed together
UNROLL = 4  # partial sums, added in pairs


def rates(k, a_log, out, n):
    """out = -e^a_log / ln 2, so that a step of delta decays by 2^(delta out)."""

    def body(i):
        k.store(exp(k.load(F32.x16, a_log + 4 * i)) * (-1 / math.log(2)), out + 4 * i)

    k.loop(n, body, step=LANES)


def convolve(k, rows, length, x, across, weight, bias, past, out, channels, taps):
    """out_MC = silu of the causal convolution of x_MC with weight_KC, tap K - 1 at the row itself.

    The rows of x are ``across`` numbers apart; ``past`` has the K - 1 rows before them, (lanes,
    K - 1, C), and is moved on.
    """
    kept = taps - 1

    def lane(s):
        older, newer = past + s * kept * channels * 4, x + s * length * across * 4

        def source(i):
            """Row i of past and x in one."""
            return select(i < kept, older + i * channels * 4, newer + (i - kept) * across * 4)

        def row(t):
            def block(c):
                def tap(j, total):
                    w = k.load(F32.x16, weight + (j * channels + c) * 4)
                    return fma(k.load(F32.x16, source(t + j) + 4 * c), w, total)

                y = silu(k.loop(taps, tap, k.load(F32.x16, bias + 4 * c)))
                k.store(y, out + ((s * length + t) * channels + c) * 4)

            k.loop(channels, block, step=LANES)

        def keep(i):
            old, new = source(length + i), older + i * channels * 4
            k.loop(
                channels, lambda c: k.store(k.load(F32.x16, old + 4 * c), new + 4 * c), step=LANES
            )

        k.loop(length, row)
        k.loop(kept, keep)

    k.loop(rows // length, lane)


def scan(k, rows, length, x, delta, bias, a, b, c, across, skip, z, state, out, width, states):
    """out_MD = y_MD silu(z) of the recurrence of Mamba-1, with delta = softplus(delta_MD + bias_D).

    a (D / 16, N, 16) is from `rates`; b_MN and c_MN have rows that are ``across`` numbers apart, z
    rows of 2D.  ``state`` is (lanes, D / 16, N, 16).
    """

    def lane(s):
        def row(t):
            m = s * length + t

            def block(d):
                rate, h = a + d * states * 4, state + (s * width + d) * states * 4
                u = k.load(F32.x16, x + (m * width + d) * 4)
                step = k.load(F32.x16, delta + (m * width + d) * 4)
                step = softplus(step + k.load(F32.x16, bias + 4 * d))
                drive = step * u

                def number(n, y):
                    decay = exp2(step * k.load(F32.x16, rate + n * (LANES * 4)))
                    now = drive * k.load(F32, b + (m * across + n) * 4)
                    now = fma(decay, k.load(F32.x16, h + n * (LANES * 4)), now)
                    k.store(now, h + n * (LANES * 4))
                    return fma(now, k.load(F32, c + (m * across + n) * 4), y)

                y = k.loop(states, number, k.load(F32.x16, skip + 4 * d) * u)
                y = y * silu(k.load(F32.x16, z + (m * width * 2 + d) * 4))
                k.store(y, out + (m * width + d) * 4)

            k.loop(width, block, step=LANES)

        k.loop(length, row)

    k.loop(rows // length, lane)


def scan_heads(
    k, rows, length, x, delta, across, bias, a, b_c, skip, z, state, out, heads, width, states
):
    """out_MD = y_MD silu(z) of the recurrence of Mamba-2, with delta = softplus(delta_MH + bias_H).

    a_H is from `rates`; delta has rows that are ``across`` numbers apart, b_c_M(2N) b and c, z rows
    of 2D.  ``state`` is (lanes, D / 16, N, 16).  TILE rows of a lane share what is loaded.
    """
    inner = heads * width

    def tile(m, height, lane, h):
        """Rows m to m + height of one head."""
        tall = range(height)
        rate, offset, through = (k.load(F32, v + 4 * h).splat(LANES) for v in (a, bias, skip))
        steps = [k.load(F32, delta + ((m + j) * across + h) * 4).splat(LANES) for j in tall]
        steps = [softplus(step + offset) for step in steps]
        decay = [exp2(step * rate) for step in steps]
        b = [b_c + (m + j) * states * 8 for j in tall]

        def block(p):
            d = h * width + p
            cells = state + (lane * inner + d) * states * 4
            place = [(m + j) * inner + d for j in tall]
            u = [k.load(F32.x16, x + place[j] * 4) for j in tall]
            drive = [steps[j] * u[j] for j in tall]

            def numbers(n, *parts):
                made = list(parts)
                for i in range(UNROLL):
                    cell = cells + (n + i) * (LANES * 4)
                    now = k.load(F32.x16, cell)
                    for j in tall:
                        into, from_ = (
                            k.load(F32, b[j] + (part * states + n + i) * 4) for part in range(2)
                        )
                        now = fma(decay[j], now, drive[j] * into)
                        made[j * UNROLL + i] = fma(now, from_, made[j * UNROLL + i])
                    k.store(now, cell)
                return tuple(made)

            zero = k.constant(F32.x16, 0)
            parts = k.loop(states, numbers, *[zero] * (UNROLL * height), step=UNROLL)
            for j in tall:
                one, two, three, four = parts[j * UNROLL : (j + 1) * UNROLL]
                y = fma(through, u[j], (one + two) + (three + four))
                gate = k.load(F32.x16, z + (place[j] + (m + j) * inner) * 4)
                k.store(y * silu(gate), out + place[j] * 4)

        k.loop(width, block, step=LANES)

    def lane_of_rows(lane):
        first = lane * length
        whole = length // TILE * TILE

        def head(h):
            k.loop(whole, lambda t: tile(first + t, TILE, lane, h), step=TILE)
            k.loop(length, lambda t: tile(first + t, 1, lane, h), start=whole)

        k.loop(heads, head)

    k.loop(rows // length, lane_of_rows)


class _Mixer:
    """The packed weights of a block, and what both Mambas share.

    ``channels`` are the widths of what is convolved; `scratch` has arrays for all blocks in turn,
    and `add` appends the operations to an `engine.Step`.
    """

    channels: tuple[int, ...]

    def __init__(self, block, machine):
        mixer = block.mixer
        self.D, self.N = mixer.d_inner, mixer.d_state
        self.norm = array(block.norm.weight)
        self.in_proj, self.out_proj = Weight(mixer.in_proj), Weight(mixer.out_proj)
        self.taps, self.conv_bias = array(mixer.conv_weight.T), array(mixer.conv_bias)
        self.bias, self.skip = array(mixer.dt_bias), array(mixer.skip)
        a_log = array(mixer.a_log)
        if a_log.ndim == 2:
            a_log = a_log.reshape(-1, LANES, self.N).transpose(0, 2, 1)
        self.a = np.zeros(-(-a_log.size // LANES) * LANES, np.float32)
        self.a[: a_log.size] = a_log.flatten()
        made = Program(machine)
        made.add(rates, a_log=self.a, out=self.a, n=self.a.size)
        made.finish()
        made()

    def convolved(self, step, x, across: int, first: int, past: np.ndarray, out: np.ndarray):
        """Append the convolution of the channels from ``first`` on that ``past`` has."""
        part = slice(first, first + past.shape[-1])
        step.add(convolve, x=x, across=across, weight=np.ascontiguousarray(self.taps[:, part]),
                 bias=self.conv_bias[part], past=past, out=out, channels=past.shape[-1],
                 taps=len(self.taps))  # fmt: skip


class _Mamba1(_Mixer):
    """z, x <- u; x convolved; delta, b, c <- x."""

    def __init__(self, block, machine):
        super().__init__(block, machine)
        self.channels = (self.D,)
        self.x_proj, self.dt_proj = Weight(block.mixer.x_proj), Weight(block.mixer.dt_weight)
        self.R = block.mixer.dt_weight.shape[1]

    def scratch(self, step) -> dict[str, np.ndarray]:
        D = self.D
        return {
            "z_x": step.floats(2 * D), "x": step.floats(D), "delta": step.floats(D),
            "mixed": step.floats(self.x_proj.outputs),
        }  # fmt: skip

    def add(self, step, pasts, h, z_x, x, delta, mixed) -> None:
        D, N, R, W = self.D, self.N, self.R, self.x_proj.outputs
        step.normed(self.norm, self.in_proj, z_x)
        self.convolved(step, z_x.reshape(-1)[D:], 2 * D, 0, pasts[0], x)
        step.product(self.x_proj, x, mixed)  # delta's input, b and c
        step.product(self.dt_proj, mixed, delta, across=W)
        b, c = mixed.reshape(-1)[R:], mixed.reshape(-1)[R + N :]
        step.add(scan, x=x, delta=delta, bias=self.bias, a=self.a, b=b, c=c, across=W,
                 skip=self.skip, z=z_x, state=h, out=step.y, width=D, states=N)  # fmt: skip
        step.product(self.out_proj, step.y, step.h_MD, add=1)


class _Mamba2(_Mixer):
    """z, x, b, c, delta <- u; x, b, c convolved; the gated output is normed."""

    def __init__(self, block, machine):
        super().__init__(block, machine)
        self.channels = self.D, 2 * self.N
        self.H, self.out_norm = block.mixer.n_head, array(block.mixer.norm.weight)
        self.bcdt_proj = Weight(block.mixer.bcdt_proj)

    def scratch(self, step) -> dict[str, np.ndarray]:
        D = self.D
        return {
            "z_x": step.floats(2 * D), "x": step.floats(D), "b_c": step.floats(2 * self.N),
            "mixed": step.floats(self.bcdt_proj.outputs), "gated": step.floats(D),
        }  # fmt: skip

    def add(self, step, pasts, h, z_x, x, b_c, mixed, gated) -> None:
        D, N, W = self.D, self.N, self.bcdt_proj.outputs
        step.add(norm, x=step.h_MD, weight=self.norm, out=step.y, width=len(self.norm))
        step.product(self.bcdt_proj, step.y, mixed)
        step.product(self.in_proj, step.y, z_x)
        self.convolved(step, z_x.reshape(-1)[D:], 2 * D, 0, pasts[0], x)
        self.convolved(step, mixed, W, D, pasts[1], b_c)
        step.add(scan_heads, x=x, delta=mixed.reshape(-1)[2 * N :], across=W, bias=self.bias,
                 a=self.a, b_c=b_c, skip=self.skip, z=z_x, state=h, out=gated, heads=self.H,
                 width=D // self.H, states=N)  # fmt: skip
        step.normed(self.out_norm, self.out_proj, step.h_MD, x=gated, add=1)


class Mamba:
    """The blocks of a Mamba."""

    context, together = sys.maxsize, TOGETHER
    remembered = PAST + TOGETHER  # ids of a lane

    def __init__(self, model, machine):
        c = model.config
        kind = {"mamba1": _Mamba1, "mamba2": _Mamba2}[c.ssm]
        self.mixers = [kind(block, machine) for block in model.body.blocks]
        self.widest, self.kept = c.d_inner, c.d_conv - 1

    def caches(self, lanes: int) -> list[np.ndarray]:
        """The last rows of each convolution's input, and h, of all layers."""
        mixer = self.mixers[0]
        shapes = [(self.kept, channels) for channels in mixer.channels]
        shapes = [*shapes, (mixer.D // LANES, mixer.N, LANES)]
        return [np.zeros((len(self.mixers), lanes, *shape), np.float32) for shape in shapes]

    def clear(self, caches: list[np.ndarray]) -> None:
        """Make them as they were before the first id."""
        for cache in caches:
            cache.fill(0)

    def add(self, step, caches: list[np.ndarray]) -> None:
        """Append the operations of all blocks to an `engine.Step`."""
        scratch = self.mixers[0].scratch(step)
        for mixer, *pasts, h in zip(self.mixers, *caches, strict=True):
            mixer.add(step, pasts, h, **scratch)


KERNELS = [rates, convolve, scan, scan_heads]
