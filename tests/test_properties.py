"""Over shapes, axes, dtypes and strides that Hypothesis thinks of: fused against composed, and what must always hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import xpnn
from xpnn import testing

settings.register_profile(
    "xpnn",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("xpnn")
EPS = {np.float32: 2.0**-23, np.float64: 2.0**-52}
NORMALIZERS = ["softmax", "log_softmax", "logsumexp"]


@st.composite
def arrays(draw: st.DrawFn, dimensions: int = 4) -> tuple[np.ndarray, int]:
    """An array with any strides, and an axis."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(
        st.lists(st.sampled_from([1, 2, 3, 5, 8, 17, 33]), min_size=1, max_size=dimensions).filter(lambda s: np.prod(s) < 20000)
    )
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    steps = [draw(st.sampled_from([1, 1, 1, 2, -1, -3])) for _ in shape]
    scale = draw(st.sampled_from([0.01, 1.0, 10.0, 200.0]))
    memory = (rng.normal(size=[n * abs(k) for n, k in zip(shape, steps, strict=True)]) * scale).astype(dtype)
    order = draw(st.permutations(range(len(shape))))
    x = memory[tuple(slice(None, None, k) for k in steps)].transpose(order)
    return x, draw(st.integers(-x.ndim, x.ndim - 1))


def reference(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Composed by NumPy in float64, on contiguous copies."""
    wide = [np.array(a, np.float64 if a.dtype.kind == "f" else a.dtype) if isinstance(a, np.ndarray) else a for a in args]
    with xpnn.use_backend("numpy"):
        return function(*wide, **kwargs)


def fused(function: Any, *args: Any, **kwargs: Any) -> Any:
    with xpnn.use_backend("numba"):
        return function(*args, **kwargs)


def near(got: Any, want: Any, dtype: Any, terms: Any = 1.0, ulps: float = 16) -> None:
    """To some roundings of the largest term."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == dtype
    assert got.shape == want.shape
    bound = ulps * EPS[dtype] * np.maximum(np.abs(want), np.max(np.abs(terms), initial=0.0))
    worst = np.max(np.abs(got - want) - bound, initial=-1.0)
    assert worst <= 0, worst


@pytest.mark.parametrize("name", NORMALIZERS)
@given(made=arrays())
def test_normalizers(name: str, made: tuple[np.ndarray, int]) -> None:
    x, axis = made
    k = getattr(xpnn, name)
    y = fused(k, x, axis=axis)
    near(y, reference(k, x, axis=axis), x.dtype.type, 1e-30 if name == "softmax" and np.abs(x).max() < 5 else np.abs(x).max())


@pytest.mark.parametrize("name", NORMALIZERS)
@given(made=arrays(3), seed=st.integers(0, 2**32))
def test_gradients_of_normalizers(name: str, made: tuple[np.ndarray, int], seed: int) -> None:
    x, axis = made
    k = getattr(xpnn, name)
    y, pullback = fused(k.vjp, x, axis=axis)
    dy = np.random.default_rng(seed).normal(size=y.shape).astype(x.dtype)
    want = reference(lambda a, b: k.vjp(a, axis=axis)[1](b), x, dy)
    terms = np.abs(x).max() * np.abs(dy).sum(axis if name != "logsumexp" else None)
    near(fused(pullback, dy), want, x.dtype.type, max(np.max(terms), np.abs(dy).max()))


@given(made=arrays())
def test_rows_sum_to_one(made: tuple[np.ndarray, int]) -> None:
    x, axis = made
    y = fused(xpnn.softmax, x, axis=axis)
    assert (y >= 0).all()
    near(y.astype(np.float64).sum(axis).astype(x.dtype), np.ones(y.sum(axis).shape), x.dtype.type)
    near(
        fused(xpnn.logsumexp, fused(xpnn.log_softmax, x, axis=axis), axis=axis),
        np.zeros(y.sum(axis).shape),
        x.dtype.type,
        max(1, np.abs(x).max()),
    )


@given(made=arrays(), shift=st.integers(-1000, 1000))
def test_shifts_change_nothing(made: tuple[np.ndarray, int], shift: int) -> None:
    """Whole numbers shift whole numbers exactly, so the results are the same bits; logsumexp shifts along."""
    x, axis = made
    x = np.round(x)
    np.testing.assert_array_equal(fused(xpnn.softmax, x + x.dtype.type(shift), axis=axis), fused(xpnn.softmax, x, axis=axis))
    np.testing.assert_array_equal(
        fused(xpnn.log_softmax, x + x.dtype.type(shift), axis=axis), fused(xpnn.log_softmax, x, axis=axis)
    )
    moved = fused(xpnn.logsumexp, x + x.dtype.type(shift), axis=axis)
    near(moved, fused(xpnn.logsumexp, x, axis=axis).astype(np.float64) + shift, x.dtype.type, np.abs(x).max() + abs(shift))


@given(made=arrays(), seed=st.integers(0, 2**32))
def test_gradients_sum_to_zero(made: tuple[np.ndarray, int], seed: int) -> None:
    """softmax does not see a shift, so its gradient along the row sums to zero; so does cross_entropy's."""
    x, axis = made
    rng = np.random.default_rng(seed)
    dy = rng.normal(size=x.shape).astype(x.dtype)
    g = fused(xpnn.softmax.vjp, x, axis=axis)[1](dy)
    near(g.astype(np.float64).sum(axis).astype(x.dtype), np.zeros(g.sum(axis).shape), x.dtype.type, np.abs(dy).max())
    lead = np.delete(x.shape, axis)
    target = rng.integers(0, x.shape[axis], lead)
    g = fused(xpnn.cross_entropy.value_and_grad, x, target, axis=axis, reduction="sum")[1]
    near(g.astype(np.float64).sum(axis).astype(x.dtype), np.zeros(g.sum(axis).shape), x.dtype.type)


@given(made=arrays())
def test_sigmoid(made: tuple[np.ndarray, int]) -> None:
    """Accurate in its tails too: relative to its own value, where that is a normal number."""
    x, _ = made
    y = fused(xpnn.sigmoid, x)
    want = reference(xpnn.sigmoid, x)
    normal = want > np.finfo(x.dtype).tiny
    near(y[normal], want[normal], x.dtype.type, 0.0)
    assert (y[~normal] <= np.finfo(x.dtype).tiny).all()
    near(y + fused(xpnn.sigmoid, -x), np.ones(x.shape), x.dtype.type)
    order = np.argsort(x, axis=None)
    assert (np.diff(y.ravel()[order].astype(np.float64)) >= -4 * EPS[x.dtype.type] * y.ravel()[order][1:]).all()


@given(made=arrays(), seed=st.integers(0, 2**32), reduction=st.sampled_from(["none", "mean"]), ignored=st.booleans())
def test_cross_entropy(made: tuple[np.ndarray, int], seed: int, reduction: str, ignored: bool) -> None:
    x, axis = made
    rng = np.random.default_rng(seed)
    target = np.asarray(rng.integers(0, x.shape[axis], np.delete(x.shape, axis)))
    if ignored:
        target = np.where(rng.uniform(size=target.shape) < 0.3, -100, target)
    options: dict[str, Any] = {"axis": axis, "reduction": reduction}
    loss, pullback = fused(xpnn.cross_entropy.vjp, x, target, **options)
    want = reference(xpnn.cross_entropy, x, target, **options)
    if np.isnan(want).any():
        assert not (target != -100).any()
        assert np.isnan(loss)
    else:
        near(loss, want, x.dtype.type, np.abs(x).max())
    dloss = np.asarray(rng.normal(size=np.shape(loss))).astype(x.dtype)
    g = pullback(dloss)[0]
    near(
        g,
        reference(lambda a, b, c: xpnn.cross_entropy.vjp(a, b, **options)[1](c)[0], x, target, dloss),
        x.dtype.type,
        np.abs(dloss).max() * max(1, np.abs(x).max()),
    )


def test_what_is_made_of_a_flushed_intermediate_is_judged_by_what_was_flushed() -> None:
    """exp(-87.77) lies below float32's smallest normal number and may be flushed; 500 times it is 500 times as wrong."""
    kernel = xpnn.binary_cross_entropy_with_logits
    arrays = {n: np.full((2, 3), v, np.float32) for n, v in {"logits": 87.77, "target": 0.4, "weight": 490.0}.items()}
    arrays |= {"pos_weight": np.ones((2, 3), np.float32), "dloss": np.float32(1.0)[...]}
    truth = testing.truth_of(kernel, "backward", arrays, {"reduction": "sum"}, "float32")
    found = testing._compute(kernel, "backward", arrays, {"reduction": "sum"}, "numba")
    assert truth.excess(found)[2] <= 0
    off = found["dpos_weight"] + 500 * 5 * np.finfo(np.float32).tiny
    assert truth.excess(found | {"dpos_weight": off})[2] > 0
