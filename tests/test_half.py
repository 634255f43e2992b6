"""Half precision on the CPU: the correctly rounded float32 computation, from and to 16 bits."""

import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import xpnn
from xpnn.backends.numba import products
from xpnn.backends.products import into, widened

HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EVERY = np.arange(2**16, dtype=np.uint16)


def every_rounding_tie(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The float32 halfway between each two neighbours, both signs, and the float32 on either side of it."""
    with np.errstate(all="ignore"):
        values = EVERY.view(dtype).astype(np.float64)
    values = np.sort(values[np.isfinite(values)])
    last = 2 * values[-1] - values[-2]  # what would come next
    values = np.concatenate([[-last], values, [last]])
    middle = (values[1:] + values[:-1]) / 2
    exact = middle.astype(np.float32)
    assert np.array_equal(exact, middle)
    return np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])


def same(ours: Any, theirs: Any) -> None:
    """Equal bits, or NaN for NaN."""
    kind = np.uint16 if ours.itemsize == 2 else np.uint32
    with np.errstate(all="ignore"):
        equal = (ours.view(kind) == theirs.view(kind)) | (np.isnan(ours) & np.isnan(theirs))
    assert equal.all(), (ours[~equal][:5], theirs[~equal][:5])


def check_conversions() -> None:
    special = np.float32(
        [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 3e38, -3e38, 1e-45, -1e-45, 6e-8, 2.9e-8, 65519.99, 65520]
    )
    bits = np.random.default_rng(0).integers(0, 2**32, 2_000_001, dtype=np.uint32)
    for dtype in HALVES.values():
        held = EVERY.view(dtype)[None]
        with np.errstate(all="ignore"):
            same(widened(held, products.convert), held.astype(np.float32))
        for values in (special, every_rounding_tie(dtype), bits.view(np.float32)):
            rounded = np.empty((1, values.size), dtype)
            products.convert(rounded, values[None])
            with np.errstate(all="ignore"):
                same(rounded, values[None].astype(dtype))
                if values.size < 100:  # lane by lane, as rows' values go
                    column = np.empty((values.size, 1), dtype)
                    products.convert(column, values[:, None])
                    same(column, values[:, None].astype(dtype))


def test_conversions() -> None:
    """All 65,536 patterns to float32; every rounding tie and its neighbours, and two million floats, back."""
    check_conversions()


def test_conversions_without_the_processors_help() -> None:
    """The same in whole numbers, for a processor of which nothing is known."""
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        from xpnn.backends.numba import half
        assert not half.converts_float16()
        import test_half
        test_half.check_conversions()
    """
    environment = os.environ | {"NUMBA_CPU_NAME": "generic"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("columns", [1, 7, 16, 37, 4099])
def test_results_are_float32s_rounded_once(dtype: str, columns: int) -> None:
    """A half-precision result has the bits of the float32 kernel's on the same values, rounded to nearest even."""
    rng = np.random.default_rng(columns)
    logits = (4 * rng.standard_normal((9, columns))).astype(HALVES[dtype])
    wide = logits.astype(np.float32)
    target = rng.integers(0, columns, 9)
    dy = rng.standard_normal(logits.shape).astype(HALVES[dtype])
    with xpnn.use_backend("numba"):
        for kernel in (xpnn.softmax, xpnn.log_softmax, xpnn.logsumexp, xpnn.sigmoid, xpnn.tanh):
            same(kernel(logits), kernel(wide).astype(HALVES[dtype]))
        same(xpnn.tanh.backward(dy, x=logits), xpnn.tanh.backward(dy.astype(np.float32), x=wide).astype(HALVES[dtype]))
        loss, gradient = xpnn.cross_entropy.value_and_grad(logits, target)
        want, want_gradient = xpnn.cross_entropy.value_and_grad(wide, target)
        assert loss.dtype == np.float32
        assert loss == want
        same(gradient, want_gradient.astype(HALVES[dtype]))


@pytest.mark.parametrize("dtype", HALVES)
def test_layouts_and_in_place(dtype: str) -> None:
    """Strided, misaligned and transposed rows; a gradient over its own logits; the short way of a second call."""
    rng = np.random.default_rng(3)
    big = (3 * rng.standard_normal((12, 80))).astype(HALVES[dtype])
    want = xpnn.softmax(big[::2, :33].copy())
    for _ in range(2):
        same(xpnn.softmax(big[::2, :33]), want)
        same(xpnn.softmax(big[::2, 1:34].copy()[:, :]), xpnn.softmax(big[::2, 1:34]))
        same(xpnn.softmax(big.T, axis=0), xpnn.softmax(big).T)
    target = rng.integers(0, 80, 12)
    _, gradient = xpnn.cross_entropy.value_and_grad(big, target)
    for _ in range(2):
        logits = big.copy()
        _, over = xpnn.cross_entropy.value_and_grad(logits, target, out=logits)
        assert over is logits
        same(logits, gradient)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 3, 7), (1030, 40, 1100), (3, 2100, 5)])
def test_products(dtype: str, m: int, k: int, n: int) -> None:
    """Products by blocks are within a rounding of the exact ones, from either layout, and add to float32."""
    rng = np.random.default_rng(m)
    a, b = (rng.standard_normal(s).astype(HALVES[dtype]) for s in ((m, k), (k, n)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    for left, right in ((a, b), (a.T.copy().T, b), (a, b.T.copy().T)):
        half = products.matmul(left, right)
        assert half.dtype == HALVES[dtype]
        ulp = float(ml_dtypes.finfo(HALVES[dtype]).eps)
        assert (np.abs(half.astype(np.float64) - exact) <= ulp / 2 * np.abs(exact) + 1e-6 * bound + 6e-8).all()
        total = np.ones((m, n), np.float32)
        into(total, left, right, add=True, convert=products.convert)
        assert (np.abs(total - 1 - exact) <= 1e-6 * (bound + 1)).all()


def test_products_take_no_whole_copy() -> None:
    a = np.ones((3000, 3000), np.float16)
    products.matmul(a, a)
    tracemalloc.start()
    products.matmul(a, a)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < a.nbytes + 24e6  # the result, and what a product of two blocks takes in float32


@pytest.mark.parametrize("dtype", HALVES)
def test_linear(dtype: str) -> None:
    """A layer and its gradients in half precision, beside float32's."""
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(s).astype(HALVES[dtype]) for s in ((6, 20), (5, 20), (5,)))
    y, pullback = xpnn.linear.vjp(x, weight, bias, activation=xpnn.tanh)
    wide = [a.astype(np.float32) for a in (x, weight, bias)]
    want, want_pullback = xpnn.linear.vjp(*wide, activation=xpnn.tanh)
    dy = rng.standard_normal(y.shape).astype(HALVES[dtype])
    ulp = float(ml_dtypes.finfo(HALVES[dtype]).eps)
    for ours, theirs in zip((y, *pullback(dy)), (want, *want_pullback(dy.astype(np.float32))), strict=True):
        assert ours.dtype == HALVES[dtype]
        np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=8 * ulp, atol=8 * ulp * np.abs(theirs).max())
