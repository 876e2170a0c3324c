"""Parts of portable Mamba blocks as fused CPU kernels, with the same bits as `portable_mamba`.

The state of a block of channels stays in the nearest cache while the scan walks through the
positions, and element-wise operations are fused into one pass over memory.

Every operation is rounded as in IEEE 754, in the order of the plain form.  So nothing may be
contracted or reordered: no fastmath, and constants are float32.

Shapes: S lanes, T positions, N states of a channel, D channels, K taps, L = LANES channels of a
block; any shape where none is given.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from bitbyte.kernels.jit import compiler

LANES = 64
WORK = 1 << 16  # state updates that make a thread worthwhile
ZERO, ONE = np.float32(0), np.float32(1)
ROUND = np.float32(1.5 * 2**23)  # adding and subtracting it rounds numbers below 2^22, half to even


def _from_table(table, x, steps, span):
    """The entry nearest to x * steps of a table over -span..span."""
    at = np.float32(x * steps)
    at = span if at > span else at
    at = -span if at < -span else at
    return table[np.uint32(np.float32(np.float32(at + ROUND) - ROUND) + span)]


def _snapped(x, snap, limit):
    """x in multiples of 1 / snap, clamped to +-limit / snap."""
    at = np.float32(np.rint(np.float32(x * snap)))
    at = limit if at > limit else at
    at = -limit if at < -limit else at
    return np.float32(at * np.float32(ONE / snap))


def _look_up(x_M, table, steps, span, times, out_M):
    for i in range(len(x_M)):
        value = _from_table(table, x_M[i], steps, span)
        out_M[i] = np.float32(value * x_M[i]) if times else value


def _convolve(x_STD, taps_KD, bias_D, table, steps, span, snap, limit, y_STD):
    """silu of K products, added oldest first; x has K - 1 positions more than y."""
    S, T, D = y_STD.shape
    for s in range(S):
        for t in range(T):
            for j in range(D):
                y = np.float32(x_STD[s, t, j] * taps_KD[0, j])
                for k in range(1, len(taps_KD)):
                    y = np.float32(y + np.float32(x_STD[s, t + k, j] * taps_KD[k, j]))
                y = np.float32(y + bias_D[j])
                value = np.float32(_from_table(table, y, steps, span) * y)
                y_STD[s, t, j] = _snapped(value, snap, limit)


def _scan(
    h_SND, x_STD, delta_STD, decay_STD, rates_ND, table, b_STN, c_STN, skip_D, y_STD,
    step, shrink, snap, limit, first, last,
):  # fmt: skip
    """Scan blocks first..last-1, counted over all lanes; without rates, ``decay`` is used."""
    N, D = h_SND.shape[1:]
    blocks, end = -(-D // LANES), np.float32(len(table) - 1)
    h, work = np.zeros((N, LANES), np.float32), np.zeros((N, LANES), np.float32)
    rates = np.zeros((len(rates_ND), LANES), np.float32)
    x, delta = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    given, decay = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    skip, y = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for task in range(first, last):
        s, d = task // blocks, task % blocks * LANES
        width = min(LANES, D - d)
        skip[:width] = skip_D[d : d + width]
        for n in range(N):
            h[n, :width] = h_SND[s, n, d : d + width]
        for n in range(len(rates)):
            rates[n, :width] = rates_ND[n, d : d + width]
        for t in range(x_STD.shape[1]):
            x[:width] = x_STD[s, t, d : d + width]
            delta[:width] = delta_STD[s, t, d : d + width]
            if not len(rates):
                decay[:width] = decay_STD[s, t, d : d + width]
            for j in range(LANES):
                given[j] = np.float32(x[j] * delta[j])
            for n in range(N):
                b, c = b_STN[s, t, n], c_STN[s, t, n]
                if len(rates):
                    for j in range(LANES):
                        at = np.float32(delta[j] * rates[n, j])
                        at = end if at > end else at
                        nearest = np.float32(np.float32(at + ROUND) - ROUND)
                        rest = np.float32(np.float32(at - nearest) * step)
                        decay[j] = np.float32(np.float32(rest + ONE) * table[np.uint32(nearest)])
                for j in range(LANES):
                    v = np.float32(np.float32(given[j] * b) + np.float32(h[n, j] * decay[j]))
                    v = v if abs(v) > shrink else ZERO
                    h[n, j] = v
                    work[n, j] = np.float32(v * c)
            n = N
            while n > 1:
                half = n // 2
                for i in range(half):
                    for j in range(LANES):
                        work[i, j] = np.float32(work[i, j] + work[n - half + i, j])
                n -= half
            for j in range(LANES):
                sum_ = np.float32(np.float32(x[j] * skip[j]) + work[0, j])
                y[j] = _snapped(sum_, snap, limit)
            y_STD[s, t, d : d + width] = y[:width]
        for n in range(N):
            h_SND[s, n, d : d + width] = h[n, :width]


@functools.cache
def _compiled() -> dict[str, Callable]:
    """The kernels in machine code.  Raises BitbyteError without numba."""
    jit = compiler(nogil=True)
    from numba.extending import register_jitable

    register_jitable(_from_table)
    register_jitable(_snapped)
    return {"look_up": jit(_look_up), "convolve": jit(_convolve), "scan": jit(_scan)}


def _in_threads(kernel: Callable, n: int, work: int) -> None:
    """Run kernel(first, last) on parts of 0..n-1, which must write to separate results."""
    threads = max(1, min(torch.get_num_threads(), n, work // WORK))
    edges = [n * i // threads for i in range(threads + 1)]
    if threads == 1:
        kernel(0, n)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(kernel, edges[:-1], edges[1:]))


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [v.contiguous().numpy() for v in tensors]


def look_up(table: Tensor, x: Tensor, steps: int, span: int, times: bool) -> Tensor:
    """The entry nearest to x * steps of a table over -span..span; ``times``: times x.  Float32."""
    kernel, out = _compiled()["look_up"], torch.empty_like(x, memory_format=torch.contiguous_format)
    x_M, table, out_M = _arrays(x.reshape(-1), table, out.view(-1))
    scalars = np.float32(steps), np.float32(span), times

    def part(first: int, last: int) -> None:
        kernel(x_M[first:last], table, *scalars, out_M[first:last])

    _in_threads(part, len(x_M), len(x_M))
    return out


def convolve(
    x_STD: Tensor, taps_KD: Tensor, bias_D: Tensor, table: Tensor, *, steps: int, span: int,
    snap: float, limit: float,
) -> Tensor:  # fmt: skip
    """silu of the causal convolution, snapped; x begins with the K - 1 preceding positions."""
    kernel = _compiled()["convolve"]
    S, T, D = x_STD.shape
    y_STD = x_STD.new_empty(S, T - len(taps_KD) + 1, D)
    x, taps, bias, table, y = _arrays(x_STD, taps_KD, bias_D, table, y_STD)
    scalars = [np.float32(v) for v in (steps, span, snap, limit)]

    def part(first: int, last: int) -> None:
        kernel(x[first:last], taps, bias, table, *scalars, y[first:last])

    _in_threads(part, S, y_STD.numel())
    return y_STD


def scan(
    h_SND: Tensor, x_STD: Tensor, delta_STD: Tensor, decay_STD: Tensor | None, rates_ND: Tensor,
    table: Tensor, b_STN: Tensor, c_STN: Tensor, skip_D: Tensor, *, step: float, shrink: float,
    snap: float, limit: float,
) -> Tensor:  # fmt: skip
    """h = decay h + delta x b over all positions, in place; returns y_STD = h c + skip x, snapped.

    All float32 on the CPU, h contiguous.  ``decay_STD`` is one decay for all states of a channel;
    if None, each state has its own, exp(-delta * rate) by ``table``, with ``rates_ND`` in table
    steps, each of which adds ``step`` to the exponent.  States of at most ``shrink`` become 0.
    """
    kernel = _compiled()["scan"]
    S, T, D = x_STD.shape
    y_STD, none = x_STD.new_empty(S, T, D), x_STD.new_empty(0, 0, 0)
    rates_ND = rates_ND if decay_STD is None else rates_ND.new_empty(0, D)
    arrays = _arrays(
        h_SND, x_STD, delta_STD, none if decay_STD is None else decay_STD, rates_ND, table, b_STN,
        c_STN, skip_D, y_STD,
    )  # fmt: skip
    scalars = [np.float32(v) for v in (step, shrink, snap, limit)]
    _in_threads(
        lambda first, last: kernel(*arrays, *scalars, first, last), S * -(-D // LANES),
        h_SND.numel() * T,
    )  # fmt: skip
    return y_STD
