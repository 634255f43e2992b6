"""xp.erf and xp.erfc, which the standard lacks: on every backend and in every namespace."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest

import xpnn


@xpnn.kernel
def erf(xp: Any, x: Any) -> Any:
    return xp.erf(x)


@erf.backward
def erf_backward(xp: Any, dy: Any, x: Any) -> Any:
    return dy * (xp.exp(-(x * x)) * (2 / np.pi**0.5))


@xpnn.kernel
def erfc(xp: Any, x: Any) -> Any:
    return xp.erfc(x)


@erfc.backward
def erfc_backward(xp: Any, dy: Any, x: Any) -> Any:
    return dy * (xp.exp(-(x * x)) * (-2 / np.pi**0.5))


KERNELS = {"erf": erf, "erfc": erfc}
BOUNDS = {("numba", "erf"): 2, ("numba", "erfc"): 3, ("numpy", "erf"): 4, ("numpy", "erfc"): 7}  # ULP


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", KERNELS)
def test_last_bits(backend: str, name: str, dtype: str) -> None:
    rng = np.random.default_rng(5)
    limit = 300 if dtype == "float64" else 37
    end = 26.5 if dtype == "float64" else 9.1  # where erfc is subnormal
    x = np.concatenate([rng.uniform(-6, end, 1500), rng.uniform(0.4, 0.6, 300), rng.standard_normal(500)])
    x = np.concatenate([x, rng.standard_normal(300) * 10.0 ** rng.uniform(-limit, 0, 300)]).astype(dtype)
    with mpmath.workdps(60):
        for value, result in zip(x.tolist(), KERNELS[name](x).tolist(), strict=True):
            truth = getattr(mpmath, name)(mpmath.mpf(value))
            unit = max(float(np.spacing(np.asarray(abs(truth), dtype))), float(np.finfo(dtype).tiny))
            assert abs(mpmath.mpf(result) - truth) <= BOUNDS[backend, name] * unit, (value, result)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_edges(backend: str, dtype: str) -> None:
    tiny = np.finfo(dtype).tiny
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, -0.0, tiny, -tiny], dtype)
    y = erf(x)
    np.testing.assert_allclose(y, [np.nan, 1, -1, 1, -1, 0, 0, tiny * 2 / np.pi**0.5, -tiny * 2 / np.pi**0.5], rtol=1e-6)
    np.testing.assert_array_equal(np.signbit(y[5:]), [False, True, False, True])
    np.testing.assert_array_equal(erfc(x), [np.nan, 0, 2, 0, 2, 1, 1, 1, 1])


@pytest.mark.parametrize("name", KERNELS)
def test_parity(name: str) -> None:
    """Sizes of terms and all backends; CUDA kernels run on the CPU."""
    pytest.importorskip("cupy", reason="cupy is not installed: erf of CUDA kernels not run")
    xpnn.testing.assert_parity(KERNELS[name], ("numpy", "numba", "cupy"), ("float32", "float64"))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elsewhere(library: Any, name: str, dtype: str) -> None:
    """Composed of what every namespace has. SciPy's erfc is off by up to 20 ULP itself."""
    special = pytest.importorskip("scipy.special")
    x = np.linspace(-7, 7, 301, dtype=dtype)
    got = library.numpy(KERNELS[name](library.array(x)))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, getattr(special, name)(x.astype(np.float64)), rtol=32 * np.finfo(dtype).eps, atol=0)
