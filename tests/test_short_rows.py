"""Rows of few columns, sixteen of them at a time, and the short way of a second call: whatever the arrays' layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import at_odd_address, frozen

import xpnn
from xpnn import Column, Index

COLUMNS = (1, 3, 4, 10, 16, 17, 40, 64, 65, 100)


def laid_out(x: np.ndarray[Any, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The same values in other places."""
    rows, columns = x.shape
    yield "columns first", np.asfortranarray(x)
    apart = np.full((rows, columns + 3), np.nan, x.dtype)
    apart[:, 1:-2] = x
    yield "rows apart", apart[:, 1:-2]
    yield "rows in reverse", x[::-1].copy()[::-1]
    yield "columns in reverse", x[:, ::-1].copy()[:, ::-1]
    yield "at an odd address", at_odd_address(x)
    yield "read-only", frozen(x)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layouts(columns: int, dtype: str) -> None:
    """A row's bits depend on the row alone: not on the others, nor on where it lies."""
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((21, columns)).astype(dtype)
    target = rng.integers(0, columns, 21)
    apart = np.stack([target, target], axis=1)[:, 0]
    for _ in range(2):  # the second call goes the short way
        y = xpnn.softmax(x)
        loss, gradient = xpnn.cross_entropy.value_and_grad(x, target)
    for name, other in laid_out(x):
        for _ in range(2):
            assert np.array_equal(xpnn.softmax(other), y), name
            for t in (target, apart):
                found, moved = xpnn.cross_entropy.value_and_grad(other, t)
                assert found == loss, name
                assert np.array_equal(moved, gradient), name
    for i in range(21):
        assert np.array_equal(xpnn.softmax(x[i : i + 1]), y[i : i + 1])
        assert np.array_equal(xpnn.softmax(x[i:]), y[i:])


@pytest.mark.parametrize("columns", COLUMNS)
def test_out(columns: int) -> None:
    """Where a result is written: in place, with gaps, in reverse; and where it is refused, with nothing written."""
    x = np.random.default_rng(columns).standard_normal((21, columns), "float32")
    for _ in range(2):
        y = xpnn.softmax(x)
    wide = np.full((21, columns + 2), 7, np.float32)
    assert xpnn.softmax(x, out=wide[:, :columns]) is not None
    assert np.array_equal(wide[:, :columns], y)
    assert (wide[:, columns:] == 7).all()
    turned = np.empty_like(x)
    xpnn.softmax(x, out=turned[::-1])
    assert np.array_equal(turned[::-1], y)
    over = x.copy()
    assert xpnn.softmax(over, out=over) is over
    assert np.array_equal(over, y)
    both = np.zeros((22, columns), np.float32)
    both[:21] = x
    before = both.copy()
    with pytest.raises(ValueError, match="overlaps x"):
        xpnn.softmax(both[:21], out=both[1:])
    with pytest.raises(ValueError, match="overlaps x"):
        xpnn.softmax(both[:21], out=both[:21][::-1])
    assert np.array_equal(both, before)
    with pytest.raises(ValueError, match="share memory"):
        xpnn.softmax(x, out=np.lib.stride_tricks.as_strided(np.zeros(columns, np.float32), x.shape, (0, 4)))
    with pytest.raises(ValueError, match="shape"):
        xpnn.softmax(x, out=np.empty((20, columns), np.float32))
    target = np.zeros(21, np.int64)
    for _ in range(2):
        xpnn.cross_entropy.value_and_grad(x, target)
    for wrong in (target[:20], np.zeros(22, np.int64)):
        with pytest.raises(ValueError, match="target: got shape"):
            xpnn.cross_entropy.value_and_grad(x, wrong)


def test_other_arrays_after_the_short_way() -> None:
    """Whatever made a short way, the next call may come with other types, dimensions and dtypes."""
    x = np.random.default_rng(0).standard_normal((4, 5), "float32")
    y = xpnn.softmax(x)
    for _ in range(2):  # one array in two places
        same = xpnn.softmax.backward(y, y)
    expected = y * (y - (y * y).sum(-1, keepdims=True))
    np.testing.assert_allclose(same, expected, rtol=1e-5, atol=1e-7)
    for other in (y.astype("float64"), y.astype("float16"), y.tolist(), y[:, :1].repeat(5, 1), np.broadcast_to(y[0], y.shape)):
        want = y * (np.asarray(other) - (y * np.asarray(other)).sum(-1, keepdims=True))
        try:
            found = xpnn.softmax.backward(other, y)
        except TypeError:  # halves and others do not mix
            continue
        np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-6)
    one = np.full(5, 0.2, np.float32)
    for target in (one, one, y, one, y[:1], y.astype("float64"), y):  # broadcast over the rows, or not
        loss = xpnn.cross_entropy_probs(y, target)
        np.testing.assert_allclose(loss, -(np.log(y) * target).sum(-1), rtol=1e-5)
    index = np.array([0, 1, 2, 3])
    for target in (index, index.astype("int32"), index.tolist(), index[:, None].repeat(2, 1)[:, 0], index):
        np.testing.assert_allclose(xpnn.cross_entropy(x, target), -np.log(y[index, index]).mean(), rtol=1e-5)
    for target in (y, index, y):
        xpnn.cross_entropy(x, target)
        assert np.isfinite(xpnn.cross_entropy(x, target))


def test_large_out_at_an_odd_address() -> None:
    """What is written around the caches asks for whole lines of memory, which such an array has nowhere."""
    xpnn.relu(np.ones(100, np.float32))
    x = np.random.default_rng(0).standard_normal(7 << 20, "float32")
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32)
    for _ in range(2):
        xpnn.relu(x, out=odd)
    assert np.array_equal(odd, np.maximum(x, 0))
    packed = np.zeros((5, 41), np.uint8)[:, 1:].view(np.float32)  # rows 41 bytes apart
    for _ in range(2):
        xpnn.softmax(x[:50].reshape(5, 10), out=packed)
    assert np.array_equal(packed, xpnn.softmax(x[:50].reshape(5, 10)))


def test_checks_of_shapes() -> None:
    """A check sees every shape of every direction; what it replaces for one shape is not used for another."""

    def check(kinds: Any, shapes: Any, options: Any) -> None:
        if options["scale"] == 0.0:
            options["scale"] = float(shapes["x"][0]) if "x" in shapes else 1.0
        if "x" in shapes and shapes["x"][-1] == 3:
            raise ValueError("three columns")

    @xpnn.kernel(check=check)
    def scaled(xp: Any, x: Any, *, scale: float = 0.0) -> Any:
        return x * scale

    @scaled.backward
    def scaled_backward(xp: Any, dy: Any, *, scale: float = 0.0) -> Any:
        return dy * scale

    for n in (2, 3, 2, 3, 3, 5, 2):
        assert scaled(np.ones((n, 2), np.float32))[0, 0] == n
    for _ in range(2):
        scaled.backward(np.ones((2, 3), np.float32))
        with pytest.raises(ValueError, match="three columns"):
            scaled(np.ones((2, 3), np.float32))


@xpnn.kernel(outputs=("y", "row", "best"))
def mixed(xp: Any, x: Any, index: Index, *, gain: Column, shift: float = 0.5) -> Any:
    """Everything at once: columns' and rows' values, a gather of what was computed, whole numbers, sums."""
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    p = e / xp.sum(e, axis=-1, keepdims=True)
    valid = index != 1
    taken = xp.take_along_axis(p * gain, index, axis=-1) + xp.take(gain, index)
    row = xp.where(valid, xp.log(1.0 + taken * taken), shift)
    hit = xp.arange(x.shape[-1]) == index
    return xp.where(hit, p - 1.0, p) * gain + row, row, xp.argmax(x, axis=-1, keepdims=True)


@mixed.backward
def mixed_backward(xp: Any, dy: Any, x: Any, index: Any, gain: Any, *, shift: float = 0.5) -> Any:
    """Not its derivative: row and column sums in one pass."""
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    s = xp.sum(dy * e, axis=-1, keepdims=True)
    return dy * e - s * gain, None, xp.sum(dy * e / (1.0 + s * s), axis=0, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from((1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 70)),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 1000),
)
def test_everything_at_once(rows: int, columns: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((rows, columns)).astype(dtype) for _ in range(2))
    gain, index = rng.standard_normal(columns).astype(dtype), rng.integers(0, columns, rows)
    tolerance = 2e-5 if dtype == "float32" else 1e-12
    with xpnn.use_backend("numpy"):
        exact = mixed(x.astype("float64"), index, gain=gain.astype("float64"))
        slopes = mixed.backward(dy.astype("float64"), x=x.astype("float64"), index=index, gain=gain.astype("float64"))
    with xpnn.use_backend("numba"):
        found = mixed(x, index, gain=gain)
        gradients = mixed.backward(dy, x=x, index=index, gain=gain)
    for got, want in zip((*found, gradients[0], gradients[2]), (*exact, slopes[0], slopes[2]), strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * 10)
