"""Numbers made of run-time options alone: computed in double precision before the loops run, on every backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import xpnn
from xpnn import Matrix
from xpnn.backends import prepare
from xpnn.samples import Place, place

RNG = np.random.default_rng(8)
X = RNG.normal(size=(5, 7))
BETA = 0.999


@xpnn.kernel(outputs=("y", "z"), off={"rate": 0.0})
def decayed(xp, x, *, beta=BETA, step=1, rate=0.0, power=0.5):
    """What an optimiser makes of its options: powers, differences near zero, quotients of them."""
    y = x * (1 - beta) / ((1 - beta**step) ** power)
    return y, (x * (1 - rate * beta) if rate else x) * 2.0 ** (-step)


def truth(x: np.ndarray, beta: float, step: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    wide = x.astype(np.float64)
    return wide * ((1 - beta) / np.sqrt(-np.expm1(step * np.log(beta)))), wide * (1 - rate * beta) * 2.0**-step


@pytest.fixture(params=["numpy", "numba", "array-api", "dask", "cupy"])
def at(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each backend, and how its arrays are made."""
    pytest.importorskip({"dask": "dask", "cupy": "cupy"}.get(request.param, "numpy"), reason=f"no {request.param} here")
    with place(request.param) as where:
        yield where


def ulps(ours: np.ndarray, wide: np.ndarray) -> float:
    return float(np.max(np.abs(ours - wide) / np.spacing(np.abs(wide).astype(ours.dtype))))


def test_single_precision_loses_nothing(at: Place) -> None:
    """To two roundings of float32, where one of `1 - beta` would be thousands."""
    x = X.astype("f4")
    for step, rate in ((1, 0.0), (1, 0.3), (2, 0.3), (1000, 0.0)):  # the same loop for all steps
        found = decayed(at.there(x), beta=BETA, step=step, rate=rate)
        for ours, wide in zip(map(at.back, found), truth(x, BETA, step, rate), strict=True):
            assert ours.dtype == np.float32
            assert ulps(ours, wide) <= 2.5
    spoilt = x * (np.float32(1) - np.float32(BETA)) / np.sqrt(np.float32(1) - np.float32(BETA))
    assert ulps(spoilt, truth(x, BETA, 1, 0.0)[0]) > 100


def test_the_short_way_takes_them() -> None:
    """A call with nothing but arrays, the second time."""
    k = xpnn.kernel(lambda xp, x, *, beta=BETA: x * (1 - beta))
    x = X.astype("f4")
    with xpnn.use_backend("numba"):
        first, second = k(x), k(x)
        assert k._fast
    assert ulps(second, x * (1 - BETA)) <= 1
    np.testing.assert_array_equal(first, second)


def test_products_take_them(backend: str, close: Callable[..., None]) -> None:
    @xpnn.kernel
    def k(xp, x, w: Matrix, *, beta=BETA):
        return (1 - beta) * xp.matmul((1 + beta) * x, w.T)

    w = RNG.normal(size=(3, 7))
    close(k(X, w), (1 - BETA) * ((1 + BETA) * X @ w.T))
    close(k(X, w, beta=0.25), 0.75 * (1.25 * X @ w.T))


def test_a_result_of_its_own(backend: str) -> None:
    k = xpnn.kernel(outputs=("y", "n"))(lambda xp, x, *, a=0.1, count=3: (x * a, xp.sum(x, axis=None) * 0 + (a - count)))
    assert k(X)[1] == 0.1 - 3
    assert k(X, a=0.5, count=2**40)[1] == 0.5 - 2**40


def program(k: Any, **options: Any) -> Any:
    return prepare.example_task(k, "float32", "forward", options, backend="numba").job.program()


def test_the_program_says_what_they_are() -> None:
    """One number for each, made of what the caller gives; the loop takes no option that is in them alone."""
    plain, decaying = program(decayed), program(decayed, rate=0.3)
    assert [line for line in plain.text().splitlines() if line.startswith("derived")] == [
        "derived0: [1, 1] float",
        "derived1: [1, 1] float",
        "derived2: [1, 1] float",
        "derived0 = (1 - beta)",
        "derived1 = ((1 - (beta ** step)) ** power)",
        "derived2 = (2.0 ** (-step))",
    ]
    assert list(plain.options) == ["derived0", "derived1", "derived2"]
    assert "derived2 = (1 - (rate * beta))" in decaying.text()
    assert "derived0 = (1 - beta)" in decayed.source()
    assert "derived0 = (1 - beta)" in decayed.source(backend="cupy")
    numbers = plain.numbers({"beta": 0.5, "step": 2, "power": 0.5})
    assert numbers == {"beta": 0.5, "step": 2, "power": 0.5, "derived0": 0.5, "derived1": 0.75**0.5, "derived2": 0.25}


def test_names_do_not_meet(backend: str, close: Callable[..., None]) -> None:
    k = xpnn.kernel(lambda xp, x, *, derived0=0.5, derived1=2: x * derived0 + x * (1 - derived0) ** derived1)
    close(k(X, derived0=0.25), X * 0.25 + X * 0.75**2)


def test_one_constant_is_no_number(backend: str, close: Callable[..., None]) -> None:
    """Infinities stay in the loop, whole numbers stay exact, and an option that stands alone is passed as it is."""
    k = xpnn.kernel(lambda xp, x, *, a=0.5, n=3: xp.where(x * a > xp.inf * a, n, -n) + xp.maximum(x, -n))
    close(k(X), -3 + np.maximum(X, -3))
    assert "inf" not in "".join(line for line in program(k).text().splitlines() if line.startswith("derived"))


def raises_an_array(xp, x, *, beta=0.5):
    return x**beta


def raises_to_an_array(xp, x, *, beta=0.5):
    return beta**x


def raises_to_three(xp, x):
    return x**3


@pytest.mark.parametrize("formula", [raises_an_array, raises_to_an_array, raises_to_three], ids=lambda f: f.__name__)
def test_powers_of_arrays_are_not_fused(formula: Any) -> None:
    k = xpnn.kernel(formula)
    with xpnn.use_backend("numba"), pytest.raises(xpnn.BackendError) as raised:
        k(np.abs(X))
    assert f"{__file__}:{inspect.getsourcelines(formula)[1] + 1}" in str(raised.value)
    assert "it uses the operator **" in str(raised.value)
    want = {"raises_an_array": np.abs(X) ** 0.5, "raises_to_an_array": 0.5 ** np.abs(X)}.get(k.__name__, np.abs(X) ** 3)
    np.testing.assert_allclose(k(np.abs(X)), want, rtol=1e-14)
