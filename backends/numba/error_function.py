"""erf and erfc as straight-line LLVM IR, in the manner of `elementary`."""

import math
from dataclasses import dataclass

from llvmlite import ir

from xpnn.backends.numba.elementary import _FLOAT, LN2, _polynomial, _power_of_two, _round, _Value
from xpnn.backends.special import CENTRE, ERF, ERFC, HALFWAY


@dataclass(frozen=True)
class _Fit:
    """The constants of `xpnn.backends.special`, fitted to a format; `short` keeps half of a number's significant bits."""

    erf: tuple[float, ...]
    centre: float
    erfc: tuple[float, ...]
    short: int


# fmt: off
_SINGLE = _Fit(
    erf=(0.12837917, -0.37612617, 0.112830564, -0.026775358, 0.004761306),
    centre=2.3125,
    erfc=(
        1.0437663, -0.7661567, 0.39304164, -0.11844092, 0.0032030598, 0.011723706, -0.0019247477, -0.0014862581,
        0.000267704, 0.00021548397,
    ),
    short=-1 << 12,
)
# fmt: on
_WIDE = _Fit(erf=ERF, centre=CENTRE, erfc=ERFC, short=-1 << 27)


def erf(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """erf(x) = x + x q(x**2) where it is below 1/2, from there on 1 - erfc(|x|) with the sign of x.

    @@
    """
    v = _Value(builder, x)
    a = abs(v)
    return (1.0 - _tail(a)).replace(a < HALFWAY, _near(a)).copysign(v).raw


def erfc(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """erfc(x) = 1 - erf(x) as long as that is more than 1/2, and 2 - erfc(-x) below zero.

    @@
    """
    v = _Value(builder, x)
    a = abs(v)
    far = _tail(a)
    return far.replace(v < 0.0, 2.0 - far).replace(a < HALFWAY, 1.0 - _near(v)).raw


def _fit(v: _Value) -> _Fit:
    return _SINGLE if v.format is _FLOAT else _WIDE


def _near(v: _Value) -> _Value:
    """erf(v) where it is below 1/2."""
    return _polynomial(v * v, _fit(v).erf).fma(v, v)


def _tail(a: _Value) -> _Value:
    """erfc(a) = exp(-a**2) q(t) / (a + c) from 1/2 on, with t = (a - c) / (a + c); 0 where exp(-a**2) is.

    a**2 = h**2 + (a - h) (a + h), where h has half of a's bits: its square and n ln 2, high part, are exact, and so is their
    difference. The rounding of a**2 itself would come out as many times larger as a**2 is. What d = a + c and u = 1 / d lost,
    1 - (a + c) u, is given back.
    """
    form, fit = a.format, _fit(a)
    end = math.sqrt((form.bias - 0.05) * LN2)
    a = a.replace(a > end, end)
    d = a + fit.centre
    u = 1.0 / d
    lost = u.fma(a - (d - fit.centre), d.fma(u, -1.0))
    q = _polynomial((lost * u).fma(2 * fit.centre, u.fma(-2 * fit.centre, 1.0)), fit.erfc)
    h = (a.as_bits() & fit.short).as_float()
    n, shifted = _round(a * a, -1 / LN2, form.bias)
    high, low = form.ln2
    r = 0.0 - (a - h).fma(a + h, n.fma(low, n.fma(high, h * h)) + lost)
    power = _polynomial(r, form.exp[2:]).fma(r * r, r)  # exp(r) - 1
    y = q * u
    return (power.fma(y, q.fma(u, -y)) + y) * _power_of_two(shifted)
