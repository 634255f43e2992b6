"""Products of NumPy arrays, half precision converted by compiled loops."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from xpnn.backends import products
from xpnn.backends.arrays import dtype_name
from xpnn.backends.products import Array
from xpnn.backends.recording import Trace
from xpnn.backends.task import HALF


def matmul(left: Array, right: Array, out: Array | None = None) -> Array:
    """`left @ right`, of the dtype of `left`."""
    if dtype_name(left.dtype) not in HALF:
        return np.matmul(left, right, out=out)
    result = np.empty((left.shape[0], right.shape[1]), left.dtype) if out is None else out
    products.into(result, left, right, convert=convert)
    return result


def convert(to: Array, values: Array) -> None:
    """Copy values between a half type and float32, rounded to nearest even."""
    widen = to.dtype.name not in HALF
    _converter((values if widen else to).dtype.name, widen)({"x": values}, {}, {"y": to})


@functools.cache
def _converter(half: str, widen: bool) -> Any:
    from xpnn.backends.numba import Compiled

    recording = Trace()
    x = recording.input("x", ("R", "C"), "float")
    return Compiled(recording.program("convert", {"x": x}, {}, {"y": x}, {}), half, {"y" if widen else "x"})
