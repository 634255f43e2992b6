"""Runs a program node by node in NumPy, and says beside each value how large the terms were that it was made of.

That size is the yardstick for rounding errors: a difference of two large numbers cannot be as exact as its small result
asks for. It follows from first-order error analysis: a rounded operation adds an error of its result's size, and carries
its arguments' errors on by its derivative. Inputs are exact. A result below the smallest normal number may be flushed to 0,
and counts as large as a number with an error of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from xpnn.backends import special
from xpnn.backends.program import Node, Program, limit, walk

Array = np.ndarray[Any, Any]


class Sized(NamedTuple):
    """A value, and the size of its largest term."""

    value: Array
    size: Array


class Format(NamedTuple):
    """A floating-point format: the bits of its significand, its smallest normal number, its largest."""

    digits: int
    least: float
    most: float


FORMATS = {
    "float16": Format(11, 2.0**-14, 65504.0),
    "bfloat16": Format(8, 2.0**-126, 2.0**128 - 2.0**120),
    "float32": Format(24, 2.0**-126, 2.0**128 - 2.0**104),
    "float64": Format(53, 2.0**-1022, float(np.finfo(np.float64).max)),
}

_VALUES: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "maximum": np.maximum, "minimum": np.minimum,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.logical_and, "or": np.logical_or, "not": np.logical_not, "abs": np.abs, "neg": np.negative, "exp": np.exp,
    "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "sqrt": np.sqrt, "floor": np.floor, "tanh": np.tanh,
    "isnan": np.isnan, "where": np.where,
    "erf": functools.partial(special.erf, np), "erfc": functools.partial(special.erfc, np),
    "matmul": np.matmul, "transpose": np.transpose,
    "row_sum": lambda a: np.sum(a, axis=-1, keepdims=True),
    "row_max": lambda a: np.max(a, axis=-1, keepdims=True),
    "column_sum": lambda a: np.sum(a, axis=0, keepdims=True),
    "sum_rows": lambda a: np.sum(a, axis=0, keepdims=True),
}  # fmt: skip


def interpret(
    program: Program, inputs: Mapping[str, Array], options: Mapping[str, float], rounded: str = "float64"
) -> dict[str, Sized]:
    """The results of a program on canonical arrays, computed in their own dtype.

    `rounded` names the format whose rounding the sizes are for.
    """
    extents = {
        s: size
        for name, node in program.inputs.items()
        if name in inputs
        for s, size in zip(node.shape, inputs[name].shape, strict=True)
    }
    dtype = np.result_type(*([a.dtype for a in inputs.values() if a.dtype.kind == "f"] or [np.float64]))
    options = program.numbers(options)
    known: dict[Node, Sized] = {}
    with np.errstate(all="ignore"):
        for node in walk(program.outputs.values()):
            known[node] = _step(node, [known[a] for a in node.args], inputs, options, extents, dtype, FORMATS[rounded])
    return {name: known[node] for name, node in program.outputs.items()}


def _step(
    node: Node,
    args: list[Sized],
    inputs: Mapping[str, Array],
    options: Mapping[str, float],
    extents: Mapping[Any, int],
    dtype: Any,
    rounded: Format,
) -> Sized:
    if node.op in ("input", "option", "constant", "extent", "columns"):
        leaves: dict[str, Callable[[], Any]] = {
            "input": lambda: inputs[node.value],
            "option": lambda: np.asarray(options[node.value], dtype if node.dtype == "float" else np.int64),
            "constant": lambda: np.asarray(limit(node.value, dtype), dtype if node.dtype == "float" else None),
            "extent": lambda: np.asarray(extents[node.value]),
            "columns": lambda: np.arange(extents[node.value])[None, :],
        }
        leaf = leaves[node.op]()
        return Sized(np.atleast_2d(leaf), np.zeros(np.atleast_2d(leaf).shape))
    values = [a.value for a in args]
    if node.op == "cast":
        shape = tuple(1 if s == 1 else extents.get(s, n) for s, n in zip(node.shape, values[0].shape, strict=True))
        kind = {"float": dtype, "int": np.int64, "bool": bool}[node.dtype]
        return Sized(np.broadcast_to(values[0].astype(kind), shape), np.broadcast_to(args[0].size, shape))
    if node.op == "gather":
        return Sized(*(_gather(a, values[1]) for a in args[0]))
    value = _VALUES[node.op](*values)
    return Sized(value, np.nan_to_num(_size(node.op, value, args, rounded), posinf=np.finfo(dtype).max))


def _gather(a: Array, index: Array) -> Array:
    inside = (index >= 0) & (index < a.shape[1])
    rows = np.broadcast_to(a, (index.shape[0], a.shape[1]))
    return np.where(inside, np.take_along_axis(rows, np.where(inside, index, 0), axis=1), np.nan)


def _size(op: str, v: Array, args: list[Sized], rounded: Format) -> Any:
    """The size of the largest term in a result."""
    sizes = [a.size for a in args]
    a, b = args[0], args[-1]
    own = np.abs(v) if v.dtype.kind == "f" else np.zeros(v.shape)
    flushed = (own > 0) & (own < rounded.least)
    carried: dict[str, Callable[[], Any]] = {
        "add": lambda: np.maximum(a.size, b.size),
        "sub": lambda: np.maximum(a.size, b.size),
        "mul": lambda: np.maximum(a.size * np.abs(b.value), np.abs(a.value) * b.size),
        "div": lambda: np.maximum(a.size / np.abs(b.value), own * b.size / np.abs(b.value)),
        "exp": lambda: own * a.size,
        "expm1": lambda: (1 + v) * a.size,
        "log": lambda: a.size / np.abs(a.value),
        "log1p": lambda: a.size / np.abs(1 + a.value),
        "tanh": lambda: (1 - v * v) * a.size,
        "erf": lambda: 2 / np.sqrt(np.pi) * np.exp(-a.value * a.value) * a.size,
        "erfc": lambda: 2 / np.sqrt(np.pi) * np.exp(-a.value * a.value) * a.size,
        "sqrt": lambda: a.size / (2 * own),
        "matmul": lambda: np.abs(a.value) @ np.maximum(np.abs(b.value), b.size) + a.size @ np.abs(b.value),
        "row_sum": lambda: np.sum(np.maximum(np.abs(a.value), a.size), axis=-1, keepdims=True),
        "column_sum": lambda: np.sum(np.maximum(np.abs(a.value), a.size), axis=0, keepdims=True),
        "sum_rows": lambda: np.sum(np.maximum(np.abs(a.value), a.size), axis=0, keepdims=True),
    }
    exact: dict[str, Callable[[], Any]] = {
        "where": lambda: np.where(args[0].value, sizes[1], sizes[2]) if len(args) == 3 else 0.0,
        "row_max": lambda: np.max(a.size, axis=-1, keepdims=True),
        "maximum": lambda: np.maximum(*sizes),
        "minimum": lambda: np.maximum(*sizes),
        "transpose": lambda: a.size.T,
        "abs": lambda: a.size,
        "neg": lambda: a.size,
    }
    if op in exact:
        return np.broadcast_to(exact[op](), v.shape)
    if op not in carried:  # comparisons and logic
        return own
    own = np.where(flushed, rounded.least * 2.0 ** (rounded.digits - 1), own)
    return np.maximum(own, np.nan_to_num(np.where(np.isfinite(carried[op]()), carried[op](), 0.0)))
