"""Rows along an axis that is not the last: read and written where they lie, and the same to the last bit."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import at_odd_address, frozen

import xpnn
from xpnn import Column, Index

Array = np.ndarray[Any, Any]


def last(x: Array, axis: int) -> Array:
    """The same values with the axis last."""
    return np.ascontiguousarray(np.moveaxis(x, axis, -1))


def laid_out(x: Array) -> Iterator[tuple[str, Array]]:
    """The same values in other places."""
    yield "C order", x.copy()
    yield "Fortran order", np.asfortranarray(x)
    wide = np.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3), np.nan, x.dtype)
    wide[:, 1:, 1:-2] = x
    yield "gaps", wide[:, 1:, 1:-2]
    yield "in reverse", x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1]
    twice = np.repeat(x, 2, axis=2)
    yield "every second", twice[:, :, ::2]
    yield "at an odd address", at_odd_address(x)
    yield "read-only", frozen(x)


@pytest.mark.parametrize(
    ("dtype", "columns"), [*(("float32", n) for n in (1, 3, 16, 19, 64, 65, 512, 531, 1024)), ("float64", 19), ("float64", 65)]
)
def test_bits(dtype: str, columns: int) -> None:
    """A row's bits depend on the row alone: short rows and long ones, in planes of fewer rows than a vector and of more."""
    rng = np.random.default_rng(columns)
    for rows in (1, 5, 37):
        x = rng.standard_normal((3, columns, rows)).astype(dtype)
        target = rng.integers(0, columns, (3, rows))
        dy = rng.standard_normal(x.shape).astype(dtype)
        moved = last(x, 1)
        y = xpnn.softmax(moved)
        loss, gradient = xpnn.cross_entropy.value_and_grad(moved, target, axis=-1, label_smoothing=0.1)
        for name, other in laid_out(x):
            assert np.array_equal(last(xpnn.softmax(other, axis=1), 1), y), name
            assert np.array_equal(xpnn.logsumexp(other, axis=1), xpnn.logsumexp(moved)), name
            found, slopes = xpnn.cross_entropy.value_and_grad(other, target, axis=1, label_smoothing=0.1)
            assert found == pytest.approx(float(loss), rel=1e-6), name
            assert np.array_equal(last(slopes, 1), gradient), name
        _, pullback = xpnn.log_softmax.vjp(x, axis=1)
        _, expected = xpnn.log_softmax.vjp(moved)
        assert np.array_equal(last(pullback(dy), 1), expected(last(dy, 1)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("columns", [10, 200])
def test_half(dtype: str, columns: int) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 is a dtype of ml_dtypes")
    x = np.random.default_rng(1).standard_normal((2, columns, 21)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert np.array_equal(last(xpnn.softmax(x, axis=1), 1), xpnn.softmax(last(x, 1)))
    assert np.array_equal(xpnn.logsumexp(x, axis=1), xpnn.logsumexp(last(x, 1)))


@xpnn.kernel(outputs=("y", "at", "scaled"))
def in_planes(xp: Any, x: Any, weight: Column, target: Index) -> Any:
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return xp.take_along_axis(e, target, axis=-1) * e, xp.take(weight, target), x * weight


@xpnn.kernel(outputs=("summed",))
def over_rows(xp: Any, x: Any) -> Any:
    return xp.sum(x / xp.sum(xp.exp(x), axis=-1, keepdims=True), axis=0, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.data())
def test_any_shape(shape: list[int], data: st.DataObject) -> None:
    """A kernel of a user's, several results of it, against itself composed."""
    axis = data.draw(st.integers(0, len(shape) - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = rng.standard_normal(shape)
    if data.draw(st.booleans()):
        x = x.transpose(data.draw(st.permutations(range(len(shape)))))
    weight = rng.standard_normal(x.shape[axis])
    target = rng.integers(0, x.shape[axis], x.shape[:axis] + x.shape[axis + 1 :])
    found = in_planes(x, weight, target, axis=axis)
    columns = over_rows(x, axis=axis)
    with xpnn.use_backend("numpy"):
        expected = in_planes(x, weight, target, axis=axis)
        assert np.allclose(columns, over_rows(x, axis=axis), rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert np.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [10, 150])
def test_in_place(columns: int) -> None:
    """Over the input, into an array with gaps, and nothing beyond what was asked for is written."""
    x = np.random.default_rng(2).standard_normal((2, columns, 41))
    y = xpnn.softmax(last(x, 1))
    over = x.copy()
    assert xpnn.softmax(over, axis=1, out=over) is over
    assert np.array_equal(last(over, 1), y)
    around = np.full((4, columns + 2, 43), -7.0)
    inside = around[1:-1, 1:-1, 1:-1]
    assert xpnn.softmax(x, axis=1, out=inside) is inside
    assert np.array_equal(last(inside, 1), y)
    inside[...] = -7.0
    assert np.all(around == -7.0)


def test_errors() -> None:
    """A target out of range is named by its place, and nothing is written."""
    x, out = np.zeros((2, 30, 5)), np.full((2, 30, 5), 3.0)
    target = np.zeros((2, 5), int)
    target[1, 3] = 30
    with pytest.raises(IndexError, match=r"target\[1, 3\]: got 30, expected 0 <= target < 30"):
        xpnn.cross_entropy.value_and_grad(x, target, axis=1, out=out)
    assert np.all(out == 3.0)


def test_no_copies() -> None:
    """Neither the input nor the result is moved: all that is allocated is the result, in the order of the input."""
    x = np.random.default_rng(3).standard_normal((4, 20, 20_000), dtype=np.float32)
    target = np.zeros((4, 20_000), int)
    xpnn.softmax(x, axis=1)
    xpnn.cross_entropy.value_and_grad(x, target, axis=1)
    for call in (lambda: xpnn.softmax(x, axis=1), lambda: xpnn.cross_entropy.value_and_grad(x, target, axis=1)[1]):
        tracemalloc.start()
        result = call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert result.flags.c_contiguous
        assert peak < 1.2 * x.nbytes
