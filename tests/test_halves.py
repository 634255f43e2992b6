"""glu, whose two arrays are the halves of one: PyTorch's values and gradients, along any axis, without copies."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special as sp

import xpnn

RNG = np.random.default_rng(0)
SHAPES = [((4,), 0), ((3, 6), -1), ((6, 3), 0), ((2, 4, 5), 1), ((2, 3, 4), -1)]


def by_hand(x: np.ndarray, dy: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.split(x, 2, axis)
    s = sp.expit(b)
    return a * s, np.concatenate([dy * s, dy * a * s * sp.expit(-b)], axis)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], axis: int, backend: str, close: Callable[..., None]) -> None:
    x = RNG.normal(size=shape)
    y, pullback = xpnn.glu.vjp(x, axis)
    dy = RNG.normal(size=y.shape)
    want, dx = by_hand(x, dy, axis)
    for found in (y, xpnn.glu(x, axis), xpnn.glu(x, axis=axis), xpnn.glu(x, axis, out=np.empty_like(want))):
        close(found, want)
    for found in (pullback(dy), xpnn.glu.backward(dy, x, axis)):
        close(found, dx)
    for layout in (np.ascontiguousarray, np.asfortranarray):
        close(xpnn.glu(layout(x), axis), want)
        out = layout(np.empty_like(x))
        assert pullback(dy, out=out) is out
        close(out, dx)
        over = layout(x.copy())
        assert xpnn.glu.backward(dy, over, axis, out=over) is over
        close(over, dx)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes(dtype: str, backend: str) -> None:
    x = RNG.normal(size=(3, 8)).astype(dtype)
    y, pullback = xpnn.glu.vjp(x)
    assert (y.dtype, pullback(y).dtype) == (dtype, dtype)
    assert xpnn.glu([1, 2]).dtype == np.float64


def test_other_libraries(library: Any, close: Callable[..., None]) -> None:
    x = RNG.normal(size=(3, 4, 5))
    dy = RNG.normal(size=(3, 2, 5))
    y, pullback = xpnn.glu.vjp(library.array(x), 1)
    want, dx = by_hand(x, dy, 1)
    close(library.numpy(y), want)
    close(library.numpy(pullback(library.array(dy))), dx)


def test_in_jax(load_library: Any, close: Callable[..., None]) -> None:
    load_library("jax")
    import jax

    import xpnn.jax

    x, dy = RNG.normal(size=(3, 4, 5)), RNG.normal(size=(3, 2, 5))
    y, pull = jax.vjp(jax.jit(lambda x: xpnn.jax.glu(x, axis=1)), x)
    want, dx = by_hand(x, dy, 1)
    close(y, want)
    close(pull(dy)[0], dx)


def test_nothing_of_the_size_is_made(backend: str) -> None:
    """The halves are views, and the gradient's halves are written in place."""
    import tracemalloc

    if backend == "numpy":
        pytest.skip("a composed formula makes what it computes")
    x = RNG.normal(size=(64, 4096))
    out, dy = np.empty_like(x), np.ones((64, 2048))
    y, pullback = xpnn.glu.vjp(x)
    pullback(dy, out=out)
    tracemalloc.start()
    xpnn.glu(x, out=y)
    pullback(dy, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 8


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda x: xpnn.glu(x[:, :3]), ValueError, "glu: x: got 3 elements along axis 1, expected an even number"),
    (lambda x: xpnn.glu(x, 2), ValueError, "glu: axis: got 2, expected -2 <= axis < 2 for shape (2, 4)"),
    (lambda x: xpnn.glu(x, 1.0), TypeError, "glu: axis: got 1.0, expected an integer"),
    (lambda x: xpnn.glu(1.0), ValueError, "expected an array of at least one dimension"),
    (lambda x: xpnn.glu("x"), TypeError, "glu: x: got str, expected an array"),
    (lambda x: xpnn.glu(x, out=x), ValueError, "glu: out: got shape (2, 4), expected (2, 2)"),
    (lambda x: xpnn.glu(x, out=np.empty((2, 2), "float32")), TypeError, "glu: out: got dtype float32, expected float64"),
    (lambda x: xpnn.glu.vjp(x, out=x[:, :2]), ValueError, "glu: out: got the memory of x, expected other memory"),
    (lambda x: xpnn.glu.vjp(x)[1](x), ValueError, "glu pullback: dy: got shape (2, 4), expected (2, 2)"),
    (lambda x: xpnn.glu.value_and_grad(x), ValueError, "glu.value_and_grad: the result: got an array, expected one"),
    (lambda x: xpnn.glu.value_and_grad(x, 2), ValueError, "glu.value_and_grad: axis: got 2, expected -2 <= axis < 2"),
    (lambda x: xpnn.glu.backward(x[:, :2], x.astype(int)), TypeError, "glu.backward: x: got dtype int64, expected floating"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_bad_input(call: Callable[..., Any], error: type[Exception], message: str, backend: str) -> None:
    x = np.ones((2, 4))
    with pytest.raises(error, match=re.escape(message)):
        call(x)
    assert np.all(x == 1)


def test_as_a_kernel() -> None:
    assert str(inspect.signature(xpnn.glu)) == "(x, axis=-1, *, out=None)"
    assert pickle.loads(pickle.dumps(xpnn.glu)) is xpnn.glu
    assert xpnn.glu.explain(np.ones(2)) == "numba"
    assert "def stage0" in xpnn.glu.source()
    xpnn.glu.warmup(dtype="float32")
    assert xpnn.glu(np.ones((0, 4))).shape == (0, 2)
    assert xpnn.glu.vjp(np.ones((2, 0)))[1](np.ones((2, 0))).shape == (2, 0)
