"""How far a kernel looks, which decides whether it has an axis and what rows its arrays are cut into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xpnn
from xpnn import Column, Row
from xpnn.backends.arrays import rectangle
from xpnn.backends.prepare import reach


def element(xp: Any, x: Any) -> Any:
    return x * x


def total(xp: Any, x: Any) -> Any:
    return xp.sum(x, axis=None)


def mean(xp: Any, x: Any) -> Any:
    return xp.mean(xp.abs(x), axis=None)


def centred(xp: Any, x: Any) -> Any:
    return x - xp.mean(x, axis=None)


def two_sums(xp: Any, x: Any, t: Any) -> Any:
    return xp.sum(x, axis=None) / (xp.sum(t, axis=None) + x.shape[0] * x.shape[-1])


def row_sum(xp: Any, x: Any) -> Any:
    return xp.sum(x, axis=-1, keepdims=True)


def squared_row_sums(xp: Any, x: Any) -> Any:
    s = xp.sum(x, axis=-1, keepdims=True)
    return xp.sum(s * s, axis=None)


def both_sums(xp: Any, x: Any) -> Any:
    return xp.sum(x, axis=None) * x + xp.sum(x, axis=-1, keepdims=True)


def largest(xp: Any, x: Any) -> Any:
    return xp.sum(x - xp.max(x, axis=-1, keepdims=True), axis=None)


def column_sum(xp: Any, x: Any) -> Any:
    return xp.sum(x, axis=0, keepdims=True)


def number_of_rows(xp: Any, x: Any) -> Any:
    return x / x.shape[0]


def rows_alone(xp: Any, x: Any) -> Any:
    return xp.sum(x, axis=None) / x.shape[0]


def rows_twice(xp: Any, x: Any) -> Any:
    return xp.sum(x, axis=None) / (x.shape[0] * x.shape[0])


def rows_besides(xp: Any, x: Any) -> Any:
    return xp.mean(x, axis=None) / x.shape[0]


def columns(xp: Any, x: Any) -> Any:
    return x * xp.arange(x.shape[-1])


def column_input(xp: Any, x: Any, weight: Column = None) -> Any:
    return xp.sum(x if weight is None else x * weight, axis=None)


def row_input(xp: Any, x: Any, scale: Row) -> Any:
    return xp.sum(x * scale, axis=None)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (element, "element"), *((f, "all") for f in (total, mean, centred, two_sums)),
        *((f, "row") for f in (row_sum, squared_row_sums, both_sums, largest, column_sum, number_of_rows, rows_alone)),
        *((f, "row") for f in (rows_twice, rows_besides, columns, row_input)),
    ],
)  # fmt: skip
def test_reach(formula: Callable[..., Any], expected: str) -> None:
    k = xpnn.kernel(formula)
    assert reach(k) == expected
    assert k.has_axis == (expected == "row")


def test_a_column_makes_an_axis() -> None:
    """Even if it may be left out: it has to be known what it is a column of."""
    k, x = xpnn.kernel(column_input), np.arange(24.0).reshape(2, 3, 4)
    assert k.has_axis
    assert k(x) == x.sum()
    assert k(x, np.array([0.0, 1.0, 0.0]), axis=1) == x[:, 1].sum()


def test_a_backward_counts_too() -> None:
    """A gradient that tells rows from columns gives the kernel an axis."""
    k = xpnn.kernel(total)

    @k.backward
    def by_row(xp: Any, dy: Any, x: Any) -> Any:
        return dy * xp.max(x, axis=-1, keepdims=True) + 0.0 * x

    assert k.has_axis


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_everything_taken_from_everything(backend: str) -> None:
    """A full result that needs the sum over all elements, whatever the shape."""
    k = xpnn.kernel(centred)
    with xpnn.use_backend(backend):
        for shape in ((), (7,), (3, 5), (2, 3, 4), (30, 700), (8209,)):  # the last is a prime
            x = np.random.default_rng(0).normal(size=shape)
            np.testing.assert_allclose(k(x), x - x.mean(), rtol=0, atol=1e-14)


def by_option(xp: Any, x: Any, *, over: str = "everything") -> Any:
    return xp.sum(x, axis=None) if over == "everything" else xp.sum(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_rows_without_an_axis(backend: str) -> None:
    """Where an option alone makes rows matter, a row is one place along the first axis."""
    k = xpnn.kernel(by_option)
    assert not k.has_axis
    with xpnn.use_backend(backend):
        for shape in ((), (4,), (4, 5), (2, 3, 4)):
            x = np.random.default_rng(0).normal(size=shape)
            rows = k(x, over="rows")
            assert np.shape(rows) == shape[:1]
            np.testing.assert_allclose(rows, x.reshape((*shape[:1], -1)).sum(-1), rtol=1e-14)


@given(st.integers(0, 10**7))
def test_rectangle(size: int) -> None:
    rows, columns = rectangle(size)
    assert rows * columns == size
    assert rows == 1 or 256 <= columns <= 8192
