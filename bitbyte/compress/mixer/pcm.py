"""Sound: samples to what a linear prediction leaves of them, and back.

A sample is predicted from the newest ones (of a second channel, too) by least squares, which forget
exponentially; what that leaves is predicted once more by integers.  The residuals, folded to
unsigned numbers and with their high byte first, go to the mixer in place of the samples.

Least squares are computed in float64 by single additions, multiplications, divisions and square
roots in a fixed order.  IEEE 754 rounds each of them the same everywhere.
"""

import math
from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer.kernel import kernel

ORDER = 32  # of least squares
OTHER = 12  # of these, from the other channel of two
FORGET = 0.997
RIDGE = 1.0
SOLVE_EVERY = 2  # samples
SECOND = 8  # order of the second prediction
SECOND_BITS = 16


@kernel
def solve(r_KK, b_K, l_KK, w_K):
    """Solve r w = b by Cholesky's method; leaves w as it is if r is not positive.

    The inner loops run along rows of ``l`` (upper triangle), so that compilers may use vectors
    without changing the order of sums.
    """
    K = len(b_K)
    for i in range(K):
        for j in range(i, K):
            l_KK[i, j] = r_KK[i, j]
        l_KK[i, i] += RIDGE
    for k in range(K):
        if not l_KK[k, k] > 0.0:
            return
        root = math.sqrt(l_KK[k, k])
        for j in range(k, K):
            l_KK[k, j] = l_KK[k, j] / root
        for i in range(k + 1, K):
            factor = l_KK[k, i]
            for j in range(i, K):
                l_KK[i, j] -= factor * l_KK[k, j]
    for k in range(K):
        w_K[k] = b_K[k]
    for k in range(K):
        w_K[k] = w_K[k] / l_KK[k, k]
        for j in range(k + 1, K):
            w_K[j] -= l_KK[k, j] * w_K[k]
    for k in range(K - 1, -1, -1):
        total = w_K[k]
        for j in range(k + 1, K):
            total -= l_KK[k, j] * w_K[j]
        w_K[k] = total / l_KK[k, k]


@kernel
def observe(r_KK, b_K, h_K, x):
    """Add a sample and its predecessors to the sums."""
    K = len(h_K)
    for i in range(K):
        for j in range(i, K):
            r_KK[i, j] = r_KK[i, j] * FORGET + h_K[i] * h_K[j]
        b_K[i] = b_K[i] * FORGET + x * h_K[i]


@kernel
def _shift(h, first, end, value):
    """Put a value before h[first:end], whose last falls out."""
    for i in range(end - 1, first, -1):
        h[i] = h[i - 1]
    if end > first:
        h[first] = value


@kernel
def _rounded(value, most):
    """A float as an integer within +-most; 0 for one that is not finite."""
    if not -1e9 < value < 1e9:
        return 0
    return max(-most, min(most - 1, math.floor(value + 0.5)))


@kernel
def _second(w_K, h_K):
    total = 0
    for i in range(SECOND):
        total += int(w_K[i]) * int(h_K[i])
    return total >> SECOND_BITS


@kernel
def _second_learns(w_K, h_K, error):
    """Normalized least mean squares, in integers."""
    power = 1
    for i in range(SECOND):
        power += int(h_K[i]) * int(h_K[i])
    for i in range(SECOND):
        step = (error * int(h_K[i]) * 256) // power
        w_K[i] = max(-(1 << 20), min(1 << 20, int(w_K[i]) + step))


@kernel
def _wrapped(value, bits):
    half = 1 << (bits - 1)
    return ((value + half) & ((1 << bits) - 1)) - half


class Linear(NamedTuple):
    """State of the predictions.  C channels, K = ORDER, S = SECOND."""

    r_CKK: np.ndarray  # float64: sums of products of predecessors, upper triangle
    b_CK: np.ndarray  # of a sample and its predecessors
    l_KK: np.ndarray  # scratch
    w_CK: np.ndarray  # weights
    h_CK: np.ndarray  # predecessors, the newest first; of the other channel behind its own
    second_w_CS: np.ndarray  # int64, of the second prediction
    second_h_CS: np.ndarray


def new_linear(channels: int) -> Linear:
    C, K, S = channels, ORDER, SECOND
    return Linear(
        np.zeros((C, K, K)), np.zeros((C, K)), np.zeros((K, K)), np.zeros((C, K)), np.zeros((C, K)),
        np.zeros((C, S), np.int64), np.zeros((C, S), np.int64),
    )  # fmt: skip


@kernel
def _guess(s, c) -> float:
    total = 0.0
    for i in range(ORDER):
        total += s.w_CK[c, i] * s.h_CK[c, i]
    return total


def predict(s, values, bits, forward):
    """Replace samples by residuals if ``forward``, else residuals by samples (int64, in place).

    ``s`` is a new Linear; the channels of ``values`` take turns.
    """
    C = len(s.b_CK)
    own = ORDER - (OTHER if C == 2 else 0)
    most = 1 << (bits - 1)
    for t in range(len(values)):
        c = t % C
        first = _rounded(_guess(s, c), most)
        second = first + _second(s.second_w_CS[c], s.second_h_CS[c])
        second = max(-most, min(most - 1, second))
        if forward:
            x = int(values[t])
            values[t] = _wrapped(x - second, bits)
        else:
            x = _wrapped(int(values[t]) + second, bits)
            values[t] = x
        observe(s.r_CKK[c], s.b_CK[c], s.h_CK[c], float(x))
        if t // C % SOLVE_EVERY == 0:
            solve(s.r_CKK[c], s.b_CK[c], s.l_KK, s.w_CK[c])
        _second_learns(s.second_w_CS[c], s.second_h_CS[c], x - second)
        _shift(s.second_h_CS[c], 0, SECOND, x - first)
        _shift(s.h_CK[c], 0, own, float(x))
        if C == 2:
            _shift(s.h_CK[1 - c], own, ORDER, float(x))
