"""Results are the same to the bit: for any number of threads, rows, alignment, stride, in place or not."""

from collections.abc import Iterator

import numpy as np
import pytest

import xpnn

WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 100, 257, 1000, 2047, 2048, 2049, 2064, 5001]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with xpnn.use_backend("numba"):
        yield


def layouts(x: np.ndarray) -> Iterator[np.ndarray]:
    """The same values in other places: with gaps between rows, in reverse order, misaligned to vectors, read-only."""
    rows, columns = x.shape
    gaps = np.empty((rows, columns + 5), x.dtype)
    gaps[:, 2 : columns + 2] = x
    yield gaps[:, 2 : columns + 2]
    yield np.ascontiguousarray(x[::-1])[::-1]
    shifted = np.empty(x.size + 3, x.dtype)[3:].reshape(x.shape)
    shifted[...] = x
    yield shifted
    frozen = x.copy()
    frozen.flags.writeable = False
    yield frozen
    yield np.asfortranarray(x)


def same(a: object, b: object) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_rows(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's result does not depend on where it lies or what surrounds it."""
    kernel = getattr(xpnn, name)
    for width in WIDTHS:
        x = (3 * RNG.standard_normal((max(7, 40_000 // width), width))).astype(dtype)
        monkeypatch.setenv("XPNN_NUM_THREADS", "2")
        expected = kernel(x)
        for threads in ("1", "3"):
            monkeypatch.setenv("XPNN_NUM_THREADS", threads)
            assert same(kernel(x), expected)
        few = [0, len(x) // 2, len(x) - 1]
        assert all(same(kernel(x[i]), expected[i]) for i in few)
        assert all(same(kernel(y), expected) for y in layouts(x))
        if name != "logsumexp":
            inplace = x.copy()
            assert kernel(inplace, out=inplace) is inplace
            assert same(inplace, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropy(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient, in place and not."""
    for width in WIDTHS:
        rows = max(7, 40_000 // width)
        x = (3 * RNG.standard_normal((rows, width))).astype(dtype)
        t = RNG.integers(0, width, rows)
        monkeypatch.setenv("XPNN_NUM_THREADS", "2")
        loss, dx = xpnn.cross_entropy.value_and_grad(x, t)
        for threads in ("1", "3"):
            monkeypatch.setenv("XPNN_NUM_THREADS", threads)
            again = xpnn.cross_entropy.value_and_grad(x, t)
            assert same(again[0], loss)
            assert same(again[1], dx)
        for y in layouts(x):
            again = xpnn.cross_entropy.value_and_grad(y, t)
            assert same(again[0], loss)
            assert same(again[1], dx)
        inplace = x.copy()
        assert same(xpnn.cross_entropy.value_and_grad(inplace, t, out=inplace)[0], loss)
        assert same(inplace, dx)


def test_sums_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias gradient adds its rows in the same order for any number of threads."""
    x, weight = RNG.standard_normal((1000, 33)).astype("f4"), RNG.standard_normal((70, 33)).astype("f4")
    dy = RNG.standard_normal((1000, 70)).astype("f4")
    results = []
    for threads in ("1", "2", "3", "7"):
        monkeypatch.setenv("XPNN_NUM_THREADS", threads)
        _, pullback = xpnn.linear.vjp(x, weight, np.zeros(70, "f4"), activation=xpnn.tanh)
        results.append(pullback(dy)[2])
    assert all(same(r, results[0]) for r in results)
    assert results[0].any()


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "relu", "log"])
def test_elements(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An element's result does not depend on its place in a vector."""
    kernel = getattr(xpnn, name)
    x = np.abs(RNG.standard_normal((300, 257)).astype("f4"))
    expected = kernel(x)
    for threads in ("1", "3"):
        monkeypatch.setenv("XPNN_NUM_THREADS", threads)
        assert same(kernel(x), expected)
    assert all(same(kernel(y), expected) for y in layouts(x))
    assert all(same(kernel(x.reshape(-1)[i : i + 5]), expected.reshape(-1)[i : i + 5]) for i in range(20))
