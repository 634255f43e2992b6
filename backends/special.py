"""erf and erfc, which the array API standard lacks, written in what it has.

Right in float32 and float64; the coefficients are found by `tools/fit_elementary.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# erf(x) = x + x q(x²) where |erf(x)| < 1/2
HALFWAY = 0.4769362762044699
ERF = (
    0.1283791670955126,
    -0.37612638903183754,
    0.11283791670955001,
    -0.026866170645061686,
    0.005223977623457679,
    -0.0008548326697914031,
    0.00012055300425591646,
    -1.4923630912777343e-05,
    1.6386117573493423e-06,
    -1.4767585239544442e-07,
)
# erfc(a) = exp(-a²) q(t) / (a + c) with t = (a - c) / (a + c), from there on as far as it is a normal number
CENTRE = 3.828125
ERFC = (
    1.0932725406451944,
    -0.9646134483004571,
    0.7483804543519533,
    -0.5067260507959973,
    0.29545160867373543,
    -0.14490421519082888,
    0.05718627376219477,
    -0.016385111294998304,
    0.0022582528573111553,
    0.0006141439052944735,
    -0.00042248344067612864,
    5.926178100256738e-05,
    3.204744978372467e-05,
    -1.4097389533506575e-05,
    -1.3512656390556218e-06,
    2.050713925265297e-06,
    -7.718922935338629e-08,
    -2.6816350777596863e-07,
    2.9606457002996416e-08,
    2.6569996970863378e-08,
    -3.673634066753209e-09,
)


def erf(xp: Any, x: Any) -> Any:
    """The error function, 2/√π ∫ exp(−t²) dt from 0 to x."""
    c = _tail(xp, xp.abs(x))
    return xp.where(xp.abs(x) < HALFWAY, _near(x), xp.where(x < 0, c - 1.0, 1.0 - c))


def erfc(xp: Any, x: Any) -> Any:
    """1 − erf(x), without the cancellation far right."""
    c = _tail(xp, xp.abs(x))
    return xp.where(xp.abs(x) < HALFWAY, 1.0 - _near(x), xp.where(x < 0, 2.0 - c, c))


def _near(x: Any) -> Any:
    """erf(x) below HALFWAY."""
    return x + x * _polynomial(x * x, ERF)


def _tail(xp: Any, a: Any) -> Any:
    """erfc(a) from HALFWAY on.

    a² = h² + (a − h)(a + h), where h is short, so that its square is exact: exp(−a²) would carry the rounding of a² many
    times. What the rounding of a + c loses is given back.
    """
    a = xp.where(a > 120.0, 120.0, a)  # where it is 0, in extended precision too
    h = xp.floor(16.0 * a) / 16.0
    d = a + CENTRE
    lost = (a - (d - CENTRE)) / d
    t = (a - CENTRE) / d * (1.0 - lost)
    return xp.exp(-h * h) * xp.exp((h - a) * (a + h) - lost) * (_polynomial(t, ERFC) / d)


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    """The polynomial with these coefficients, lowest power first, by Horner's rule."""
    result = x * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        result = result * x + c
    return result
