"""`scans.selective_scan` of Mamba-1 on the CPU: one fused kernel forward, one backward.

    h_t = exp(delta_t * A) * h_{t-1} + delta_t * B_t * x_t,  h_{-1} = 0      (state, D x N)
    y_t = sum_n C_t * h_t + skip * x_t

(Gu and Dao, arXiv:2312.00752, section 3.2 and algorithm 2.)  The states of all positions never
exist at once: one is kept every SEGMENT positions, and the backward pass recomputes the others.

Channels run along SIMD lanes.  Inside a segment the states n are the outer loop and the positions
the inner one, so that h stays in registers and all scratch in the nearest cache, whatever N is.

Shapes: B batch, T positions, D channels, N states of a channel, K = ceil(D / L) blocks of
L = LANES channels, S = ceil(T / SEGMENT) segments.  All arithmetic is float32.
"""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitbyte.files import RunError
from bitbyte.kernels.jit import compiler

LANES = 64  # channels of a block: four 512-bit or eight 256-bit registers
SEGMENT = 32  # positions between two kept states
GROUP = 4  # blocks that one task takes through a segment before the next segment

# numba freezes globals; a Python float would make the kernels compute in float64.
ZERO, ONE, LN_2 = np.float32(0), np.float32(1), np.float32(math.log(2))
LOWEST = np.float32(-125)  # 2**LOWEST is still a normal number
ROUND = np.float32(1.5 * 2**23)  # adding it rounds to an integer, found in the low bits
# 2**f = 1 + E1 f + ... + E5 f**5 for |f| <= 1/2, least maximal relative error (9e-8)
E1, E2, E3, E4, E5 = (
    np.float32(c)
    for c in (0.6931470037, 0.2402224243, 0.0555073358, 0.0096715130, 0.0013264727)
)  # fmt: skip
# Sums may be reordered into lanes, but nan and inf must survive, and so must the rounding trick.
REORDER = {"contract", "nsz", "arcp", "reassoc"}
KEEP_ORDER = {"contract", "nsz"}


def _exp2(z):
    """2**z for z < 127 in float32, relative error 2e-7; never below 2**-125."""
    z = LOWEST if z < LOWEST else z
    shifted = np.float32(z + ROUND)
    f = z - (shifted - ROUND)
    p = np.float32(((((E5 * f + E4) * f + E3) * f + E2) * f + E1) * f + ONE)
    exponent = np.int32(shifted.view(np.int32) << np.int32(23))
    return np.int32(p.view(np.int32) + exponent).view(np.float32)


def _scratch():
    """A row of lanes for each position, and one more; when compiled, it lies on the stack.

    LLVM knows that two stack arrays never overlap; otherwise it could not vectorize well.
    """
    return np.empty((SEGMENT + 1, LANES), np.float32)


def _forward(x_BTKL, delta_BTKL, a_KNL, b_BTN, c_BTN, skip_KL, y_BTKL, start_BKSNL, row, group):
    """Scan one group of one batch row: fills y and the state before each segment.

    ``a`` is A / ln 2, because e**z = 2**(z / ln 2).
    """
    (_, T, K, _), N, S = x_BTKL.shape, a_KNL.shape[1], start_BKSNL.shape[2]
    delta, dx, y = _scratch(), _scratch(), _scratch()
    a, h = _scratch()[0], _scratch()[0]
    first = group * GROUP
    for s in range(S):
        t0 = s * SEGMENT
        steps = min(SEGMENT, T - t0)
        for k in range(first, min(first + GROUP, K)):
            if s == 0:
                start_BKSNL[row, k, 0] = ZERO
            for t in range(steps):
                for j in range(LANES):
                    x = x_BTKL[row, t0 + t, k, j]
                    delta[t, j] = delta_BTKL[row, t0 + t, k, j]
                    dx[t, j] = delta[t, j] * x
                    y[t, j] = skip_KL[k, j] * x
            for n in range(N):
                for j in range(LANES):
                    a[j] = a_KNL[k, n, j]
                    h[j] = start_BKSNL[row, k, s, n, j]
                for t in range(steps):
                    b, c = b_BTN[row, t0 + t, n], c_BTN[row, t0 + t, n]
                    for j in range(LANES):
                        h[j] = _exp2(delta[t, j] * a[j]) * h[j] + b * dx[t, j]
                        y[t, j] += c * h[j]
                if s + 1 < S:
                    for j in range(LANES):
                        start_BKSNL[row, k, s + 1, n, j] = h[j]
            for t in range(steps):
                for j in range(LANES):
                    y_BTKL[row, t0 + t, k, j] = y[t, j]


def _backward(
    x_BTKL, delta_BTKL, a_KNL, b_BTN, c_BTN, skip_KL, start_BKSNL, g_BTKL,
    grad_x_BTKL, grad_delta_BTKL, grad_a_BKNL, grad_b_GBTN, grad_c_GBTN, grad_skip_BKL, row, group,
):  # fmt: skip
    """Gradients of one group of one batch row, from g, the gradient of y.

    Those of A and skip are this row's share, those of B and C this group's share; all four must be
    zero on entry.
    """
    (_, T, K, _), N, S = x_BTKL.shape, a_KNL.shape[1], start_BKSNL.shape[2]
    delta, dx, g, decay, h = _scratch(), _scratch(), _scratch(), _scratch(), _scratch()
    grad_dx, grad_z = _scratch(), _scratch()
    a, grad_a, carry = _scratch()[0], _scratch()[0], _scratch()[0]
    first = group * GROUP
    carry_KNL = np.zeros((GROUP, N, LANES), np.float32)  # gradient of a segment's last h
    for s in range(S - 1, -1, -1):
        t0 = s * SEGMENT
        steps = min(SEGMENT, T - t0)
        for k in range(first, min(first + GROUP, K)):
            for t in range(steps):
                for j in range(LANES):
                    delta[t, j] = delta_BTKL[row, t0 + t, k, j]
                    dx[t, j] = delta[t, j] * x_BTKL[row, t0 + t, k, j]
                    g[t, j] = g_BTKL[row, t0 + t, k, j]
                    grad_dx[t, j] = ZERO
                    grad_z[t, j] = ZERO
            for n in range(N):
                for j in range(LANES):
                    a[j] = a_KNL[k, n, j]
                    h[0, j] = start_BKSNL[row, k, s, n, j]
                    grad_a[j] = grad_a_BKNL[row, k, n, j]
                    carry[j] = carry_KNL[k - first, n, j]
                for t in range(steps):
                    b = b_BTN[row, t0 + t, n]
                    for j in range(LANES):
                        decay[t, j] = _exp2(delta[t, j] * a[j])
                        h[t + 1, j] = decay[t, j] * h[t, j] + b * dx[t, j]
                for i in range(steps):
                    t = steps - 1 - i
                    b, c = b_BTN[row, t0 + t, n], c_BTN[row, t0 + t, n]
                    grad_b, grad_c = ZERO, ZERO
                    for j in range(LANES):
                        grad_h = carry[j] + c * g[t, j]
                        grad_b += grad_h * dx[t, j]
                        grad_c += g[t, j] * h[t + 1, j]
                        grad_dx[t, j] += b * grad_h
                        carry[j] = decay[t, j] * grad_h
                        grad_exponent = carry[j] * h[t, j]
                        grad_a[j] += grad_exponent * delta[t, j]
                        grad_z[t, j] += grad_exponent * a[j]
                    grad_b_GBTN[group, row, t0 + t, n] += grad_b
                    grad_c_GBTN[group, row, t0 + t, n] += grad_c
                for j in range(LANES):
                    grad_a_BKNL[row, k, n, j] = grad_a[j]
                for j in range(LANES):
                    carry_KNL[k - first, n, j] = carry[j]
            for j in range(LANES):
                carry[j] = grad_skip_BKL[row, k, j]
            for t in range(steps):
                for j in range(LANES):
                    x = x_BTKL[row, t0 + t, k, j]
                    grad_z[t, j] = LN_2 * grad_z[t, j] + grad_dx[t, j] * x
                    grad_dx[t, j] = grad_dx[t, j] * delta[t, j] + skip_KL[k, j] * g[t, j]
                    carry[j] += g[t, j] * x
                for j in range(LANES):
                    grad_x_BTKL[row, t0 + t, k, j] = grad_dx[t, j]
                for j in range(LANES):
                    grad_delta_BTKL[row, t0 + t, k, j] = grad_z[t, j]
            for j in range(LANES):
                grad_skip_BKL[row, k, j] = carry[j]


@functools.cache
def _compiled() -> tuple[Callable, Callable]:
    """(forward, backward) in machine code.  Raises BitbyteError without numba."""
    jit = compiler(nogil=True, fastmath=REORDER)
    from llvmlite import ir
    from numba.core import types
    from numba.extending import lower_builtin, register_jitable, type_callable
    from numba.np.arrayobj import populate_array

    shape = (SEGMENT + 1, LANES)

    @type_callable(_scratch)
    def scratch_type(_context):
        return lambda: types.Array(types.float32, len(shape), "C")

    @lower_builtin(_scratch)
    def scratch_code(context, builder, sig, _args):
        # LLVM prefers 256-bit registers on many CPUs with 512; here the wide ones win by a third.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        with builder.goto_entry_block():
            data = builder.alloca(ir.FloatType(), size=math.prod(shape))
            data.align = 64
        array = context.make_array(sig.return_type)(context, builder)
        strides = (4 * LANES, 4)
        populate_array(
            array,
            data=data,
            shape=[context.get_constant(types.intp, n) for n in shape],
            strides=[context.get_constant(types.intp, n) for n in strides],
            itemsize=context.get_constant(types.intp, 4),
            meminfo=None,
        )
        return array._getvalue()

    register_jitable(fastmath=KEEP_ORDER)(_exp2)
    return jit(_forward), jit(_backward)


def _each_group(kernel: Callable, arrays: list[np.ndarray], batch: int, groups: int) -> None:
    """Run the kernel on all groups of all rows; each writes its own part, in whatever order."""
    tasks = [(row, group) for row in range(batch) for group in range(groups)]
    threads = min(torch.get_num_threads(), len(tasks))
    if threads == 1:
        for task in tasks:
            kernel(*arrays, *task)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda task: kernel(*arrays, *task), tasks))


def _blocks(v: Tensor) -> Tensor:
    """(..., D) of any float type and layout -> (..., K, L) float32, padded with zeros."""
    v, missing = v.detach().float(), -v.shape[-1] % LANES
    if missing:  # else no copy is made
        v = F.pad(v, (0, missing))
    return v.contiguous().unflatten(-1, (-1, LANES))


def _sum_in_order(parts: Tensor) -> Tensor:
    """Sum over the first axis, in order: torch's own order depends on its number of threads."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


class FusedScan(torch.autograd.Function):
    """``FusedScan.apply(x_BTD, delta_BTD, a_DN, b_BTN, c_BTN, skip_D) -> y_BTD``, differentiable.

    delta > 0 and A < 0; any float type, computed in float32, returned in the type of x.  Works
    on ``torch.get_num_threads()`` threads; the result is bit-identical for any number of them.
    Raises BitbyteError without numba.
    """

    @staticmethod
    def forward(ctx, x_BTD, delta_BTD, a_DN, b_BTN, c_BTN, skip_D) -> Tensor:
        forward, _ = _compiled()
        (B, T, D), N = x_BTD.shape, a_DN.shape[1]
        shapes = [tuple(v.shape) for v in (delta_BTD, a_DN, b_BTN, c_BTN, skip_D)]
        if shapes != [(B, T, D), (D, N), (B, T, N), (B, T, N), (D,)]:
            raise RunError(f"scan of x {(B, T, D)}: the other shapes {shapes} do not fit")
        ctx.dtypes = [v.dtype for v in (x_BTD, delta_BTD, a_DN, b_BTN, c_BTN, skip_D)]
        x_BTKL, delta_BTKL, skip_KL = _blocks(x_BTD), _blocks(delta_BTD), _blocks(skip_D)
        a_KNL = _blocks(a_DN.float().t() / math.log(2)).transpose(0, 1).contiguous()
        b_BTN, c_BTN = (v.detach().float().contiguous() for v in (b_BTN, c_BTN))
        K = len(skip_KL)
        y_BTKL = torch.empty_like(x_BTKL)
        start_BKSNL = x_BTKL.new_empty(B, K, math.ceil(T / SEGMENT), N, LANES)
        inputs = [x_BTKL, delta_BTKL, a_KNL, b_BTN, c_BTN, skip_KL]
        arrays = [v.numpy() for v in (*inputs, y_BTKL, start_BKSNL)]
        _each_group(forward, arrays, B, math.ceil(K / GROUP))
        ctx.save_for_backward(*inputs, start_BKSNL)
        return y_BTKL.flatten(-2)[..., :D].to(x_BTD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_BTD):
        _, backward = _compiled()
        saved = ctx.saved_tensors
        x_BTKL, _, a_KNL, b_BTN, _, _, start_BKSNL = saved
        (B, K, _, N, _), (T, D) = start_BKSNL.shape, g_BTD.shape[1:]
        G = math.ceil(K / GROUP)
        grad_x_BTKL, grad_delta_BTKL = torch.empty_like(x_BTKL), torch.empty_like(x_BTKL)
        grad_a_BKNL = a_KNL.new_zeros(B, K, N, LANES)
        grad_b_GBTN, grad_c_GBTN = b_BTN.new_zeros(2, G, B, T, N)
        grad_skip_BKL = a_KNL.new_zeros(B, K, LANES)
        parts = [grad_x_BTKL, grad_delta_BTKL, grad_a_BKNL, grad_b_GBTN, grad_c_GBTN, grad_skip_BKL]
        arrays = [v.numpy() for v in (*saved, _blocks(g_BTD), *parts)]
        _each_group(backward, arrays, B, G)
        grads = (
            grad_x_BTKL.flatten(-2)[..., :D],
            grad_delta_BTKL.flatten(-2)[..., :D],
            _sum_in_order(grad_a_BKNL).transpose(1, 2).flatten(0, 1)[:D],
            _sum_in_order(grad_b_GBTN),
            _sum_in_order(grad_c_GBTN),
            _sum_in_order(grad_skip_BKL).flatten()[:D],
        )
        return tuple(v.to(dtype) for v, dtype in zip(grads, ctx.dtypes, strict=True))
