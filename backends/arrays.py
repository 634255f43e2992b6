"""The caller's arrays: which library they are, what is accepted, and their canonical two-dimensional form."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from xpnn.backends.kinds import Column, Full, Index, Kind, Matrix, Row, Scalar, Wide
from xpnn.backends.program import DType, Shape
from xpnn.backends.task import HALF

IMMUTABLE = {"jax", "dask"}
FAST: set[type] = {np.ndarray}  # array types that have a short way; CuPy's joins when its backend is first used
WRITABLE = {"numpy", "cupy"}  # whose memory we write results to ourselves


def wrong(kernel: str, argument: str, got: object, expected: str) -> str:
    """The wording of every complaint about an argument."""
    return f"{kernel}: {argument}: got {got}, expected {expected}"


def mistyped(kernel: str, argument: str, value: Any, expected: str) -> TypeError:
    """What to raise for an option of another type than expected; one that JAX traces gets the remedy."""
    given = value if isinstance(value, tuple | list) else (value,)
    if any(t.__module__.startswith("jax.") and t.__name__ == "Tracer" for v in given for t in type(v).__mro__):
        expected += ", not traced: under jax.jit, name it in static_argnames"
    return TypeError(wrong(kernel, argument, repr(value), expected))


def library(array: Any) -> str:
    """The name of an array's library, by its type's module."""
    if isinstance(array, np.ndarray | np.generic):
        return "numpy"  # subclasses too
    root = type(array).__module__.partition(".")[0]
    return {"jaxlib": "jax"}.get(root, root)


def namespace(array: Any) -> Any:
    """The array's namespace; NumPy's own, which follows the standard, where array-api-compat's would cost an import."""
    return np if isinstance(array, np.ndarray | np.generic) else array_api_compat.array_namespace(array)


def accept(kernel: str, name: str, value: Any, others: str | None) -> Any:
    """An argument as an array: lists and numbers become NumPy's unless another library is at work.

    Raises
    ------
    TypeError
        For what is no array of numbers.
    """
    if type(value) is np.ndarray:
        array = value
    elif isinstance(value, np.ma.MaskedArray):
        raise TypeError(wrong(kernel, name, "a MaskedArray", "an array without a mask"))
    elif isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
    elif isinstance(value, bool | int | float | list | tuple):
        if others not in (None, "numpy"):
            raise TypeError(wrong(kernel, name, type(value).__name__, f"a {others} array like the others"))
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise TypeError(wrong(kernel, name, f"a {type(value).__name__} ({error})", "an array of numbers")) from None
    elif array_api_compat.is_array_api_obj(value):
        return _in_blocks(kernel, name, value) if library(value) == "dask" else value
    else:
        raise TypeError(wrong(kernel, name, type(value).__name__, "an array"))
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(wrong(kernel, name, f"dtype {array.dtype}", "real numbers"))
    return array


def _in_blocks(kernel: str, name: str, array: Any) -> Any:
    """A lazy array of known shape, without blocks that hold nothing: those confuse Dask beside an axis of length 1."""
    if any(math.isnan(n) for n in array.shape):
        raise ValueError(wrong(kernel, name, f"shape {array.shape}", "a known one; call its compute_chunk_sizes() first"))
    if not any(0 in sizes and any(sizes) for sizes in array.chunks):
        return array
    return array.rechunk(tuple(tuple(filter(None, sizes)) or (0,) for sizes in array.chunks))


def dtype_class(xp: Any, kernel: str, name: str, dtype: Any) -> DType:
    """Whether a dtype is one of floats, integers or booleans."""
    if isinstance(dtype, np.dtype) and (dtype.kind in "biuf" or dtype.name == "bfloat16"):
        return {"b": "bool", "i": "int", "u": "int"}.get(dtype.kind, "float")  # type: ignore[return-value]
    if xp.isdtype(dtype, "bool"):
        return "bool"
    if xp.isdtype(dtype, "integral"):
        return "int"
    if xp.isdtype(dtype, "real floating"):
        return "float"
    raise TypeError(wrong(kernel, name, f"dtype {dtype}", "real numbers"))


def dtype_name(dtype: Any) -> str:
    """ "float32" for any library's float32."""
    return _numpy_name(dtype) if isinstance(dtype, np.dtype) else str(getattr(dtype, "name", dtype)).rpartition(".")[2]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name, bfloat16 from ml_dtypes among them."""
    if name == "bfloat16":
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return found
    return np.dtype(name)


def wide_dtype(xp: Any, dtype: Any) -> Any:
    """What a floating dtype is computed in."""
    return xp.float32 if dtype_name(dtype) in HALF else dtype


def address(a: Any) -> int:
    """Where the memory of a NumPy or CuPy array starts."""
    return int(a.__array_interface__["data"][0] if isinstance(a, np.ndarray | np.generic) else a.data.ptr)


class _Memory:
    """An array's place in memory, as NumPy understands it."""

    def __init__(self, a: Any) -> None:
        self.array = a  # kept alive by what NumPy makes of this
        self.__array_interface__ = {
            "version": 3, "shape": a.shape, "strides": a.strides, "typestr": f"|V{a.itemsize}", "data": (address(a), False),
        }  # fmt: skip


def memory(a: Any) -> np.ndarray[Any, Any]:
    """An array that stands for the memory of a NumPy or CuPy array, wherever that is; its values must not be read."""
    return a if isinstance(a, np.ndarray) else np.asarray(_Memory(a))


@functools.cache
def _numpy_name(dtype: np.dtype[Any]) -> str:
    return dtype.name


@dataclass(frozen=True)
class Frame:
    """How the caller's shapes map to rows and columns.

    `shape` is the shape of Full arrays; `axis` the one that becomes columns, or None for kernels that have no axis.
    `reach` says how far a kernel looks (`prepare.reach`). Of the last axes several may become columns: `span` of them.
    """

    shape: tuple[int, ...]
    axis: int | None
    rows: int
    columns: int
    reach: str = "row"
    span: int = 1

    @property
    def lead(self) -> tuple[int, ...]:
        """The shape of a row's values: Full without its axis."""
        if self.axis is None:
            return self.shape[:1]
        return self.shape[: self.axis] + self.shape[self.axis + self.span :]

    @property
    def has_planes(self) -> bool:
        """Whether a row's values lie apart from one another, and those of adjacent rows side by side."""
        return self.axis is not None and self.axis < len(self.shape) - self.span

    def canonical(self, xp: Any, array: Any, kind: type[Kind], planes: bool = False) -> Any:
        """An array as (R, C), (R, 1), (1, C) or (1, 1); as `planes` a Full one as (planes, rows of each, C)."""
        if kind is not Full:
            return xp.reshape(array, self.extents(array.shape, kind))
        if array.shape != self.shape:
            array = xp.broadcast_to(array, self.shape)
        if planes:
            assert self.axis is not None
            number = math.prod(self.shape[: self.axis])
            rows = math.prod(self.shape[self.axis + 1 :])
            return array.reshape(number, self.columns, rows).transpose(0, 2, 1)
        if self.has_planes:
            array = xp.moveaxis(array, self.axis, -1)
        return array if array.shape == (self.rows, self.columns) else xp.reshape(array, (self.rows, self.columns))

    def extents(self, shape: tuple[int, ...], kind: type[Kind]) -> tuple[int, int]:
        """The canonical shape of an array of a kind."""
        if kind is Full:
            return self.rows, self.columns
        if kind is Wide:
            return self.rows, shape[-1]
        if kind in (Row, Index):
            return self.rows, 1
        if kind is Column:
            return 1, math.prod(shape)
        return (1, 1) if kind is Scalar else shape  # type: ignore[return-value]

    def result_shape(self, shape: Shape, canonical: tuple[int, ...]) -> tuple[int, ...]:
        """The caller's shape of a result, given its symbolic and canonical ones."""
        if shape == ("R", "C"):
            return self.shape
        rows, columns = shape
        lead = self.lead if rows == "R" else () if rows == 1 else (canonical[0],)
        if columns == 1:
            return lead
        at = self.axis if rows == "R" and self.axis is not None else len(lead)
        return (*lead[:at], canonical[1], *lead[at:])

    def restore(self, xp: Any, array: Any, shape: Shape) -> Any:
        """A canonical result in the caller's shape."""
        target = self.result_shape(shape, array.shape)
        if array.ndim == 3:  # planes
            return array.transpose(0, 2, 1).reshape(target)
        if shape[0] == "R" and shape[1] != 1 and target and self.has_planes:
            moved = (*target[: self.axis], *target[self.axis + 1 :], target[self.axis])  # type: ignore[index, operator]
            return xp.moveaxis(xp.reshape(array, moved), -1, self.axis)
        if array.shape == target:
            return array
        return xp.reshape(array, target)


@functools.lru_cache(4096)
def rectangle(size: int) -> tuple[int, int]:
    """Rows and columns for arrays of a size whose own shape does not matter.

    What is summed over everything is then summed in rows of a few thousand: they are shared out over threads, and many
    short sums round less than a long one. A size without a fitting divisor, such as a large prime, is one row.
    """
    columns = next((c for c in range(min(size, 8192), 255, -1) if size % c == 0), size)
    return (size // columns if size else 1), columns


def frame(
    kernel: str,
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, type[Kind]],
    axis: int | None,
    reach: str,
    given: bool,
    span_name: str | None = None,
    span: tuple[int, ...] | None = None,
) -> Frame:
    """Work out rows and columns from the arguments' shapes.

    `span` is the shape that the caller gave, under that name, for the last axes to become columns.
    Where a kernel of no axis tells rows from columns all the same, as a mean over a batch does, a row is what has one
    place along the first axis.

    Raises
    ------
    ValueError
        Where shapes do not fit one another.
    """
    full = [n for n, k in kinds.items() if k is Full]
    if not full:
        raise TypeError(wrong(kernel, "arguments", "none with rows and columns", "one such array"))
    try:
        shape = shapes[full[0]] if len(full) == 1 else np.broadcast_shapes(*(shapes[n] for n in full))
    except ValueError:
        raise ValueError(
            wrong(kernel, full[-1], f"shape {shapes[full[-1]]}", f"one that fits {full[0]}'s {shapes[full[0]]}")
        ) from None
    if reach == "element":
        result = Frame(shape, None, 1, math.prod(shape), reach)
    elif reach == "all":
        result = Frame(shape, None, *rectangle(math.prod(shape)), reach)
    elif not shape and (span_name is not None or Matrix in kinds.values()):
        raise ValueError(wrong(kernel, full[0], "shape ()", "at least one dimension"))
    elif axis is None:
        result = Frame(shape, None, math.prod(shape[:1]), math.prod(shape[1:]))
    elif span is not None:
        at = len(shape) - len(span)
        if at < 0 or shape[at:] != span:
            raise ValueError(wrong(kernel, str(span_name), span, f"the end of {full[0]}'s shape {shape}"))
        result = Frame(shape, at, math.prod(shape[:at]), math.prod(span), span=len(span))
    elif not -len(shape) <= axis < max(len(shape), 1) and (shape or axis != -1):
        fits = f"-{len(shape)} <= axis < {len(shape)} for shape {shape}" if shape else "-1 or 0 for a 0-d array"
        raise ValueError(wrong(kernel, "axis", axis, fits))
    else:
        axis %= max(len(shape), 1)
        result = Frame(shape, axis, math.prod(shape[:axis] + shape[axis + 1 :]), math.prod(shape[axis : axis + 1]))
    for name, kind in kinds.items():
        have = shapes[name]
        if kind in (Row, Index):
            other = shape[:1] + shape[2:]
            if have == result.lead:
                if not given and len(shape) > 2 and have == other and axis != 1:
                    raise ValueError(
                        wrong(
                            kernel,
                            name,
                            f"shape {have} with {full[0]} {shape}",
                            "axis=-1 or axis=1 to be given: both would fit",
                        )
                    )
            else:
                hint = "; PyTorch layout? pass axis=1" if not given and len(shape) > 1 and axis != 1 and have == other else ""
                raise ValueError(
                    wrong(
                        kernel,
                        name,
                        f"shape {have}",
                        f"{result.lead}, {full[0]}'s shape {shape} without axis {axis}{hint}",
                    )
                )
        elif kind is Wide and have[:-1] != result.lead:
            raise ValueError(
                wrong(kernel, name, f"shape {have}", f"{(*result.lead, '*')}, as many rows as {full[0]}'s {shape}")
            )
        elif kind is Column and span is not None and have != span:
            raise ValueError(wrong(kernel, name, f"shape {have}", f"{span_name}'s {span}"))
        elif kind is Column and span is None and len(have) != 1:
            raise ValueError(wrong(kernel, name, f"shape {have}", "one dimension"))
        elif kind is Matrix and len(have) != 2:
            raise ValueError(wrong(kernel, name, f"shape {have}", "two dimensions"))
        elif kind is Scalar and math.prod(have) != 1:
            raise ValueError(wrong(kernel, name, f"shape {have}", "one number"))
    return result


def check_extents(
    kernel: str, shapes: Mapping[str, tuple[int, ...]], extents: Mapping[str, tuple[int, ...]], symbols: Mapping[str, Shape]
) -> None:
    """Raise where an argument's extent differs from that of an earlier one that the formula takes to be equal."""
    sizes: dict[str, int] = {}
    for name, symbol in symbols.items():
        for axis, s in enumerate(symbol):
            size = extents[name][axis]
            if s != 1 and sizes.setdefault(s, size) != size:
                want = [*shapes[name]]
                want[axis if len(want) > 1 else 0] = sizes[s]
                raise ValueError(wrong(kernel, name, f"shape {shapes[name]}", f"{tuple(want)} to fit the other arguments"))
