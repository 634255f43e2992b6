"""Every kernel against the composed formula in wider precision, and against references of another make."""

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from chosen import few, in_dtypes
from oracles import ORACLES

import xpnn
from xpnn.backends.cupy import host
from xpnn.backends.kernel import Kernel
from xpnn.backends.kinds import Index
from xpnn.testing import Variant, parity_rows, sample, variants

EXPORTED = [getattr(xpnn, name) for name in xpnn.kernels.__all__]
KERNELS = [k for e in EXPORTED if isinstance(k := getattr(e, "kernel", e), Kernel)]  # glu's is within it
VARIANTS = [pytest.param(k, v, id=f"{k.__name__}-{v}") for k in dict.fromkeys(KERNELS) for v in variants(k)]


def named(value: Any) -> str:
    return str(getattr(value, "__name__", value))


def test_every_kernel_has_an_oracle() -> None:
    """A kernel without an independent reference is not done."""
    assert {k.__name__ for k in KERNELS} == ORACLES.keys()


@pytest.mark.parametrize(("kernel", "dtype"), in_dtypes(dict.fromkeys(KERNELS), ("float32", "float64")), ids=named)
def test_parity(kernel: Kernel, dtype: str) -> None:
    """Fused results are as exact as the composed ones, in every direction.

    A variant costs three compilations. float32 goes through each set of options once, passing the inputs in one way; float64
    goes through few, half precision through the one with most: a dtype changes loads, stores and elementary functions, which
    all variants share, not what the programs do. `test_oracle` goes through every variant in float64, and `xpnn parity`
    through every one in every dtype.
    """
    most = {"float16": 1, "bfloat16": 1}.get(dtype)
    rows = list(parity_rows([kernel], ["numba"], [dtype], lambda k: few(k, together=dtype == "float32")[:most]))
    assert len(rows) >= (3 if kernel.declaration.backward is not None else 1)
    assert [row for row in rows if row["verdict"] != "ok"] == []


@pytest.mark.parametrize(("kernel", "dtype"), in_dtypes(dict.fromkeys(KERNELS), ("float32",)), ids=named)
def test_parity_of_cuda_kernels(kernel: Kernel, dtype: str, record_property: Callable[[str, object], None]) -> None:
    """The same for CUDA kernels, on a GPU or on the CPU in its place.

    They are emitted from the programs that the test above goes through, so few variants are enough, and beyond float32 the
    one with most.
    """
    if (state := host.state()) not in ("GPU", "host"):
        pytest.skip(state)
    rows = list(parity_rows([kernel], ["cupy"], [dtype], lambda k: few(k) if dtype == "float32" else few(k)[:1]))
    assert len(rows) >= (2 if kernel.declaration.backward is not None else 1)
    assert [row for row in rows if row["verdict"] != "ok"] == []
    record_property("cuda parity", f"{kernel.__name__} {dtype} {len(rows)} {state}")


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize(("kernel", "variant"), VARIANTS)
def test_oracle(kernel: Kernel, variant: Variant, backend: str) -> None:
    """Values equal the reference's; gradients equal central differences of the reference."""
    options, oracle = dict(variant.options), ORACLES[kernel.__name__]
    rng = np.random.default_rng(5)
    with xpnn.use_backend(backend):
        for seed, shape in ((0, (4, 7)), (2, (3, 37))):
            arrays = sample(kernel, variant, shape, "float64", seed)
            expected = oracle(**arrays, **options)
            graded = kernel.declaration.backward is not None
            y, pullback = kernel.vjp(**arrays, **options) if graded else (kernel(**arrays, **options), None)
            for ours, theirs in zip(_all(y), _all(expected), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
            if not graded:
                continue
            smooth = len(_all(y)) - sum(options.get(f"return_{n}", False) for n in ("argmax", "accuracy"))
            dy = [rng.standard_normal(np.shape(value)) for value in _all(y)[:smooth]]
            gradients = pullback(*dy)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            for name, gradient in zip(arrays, gradients, strict=True):
                if gradient is not None:
                    assert gradient.any()
                    check_gradient(oracle, arrays, options, name, dy, gradient)


def _all(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def check_gradient(oracle: Any, arrays: dict[str, Any], options: dict[str, Any], name: str, dy: list[Any], ours: Any) -> None:
    """Compare with a central difference in every element."""
    expected = np.empty_like(ours)
    for at in np.ndindex(ours.shape):
        values = []
        stays_positive = oracle in (ORACLES["log"], ORACLES["cross_entropy_probs"], ORACLES["kl_div"])
        h = 1e-3 * abs(arrays[name][at]) if stays_positive else 1e-5 * max(1.0, abs(arrays[name][at]))
        for sign in (1, -1):
            moved = arrays[name].copy()
            moved[at] += sign * h
            values.append(_all(oracle(**(arrays | {name: moved}), **options)))
        expected[at] = sum(np.sum(d * (a - b)) for d, a, b in zip(dy, *values, strict=False)) / (2 * h)
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@xpnn.kernel
def log1p(xp: Any, x: Any) -> Any:
    return xp.log1p(x)


@xpnn.kernel
def expm1(xp: Any, x: Any) -> Any:
    return xp.expm1(x)


OWN = {"log1p": log1p, "expm1": expm1}  # operations that no public kernel is
MPMATH = {
    "expm1": mpmath.expm1,
    "log1p": mpmath.log1p,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "log": mpmath.log,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MPMATH)
def test_last_bits(name: str, dtype: str) -> None:
    """Element-wise functions are within 2 ULP of the true value, beside terms of size one for sigmoid."""
    rng = np.random.default_rng(11)
    limit = 300 if dtype == "float64" else 37
    x = np.concatenate([rng.uniform(-20, 20, 800), rng.standard_normal(800) * 10.0 ** rng.uniform(-limit, 1, 800)])
    x = np.where(x < {"log": 0, "log1p": -1}.get(name, -np.inf), -x, x).astype(dtype)
    with xpnn.use_backend("numba"):
        ours = OWN.get(name, getattr(xpnn, name, None))(x)
    with mpmath.workprec(200):
        for value, result in zip(x, ours, strict=True):
            truth = MPMATH[name](mpmath.mpf(float(value)))
            unit = np.spacing(np.asarray(max(float(abs(truth)), 1.0 if name == "sigmoid" else 0.0), dtype))
            error = abs(mpmath.mpf(float(result)) - truth) / max(float(unit), float(np.finfo(dtype).tiny))
            assert error <= 2, (float(value), float(result))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OWN)
def test_edges(name: str, dtype: str) -> None:
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([0.0, -0.0, tiny, -tiny, -np.inf, np.inf, np.nan, -800.0, np.finfo(dtype).max], dtype)
    x[-2] = x[-2] if name == "expm1" else -1.0
    with np.errstate(all="ignore"), xpnn.use_backend("numba"):
        want, got = getattr(np, name)(x), OWN[name](x)
    np.testing.assert_array_equal(got[:-1], want[:-1])
    np.testing.assert_array_equal(np.signbit(got[:4]), np.signbit(want[:4]))
    np.testing.assert_allclose(got[-1], want[-1], rtol=np.finfo(dtype).eps)


@xpnn.kernel
def floor(xp: Any, x: Any) -> Any:
    return xp.floor(x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floor(dtype: str) -> None:
    """The largest whole number below, signs of zeros included; of lanes, and of numbers that a row has one of."""
    x = np.array([[0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0**23 - 0.5, -(2.0**60), np.inf, -np.inf, np.nan]], dtype)
    with xpnn.use_backend("numba"):
        for ours, want in ((floor(x), np.floor(x)), (floor(x[0, 3]), np.floor(x[0, 3])), (floor(x.T), np.floor(x.T))):
            np.testing.assert_array_equal(ours, want)
            np.testing.assert_array_equal(np.signbit(ours), np.signbit(want))


@xpnn.kernel(outputs=("whole",))
def floored_index(xp: Any, x: Any, target: Index) -> Any:
    return xp.where(xp.take_along_axis(x, target, axis=-1) > 0, xp.floor(target), 0)


def test_floor_of_integers(backend: str) -> None:
    """They stay what they are, on every backend."""
    found = floored_index(np.array([[1.0, 2.0], [-1.0, -2.0]]), np.array([1, 1]))
    np.testing.assert_array_equal(found, [1, 0])
    assert found.dtype == np.int64
