"""Fit the coefficients of the modules of backends/numba that hold elementary functions, and measure those.

    fit_elementary.py            print the coefficients (weighted Remez in mpmath, rounded to the dtype)
    fit_elementary.py --check    worst error in ULP of the compiled functions [--stride N: every N-th float32]

The errors printed beside the coefficients are relative to the function of the same name, before and after rounding.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mpmath as mp
import numpy as np
from numba.core.decorators import njit
from numba.extending import intrinsic

from xpnn.backends import special
from xpnn.backends.numba import elementary, error_function

mp.mp.dps = 50
SPECIAL = ("erf", "erfc")
TINY = mp.mpf("1e-12")  # an end of a range where the fitted function is 0 / 0
Function = Callable[[Any], Any]


# ---------------------------------------------------------------------------------------------------------- fitting


def remez(target: Function, weight: Function, low: Any, high: Any, powers: Sequence[int]) -> tuple[list[Any], Any]:
    """Coefficients c minimising max |weight * (target - sum c_k x**powers_k)| on [low, high], and that maximum."""
    size = len(powers) + 1
    middle, half = (low + high) / 2, (high - low) / 2
    grid = [middle - half * mp.cos(mp.pi * (i + mp.mpf(1) / 2) / (40 * size)) for i in range(40 * size)]
    values = [(target(x), abs(weight(x))) for x in grid]
    chosen = [round((len(grid) - 1) * (1 - mp.cos(mp.pi * i / (size - 1))) / 2) for i in range(size)]
    for _ in range(30):
        matrix, right = mp.matrix(size, size), mp.matrix(size, 1)
        for row, i in enumerate(chosen):
            x, (y, w) = grid[i], values[i]
            for column, power in enumerate(powers):
                matrix[row, column] = w * x**power
            matrix[row, size - 1] = (-1) ** row
            right[row] = w * y
        solution = list(mp.lu_solve(matrix, right))
        errors = [
            w * (y - mp.fsum(c * x**p for c, p in zip(solution, powers, strict=False)))
            for x, (y, w) in zip(grid, values, strict=True)
        ]
        worst, levelled = max(map(abs, errors)), abs(solution[-1])
        if worst <= levelled * mp.mpf("1.001"):
            break
        chosen = extrema(errors, size)
    return solution[:-1], worst


def extrema(errors: Sequence[Any], size: int) -> list[int]:
    """Indices of `size` extrema of alternating sign, the largest kept."""
    peaks: list[int] = []
    for i, error in enumerate(errors):
        if peaks and mp.sign(errors[peaks[-1]]) == mp.sign(error):
            if abs(error) > abs(errors[peaks[-1]]):
                peaks[-1] = i
        else:
            peaks.append(i)
    while len(peaks) > size:
        if len(peaks) == size + 1:
            peaks.pop(0 if abs(errors[peaks[0]]) < abs(errors[peaks[-1]]) else -1)
        else:
            pair = min(range(len(peaks) - 1), key=lambda i: max(abs(errors[peaks[i]]), abs(errors[peaks[i + 1]])))
            del peaks[pair : pair + 2]
    return peaks


def fit(target: Function, weight: Function, low: Any, high: Any, degree: int, dtype: type) -> list[float]:
    """Coefficients of the polynomial of lowest weighted error, lowest power first, rounded to dtype."""
    solution, worst = remez(target, weight, low, high, range(degree + 1))
    rounded = [round_to(dtype, c) for c in solution]
    after = max(abs(weight(x) * (target(x) - mp.polyval(rounded[::-1], x))) for x in mp.linspace(low, high, 1000))
    print(f"    # relative error 2^{float(mp.log(worst, 2)):.1f}, rounded 2^{float(mp.log(after, 2)):.1f}")
    return rounded


def round_to(dtype: type, value: Any) -> float:
    bits = np.finfo(dtype).nmant + 1
    _, exponent = mp.frexp(value)
    return float(mp.ldexp(mp.nint(mp.ldexp(value, bits - exponent)), exponent - bits))


def print_coefficients() -> None:
    half = mp.log(2) / 2 * mp.mpf("1.0001")
    for dtype, degrees, ln2_bits in ((np.float32, (4, 8, 3, 4), 16), (np.float64, (9, 6, 9, 10), 42)):
        exp_degree, log1p_degree, near_degree, far_degree = degrees
        print(dtype.__name__)
        high = mp.ldexp(mp.nint(mp.ldexp(mp.log(2), ln2_bits)), -ln2_bits)
        show("ln2", dtype, [float(high), round_to(dtype, mp.log(2) - high)])
        # exp(r) = 1 + r + r^2 q(r)
        tail = fit(lambda r: (mp.expm1(r) - r) / r**2, lambda r: r**2 / mp.exp(r), -half, half, exp_degree, dtype)
        show("exp", dtype, [1.0, 1.0, *tail])
        if dtype is np.float32:  # the same on a sixteenth of the range
            tail = fit(lambda r: (mp.expm1(r) - r) / r**2, lambda r: r**2 / mp.exp(r), -half / 16, half / 16, 1, dtype)
            show("exp_short", dtype, [1.0, *tail])
        if dtype is np.float32:  # log(1 + f) = f + f^2 q(f)
            show("log1p", dtype, fit(lambda f: (mp.log1p(f) - f) / f**2, lambda f: f**2 / mp.log1p(f),
                                     mp.sqrt(0.5) - 1, mp.sqrt(2) - 1, log1p_degree, dtype))  # fmt: skip
        else:  # log(1 + f) = 2 s + s^3 q(s^2), s = f / (2 + f)
            show("log1p", dtype, fit(lambda v: (2 * mp.atanh(mp.sqrt(v)) / mp.sqrt(v) - 2) / v, lambda v: v,
                                     TINY, (3 - 2 * mp.sqrt(2)) ** 2, log1p_degree, dtype))  # fmt: skip
        # tanh(a) = a + a^3 q(a^2) where tanh(a) < 1/2
        show("tanh_near", dtype, fit(lambda u: (mp.tanh(mp.sqrt(u)) / mp.sqrt(u) - 1) / u,
                                lambda u: u * mp.sqrt(u) / mp.tanh(mp.sqrt(u)),
                                TINY, (mp.log(3) / 2) ** 2, near_degree, dtype))  # fmt: skip
        # exp(2 r) = 1 + r q(r), for tanh(a) >= 1/2
        tail = fit(lambda r: mp.expm1(2 * r) / r, lambda r: r * tanh_by_exp(r), -half / 2, half / 2, far_degree, dtype)
        show("tanh_far", dtype, [1.0, *tail])
        print_error_functions(dtype)


def print_error_functions(dtype: type) -> None:
    """Those of erf and erfc, for float64 in backends/special.py."""
    near, far, centre, end = (4, 9, 2.3125, 9.25) if dtype is np.float32 else (9, 20, 3.828125, 26.6)
    # erf(x) = x + x q(x^2)
    show("erf", dtype, fit(lambda u: mp.erf(mp.sqrt(u)) / mp.sqrt(u) - 1, lambda u: mp.sqrt(u) / mp.erf(mp.sqrt(u)),
                           TINY, mp.erfinv(0.5) ** 2 * mp.mpf("1.0001"), near, dtype))  # fmt: skip

    @functools.cache
    def scaled(t: Any) -> Any:
        a = centre * (1 + t) / (1 - t)
        return (a + centre) * mp.exp(a * a) * mp.erfc(a)

    # erfc(a) = exp(-a^2) q(t) / (a + c) with t = (a - c) / (a + c)
    low, high = ((a - centre) / (a + centre) for a in (mp.erfinv(0.5) * mp.mpf("0.9999"), mp.mpf(end)))
    show("erfc", dtype, fit(scaled, lambda t: 1 / scaled(t), low, high, far, dtype))
    if dtype is np.float32:  # erfc(k/8 + r) = q(r)
        eighth = mp.mpf("0.0625001")
        tables = [remez(lambda r, a=k / 8: mp.erfc(a + r), lambda r, a=k / 8: 1 / mp.erfc(a + r), -eighth, eighth, range(7))
                  for k in range(32)]  # fmt: skip
        print(f"    # relative error 2^{float(mp.log(max(worst for _, worst in tables), 2)):.1f}")
        for power in range(7):
            show(f"eighths[{power}]", dtype, [round_to(dtype, solution[power]) for solution, _ in tables])
        firsts = [solution[0] for solution, _ in tables]
        show("eighths_lost", dtype, [round_to(dtype, c - mp.mpf(round_to(dtype, c))) for c in firsts])


def tanh_by_exp(r: Any) -> Any:
    """How much 1 - 2 / (2**n exp(2 r) + 1) moves with exp(2 r), at the lowest n where it is >= 1/2."""
    power = mp.exp(2 * r)
    scale = 4 if 4 * power >= 3 else 8
    return 2 * scale / (scale * power + 1) ** 2


def show(name: str, dtype: type, values: Sequence[float]) -> None:
    print(f"    {name} = ({', '.join(str(dtype(v)) for v in values)})")


# -------------------------------------------------------------------------------------------------------- measuring


def compiled(name: str) -> Function:
    """The function as a loop over an array."""
    build = getattr(error_function if name in SPECIAL else elementary, name)

    def typed(typing_context: Any, x: Any) -> Any:
        return x(x), lambda context, builder, signature, arguments: build(builder, arguments[0])

    function: Any = intrinsic(typed)

    def loop(x: Any) -> Any:
        y = np.empty_like(x)
        for i in range(x.size):
            y[i] = function(x[i])
        return y

    compiled_loop: Function = njit(loop)
    return compiled_loop


def ulps(result: Any, truth: Any, beyond: Any, dtype: type) -> Any:
    """Error in units of the last place of the truth; `beyond` is what the truth misses, in these units."""
    unit = np.spacing(np.abs(truth).astype(dtype)).astype(np.float64)
    with np.errstate(under="ignore"):
        return np.abs((result.astype(np.float64) - truth) / unit - beyond)


def float32_samples(stride: int) -> Iterable[Any]:
    for start in range(0, 2**32, 2**24):
        yield np.arange(start, start + 2**24, stride, dtype=np.uint32).view(np.float32)


def float64_samples(name: str) -> Any:
    rng = np.random.default_rng(0)
    size = 10000
    spread = np.exp(rng.uniform(-700, 700, size))
    small = np.exp(rng.uniform(-5, 1.5, size))
    if name == "log":
        near_one = 1 + rng.choice([-1, 1], size) * small / 100
        return np.concatenate([spread, rng.uniform(0.3, 3, 4 * size), near_one, [5e-324]])
    if name == "log1p":  # near -1, across 0 down to where it is the identity, and far out
        tiny = rng.choice([-1, 1], 2 * size) * np.exp(rng.uniform(-80, -1, 2 * size))
        return np.concatenate([spread, tiny, rng.uniform(-1, 3, 4 * size), small - 1, -1 + 2.0 ** -rng.uniform(1, 53, size)])
    if name == "expm1":  # down to where it is -1, and across 0 to where it is the identity
        tiny = rng.choice([-1, 1], 2 * size) * np.exp(rng.uniform(-80, 0.5, 2 * size))
        wide = rng.uniform(-40, 709.782, size)
        return np.concatenate([tiny, rng.uniform(-40, 40, 2 * size), rng.uniform(-2, 2, 4 * size), wide])
    if name == "erfc":  # to where it is subnormal
        return np.concatenate([-small, rng.uniform(-6, 6, 4 * size), rng.uniform(0, 26.5, 2 * size), 1 / spread[spread > 1]])
    if name in ("tanh", "erf"):
        return np.concatenate([spread, small, -small, rng.uniform(0, 1.5, 2 * size), rng.uniform(0, 20, size)])
    x = np.concatenate([rng.uniform(-708.396, 709.782, 3 * size), rng.uniform(-2, 2, 3 * size), small])
    return -np.abs(x[x < 708.396]) if name == "exp_nonpositive" else x


def worst_float32(name: str, function: Function, stride: int) -> tuple[float, float]:
    exact = getattr(np, name.removesuffix("_nonpositive"), None)
    if name in SPECIAL:  # in float64 off by a few ULP of it
        exact = functools.partial(getattr(special, name), np)
    limits = np.finfo(np.float32)
    worst = (0.0, 0.0)
    for x in float32_samples(stride):
        with np.errstate(all="ignore"):
            truth = exact(x.astype(np.float64))
        keep = np.isfinite(truth) & (np.abs(truth) <= limits.max)
        if name in ("exp", "exp_nonpositive", "erfc"):
            keep &= truth >= limits.smallest_normal
        if name == "exp_nonpositive":
            keep &= x <= 0
        if keep.any():
            errors = ulps(function(x[keep]), truth[keep], 0.0, np.float32)
            i = int(np.argmax(errors))  # a NaN counts as the largest
            worst = max(worst, (float(errors[i]), float(x[keep][i])), key=lambda pair: np.nan_to_num(pair[0], nan=np.inf))
    return worst


def worst_float64(name: str, function: Function) -> tuple[float, float]:
    x = float64_samples(name)
    truths = [getattr(mp, name.removesuffix("_nonpositive"))(mp.mpf(v)) for v in x.tolist()]
    nearest = np.array([float(t) for t in truths])
    units = np.spacing(np.abs(nearest))
    beyond = [float((t - mp.mpf(h)) / mp.mpf(u)) for t, h, u in zip(truths, nearest.tolist(), units.tolist(), strict=True)]
    errors = ulps(function(x), nearest, np.array(beyond), np.float64)
    i = int(np.argmax(errors))
    return float(errors[i]), float(x[i])


def check_special(name: str, function: Function, dtype: type) -> None:
    limits = np.finfo(dtype)
    inf, nan, tiny = np.inf, np.nan, limits.smallest_subnormal
    low, high = np.log(limits.smallest_normal), np.log(limits.max)
    pairs = {
        "exp_nonpositive": [(0.0, 1.0), (-0.0, 1.0), (-inf, 0.0), (nan, nan), (low * 1.01, 0.0), (limits.min, 0.0)],
        "expm1": [(v, v) for v in (0.0, -0.0, tiny, -tiny, limits.smallest_normal, -limits.smallest_normal, inf, nan)]
        + [(-inf, -1.0), (limits.min, -1.0), (-50.0, -1.0), (high * 1.0001, inf), (limits.max, inf)],
        "log": [(0.0, -inf), (-0.0, -inf), (-1.0, nan), (-tiny, nan), (-inf, nan), (inf, inf), (nan, nan), (1.0, 0.0)],
        "log1p": [(v, v) for v in (0.0, -0.0, tiny, -tiny, limits.smallest_normal, inf, nan)]
        + [(-1.0, -inf), (-1.5, nan), (-inf, nan), (limits.min, nan)],
        "erf": [(v, v) for v in (0.0, -0.0, nan)] + [(inf, 1.0), (-inf, -1.0), (limits.max, 1.0), (-50.0, -1.0)],
        "erfc": [(v, 1.0) for v in (0.0, -0.0, tiny, -tiny, limits.smallest_normal)]
        + [(nan, nan), (inf, 0.0), (-inf, 2.0), (limits.max, 0.0), (-50.0, 2.0)],
        "tanh": [(v, v) for v in (0.0, -0.0, tiny, -tiny, limits.smallest_normal, nan)]
        + [(inf, 1.0), (-inf, -1.0), (limits.max, 1.0), (-50.0, -1.0)],
    }
    pairs["exp"] = [*pairs["exp_nonpositive"], (inf, inf), (high * 1.0001, inf), (limits.max, inf)]
    if "exp" in name and name != "expm1":  # below the smallest normal number results are between 0 and it
        between = function(np.linspace(low * 1.01, low * 1.00001, 1000, dtype=dtype))
        assert ((between >= 0) & (between < limits.smallest_normal)).all(), (name, dtype, between)
    x, expected = np.array(pairs[name], dtype=dtype).T.copy()
    result = function(x)
    same = ((result == expected) & (np.signbit(result) == np.signbit(expected))) | (np.isnan(result) & np.isnan(expected))
    assert same.all(), (name, dtype, x[~same], result[~same])


def check(stride: int) -> None:
    for name in ("exp", "exp_nonpositive", "expm1", "log", "log1p", "tanh", *SPECIAL):
        function = compiled(name)
        check_special(name, function, np.float32)
        check_special(name, function, np.float64)
        print("{:16} float32 {:.3f} ULP at {!r}".format(name, *worst_float32(name, function, stride)), flush=True)
        print("{:16} float64 {:.3f} ULP at {!r}".format(name, *worst_float64(name, function)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--stride", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.stride)
    else:
        print_coefficients()


if __name__ == "__main__":
    main()
