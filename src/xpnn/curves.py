"""An activation's curve and its slope, as the kernel itself computes them, and what can be read off: range, steepest, flat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from xpnn.backends import prepare
from xpnn.backends.kernel import Kernel
from xpnn.backends.kinds import Full

Array = np.ndarray[Any, Any]

EDGE = 8.0  # the part near zero, where activations bend, is −8 to 8
SHARE = 0.01  # of the largest slope: a smaller one counts as saturated
_NEAR = np.linspace(-EDGE, EDGE, 1601)
_FAR = np.geomspace(EDGE, 1e9, 20_001)[1:]  # where a limit is told from growth, even a logarithm's
X = np.concatenate((-_FAR[::-1], _NEAR, _FAR))
X.flags.writeable = False


def refusal(kernel: Kernel) -> str | None:
    """Why a kernel has no such curve, or None if it has one."""
    d = kernel.declaration
    (first, *more) = d.inputs.values()
    if more or first.kinds != (Full,) or len(d.outputs) != 1:
        return f"it has the inputs {', '.join(d.inputs)} and the results {', '.join(d.outputs)}, expected one array of each"
    if first.name in d.domain:
        return f"{first.name} is {d.domain[first.name]}, expected all real numbers"
    if d.backward is None:
        return "it has no backward"
    if prepare.reach(kernel) != "element":
        return "its formula is not element-wise, or cannot be traced"
    return None


@dataclass(frozen=True)
class Curve:
    """g and g′ at the places X, in float64 and with the options' defaults."""

    y: Array
    slope: Array

    @cached_property
    def steepest(self) -> float:
        """The largest |g′| for |x| ≤ 8."""
        return float(np.nanmax(np.abs(self.slope[np.abs(X) <= EDGE])))

    def flat(self, share: float = SHARE) -> list[tuple[float, float]]:
        """Where |g′| < share · steepest: intervals, the outer ones open towards infinity.

        A turning point, around which g′ changes its sign, is none: gelu's lowest point does not stop learning.
        """
        small = np.abs(self.slope) < share * self.steepest
        ends = np.flatnonzero(np.diff(small, prepend=False, append=False)).reshape(-1, 2)
        found = []
        for start, stop in ends:
            first, last = start == 0, stop == X.size
            if not first and not last and self.slope[start - 1] * self.slope[stop] < 0:
                continue
            found.append((-np.inf if first else float(X[start]), np.inf if last else float(X[stop - 1])))
        return found


def curve(kernel: Kernel) -> Curve:
    """Run a kernel and its backward, whose cotangent is one everywhere.

    Raises
    ------
    TypeError
        For a kernel that is not element-wise, of one real input, and with a backward.

    Examples
    --------
    >>> import xpnn
    >>> from xpnn.curves import curve
    >>> curve(xpnn.sigmoid).steepest
    0.25
    >>> curve(xpnn.relu).flat()
    [(-inf, 0.0)]
    """
    if reason := refusal(kernel):
        raise TypeError(f"{kernel.__name__} is no activation: {reason}")
    with np.errstate(all="ignore"):  # far out, a composed formula may overflow on its way to a finite value
        y, pullback = kernel.vjp(X)
        return Curve(y, pullback(np.ones_like(X)))


def bounds(values: Array) -> tuple[float, float, bool, bool]:
    """The least and the largest of values at X, infinite if they go on growing, and whether each is attained for |x| ≤ 8.

    Examples
    --------
    >>> import xpnn
    >>> from xpnn.curves import bounds, curve
    >>> bounds(curve(xpnn.tanh).y)
    (-1.0, 1.0, False, False)
    >>> bounds(curve(xpnn.relu).y)
    (0.0, inf, True, False)
    """
    low, low_attained = _least(values)
    high, high_attained = _least(-values)
    return low, -high, low_attained, high_attained


def _least(values: Array) -> tuple[float, bool]:
    near, least = np.nanmin(values[np.abs(X) <= EDGE]), np.nanmin(values)
    if near == least:
        return float(least), True
    ends = values[[0, -1]]
    inner = values[[_FAR.size // 4, -_FAR.size // 4]]  # a hundredth as far out
    growing = (ends == least) & ~np.isclose(ends, inner, rtol=1e-3, atol=1e-12)
    return (-np.inf if growing.any() else float(least)), False
