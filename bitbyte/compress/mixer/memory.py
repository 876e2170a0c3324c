"""State in blocks of memory: for Python a NamedTuple of arrays, for machine code a pointer.

Compiled functions that are given some sixty arrays pass hundreds of numbers to each other and take
long to compile.  A block is one number, and all places and lengths in it are constants.
"""

from typing import NamedTuple, TypeVar

import numpy as np

LINE_BYTES = 64  # of a cache line
Group = TypeVar("Group", bound=NamedTuple)


def zeros(shape: int | tuple[int, ...], dtype: type) -> np.ndarray:
    """Stands for an array of zeros in what is given to `in_one_block`; takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def aligned(n_bytes: int) -> np.ndarray:
    """So many zero bytes, from the beginning of a cache line on."""
    room = np.zeros(n_bytes + LINE_BYTES, np.uint8)
    skip = -room.ctypes.data % LINE_BYTES
    return room[skip : skip + n_bytes]


def _kind(group: NamedTuple) -> np.dtype:
    """The layout of a group: each array begins a cache line."""
    offsets, size = [], 0
    for array in group:
        offsets.append(size)
        size += -(-array.nbytes // LINE_BYTES) * LINE_BYTES
    formats = [(array.dtype, array.shape) for array in group]
    layout = {"names": group._fields, "formats": formats, "offsets": offsets, "itemsize": size}
    return np.dtype(layout, align=True)


def in_one_block(group: Group) -> Group:
    """The same arrays, one after another in a block of memory."""
    kind = _kind(group)
    block = aligned(kind.itemsize).view(kind)
    for name, array in zip(group._fields, group, strict=True):
        if any(array.strides):
            block[name][0] = array
    return type(group)(*(block[name][0] for name in group._fields))
