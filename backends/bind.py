"""A call's arguments, sorted by role and checked one by one."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xpnn.backends.arrays import mistyped, wrong
from xpnn.backends.declare import Declaration

if TYPE_CHECKING:
    from xpnn.backends.kernel import Kernel


@dataclass
class Bound:
    """A call's arguments by role. `arrays` are as the caller passed them; `nones` names those that are None.

    `span` is the shape of the last axes, where the caller says that a row is made of these.
    """

    arrays: dict[str, Any]
    options: dict[str, Any]
    axis: int
    axis_given: bool
    span: tuple[int, ...] | None
    out: Any
    nones: tuple[str, ...] = ()


def by_position(kernel: Kernel) -> tuple[str, ...]:
    """What a call takes by position: the inputs; after the first what gives rows their shape; or after an only one the axis."""
    first, *others = kernel.declaration.inputs
    if kernel.declaration.span is not None:
        return first, kernel.declaration.span, *others
    return (first, "axis") if kernel.has_axis and not others else (first, *others)


def bind(kernel: Kernel, what: str, positional: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
    """Sort arguments into arrays, options, axis and out."""
    d = kernel.declaration
    if len(args) > len(positional):
        raise TypeError(f"{what}: takes {len(positional)} positional arguments ({', '.join(positional)}), got {len(args)}")
    given = dict(zip(positional, args, strict=False))
    for name in kwargs.keys() & given.keys():
        raise TypeError(f"{what}: {name} was given twice")
    arrays_known = ({*positional} | {*d.inputs}) - {"axis", d.span}
    bound = Bound({}, dict(d.options), -1, False, None, None)
    for name, value in (given | kwargs).items():
        if name == "out":
            bound.out = value
        elif name == "axis" and kernel.has_axis:
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise mistyped(what, "axis", value, "an integer")
            bound.axis, bound.axis_given = int(value), True
        elif name == d.span:
            bound.span = _span(what, name, value)
        elif name in d.options:
            bound.options[name] = option_value(what, name, value, d.options[name])
        elif name in arrays_known:
            if value is None:
                bound.nones += (name,)
            else:
                bound.arrays[name] = value
        else:
            special = ["axis"] if kernel.has_axis else [d.span] if d.span is not None else []
            known = ", ".join(sorted([*arrays_known, *d.options, *special, "out"]))
            raise TypeError(f"{what}: got an unexpected argument {name!r}, expected one of {known}")
    return bound


def _span(what: str, name: str, value: Any) -> tuple[int, ...] | None:
    """The shape of a row's axes: a tuple, or one number for the last; None is any last axis."""
    if value is None:
        return None
    sizes = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not sizes or not all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in sizes):
        raise mistyped(what, name, value, "an integer, or a tuple of at least one")
    return tuple(int(n) for n in sizes)


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
            fits, kind = False, "something hashable, such as a number, a string or None"
    if not fits:
        raise mistyped(what, name, value, kind)
    return value


def require(what: str, d: Declaration, bound: Bound, names: tuple[str, ...]) -> None:
    missing = [n for n in names if n not in bound.arrays and not (n in d.inputs and d.inputs[n].optional)]
    for n in missing:
        if n in bound.nones:
            raise TypeError(wrong(what, n, "None", "an array"))
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
    if isinstance(out, list) and len(names) > 1:
        raise TypeError(wrong(what, "out", "a list", f"a tuple of {len(names)}: {', '.join(names)}"))
    values = out if isinstance(out, tuple) else (out,)
    if len(values) != len(names):
        raise TypeError(wrong(what, "out", f"{len(values)} arrays", f"{len(names)}: {', '.join(names)}"))
    return {n: v for n, v in zip(names, values, strict=True) if v is not None}


def single(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values
