"""Logistic mixing: sets of weights, one row of each chosen by a context, and a second layer.

Inputs and outputs are stretched probabilities.  Each row learns by its own error, fast at first:
its rate falls with the bits it has seen.
"""

from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer.kernel import kernel
from bitbyte.compress.mixer.tables import EDGE

N_INPUTS = 128
ROWS = (128, 256, 256, 64, 512, 2048)  # rows of each set
FIRST_ROW = (0, 128, 384, 640, 704, 1216)
N_SETS = len(ROWS)
N_ROWS = sum(ROWS)
FINAL_ROWS = (256 * 16, 8 * 8 * 16)  # of the two mixers of the second layer
N_FINAL = len(FINAL_ROWS)
WEIGHT_BITS = 16
WEIGHT_MOST = 1 << 22
SLOW, FAST, SETTLE = 128, 1280, 2048  # rate: SLOW + FAST * SETTLE / (SETTLE + bits seen)
RATES, RATE_BITS = 4096, 5  # counts of bits whose rates are tabled, 32 bits in one
FINAL_RATE = 3


class Mixing(NamedTuple):
    """S sets, N inputs."""

    x_N: np.ndarray  # int32: inputs
    weights_RN: np.ndarray  # (rows of all sets, N) int32
    seen: np.ndarray  # (rows of all sets,) int32
    rate: np.ndarray  # (RATES,) int32
    row_S: np.ndarray  # int64: this bit's rows
    st_S: np.ndarray  # int64: outputs, stretched
    final_weights: np.ndarray  # (rows of both mixers, S) int32
    final_row: np.ndarray  # (2,) int64
    final_st: np.ndarray  # (2,) int64: their outputs, stretched


def new_mixing(first_weights: np.ndarray) -> Mixing:
    n = N_ROWS
    rate = SLOW + FAST * SETTLE // (SETTLE + (np.arange(RATES) << RATE_BITS))
    return Mixing(
        x_N=np.zeros(N_INPUTS, np.int32),
        weights_RN=np.tile(first_weights.astype(np.int32), (n, 1)),
        seen=np.zeros(n, np.int32), rate=rate.astype(np.int32), row_S=np.zeros(N_SETS, np.int64),
        st_S=np.zeros(N_SETS, np.int64),
        final_weights=np.full((sum(FINAL_ROWS), N_SETS), (1 << WEIGHT_BITS) // N_SETS, np.int32),
        final_row=np.zeros(N_FINAL, np.int64), final_st=np.zeros(N_FINAL, np.int64),
    )  # fmt: skip


@kernel
def _clipped(st):
    return max(-EDGE + 1, min(EDGE - 1, st))


@kernel
def _dot(x_N, weights_RN, row):
    total = 0
    for i in range(N_INPUTS):
        total += int(x_N[i]) * int(weights_RN[row, i])
    return total >> WEIGHT_BITS


@kernel
def _train(x_N, weights_RN, row, e):
    for i in range(N_INPUTS):
        w = int(weights_RN[row, i]) + ((int(x_N[i]) * e + (1 << 19)) >> 20)
        weights_RN[row, i] = max(-WEIGHT_MOST, min(WEIGHT_MOST, w))


@kernel
def mix(m):
    """The stretched probability that the mixed experts give; rows were chosen before."""
    for s in range(N_SETS):
        m.st_S[s] = _clipped(_dot(m.x_N, m.weights_RN, m.row_S[s]))
    total = 0
    for f in range(N_FINAL):
        row, dot = m.final_row[f], 0
        for s in range(N_SETS):
            dot += int(m.st_S[s]) * int(m.final_weights[row, s])
        m.final_st[f] = _clipped(dot >> WEIGHT_BITS)
        total += int(m.final_st[f])
    return total >> 1


@kernel
def learn(m, t, value):
    """Teach both layers a bit."""
    target = (value << 16) - value
    for f in range(N_FINAL):
        error = (target - int(t.squash[m.final_st[f] + EDGE])) * FINAL_RATE
        row = m.final_row[f]
        for s in range(N_SETS):
            step = (int(m.st_S[s]) * error + (1 << 19)) >> 20
            w = int(m.final_weights[row, s]) + step
            m.final_weights[row, s] = max(-WEIGHT_MOST, min(WEIGHT_MOST, w))
    for s in range(N_SETS):
        row = m.row_S[s]
        seen = int(m.seen[row])
        rate = int(m.rate[seen >> RATE_BITS])
        m.seen[row] = min(seen + 1, (RATES << RATE_BITS) - 1)
        error = target - int(t.squash[m.st_S[s] + EDGE])
        _train(m.x_N, m.weights_RN, row, (error * rate) >> 6)
