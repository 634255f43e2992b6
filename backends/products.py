"""Matrix products for NumPy arrays: BLAS, and by blocks through its float32 for half precision, which it does not know.

A block of each operand is converted at a time, so there is never a copy in float32 of a whole matrix, and sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xpnn.backends.arrays import dtype_name
from xpnn.backends.task import HALF

BLOCK = 1024  # rows and columns of a block: the product of two takes long enough to hide their conversion
Array = np.ndarray[Any, Any]
Convert = Callable[[Array, Array], None]


def copy(to: Array, values: Array) -> None:
    """Copy values into an array of another floating dtype, as NumPy does."""
    with np.errstate(all="ignore"):
        to[...] = values


def into(out: Array, left: Array, right: Array, add: bool = False, convert: Convert = copy) -> None:
    """out = left @ right, or out += left @ right; each of any floating dtype, half precision beside float32 among them.

    `convert(to, values)` copies between a half type and float32.
    """
    halves = [a for a in (out, left, right) if dtype_name(a.dtype) in HALF]
    if not halves and not add:
        np.matmul(left, right, out=out)
        return
    rows, inner = left.shape
    columns = right.shape[1]
    operands = dtype_name(left.dtype) in HALF or dtype_name(right.dtype) in HALF
    deep, across = (BLOCK, BLOCK) if operands else (inner, columns)
    spare = np.empty((min(BLOCK, rows), min(across, columns)), np.float32 if halves else out.dtype)
    for i in range(0, rows, BLOCK):
        for j in range(0, columns, across):
            target = out[i : i + BLOCK, j : j + across]
            total = spare[: target.shape[0], : target.shape[1]]
            for k in range(0, inner, deep):
                a, b = (widened(x, convert) for x in (left[i : i + BLOCK, k : k + deep], right[k : k + deep, j : j + across]))
                if k:
                    total += a @ b
                else:
                    np.matmul(a, b, out=total)
            if add:
                target += total
            elif target.dtype == total.dtype:
                target[...] = total
            else:
                convert(target, total)


def widened(a: Array, convert: Convert = copy) -> Array:
    """An array of half precision in float32; any other as it is."""
    if dtype_name(a.dtype) not in HALF:
        return a
    if a.strides[1] != a.itemsize and a.strides[0] == a.itemsize:
        return widened(a.T, convert).T
    result = np.empty(a.shape, np.float32)
    convert(result, a)
    return result
