"""Functions that are compiled where llvmlite works, and are plain Python where it does not.

Both compute the same: all values are integers below 2^63, masked or clamped before they could
overflow, and ``>>`` of a negative number rounds down in both.  See `kernels.native.translate`.
"""

from collections.abc import Callable


def kernel(function: Callable) -> Callable:
    """Mark a function that compiled ones may call."""
    return function


def prefetch(array, at):
    """Ask for the cache line of array[at], which is needed soon; in plain Python, nothing."""
