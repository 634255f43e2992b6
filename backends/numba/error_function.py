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
# erfc(k/8 + r) is the polynomial in r with the coefficients k of these, lowest power first; what rounding the first lost
_EIGHTHS = (
    (
        1.0, 0.8596838, 0.7236736, 0.5958831, 0.47950011, 0.3767591, 0.28884438, 0.21592493, 0.1572992, 0.11161177,
        0.077099875, 0.051829927, 0.03389485, 0.021556268, 0.013328329, 0.008009942, 0.004677735, 0.0026540293,
        0.0014627166, 0.0007829382, 0.00040695202, 0.00020537573, 0.000100621925, 4.785484e-05, 2.2090497e-05,
        9.896735e-06, 4.3027794e-06, 1.8152814e-06, 7.430984e-07, 2.9514018e-07, 1.1372726e-07, 4.2513943e-08,
    ),
    (
        -1.1283792, -1.1108853, -1.0600141, -0.9803528, -0.8787826, -0.76349956, -0.64293104, -0.52474505, -0.4151075,
        -0.31827396, -0.23652112, -0.17035978, -0.11893029, -0.08047226, -0.052774996, -0.03354583, -0.020666985,
        -0.01234082, -0.007142319, -0.004006478, -0.0021782843, -0.0011478751, -0.0005862772, -0.0002902283,
        -0.00013925305, -6.4758686e-05, -2.9189026e-05, -1.2751741e-05, -5.399427e-06, -2.2159204e-06, -8.814323e-07,
        -3.3982244e-07,
    ),
    (
        5.078781e-10, 0.13886066, 0.26500353, 0.3676323, 0.4393913, 0.47718722, 0.4821983, 0.45915192, 0.4151075,
        0.3580582, 0.2956514, 0.23424469, 0.17839544, 0.13076742, 0.09235624, 0.06289843, 0.04133397, 0.026224244,
        0.016070219, 0.009515385, 0.0054457104, 0.0030131722, 0.0016122623, 0.00083440624, 0.00041775912,
        0.00020237087, 9.4864314e-05, 4.3037115e-05, 1.8897988e-05, 8.032707e-06, 3.3053689e-06, 1.3168108e-06,
    ),
    (
        0.37612602, 0.35872304, 0.30917057, 0.23487613, 0.14646384, 0.055672027, -0.02678855, -0.09292336,
        -0.13836896, -0.1624522, -0.16753575, -0.15793772, -0.13875207, -0.1148407, -0.09015737, -0.06744116,
        -0.04822301, -0.03303743, -0.021724563, -0.013730532, -0.008350083, -0.004890417, -0.0027603803,
        -0.0015025291, -0.00078909553, -0.00040001632, -0.0001958075, -9.258163e-05, -4.2294756e-05, -1.8673338e-05,
        -7.969406e-06, -3.288386e-06,
    ),
    (
        -3.466829e-07, -0.06870731, -0.12698089, -0.16658321, -0.18307935, -0.17645937, -0.15068644, -0.11239609,
        -0.06918424, -0.027973134, 0.00615939, 0.030500453, 0.04459861, 0.049718585, 0.048101954, 0.042259682,
        0.034444846, 0.026360763, 0.019083371, 0.013133235, 0.008622414, 0.005414338, 0.0032581543, 0.0018817933,
        0.0010444226, 0.00055759103, 0.00028658044, 0.00014189482, 6.772177e-05, 3.117078e-05, 1.3842397e-05,
        5.933095e-06,
    ),
    (
        -0.11265448, -0.10401782, -0.07994276, -0.045438047, -0.0073599825, 0.027318569, 0.053117003, 0.06708904,
        0.06908121, 0.061258126, 0.047156252, 0.030615557, 0.014898528, 0.002176992, -0.0065831416, -0.011429052,
        -0.013066098, -0.012482757, -0.010653104, -0.008358209, -0.0061210156, -0.00422249, -0.0027601826,
        -0.0017168415, -0.0010191904, -0.0005787642, -0.00031494664, -0.00016446454, -8.2509345e-05, -3.9805072e-05,
        -1.8480776e-05, -8.263006e-06,
    ),
    (
        5.9162652e-05, 0.022674095, 0.040493693, 0.050025396, 0.049934268, 0.041231137, 0.026772281, 0.010295886,
        -0.004648321, -0.015537229, -0.021272905, -0.022114739, -0.01927296, -0.0143646905, -0.008922675,
        -0.004077509, -0.0004441398, 0.001826202, 0.0029019574, 0.0031076393, 0.0027905346, 0.0022391062,
        0.0016507679, 0.0011350143, 0.0007344245, 0.0004498939, 0.0002619979, 0.00014549181, 7.722132e-05,
        3.9244638e-05, 1.9124773e-05, 8.947396e-06,
    ),
)
_EIGHTHS_LOST = (
    -1.1020222e-13, -1.6466007e-08, 2.7754686e-08, 1.914261e-08, 7.2692705e-09, 5.930452e-09, -1.04558024e-08,
    5.3875553e-09, 1.3895926e-09, -3.0495542e-10, -2.8721079e-09, 5.4828014e-10, 1.7208411e-09, -7.5489376e-10,
    5.2057993e-11, 8.134732e-11, 1.7759096e-10, 7.0195606e-11, -2.2566568e-11, 9.464377e-12, -4.4201157e-12,
    1.7874776e-12, -2.3700735e-12, 6.8723537e-13, 2.9319106e-13, -1.7842298e-13, 5.1141583e-14, 3.6133067e-14,
    -9.117933e-15, 1.0755806e-14, -3.525418e-15, 1.697846e-15,
)
# fmt: on
_WIDE = _Fit(erf=ERF, centre=CENTRE, erfc=ERFC, short=-1 << 27)


def erf(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """erf(x) = x + x q(x**2) where it is below 1/2, from there on 1 - erfc(|x|) with the sign of x.

    Worst error 0.78 ULP (float32, by tables, every 16th input), 1.39 ULP (float32, without), 1.88 ULP (float64).
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
    near, inside = _by_tables(a), a < (len(_EIGHTHS[0]) - 0.6) / 8
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
    """erfc(k/8 + r) for the nearest k below 32, by a polynomial of degree 6 for each k."""
    n, shifted = _round(a, 8.0, 0)
    place, r = shifted.as_bits(), n.fma(-1 / 8, a)
    first, *c = [_entry(place, f"erfc.{k}", [_float_bits(v) for v in row]).as_float() for k, row in enumerate(_EIGHTHS)]
    result = c[-1]
    for coefficient in c[-2::-1]:
        result = result.fma(r, coefficient)
    lost = _entry(place, "erfc.lost", [_float_bits(v) for v in _EIGHTHS_LOST]).as_float()
    return result.fma(r, lost) + first


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
