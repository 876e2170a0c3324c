"""Finds the length of records: at which distances bytes are equal more often than by chance."""

import numpy as np

SAMPLE = 1 << 18  # bytes looked at
CANDIDATES = 40
LONGEST = 1 << 14
LEAST_GAIN = 0.08  # share of bytes equal at that distance, beyond chance
LEAST_BYTES = 64
LEAST_SHARE = 0.8  # of the best gain, for a length of which the best one is a multiple


def _common_gaps(values: np.ndarray, limit: int) -> np.ndarray:
    """The commonest distances between equal pairs of bytes, none in between."""
    pairs = values[:-1].astype(np.int32) << 8 | values[1:]
    order = np.argsort(pairs, kind="stable")
    gaps = np.diff(order)[np.diff(pairs[order]) == 0]
    counts = np.bincount(gaps[gaps < limit], minlength=1)
    best = np.argsort(-counts, kind="stable")[:CANDIDATES]
    return best[counts[best] > 0]


def record_lengths(data: np.ndarray) -> tuple[int, int]:
    """(length of the records in uint8 ``data``, a second length); 0 where there is none."""
    values = data[:SAMPLE]
    n = len(values)
    if n < LEAST_BYTES:
        return 0, 0
    share = np.bincount(values, minlength=256) / n
    chance = float((share * share).sum())
    gaps = _common_gaps(values, min(LONGEST, n // 16))
    gains = {int(g): float((values[g:] == values[:-g]).mean()) - chance for g in gaps if g > 1}
    good = sorted((gain, -gap) for gap, gain in gains.items() if gain > LEAST_GAIN)
    if not good:
        return 0, 0
    best, first = good[-1][0], -good[-1][1]
    # Multiples of a length are as good but for chance.
    first = min(-gap for gain, gap in good if first % -gap == 0 and gain > LEAST_SHARE * best)
    others = [-gap for _, gap in good if gap % first and first % -gap]
    return first, others[-1] if others else 0
