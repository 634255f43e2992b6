"""The symbolic namespace: given to a formula in place of NumPy, it records what the formula does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from xpnn.backends.program import LIMITS, Shape
from xpnn.backends.recording import DTYPES, Array, DTypeToken, Trace, refuse

UNARY = {
    "abs": "abs", "exp": "exp", "expm1": "expm1", "log": "log", "log1p": "log1p", "sqrt": "sqrt", "tanh": "tanh",
    "erf": "erf", "erfc": "erfc", "floor": "floor",
    "negative": "neg", "isnan": "isnan", "logical_not": "not",
}  # fmt: skip
BINARY = {
    "add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "maximum": "maximum", "minimum": "minimum",
    "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "equal": "eq", "not_equal": "ne",
    "logical_and": "and", "logical_or": "or",
}  # fmt: skip


class Limits:
    """The limits of the floating-point numbers that are computed with."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __getattr__(self, name: str) -> Array:
        if name not in LIMITS:
            refuse(f"it asks xp.finfo for {name} (known: {', '.join(LIMITS)})")
        return Array(self._trace, self._trace.node("constant", (), (1, 1), "float", name))


class Namespace:
    """What a traced formula knows as `xp`: the part of the array API that can be fused, and nothing else."""

    pi, e, inf, nan = math.pi, math.e, math.inf, math.nan

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __getattr__(self, name: str) -> Callable[..., Array]:
        op = UNARY.get(name) or BINARY.get(name)
        if op is None:
            refuse(f"it calls xp.{name}")
        arity = 1 if name in UNARY else 2

        def call(*operands: Any) -> Array:
            if len(operands) != arity:
                refuse(f"it calls xp.{name} with {len(operands)} arguments (expected {arity})")
            return self._trace.apply(op, *operands)

        return call

    def finfo(self, dtype: Any) -> Limits:
        """The limits of floating-point numbers, known when a loop is written for a dtype."""
        if dtype is not DTYPES["float"]:
            refuse(f"it calls xp.finfo with {dtype!r}")
        return Limits(self._trace)

    def where(self, condition: Any, a: Any, b: Any) -> Array:
        return self._trace.apply("where", condition, a, b)

    def square(self, x: Any) -> Array:
        return self._trace.apply("mul", x, x)

    def isdtype(self, dtype: Any, kind: str) -> bool:
        names = {
            "bool": {"bool"},
            "integral": {"int"},
            "signed integer": {"int"},
            "real floating": {"float"},
            "numeric": {"int", "float"},
        }
        if not isinstance(dtype, DTypeToken) or kind not in names:
            refuse(f"it calls xp.isdtype with {dtype!r}, {kind!r}")
        return dtype.name in names[kind]

    def astype(self, x: Array, dtype: Any, **unknown: Any) -> Array:
        if not isinstance(dtype, DTypeToken) or unknown:
            refuse("it calls xp.astype with something other than another array's dtype")
        return x if x.node.dtype == dtype.name else self._trace.apply("cast", x, dtype=dtype.name)

    def arange(self, stop: Any, **unknown: Any) -> Array:
        node = stop.node if isinstance(stop, Array) else None
        if node is None or node.op != "extent" or unknown:
            refuse("it calls xp.arange with something other than x.shape[-1]")
        return Array(self._trace, self._trace.node("columns", (), (1, node.value), "int", node.value))

    def sum(self, x: Array, *, axis: int | None = None, keepdims: bool = False) -> Array:
        if axis in (-1, 1):
            return self._row_reduction("row_sum", x, axis, keepdims)
        if axis == 0 and keepdims:
            return self._over_rows("column_sum", x)
        if axis is not None:
            refuse(f"it calls xp.sum with axis={axis!r}, keepdims={keepdims!r}")
        if x.node.shape[0] == 1 and x.node.shape[1] != 1:
            refuse("it sums a Column with axis=None; use axis=-1, keepdims=True")
        across = x if x.node.shape[1] == 1 else self._row_reduction("row_sum", x, -1, True)
        return self._over_rows("sum_rows", across)

    def mean(self, x: Array, *, axis: int | None = None, keepdims: bool = False) -> Array:
        total = self.sum(x, axis=axis, keepdims=keepdims)
        rows, columns = x.shape
        count = columns if axis in (-1, 1) else rows if axis == 0 else rows * columns
        return total / self._trace.lift(count)

    def max(self, x: Array, *, axis: int | None = None, keepdims: bool = False) -> Array:
        return self._row_reduction("row_max", x, axis, keepdims)

    def argmax(self, x: Array, *, axis: int | None = None, keepdims: bool = False) -> Array:
        """The first column that holds the row's maximum, or NaN.

        Found as a maximum of numbers that fall from left to right, which float32 tells apart in rows of up to 2**24.
        """
        found = (x == self.max(x, axis=axis, keepdims=keepdims)) | self.isnan(x)
        columns = x.shape[-1]
        last = self.max(self.where(found, columns - self.arange(columns), 0.0), axis=axis, keepdims=keepdims)
        return self._trace.apply("cast", columns - last, dtype="int")

    def take_along_axis(self, x: Array, index: Array, *, axis: int = -1) -> Array:
        """One value of each row; NaN where the index lies outside."""
        if axis not in (-1, 1) or index.node.shape[1] != 1 or index.node.dtype != "int":
            refuse("it calls xp.take_along_axis with something other than one column number per row")
        rows = self._trace.broadcast([x.node.shape[0], index.node.shape[0]])
        return Array(self._trace, self._trace.node("gather", (x.node, index.node), (rows, 1), x.node.dtype))

    def take(self, x: Array, index: Array, *, axis: int = -1) -> Array:
        """A column's value for each row, such as the weight of its class; NaN where the index lies outside."""
        if x.node.shape[0] != 1:
            refuse("it calls xp.take on something other than a Column")
        return self.take_along_axis(x, index, axis=axis)

    def matmul(self, a: Array, b: Array) -> Array:
        return self._trace.matmul(a, b)

    def _row_reduction(self, op: str, x: Array, axis: int | None, keepdims: bool) -> Array:
        if axis not in (-1, 1) or not keepdims:
            refuse(f"it reduces with axis={axis!r}, keepdims={keepdims!r} (only axis=-1, keepdims=True is known)")
        if x.node.dtype != "float":
            refuse("it reduces something other than floats; convert with xp.astype first")
        rows = "R" if x.node.shape[0] == 1 else x.node.shape[0]  # a Column's sum is found for each row anew
        return Array(self._trace, self._trace.node(op, (x.node,), (rows, 1), "float"))

    def _over_rows(self, op: str, x: Array) -> Array:
        if x.node.dtype != "float":
            refuse("it sums something other than floats; convert with xp.astype first")
        shape: Shape = (1, x.node.shape[1])
        return Array(self._trace, self._trace.node(op, (x.node,), shape, x.node.dtype))
