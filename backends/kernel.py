"""Kernel objects: what the decorated formula becomes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

from xpnn.backends import call, choice, declare, prepare
from xpnn.backends.arrays import FAST
from xpnn.backends.declare import Check, Declaration, Driver, Formula

registry: dict[str, Kernel] = {}
_OUT = {"out"}
_context = choice.context.get


class Kernel:
    """A pair of formulas, callable on arrays.

    Made by `xpnn.kernel`, never directly. Calling it runs the forward formula; see `backward`, `vjp` and
    `value_and_grad` for gradients, `source` for the code that runs.
    """

    def __init__(self, declaration: Declaration) -> None:
        self._declaration = declaration
        self._tasks: dict[Any, Any] = {}
        self._fast: dict[Any, Callable[..., Any]] = {}
        self._checked: set[Any] = set()
        self._plans: dict[Any, Any] = {}
        self.__name__ = self.__qualname__ = declaration.name
        self.__module__ = declaration.forward.__module__
        self.__doc__ = declaration.forward.__doc__ or f"The kernel {declaration.name}, whose formula has no docstring."
        self.__wrapped__ = declaration.forward
        self._backward = Backward(self)

    def _forget(self) -> None:
        """Drop what was prepared for calls."""
        for known in (self._tasks, self._fast, self._checked, self._plans):
            known.clear()

    def __repr__(self) -> str:
        return f"<kernel {self.__name__}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self.__name__

    @property
    def declaration(self) -> Declaration:
        """The formulas and the roles of their parameters."""
        return self._declaration

    @property
    def forward_formula(self) -> Formula:
        """The formula itself, `(xp, ...) -> y`, for use inside another kernel's formula."""
        return self._declaration.forward

    def backward_formula(self, xp: Any, **known: Any) -> Any:
        """The backward formula, given whichever of `known` it asks for: for use inside another kernel's."""
        d = self._declaration
        if d.backward is None:
            raise TypeError(f"{self.__name__}: it has no backward")
        return d.backward(xp, **{n: known[n] for n in d.backward_parameters if n in known})

    @property
    def has_axis(self) -> bool:
        """Whether the kernel works along rows, and so takes `axis`.

        Element-wise kernels do not, nor do those that only add up everything, nor those whose rows are the last axes.
        """
        return prepare.has_axis(self)

    @property
    def __signature__(self) -> inspect.Signature:
        d = self._declaration
        p = inspect.Parameter
        formula = inspect.signature(d.forward).parameters
        parameters = [formula[n].replace(annotation=p.empty) for n in [*d.inputs, *d.options]]
        if self.has_axis and len(d.inputs) == 1:
            parameters.insert(1, p("axis", p.POSITIONAL_OR_KEYWORD, default=-1))
        elif self.has_axis:
            parameters.append(p("axis", p.KEYWORD_ONLY, default=-1))
        elif d.span is not None:
            needed = any(not i.optional for i in [*d.inputs.values()][1:])  # what a default cannot stand before
            parameters.insert(1, p(d.span, p.POSITIONAL_OR_KEYWORD, default=p.empty if needed else None))
        parameters.append(p("out", p.KEYWORD_ONLY, default=None))
        return inspect.Signature(parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:  # what `_short` does; here a call of it would be felt
            first = args[0]
            named = tuple(kwargs) if kwargs and kwargs.keys() != _OUT else ()
            short = self._fast["forward", len(args), type(first), _context(), choice.process, first.dtype, first.ndim, named]
        except (AttributeError, IndexError, KeyError):
            short = None
        if short is not None and (result := short(*args, **kwargs)) is not None:
            return result
        return call.forward(self, args, kwargs)

    def _short(self, direction: str, args: tuple[Any, ...]) -> Any:
        """A short way for such arrays, whose result is None where it cannot be gone; or None."""
        if not args or (kind := type(first := args[0])) not in FAST:
            return None
        return self._fast.get((direction, len(args), kind, _context(), choice.process, first.dtype, first.ndim, ()))

    def vjp(self, *args: Any, **kwargs: Any) -> tuple[Any, Callable[..., Any]]:
        """Run forward and keep what backward needs.

        Returns
        -------
        y
            What the call would have returned.
        pullback
            A function of one cotangent for each differentiable output returned, None for zero; those that are not, such
            as an argmax, take none. It returns the gradient of a single input, else a tuple over the inputs passed, in the
            signature's order, None for integer ones. Takes `out=`, and `wrt=` like `value_and_grad`: gradients not asked for
            are not computed. It refers to the arrays that backward reads: changing one in place changes the gradient.

        Raises
        ------
        TypeError
            Where the kernel has no backward.

        Examples
        --------
        >>> import numpy as np, xpnn
        >>> y, pullback = xpnn.tanh.vjp(np.array([0.0, 100.0]))
        >>> pullback(np.array([1.0, 1.0]))
        array([1., 0.])
        """
        return call.vjp(self, args, kwargs)

    def value_and_grad(self, *args: Any, wrt: str | tuple[str, ...] | None = None, **kwargs: Any) -> tuple[Any, Any]:
        """The value of a kernel whose result is one number, and its gradients, in one fused pass.

        Parameters
        ----------
        wrt
            The input or inputs to differentiate by; a name gives one array, a tuple of names a tuple.
        out
            Where to write the gradients; each may be the input it is the gradient of.

        Raises
        ------
        ValueError
            Where the result is not one number.
        TypeError
            Where the kernel has no backward.

        Examples
        --------
        >>> import numpy as np, xpnn
        >>> loss, dlogits = xpnn.cross_entropy.value_and_grad(np.zeros((1, 2)), np.array([0]))
        >>> dlogits
        array([[-0.5,  0.5]])
        """
        if wrt is None and (not kwargs or kwargs.keys() == _OUT):
            short = self._short("value_and_grad", args)
            if short is not None and (result := short(*args, **kwargs)) is not None:
                return result  # type: ignore[no-any-return]
        return call.value_and_grad(self, args, kwargs, wrt)

    @property
    def backward(self) -> Backward:
        """The gradient formula as a function of cotangents and cached values; as a decorator it attaches one."""
        return self._backward

    def source(
        self,
        *,
        backend: str = "numba",
        dtype: str = "float32",
        direction: str = "forward",
        shape: tuple[int, int] = (4096, 4096),
        **options: Any,
    ) -> str:
        """The code that a backend runs, as text.

        Parameters
        ----------
        backend
            "numba": a Python module. "cupy": a translation unit of CUDA C++, which nvcc and NVRTC compile.
        direction
            "forward", "backward", or "value_and_grad" for the fused pass.
        shape
            Rows and columns, which the CUDA code depends on.

        Examples
        --------
        >>> import xpnn
        >>> print(xpnn.relu.source().splitlines()[-1].strip())
        return -1
        """
        return prepare.source(self, backend, dtype, direction, shape, options)

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """Which backend a call would run on, and why not a faster one.

        Examples
        --------
        >>> import numpy as np, xpnn
        >>> xpnn.softmax.explain(np.ones(3))
        'numba'
        """
        return call.explain(self, args, kwargs)

    def warmup(self, *, dtype: str = "float32", direction: str = "forward", **options: Any) -> None:
        """Compile ahead of the first call, for NumPy arrays of a dtype.

        Examples
        --------
        >>> import xpnn
        >>> xpnn.softmax.warmup(dtype="float64")
        """
        prepare.warmup(self, dtype, direction, options)


class Backward:
    """`k.backward`: call it for gradients, or decorate a formula with it."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.__name__ = f"{kernel.__name__}.backward"
        self.__doc__ = f"Decorate a function (xp, dy, ...) with this, to give {kernel.__name__} the backward that it lacks."

    def __repr__(self) -> str:
        return f"<{self.__name__}{self.__signature__}>"

    @property
    def __signature__(self) -> inspect.Signature:
        d = self._kernel.declaration
        p = inspect.Parameter
        if d.backward is None:
            return inspect.Signature([p("formula", p.POSITIONAL_ONLY)])
        formula = inspect.signature(d.backward).parameters
        arrays = [formula[n].replace(annotation=p.empty) for n in d.backward_parameters if n not in d.options]
        extra = [p(n, p.KEYWORD_ONLY, default=None) for n in d.inputs if n not in d.backward_parameters]
        options = [p(n, p.KEYWORD_ONLY, default=v) for n, v in d.options.items()]
        axis = [p("axis", p.KEYWORD_ONLY, default=-1)] if self._kernel.has_axis else []
        axis += [p(d.span, p.KEYWORD_ONLY, default=None)] if d.span is not None else []
        needed = [a.name for a in arrays if a.name in d.cotangents()][:1]  # others may be left out, for zero
        needed = needed if arrays[0].name in needed else []
        arrays = [a.replace(kind=p.POSITIONAL_OR_KEYWORD, default=p.empty if a.name in needed else None) for a in arrays]
        last = [p(n, p.KEYWORD_ONLY, default=None) for n in ("wrt", "out")]
        return inspect.Signature([*arrays, *extra, *options, *axis, *last])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kernel = self._kernel
        if len(args) == 1 and not kwargs and inspect.isfunction(args[0]):
            declare.parse_backward(kernel.declaration, args[0])
            kernel._forget()
            self.__doc__ = args[0].__doc__ or f"The gradients of {kernel.__name__}, whose formula has no docstring."
            return args[0]
        if not kwargs or kwargs.keys() == _OUT:
            short = kernel._short("backward", args)
            if short is not None and (result := short(*args, **kwargs)) is not None:
                return result
        return call.backward(kernel, args, kwargs)


@overload
def kernel(formula: Formula) -> Kernel: ...
@overload
def kernel(
    *,
    outputs: tuple[str, ...] = ...,
    saved: tuple[str, ...] = ...,
    off: Mapping[str, Any] = ...,
    wrt: tuple[str, ...] | None = ...,
    domain: Mapping[str, str] = ...,
    variants: tuple[dict[str, Any], ...] = ...,
    check: Check | None = ...,
    driver: Driver | None = ...,
    span: str | None = ...,
    wide: tuple[str, ...] = ...,
) -> Callable[[Formula], Kernel]: ...
def kernel(
    formula: Formula | None = None,
    *,
    outputs: tuple[str, ...] = ("y",),
    saved: tuple[str, ...] = (),
    off: Mapping[str, Any] | None = None,
    wrt: tuple[str, ...] | None = None,
    domain: Mapping[str, str] | None = None,
    variants: tuple[dict[str, Any], ...] = ({},),
    check: Check | None = None,
    driver: Driver | None = None,
    span: str | None = None,
    wide: tuple[str, ...] = (),
) -> Any:
    """Make a kernel of a formula: a pure function of an array namespace `xp` and arrays.

    The formula is given two-dimensional arrays whatever the caller passes: parameters are (R, C) unless annotated as
    `xpnn.Row` (R, 1), `xpnn.Column` (1, C), `xpnn.Scalar`, `xpnn.Index` (column numbers, one per row) or `xpnn.Matrix`.
    Parameters after `*` are options, unless annotated so; one that defaults to None may be left out.

    Parameters
    ----------
    outputs, saved
        Names of what the formula returns: results, then values kept for backward.
    off
        Values of numeric options at which the formula is specialised, so that a term that is off costs nothing.
    wrt
        The inputs that `value_and_grad` differentiates by unless told otherwise; default: all floating ones.
    domain
        For checks and benchmarks: what samples an input takes, "real" (default), "positive", "unit" (in (0, 1)),
        "simplex" (rows that sum to one) or "log_simplex" (their logarithms).
    variants
        For checks: sets of options to go through.
    check
        A function of the inputs' kinds, their shapes and the options (all dicts) that raises for arguments that make no
        sense together; it may replace options by others that mean the same.
    driver
        How a task is run where a backend's own way will not do, such as by chunks (`xpnn.backends.chunked`).
    span
        A name for the argument by which the caller says what a row is made of: the shape of the last axes, which columns have
        too. It comes after the first input; left out, a row is the last axis. Such a kernel has no `axis`.
    wide
        Inputs and outputs for which half precision is too little: they are float32 beside arrays of half precision.

    Raises
    ------
    TypeError
        Where the signature is not a formula's, with the parameter's name.

    Examples
    --------
    >>> import numpy as np, xpnn
    >>> @xpnn.kernel
    ... def swish(xp, x, *, beta=1.0):
    ...     return x / (1 + xp.exp(-beta * x))
    >>> @swish.backward
    ... def swish_backward(xp, dy, x, *, beta=1.0):
    ...     s = 1 / (1 + xp.exp(-beta * x))
    ...     return dy * (s + beta * x * s * (1 - s))
    >>> y, pullback = swish.vjp(np.array([0.0]), beta=2.0)
    >>> pullback(np.array([1.0]))
    array([0.5])
    """

    def decorate(f: Formula) -> Kernel:
        made = Kernel(
            declare.parse(
                f,
                outputs=outputs,
                saved=saved,
                off=off or {},
                wrt=wrt,
                domain=domain or {},
                variants=variants,
                check=check,
                driver=driver,
                span=span,
                wide=wide,
            )
        )
        registry[made.__name__] = made
        return made

    return decorate if formula is None else decorate(formula)


__all__ = ["Backward", "Kernel", "kernel", "registry"]
