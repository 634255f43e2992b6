"""Dask arrays: lazy, computed block by block, and equal to NumPy's as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xpnn
from xpnn.backends.kernel import registry

RNG = np.random.default_rng(11)
X = RNG.normal(size=(10, 6))
TARGET = np.where(np.arange(10) == 3, -100, RNG.integers(0, 6, 10))


@pytest.fixture(autouse=True)
def dask() -> Iterator[Any]:
    """Dask, computing in this thread."""
    dask = pytest.importorskip("dask", reason="dask is not installed: lazy arrays not compared")
    pytest.importorskip("dask.array", reason="dask.array is not installed: lazy arrays not compared")
    with dask.config.set(scheduler="synchronous"):
        yield dask


def lazy(a: Any, rows: int = 4, columns: int = -1) -> Any:
    """A Dask array in blocks of some rows, and of some columns of what has two axes."""
    import dask.array as da

    a = np.asarray(a)
    return da.from_array(a, chunks=(rows, *[columns] * (a.ndim - 1))[: a.ndim])


def by_name(case: Any, found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("columns", [-1, 3], ids=["rows", "tiles"])
def test_every_kernel(
    case: Any,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    close: Callable[..., None],
    numpy_reference: Callable[..., Any],
) -> None:
    """Value, pullback of a random cotangent, and fused pass, in blocks that do not fit one another.

    Passes are interpreted here, which tells whether they are cut and put together well; the loops are other tests'.
    """
    import xpnn.backends.dask as backend
    from xpnn.backends.interpret import interpret

    def interpreted(pickled: bytes) -> Any:
        program, _, _ = backend.pickle.loads(pickled)

        def run(xp: Any, arrays: Any, numbers: Any, out: Any) -> Any:
            return {n: v.value for n, v in interpret(program, arrays, numbers).items()}

        return program, run, {}

    monkeypatch.setattr(backend, "_compiled", interpreted)
    arrays = case.arrays((7, 6))
    given = {n: lazy(a, 3 if k else 4, columns) for k, (n, a) in enumerate(arrays.items())}
    want, pullback = numpy_reference(case.kernel.vjp, *case.given(arrays), **case.options)
    dy = case.cotangent(want)
    expected = numpy_reference(pullback, dy)
    y, pull = case.kernel.vjp(*case.given(given), **case.options)
    for g, w in zip((y, *by_name(case, pull(lazy(dy, 2)))), (want, *by_name(case, expected)), strict=True):
        assert (g is None) is (w is None)
        if w is not None:
            assert type(g) is type(y)
            close(g.compute(), w)
    if np.shape(want) == () and np.ndim(want) == 0:
        value, gradients = numpy_reference(case.kernel.value_and_grad, *case.given(arrays), **case.options)
        ours = case.kernel.value_and_grad(*case.given(given), **case.options)
        for g, w in zip((ours[0], *by_name(case, ours[1])), (value, *by_name(case, gradients)), strict=True):
            close(g.compute(), w)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fused_blocks(dask: Any, dtype: str, close: Callable[..., None]) -> None:
    """The loops themselves: rows of softmax, and a weighted mean whose divisor runs over all blocks."""
    x, weight = X.astype(dtype), RNG.uniform(size=6).astype("float32")
    assert xpnn.softmax.explain(lazy(x)) == "dask"
    y = xpnn.softmax(lazy(x))
    assert y.chunks[0] == (4, 4, 2)
    np.testing.assert_array_equal(y.compute(), xpnn.softmax(x))
    given = {"weight": weight.astype(dtype), "label_smoothing": 0.1, "ignore_index": -100}
    want = xpnn.cross_entropy.value_and_grad(x, TARGET, **given)
    given["weight"] = lazy(given["weight"], 2)
    loss, dlogits = xpnn.cross_entropy.value_and_grad(lazy(x), lazy(TARGET, 5), **given)
    assert loss.dtype == np.float32
    assert dlogits.dtype == x.dtype
    loss, dlogits = dask.compute(loss, dlogits)
    close(loss, want[0])
    np.testing.assert_allclose(dlogits, want[1], rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-7)


def test_products_of_half_precision(dask: Any) -> None:
    """In float32, rounded once: a layer, and a layer under a loss, with every gradient."""
    x, weight, target = X.astype("float16"), RNG.normal(size=(3, 6)).astype("float16"), np.maximum(TARGET, 0) % 3
    want = xpnn.linear_cross_entropy.value_and_grad(x, weight, target)
    loss, gradients = xpnn.linear_cross_entropy.value_and_grad(lazy(x), lazy(weight, 2), lazy(target))
    for got, expected in zip(dask.compute(loss, *gradients), (want[0], *want[1]), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=2e-3, atol=1e-4)
    y = xpnn.linear(lazy(x), lazy(weight, 2)).compute()
    np.testing.assert_allclose(y.astype(float), xpnn.linear(x, weight).astype(float), rtol=1e-3, atol=1e-3)


def test_threads(dask: Any, close: Callable[..., None]) -> None:
    """Dask's usual scheduler runs many blocks at once, each perhaps on several threads."""
    x, target = RNG.normal(size=(400, 6)).astype("float32"), RNG.integers(0, 6, 400)
    want = xpnn.cross_entropy.value_and_grad(x, target)
    for _ in range(5):
        lazily = xpnn.cross_entropy.value_and_grad(lazy(x, 7), lazy(target, 11))
        for got, expected in zip(dask.compute(*lazily, scheduler="threads", num_workers=8), want, strict=True):
            close(got, expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rows=st.integers(1, 12), reduction=st.sampled_from(["mean", "sum"]))
def test_any_blocks(data: Any, rows: int, reduction: str) -> None:
    """However rows are cut, the loss and its gradient are those of one block; no row that counts means NaN."""
    import dask
    import dask.array as da

    def cut(a: Any, name: str) -> Any:
        ends = sorted(data.draw(st.sets(st.integers(0, rows), max_size=4), name))
        sizes = np.diff([0, *ends, rows])
        return da.from_array(a, chunks=(tuple(map(int, sizes)), *a.shape[1:]))

    x, target = (
        X.repeat(2, 0)[:rows],
        data.draw(st.lists(st.sampled_from([-100, 0, 5]), min_size=rows, max_size=rows), "target"),
    )
    target = np.array(target)
    want = xpnn.cross_entropy.value_and_grad(x, target, reduction=reduction)
    lazily = xpnn.cross_entropy.value_and_grad(cut(x, "x"), cut(target, "t"), reduction=reduction)
    for got, expected in zip(dask.compute(*lazily, scheduler="synchronous"), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


def test_nothing_is_computed_early() -> None:
    """Not even the targets are looked at."""
    import dask.array as da

    def never(block: Any) -> Any:
        raise AssertionError("computed")

    x, t = (da.map_blocks(never, lazy(a), dtype=a.dtype, meta=a[:0]) for a in (X, TARGET))
    y, pull = xpnn.cross_entropy.vjp(x, t)
    assert pull(y)[0].shape == X.shape
    with pytest.raises(AssertionError, match="computed"):
        y.compute()


def test_blocks_are_made_once() -> None:
    """The mean's divisor reads targets alone: each block of logits is made once for loss and gradient."""
    import dask
    import dask.array as da

    made = []

    def make(block: Any) -> Any:
        made.append(block.shape)
        return block

    x = da.map_blocks(make, lazy(X), dtype=X.dtype, meta=X[:0])
    dask.compute(*xpnn.cross_entropy.value_and_grad(x, lazy(TARGET)))
    assert sorted(made) == [(2, 6), (4, 6), (4, 6)]


def test_columns_in_several_blocks() -> None:
    """Element by element they stay so; rows are put together."""
    x = lazy(X, 4, 4)
    assert xpnn.relu(x).chunks == x.chunks
    assert xpnn.softmax(x).numblocks[1] == 1
    assert xpnn.huber_loss(x, x * 2).ndim == 0


def test_more_axes_and_empty_blocks(close: Callable[..., None]) -> None:
    x = RNG.normal(size=(4, 6, 3))
    close(xpnn.softmax(lazy(x, 2, 2), axis=1).compute(), xpnn.softmax(x, axis=1))
    late = lazy(X)[lazy(np.arange(10) >= 4)].compute_chunk_sizes()
    assert late.chunks[0] == (0, 4, 2)
    assert xpnn.softmax(late).chunks[0] == (4, 2)
    close(xpnn.softmax(late).compute(), xpnn.softmax(X[4:]))
    close(xpnn.mse_loss(late, late * 0).compute(), np.mean(X[4:] ** 2))
    assert xpnn.softmax(lazy(X)[:0]).compute().shape == (0, 6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_target_out_of_range(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN loss and zero gradient for that row, the others as without it; an error where XPNN_CHECK=1 asks to look."""
    x, target = X.astype(dtype), np.where(np.arange(10) == 5, 6, TARGET)
    losses, pullback = xpnn.cross_entropy.vjp(lazy(x), lazy(target), reduction="none")
    want, right = xpnn.cross_entropy.vjp(x, TARGET, reduction="none")
    dloss = np.arange(1.0, 11.0, dtype=losses.dtype)
    found = pullback(lazy(dloss))[0].compute()
    assert (found.dtype, losses.dtype) == (dtype, want.dtype)
    assert np.isnan(losses.compute()[5])
    others = np.arange(10) != 5
    np.testing.assert_allclose(losses.compute()[others], want[others], rtol=1e-6)
    np.testing.assert_allclose(found, right(dloss)[0] * others[:, None], rtol=2e-3 if dtype == "float16" else 1e-6, atol=1e-7)
    loss, dx = xpnn.cross_entropy.value_and_grad(lazy(x), lazy(target))
    assert np.isnan(loss.compute())
    assert not dx.compute()[5].any()
    monkeypatch.setenv("XPNN_CHECK", "1")
    with pytest.raises(IndexError, match=r"cross_entropy: target: got 6 in row 1, expected 0 <= target < 6, of one block"):
        xpnn.cross_entropy(lazy(x), lazy(target)).compute()


def test_bad_input() -> None:
    unknown = lazy(X)[lazy(X)[:, 0] > 0]
    with pytest.raises(ValueError, match=r"softmax: x: got shape \(nan, 6\), expected a known one"):
        xpnn.softmax(unknown)
    unknown.compute_chunk_sizes()
    np.testing.assert_array_equal(xpnn.softmax(unknown).compute(), xpnn.softmax(X[X[:, 0] > 0]))
    with pytest.raises(TypeError, match="a mix of dask and numpy"):
        xpnn.cross_entropy(lazy(X), TARGET)
    with pytest.raises(TypeError, match="dask arrays cannot be written"):
        xpnn.softmax(lazy(X), out=lazy(X))
    with xpnn.use_backend("dask"), pytest.raises(xpnn.BackendError, match="takes Dask arrays, got numpy arrays"):
        xpnn.softmax(X)


def test_parity() -> None:
    """The conformance check of any backend."""
    xpnn.testing.assert_parity(xpnn.log_softmax, ["dask"], ["float32"])


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two worker processes."""
    distributed = pytest.importorskip("distributed", reason="distributed is not installed: several processes not tried")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def own() -> Iterator[Any]:
    """A kernel that no other process could import; forgotten afterwards."""
    before = dict(registry)

    @xpnn.kernel
    def damped(xp: Any, x: Any, *, rate: float = 0.5) -> Any:
        return xp.exp(-rate * x) / xp.sum(xp.exp(-x), axis=-1, keepdims=True)

    yield damped
    registry.clear()
    registry.update(before)


def test_processes(client: Any, own: Any, close: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks go to worker processes, which compile for themselves, one's own kernels too; errors come back."""
    x, target = RNG.normal(size=(40, 6)).astype("float32"), RNG.integers(0, 6, 40)
    loss, dlogits = client.gather(client.compute(xpnn.cross_entropy.value_and_grad(lazy(x), lazy(target))))
    want = xpnn.cross_entropy.value_and_grad(x, target)
    close(loss, want[0])
    close(dlogits, want[1])
    close(client.compute(own(lazy(x), rate=0.25)).result(), own(x, rate=0.25))
    monkeypatch.setenv("XPNN_CHECK", "1")  # in this process, not in theirs
    with pytest.raises(IndexError, match="target: got 9 in row 0"):
        client.compute(xpnn.cross_entropy(lazy(x), lazy(target * 0 + 9))).result()
