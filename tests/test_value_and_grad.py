"""What `value_and_grad` and its like do with names, order and dtypes."""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import xpnn
from xpnn.backends.kernel import registry

LOGITS = np.random.default_rng(0).standard_normal((5, 40))
TARGET = np.arange(5)


@pytest.mark.parametrize("columns", [3, 16, 40, 600])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_order_of_names_changes_nothing(dtype: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    x, t = (rng.random((4, columns)).astype(dtype) for _ in range(2))
    _, (dt, dx) = xpnn.cross_entropy.value_and_grad(x, t, wrt=("target", "logits"))
    _, alone = xpnn.cross_entropy.value_and_grad(x, t)
    assert np.array_equal(dx, alone)
    assert np.array_equal(dt, xpnn.cross_entropy.value_and_grad(x, t, wrt="target")[1])


@pytest.mark.parametrize("columns", [7, 40])
def test_two_results_of_one_phase(columns: int) -> None:
    """What is kept in a result's row is read before that result is written, whichever comes first."""

    @xpnn.kernel(outputs=("u", "v"))
    def both(xp: Any, x: Any) -> Any:
        m = xp.max(x, axis=-1, keepdims=True)
        e = xp.exp(x - m)
        s = xp.sum(e, axis=-1, keepdims=True)
        return xp.log(s) - (x - m), e / s

    x = LOGITS[:, :columns]
    for given in (x, x.astype("float32")):
        u, v = both(given)
        np.testing.assert_allclose(v, xpnn.softmax(given), rtol=1e-6)
        np.testing.assert_allclose(u, -xpnn.log_softmax(given), rtol=1e-5)


def test_nothing_is_written_before_an_error() -> None:
    over = LOGITS.copy()
    with pytest.raises(ValueError, match="wrt: got 'weight', expected one with a gradient: logits"):
        xpnn.cross_entropy.value_and_grad(over, TARGET, weight=np.ones(40), wrt=("logits", "weight"), out=(over, None))
    assert np.array_equal(over, LOGITS)


@pytest.mark.parametrize("call", [
    lambda: xpnn.cross_entropy.value_and_grad([[1, 2], [3, 4]], [0, 1]),
    lambda: xpnn.mse_loss.value_and_grad([1, 0], [0, 1]),
    lambda: xpnn.linear_cross_entropy.value_and_grad(np.array([[1, 0]]), np.ones((2, 2)), np.array([0])),
    lambda: xpnn.cross_entropy.value_and_grad(LOGITS, TARGET, wrt=3),
    lambda: xpnn.cross_entropy(LOGITS.astype("float16"), TARGET, weight=np.ones(40, ml_dtypes.bfloat16)),
])  # fmt: skip
def test_type_errors(call: Any) -> None:
    with pytest.raises(TypeError, match=r"(logits|x|wrt): got|weight and logits: got"):
        call()


@pytest.mark.parametrize("call", [
    lambda: xpnn.cross_entropy.value_and_grad(LOGITS, TARGET, wrt=("logits", "logits")),
    lambda: xpnn.cross_entropy(LOGITS, TARGET, z_loss=10**400),
    lambda: xpnn.cross_entropy.warmup(reduction="avg"),
    lambda: xpnn.cross_entropy.warmup(direction="value_and_grad", reduction="none"),
])  # fmt: skip
def test_value_errors(call: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        call()


def test_signatures() -> None:
    for kernel in registry.values():
        inspect.signature(kernel.backward)
    assert next(iter(inspect.signature(xpnn.cross_entropy.backward).parameters)) == "dloss"


def test_other_arguments_after_a_short_way() -> None:
    """A short way made for arrays meets lists, other dtypes and other dimensions."""
    x = LOGITS.astype("float32")
    expected = xpnn.cross_entropy.value_and_grad(x, TARGET)
    assert xpnn.cross_entropy.value_and_grad(x, TARGET.tolist())[0] == expected[0]
    assert xpnn.softmax(x).shape == xpnn.softmax(x[None])[0].shape
    assert xpnn.softmax(x[0]).ndim == 1
    assert xpnn.softmax(x.astype("float64")).dtype == np.float64
    assert np.shape(xpnn.softmax([1.0, 2.0])) == (2,)


def test_a_pullback_goes_by_the_signature(backend: str) -> None:
    """Whatever order the inputs were named in."""
    rng = np.random.default_rng(1)
    x, weight = rng.random((5, 3)), rng.random((4, 3))
    y, pullback = xpnn.linear.vjp(weight=weight, x=x)
    assert [g.shape for g in pullback(y)] == [x.shape, weight.shape]


@pytest.mark.parametrize("call", [
    lambda: xpnn.gelu.backward(np.ones((3, 1)), x=np.ones(3)),
    lambda: xpnn.gelu.backward(np.ones((2, 3)), x=np.ones(3)),
    lambda: xpnn.tanh.backward(np.ones((2, 3)), y=np.full(3, 0.5)),
    lambda: xpnn.layer_norm.backward(np.ones(4), x=np.ones((2, 4))),
    lambda: xpnn.softmax.backward(np.ones((2, 3)), y=np.ones((1, 3))),
])  # fmt: skip
def test_a_cotangent_of_another_shape(call: Any, backend: str) -> None:
    """It is not broadcast: (n, 1) beside (n,) would be a gradient n times too large."""
    with pytest.raises(ValueError, match=r"backward: dy: got shape"):
        call()


def test_gradients_not_asked_for_are_not_computed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wrt` of a pullback and of backward: one array for a name, a tuple for names, and no more work than that."""
    rng = np.random.default_rng(1)
    x, weight, bias = rng.random((5, 3)), rng.random((4, 3)), rng.random(4)
    y, pullback = xpnn.linear.vjp(x, weight, bias)
    dy = rng.random(y.shape)
    dx, dweight, dbias = pullback(dy)
    products: list[Any] = []
    multiply = np.matmul
    monkeypatch.setattr(np, "matmul", lambda *a, **k: (products.append(a), multiply(*a, **k))[1])
    np.testing.assert_allclose(pullback(dy, wrt="bias"), dbias)
    assert not products or backend == "numpy"  # a composed formula is computed as a whole
    alone, over = pullback(dy, wrt=("bias", "weight"), out=(None, out := np.empty_like(weight)))
    assert over is out
    np.testing.assert_allclose(alone, dbias)
    np.testing.assert_allclose(over, dweight)
    (found,) = xpnn.linear.backward(dy, x, weight, bias, wrt=("x",))
    np.testing.assert_allclose(found, dx)
    (found,) = xpnn.tanh.backward(dy, y=y, wrt=("x",))
    assert np.array_equal(found, xpnn.tanh.backward(dy, y=y, wrt="x"))
    for wrt, error in ((3, TypeError), ("y", ValueError), (("x", "x"), ValueError)):
        with pytest.raises(error, match="linear pullback: wrt: got"):
            pullback(dy, wrt=wrt)
    losses, pull = xpnn.cross_entropy.vjp(x, np.zeros(5, int), weight=np.ones(3), reduction="none")
    for name in ("target", "weight"):
        with pytest.raises(ValueError, match=f"cross_entropy pullback: wrt: got {name!r}, expected"):
            pull(losses, wrt=name)
