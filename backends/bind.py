"""A call's arguments, sorted by role and checked one by one."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xpnn.backends.arrays import wrong
from xpnn.backends.declare import Declaration

if TYPE_CHECKING:
    from xpnn.backends.kernel import Kernel


@dataclass
class Bound:
    """A call's arguments by role. `arrays` are as the caller passed them, None left out."""

    arrays: dict[str, Any]
    options: dict[str, Any]
    axis: int
    axis_given: bool
    out: Any


def bind(kernel: Kernel, what: str, positional: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
    """Sort arguments into arrays, options, axis and out."""
    d = kernel.declaration
    if len(args) > len(positional):
        raise TypeError(f"{what}: takes {len(positional)} positional arguments ({', '.join(positional)}), got {len(args)}")
    values = dict(zip(positional, args, strict=False))
    arrays_known = {*positional, *d.inputs}
    options = dict(d.options)
    bound = Bound({}, options, -1, False, None)
    for name, value in kwargs.items():
        if name in values:
            raise TypeError(f"{what}: {name} was given twice")
        if name == "out":
            bound.out = value
        elif name == "axis" and kernel.has_axis:
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(wrong(what, "axis", repr(value), "an integer"))
            bound.axis, bound.axis_given = int(value), True
        elif name in d.options:
            options[name] = option_value(what, name, value, d.options[name])
        elif name in arrays_known:
            values[name] = value
        else:
            known = [*arrays_known, *d.options, *(["axis"] if kernel.has_axis else []), "out"]
            raise TypeError(f"{what}: got an unexpected argument {name!r}, expected one of {', '.join(sorted(known))}")
    bound.arrays = {n: v for n, v in values.items() if v is not None}
    return bound


def option_value(what: str, name: str, value: Any, default: Any) -> Any:
    """An option's value in its default's type."""
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool | np.bool_), "True or False"
    elif isinstance(default, int):
        fits, kind = isinstance(value, numbers.Integral) and not isinstance(value, bool), "an integer"
        value = int(value) if fits else value
        if fits and not -(2**63) <= value < 2**63:
            raise ValueError(wrong(what, name, value, "an integer of 64 bits"))
    elif isinstance(default, float):
        fits, kind = isinstance(value, numbers.Real) and not isinstance(value, bool), "a number"
        try:
            value = float(value) if fits else value
        except OverflowError:
            raise ValueError(wrong(what, name, "a number too large", "a number that a float can hold")) from None
    elif isinstance(default, str):
        fits, kind = isinstance(value, str), "a string"
    else:
        try:
            hash(value)
            fits, kind = True, ""
        except TypeError:
            fits, kind = False, "something hashable"
    if not fits:
        raise TypeError(wrong(what, name, repr(value), kind))
    return value


def require(what: str, d: Declaration, bound: Bound, names: tuple[str, ...]) -> None:
    missing = [n for n in names if n not in bound.arrays and not (n in d.inputs and d.inputs[n].optional)]
    if missing:
        raise TypeError(f"{what}: missing {', '.join(missing)}")


def needs_backward(kernel: Kernel) -> None:
    if kernel.declaration.backward is None:
        name = kernel.__name__
        raise TypeError(f"{name}: it has no backward; add one with @{name}.backward above a function (xp, dy, ...)")


def outs(what: str, names: tuple[str, ...], out: Any) -> dict[str, Any]:
    """`out` by result: one array for one result, else a tuple."""
    if out is None:
        return {}
    values = out if isinstance(out, tuple) else (out,)
    if len(values) != len(names):
        raise TypeError(wrong(what, "out", f"{len(values)} arrays", f"{len(names)}: {', '.join(names)}"))
    return {n: v for n, v in zip(names, values, strict=True) if v is not None}


def single(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values
