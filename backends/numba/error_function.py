"""erf and erfc as straight-line LLVM IR, in the manner of `elementary`."""

import math
from dataclasses import dataclass

from llvmlite import ir

from xpnn.backends.numba.elementary import (
    _FLOAT,
    LN2,
    STEPS,
    _entry,
    _float_bits,
    _looks_up,
    _polynomial,
    _power_of_two,
    _round,
    _Value,
)
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
# erfc(k/8 + r) is the polynomial in r with the coefficients k of these, lowest power first
_EIGHTHS = (
    (
        1.0, 0.8596838, 0.7236736, 0.5958831, 0.47950011, 0.3767591, 0.28884438, 0.21592493, 0.1572992, 0.11161177,
        0.077099875, 0.051829927, 0.03389485, 0.021556268, 0.013328329, 0.008009942,
    ),
    (
        -1.1283792, -1.1108853, -1.0600141, -0.9803528, -0.8787826, -0.76349956, -0.64293104, -0.52474505, -0.4151075,
        -0.31827396, -0.23652112, -0.17035978, -0.11893029, -0.08047226, -0.052774996, -0.03354583,
    ),
    (
        1.7470278e-10, 0.13886046, 0.26500317, 0.36763188, 0.43939087, 0.47718686, 0.48219806, 0.45915183, 0.41510755,
        0.35805833, 0.29565158, 0.23424488, 0.1783956, 0.13076754, 0.09235632, 0.062898465,
    ),
    (
        0.37612602, 0.35872266, 0.30916992, 0.2348753, 0.14646299, 0.055671297, -0.02678903, -0.09292351, -0.13836877,
        -0.16245174, -0.16753511, -0.15793703, -0.13875145, -0.11484022, -0.090157054, -0.06744102,
    ),
    (
        -5.899061e-08, -0.06857459, -0.1267438, -0.16629031, -0.182787, -0.176218, -0.15052973, -0.11233581,
        -0.069211304, -0.028063891, 0.006035116, 0.030371286, 0.044486072, 0.049634732, 0.048049882, 0.042235885,
    ),
    (
        -0.112652555, -0.10393719, -0.07981125, -0.045272175, -0.0071867746, 0.027467974, 0.053215273, 0.06711993,
        0.06904268, 0.06116228, 0.04702523, 0.030474974, 0.014771054, 0.0020782745, -0.006646253, -0.011457612,
    ),
)
# fmt: on
_WIDE = _Fit(erf=ERF, centre=CENTRE, erfc=ERFC, short=-1 << 27)


def erf(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """erf(x) = x + x q(x**2) where it is below 1/2, from there on 1 - erfc(|x|) with the sign of x.

    Worst error 0.98 ULP (float32, by tables), 1.39 ULP (float32, without), 1.88 ULP (float64).
    """
    v = _Value(builder, x)
    a = abs(v)
    return (1.0 - _complement(a)).replace(a < HALFWAY, _near(a)).copysign(v).raw


def erfc(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """erfc(x) = 1 - erf(x), and 2 - erfc(-x) below zero.

    Worst error 2.48 ULP (float32), 2.83 ULP (float64).
    """
    v = _Value(builder, x)
    y = _complement(abs(v))
    return y.replace(v < 0.0, 2.0 - y).raw


def _fit(v: _Value) -> _Fit:
    return _SINGLE if v.format is _FLOAT else _WIDE


def _near(v: _Value) -> _Value:
    """erf(v) where it is below 1/2."""
    return _polynomial(v * v, _fit(v).erf).fma(v, v)


def _complement(a: _Value) -> _Value:
    """erfc(a) for a >= 0: a part of it by tables, where there are any, which costs a third and is enough for most vectors."""
    if not (a.format is _FLOAT and _looks_up() and a.lanes in (0, STEPS)):
        return _tail(a).replace(a < HALFWAY, 1.0 - _near(a))
    builder = a.builder
    near, inside = _by_tables(a), a < 15.4 / 8
    everywhere = inside.raw
    if a.lanes:
        bits = ir.IntType(a.lanes)
        everywhere = builder.icmp_unsigned("==", builder.bitcast(everywhere, bits), bits(-1))
    before = builder.block
    with builder.if_then(builder.not_(everywhere), likely=False):
        other = builder.select(inside.raw, near.raw, _tail(a).raw)
        after = builder.block
    result = builder.phi(a.kind)
    result.add_incoming(near.raw, before)
    result.add_incoming(other, after)
    return _Value(builder, result)


def _by_tables(a: _Value) -> _Value:
    """erfc(k/8 + r) for the nearest k below 16, by a polynomial of degree 5 for each k."""
    n, shifted = _round(a, 8.0, 0)
    place, r = shifted.as_bits(), n.fma(-1 / 8, a)
    c = [_entry(place, f"erfc.{k}", [_float_bits(v) for v in row]).as_float() for k, row in enumerate(_EIGHTHS)]
    result = c[-1]
    for coefficient in c[-2::-1]:
        result = result.fma(r, coefficient)
    return result


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
