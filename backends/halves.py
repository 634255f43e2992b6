"""A kernel of two arrays whose caller has them as the two halves of one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from xpnn.backends.arrays import WRITABLE, accept, dtype_class, dtype_name, library, memory, mistyped, namespace, wrong
from xpnn.backends.kernel import Kernel


class Halves:
    """A kernel of two arrays, called with one: its halves along an axis.

    The halves are views, and the halves of a gradient are written where they belong: nothing is copied where the array is
    contiguous. There is one input, so pullbacks and `backward` take no `wrt`; and there are never fewer than one dimension, so
    the result is not one number, and `value_and_grad` raises.

    Parameters
    ----------
    kernel
        An element-wise kernel of two inputs and one result.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> y, pullback = xpnn.glu.vjp(np.array([3.0, 5.0, 0.0, 1000.0]))
    >>> y
    array([1.5, 5. ])
    >>> pullback(np.array([1.0, 1.0]))
    array([0.5 , 1.  , 0.75, 0.  ])
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.__name__ = self.__qualname__ = kernel.__name__
        self.__module__ = kernel.__module__
        self.__doc__ = kernel.__doc__
        p = inspect.Parameter
        axis, out = p("axis", p.POSITIONAL_OR_KEYWORD, default=-1), p("out", p.KEYWORD_ONLY, default=None)
        self.__signature__ = inspect.Signature([p("x", p.POSITIONAL_OR_KEYWORD), axis, out])

    def __repr__(self) -> str:
        return f"<kernel {self.__name__}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self.__name__

    def __call__(self, x: Any, axis: int = -1, *, out: Any = None) -> Any:
        whole = cut(self.__name__, x, axis)
        a, b = whole.halves(whole.flat)
        return whole.written(self.kernel(a, b, out=whole.place("out", out, whole.half)), whole.half, out)

    def vjp(self, x: Any, axis: int = -1, *, out: Any = None) -> tuple[Any, Callable[..., Any]]:
        """Run forward and keep what backward needs; as `Kernel.vjp`. The pullback takes one cotangent, and `out=`; no `wrt`."""
        whole = cut(self.__name__, x, axis)
        place = whole.place("out", out, whole.half)
        if out is not None and whole.lib in WRITABLE and np.may_share_memory(memory(out), memory(whole.x)):
            raise ValueError(wrong(self.__name__, "out", "the memory of x", "other memory: the pullback reads x"))
        y, pull = self.kernel.vjp(*whole.halves(whole.flat), out=place)

        def pullback(dy: Any, *, out: Any = None) -> Any:
            """The gradient for a cotangent of the output."""
            return _gradient(whole._replace(what=f"{self.__name__} pullback"), pull, dy, out)

        return whole.written(y, whole.half, out), pullback

    def backward(self, dy: Any, x: Any, axis: int = -1, *, out: Any = None) -> Any:
        """The gradient for a cotangent, given the input; without `wrt`, there being one input."""
        whole = cut(f"{self.__name__}.backward", x, axis)
        halves = whole.halves(whole.flat)
        return _gradient(whole, lambda dy, out=None: self.kernel.backward(dy, *halves, out=out), dy, out)

    def value_and_grad(self, x: Any, axis: int = -1, *, out: Any = None) -> Any:
        """Raise ValueError, as every kernel does whose result is not one number."""
        what = f"{self.__name__}.value_and_grad"
        cut(what, x, axis)
        raise ValueError(wrong(what, "the result", "an array", "one number; use vjp"))

    def explain(self, x: Any, axis: int = -1) -> str:
        """Which backend a call would run on, and why not a faster one."""
        whole = cut(self.__name__, x, axis)
        return self.kernel.explain(*whole.halves(whole.flat))

    def source(self, **options: Any) -> str:
        """The code that a backend runs, as text; as `Kernel.source`. It is given the halves."""
        return self.kernel.source(**options)

    def warmup(self, **options: Any) -> None:
        """Compile ahead of the first call; as `Kernel.warmup`."""
        self.kernel.warmup(**options)


class Cut(NamedTuple):
    """An array, and as `flat` the matrix whose left and right half are its halves."""

    what: str
    x: Any
    xp: Any
    lib: str
    flat: Any
    half: tuple[int, ...]

    def halves(self, matrix: Any) -> tuple[Any, Any]:
        middle = matrix.shape[1] // 2
        return matrix[:, :middle], matrix[:, middle:]

    def place(self, label: str, out: Any, shape: tuple[int, ...]) -> Any:
        """The caller's `out` as a matrix of as many rows; a copy where it cannot be seen as one."""
        if out is None or library(out) != self.lib:
            return out  # the kernel says what is wrong with another library's
        if tuple(out.shape) != shape:
            raise ValueError(wrong(self.what, label, f"shape {tuple(out.shape)}", str(shape)))
        return self.xp.reshape(out, (self.flat.shape[0], -1) if math.prod(shape) else (self.flat.shape[0], 0))

    def written(self, matrix: Any, shape: tuple[int, ...], out: Any) -> Any:
        """A result in the caller's shape, in `out` if there is one."""
        result = self.xp.reshape(matrix, shape)
        if out is None:
            return result
        if not np.may_share_memory(memory(matrix), memory(out)):
            out[...] = result
        return out


def cut(what: str, x: Any, axis: Any) -> Cut:
    x = accept(what, "x", x, None)
    shape = tuple(x.shape)
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise mistyped(what, "axis", axis, "an integer")
    if not -len(shape) <= axis < len(shape):
        fits = f"-{len(shape)} <= axis < {len(shape)} for shape {shape}" if shape else "an array of at least one dimension"
        raise ValueError(wrong(what, "axis", axis, fits))
    axis = int(axis) % len(shape)
    if shape[axis] % 2:
        raise ValueError(wrong(what, "x", f"{shape[axis]} elements along axis {axis}", "an even number"))
    xp = namespace(x)
    flat = xp.reshape(x, (math.prod(shape[:axis]), math.prod(shape[axis:])))
    return Cut(what, x, xp, library(x), flat, (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :]))


def _gradient(whole: Cut, pull: Callable[..., Any], dy: Any, out: Any) -> Any:
    """The halves of the gradient, as one array."""
    xp, x = whole.xp, whole.x
    dy = accept(whole.what, "dy", dy, whole.lib)
    if tuple(dy.shape) != whole.half:
        raise ValueError(wrong(whole.what, "dy", f"shape {tuple(dy.shape)}", str(whole.half)))
    if dtype_class(xp, whole.what, "x", x.dtype) != "float":
        raise TypeError(wrong(whole.what, "x", f"dtype {dtype_name(x.dtype)}", "floating numbers, to differentiate by"))
    dy = xp.reshape(dy, (whole.flat.shape[0], -1) if dy.size else (whole.flat.shape[0], 0))
    if whole.lib not in WRITABLE:
        if out is not None:
            raise TypeError(wrong(whole.what, "out", f"a {whole.lib} array", f"None: {whole.lib} arrays are not written"))
        return xp.reshape(xp.concat(pull(dy), axis=1), x.shape)
    place = whole.place("out", out, tuple(x.shape))
    if place is None:
        place = xp.empty(whole.flat.shape, dtype=x.dtype)
    pull(dy, out=whole.halves(place))
    return whole.written(place, tuple(x.shape), out)
