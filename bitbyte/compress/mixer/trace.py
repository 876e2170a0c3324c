"""What the mixer did with each bit, for those who look: probabilities, and who asked for them.

`stream.code_bytes` fills a Trace if it gets one.  Without one it compiles to what it would be if
there were no traces, so they cost nothing to those who do not look.
"""

from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer import experts, matches, mixing
from bitbyte.compress.mixer.kernel import kernel

GROUPS = ("orders", "words", "matches", "other contexts", "model")  # of experts
ORDERS, WORDS, MATCHES, OTHERS, MODEL = range(len(GROUPS))
# The group of each context of `contexts.fill`: orders 0 to 7, words, what matches expect, the rest.
CONTEXT_GROUPS = (*[ORDERS] * 8, *[WORDS] * 3, *[OTHERS] * 8, *[MATCHES] * 2, *[OTHERS] * 2)
WEIGHT_BITS = mixing.WEIGHT_BITS


class Trace(NamedTuple):
    """B bits in a row, N inputs of the mixer, G groups of them (0 if only ``p_B`` is wanted)."""

    p_B: np.ndarray  # int64: probability of a 1, out of 65536, as the coder got it
    mixed_B: np.ndarray  # int64: the mixed one, stretched, before the final maps
    pull_BG: np.ndarray  # int64, times 2^16: what each group added to ``mixed_B``
    weight_BG: np.ndarray  # int64, times 2^16: the weights of the inputs that were not silent
    group_N: np.ndarray  # int64: the group of each input


def new_trace(n_bytes: int, grouped: bool) -> Trace:
    n, g = 8 * n_bytes, len(GROUPS) if grouped else 0
    group_N = np.full(mixing.N_INPUTS, OTHERS, np.int64)  # the bias, and inputs that do not exist
    contexts = np.repeat(CONTEXT_GROUPS, experts.INPUTS)
    last = len(contexts) + 2 * matches.N_MATCHES
    group_N[: len(contexts)] = contexts
    group_N[len(contexts) : last] = MATCHES
    group_N[last : last + 4] = MODEL
    return Trace(
        np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, g), np.int64),
        np.zeros((n, g), np.int64), group_N,
    )  # fmt: skip


@kernel
def note(trace, m, at, p):
    """Keep what was predicted for bit ``at``, before it is learnt.  ``m``: the Mixing."""
    trace.p_B[at] = p
    total = 0
    for f in range(mixing.N_FINAL):
        total += int(m.final_st[f])
    trace.mixed_B[at] = total >> 1
    if trace.pull_BG.shape[1] == 0:
        return
    for i in range(mixing.N_INPUTS):
        weight = 0  # of the input in the result: over all sets, as the second layer weighs them
        for s in range(mixing.N_SETS):
            share = 0
            for f in range(mixing.N_FINAL):
                share += int(m.final_weights[m.final_row[f], s])
            weight += (int(m.weights_RN[m.row_S[s], i]) * share) >> (WEIGHT_BITS + 1)
        x, group = int(m.x_N[i]), int(trace.group_N[i])
        trace.pull_BG[at, group] += x * weight
        trace.weight_BG[at, group] += weight * min(abs(x), 1)
