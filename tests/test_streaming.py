"""Results written around the caches: the same bits, whatever the width, the alignment and the number of rows.

Only large results are written so; here all are, by other limits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import xpnn
from xpnn.backends.arrays import numpy_dtype
from xpnn.backends.numba import loops

SHAPES = [(1, 1), (3, 5), (7, 16), (5, 17), (4, 100), (1, 512), (6, 513), (3, 1030), (2, 2049)]
KERNELS = (xpnn.softmax, xpnn.log_softmax, xpnn.cross_entropy, xpnn.sigmoid, xpnn.relu)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """A switch: write everything, or nothing, around the caches."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(loops, "STREAMED", (0, 0) if on else (1 << 60, 0))
        forget()

    def forget() -> None:
        for kernel in KERNELS:
            kernel._forget()

    yield switch
    forget()


def placed(shape: tuple[int, ...], dtype: Any, offset: int, gap: int) -> np.ndarray[Any, Any]:
    """An array that begins `offset` elements after a multiple of 64 bytes, with `gap` elements between its rows."""
    rows, columns = shape
    dtype = np.dtype(dtype)
    raw = np.zeros((rows * (columns + gap) + offset) * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64 + offset * dtype.itemsize
    values = raw[start : start + rows * (columns + gap) * dtype.itemsize].view(dtype)
    return values.reshape(rows, columns + gap)[:, :columns]


def calls(shape: tuple[int, int], dtype: Any) -> dict[str, Callable[..., Any]]:
    """Calls that take `out`, by name."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape).astype(dtype) * 3 for _ in range(2))
    target = rng.integers(0, shape[1], shape[0])
    target[::4] = -100
    found: dict[str, Callable[..., Any]] = {}
    for kernel in (xpnn.softmax, xpnn.log_softmax, xpnn.sigmoid, xpnn.relu):
        found[kernel.__name__] = functools.partial(kernel, x)
        found[f"{kernel.__name__} backward"] = functools.partial(kernel.backward, dy, kernel(x))
    found["cross_entropy"] = lambda out: xpnn.cross_entropy.value_and_grad(x, target, reduction="sum", out=out)[1]
    found["cross_entropy, probabilities"] = lambda out: xpnn.cross_entropy.value_and_grad(x, abs(dy), out=out)[1]
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_same_bits(dtype: str, streamed: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = numpy_dtype(dtype)
    expected = {}
    streamed(False)
    for shape in SHAPES:
        for name, call in calls(shape, kind).items():
            expected[shape, name] = np.array(call(out=placed(shape, kind, 0, 0)))
    streamed(True)
    for threads in ("1", "3"):
        monkeypatch.setenv("XPNN_NUM_THREADS", threads)
        monkeypatch.setattr("xpnn.backends.numba.emit.SERIAL_BELOW", 0)
        for shape in SHAPES:
            for name, call in calls(shape, kind).items():
                for offset, gap in ((0, 0), (1, 0), (4, 3), (13, 16)):
                    out = placed(shape, kind, offset, gap)
                    around = np.array(out.base, copy=True)
                    call(out=out)
                    assert np.array_equal(out.view(f"u{kind.itemsize}"), expected[shape, name].view(f"u{kind.itemsize}")), (
                        shape,
                        name,
                        offset,
                        gap,
                    )
                    if gap:  # nothing is written beside the rows
                        out[...] = 0
                        assert np.array_equal(np.asarray(out.base), around), (shape, name, offset, gap)


def test_in_place(streamed: Callable[[bool], None]) -> None:
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((5, 1030)).astype("float32"), rng.integers(0, 1030, 5)
    streamed(True)
    expected = xpnn.cross_entropy.value_and_grad(x, target)
    over = x.copy()
    loss, gradient = xpnn.cross_entropy.value_and_grad(over, target, out=over)
    assert gradient is over
    assert loss == expected[0]
    assert np.array_equal(over, expected[1])


def test_large_results() -> None:
    """A result beyond the limits, as they are; its last rows are written after the loop over rows."""
    rows, columns = 3, 3_000_017
    assert rows * columns * 4 >= loops.STREAMED[0]
    x = np.random.default_rng(0).standard_normal((rows, columns), "float32")
    y = xpnn.softmax(x)
    assert np.array_equal(y[1], xpnn.softmax(x[1]))
    assert np.array_equal(y[-1], xpnn.softmax(x[-1]))
    e = np.exp(x[-1].astype(np.float64) - x[-1].max())
    np.testing.assert_allclose(y[-1], e / e.sum(), rtol=2e-6)
