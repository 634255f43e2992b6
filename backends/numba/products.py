"""Matrix products for NumPy arrays: BLAS, and by blocks through its float32 for half precision, which it does not know.

A block of each operand is converted at a time, so there is never a copy in float32 of a whole matrix, and sums are float32.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from xpnn.backends.task import HALF
from xpnn.backends.trace import Trace

BLOCK = 1024  # rows and columns of a block: a million elements, twice as long to multiply as it takes to hide the rest
Array = np.ndarray[Any, Any]


def matmul(left: Array, right: Array, out: Array | None = None) -> Array:
    """`left @ right`, of the dtype of `left`."""
    if left.dtype.name not in HALF:
        return np.matmul(left, right, out=out)
    result = np.empty((left.shape[0], right.shape[1]), left.dtype) if out is None else out
    into(result, left, right)
    return result


def into(out: Array, left: Array, right: Array, add: bool = False) -> None:
    """out = left @ right, or out += left @ right; each of any floating dtype, half precision beside float32 among them."""
    halves = [a for a in (out, left, right) if a.dtype.name in HALF]
    if not halves and not add:
        np.matmul(left, right, out=out)
        return
    rows, inner = left.shape
    columns = right.shape[1]
    deep = BLOCK if halves else inner
    across = BLOCK if left.dtype.name in HALF or right.dtype.name in HALF else columns
    dtype = np.float32 if halves else out.dtype
    spare = np.empty((min(BLOCK, rows), min(across, columns)), dtype)
    for i in range(0, rows, BLOCK):
        for j in range(0, columns, across):
            target = out[i : i + BLOCK, j : j + across]
            total = spare[: target.shape[0], : target.shape[1]]
            started = False
            for k in range(0, inner, deep):
                a, b = widened(left[i : i + BLOCK, k : k + deep]), widened(right[k : k + deep, j : j + across])
                if started:
                    total += a @ b
                else:
                    np.matmul(a, b, out=total)
                started = True
            if add:
                target += total
            elif target.dtype == total.dtype:
                target[...] = total
            else:
                rounded(target, total)


def widened(a: Array) -> Array:
    """An array of half precision in float32; any other as it is."""
    if a.dtype.name not in HALF:
        return a
    if a.strides[1] != a.itemsize and a.strides[0] == a.itemsize:
        return widened(a.T).T
    result = np.empty(a.shape, np.float32)
    _convert(a.dtype.name, True)(result, a)
    return result


def rounded(to: Array, values: Array) -> None:
    """Write float32 values into an array of half precision."""
    _convert(to.dtype.name, False)(to, values)


@functools.cache
def _convert(half: str, widen: bool) -> Any:
    """A compiled `convert(to, from)` between a half type and float32."""
    from xpnn.backends.numba import Compiled

    recording = Trace()
    x = recording.input("x", ("R", "C"), "float")
    loop = Compiled(recording.program("convert", {"x": x}, {}, {"y": x}, {}), half, {"y" if widen else "x"})

    def convert(to: Array, values: Array) -> None:
        loop({"x": values}, {}, {"y": to})

    return convert
