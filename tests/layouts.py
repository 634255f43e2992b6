"""Arrays of the same values in places that kernels may not like."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def at_odd_address(x: Array) -> Array:
    """A copy whose elements do not lie where their dtype's usually do."""
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    odd[...] = x
    return odd


def frozen(x: Array) -> Array:
    """A copy that cannot be written."""
    copy = x.copy()
    copy.flags.writeable = False
    return copy
