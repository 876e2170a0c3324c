"""Chooses how to look at a frame, by coding a sample of it in each way that could pay."""

from collections.abc import Callable

import numpy as np

from bitbyte.compress.mixer.codec import Codec
from bitbyte.compress.mixer.contexts import BITMAP
from bitbyte.compress.mixer.records import record_lengths
from bitbyte.compress.mixer.shapes import Shape, to_mixer

TRIAL_BYTES = 1 << 15
TRIAL_BUCKETS, TRIAL_RING_BITS = 1 << 18, 16


def cost(data: np.ndarray, shape: Shape, fast_code: bool | None = None) -> int:
    """Bytes of code for a sample of the data, by a mixer that knows nothing."""
    unit = max(1, shape.width * shape.channels)
    n = min(len(data), TRIAL_BYTES) // unit * unit
    middle = (len(data) - n) // 2 // unit * unit
    sample = to_mixer(data[middle : middle + n], shape, fast_code)
    code = Codec(TRIAL_BUCKETS, TRIAL_RING_BITS, fast_code=fast_code).encode(sample, shape)
    return n if code is None else len(code)


def choose(
    data: np.ndarray, hint: Shape | None = None, fast_code: bool | None = None,
    cost: Callable[..., int] = cost,
) -> Shape:  # fmt: skip
    """The shape that codes a sample of ``data`` best.  ``hint``: what a header says of it."""
    tried = [Shape()]
    first, second = record_lengths(data)
    if first:
        tried += [Shape(record=first), Shape(BITMAP, record=first)]
        tried += [Shape(record=first, record2=second)] if second else []
    if hint is not None and len(data) % (hint.width * hint.channels) == 0:
        tried.append(hint)
    if len(tried) == 1:
        return tried[0]
    return min(tried, key=lambda shape: cost(data, shape, fast_code))
