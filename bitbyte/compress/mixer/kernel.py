"""Functions that are compiled where numba works, and are plain Python where it does not.

Both compute the same: all values are integers below 2^63, masked or clamped before they could
overflow, and ``>>`` of a negative number rounds down in both.
"""

from collections.abc import Callable

KERNELS: list[Callable] = []
# Arrays belong to the caller, so nothing has to count references to them.
OPTIONS = {"error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}


def kernel(function: Callable) -> Callable:
    """Mark a function that compiled ones may call."""
    KERNELS.append(function)
    return function
