"""The public interface: results, gradients, out=, and what arguments may be. DESIGN section 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn
import xpnn.kernels

RNG = np.random.default_rng(3)
X = RNG.normal(size=(5, 7))
DY = RNG.normal(size=(5, 7))
TARGET = RNG.integers(0, 7, 5)
NOT_DIFFERENTIATED = {  # nor does PyTorch
    ("nll_loss", "weight"), ("cross_entropy", "weight"), ("cross_entropy", "divisor"), ("linear_cross_entropy", "weight"),
}  # fmt: skip


def softmax64(x: Any) -> np.ndarray:
    e = np.exp(x - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_gradient(x: Any, dy: Any) -> np.ndarray:
    y = softmax64(x)
    return y * (dy - (dy * y).sum(-1, keepdims=True))


def loss64(x: Any, target: Any) -> tuple[float, np.ndarray]:
    """The mean cross-entropy of rows and its gradient."""
    p, rows = softmax64(x), np.arange(len(target))
    gradient = p.copy()
    gradient[rows, target] -= 1
    return float(-np.log(p[rows, target]).mean()), gradient / len(target)


# --- names --------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert xpnn.softmax_cross_entropy is xpnn.cross_entropy
    assert {n for n in xpnn.__all__ if not hasattr(xpnn, n)} == set()
    for name in xpnn.kernels.__all__:
        assert getattr(xpnn, name) is getattr(xpnn.kernels, name)
        assert name in xpnn.__all__


# --- gradients ----------------------------------------------------------------------------------------------------------


def test_vjp_of_one_input(backend: str, close: Callable[..., None]) -> None:
    y, pullback = xpnn.softmax.vjp(X)
    close(y, softmax64(X))
    dx = pullback(DY)
    assert type(dx) is np.ndarray
    close(dx, softmax_gradient(X, DY))
    close(pullback(-2 * DY), -2 * dx)  # called again, the cache is intact


def test_vjp_of_several_inputs(backend: str, close: Callable[..., None]) -> None:
    w, b = RNG.normal(size=(4, 7)), RNG.normal(size=4)
    dy = RNG.normal(size=(5, 4))
    assert [g.shape for g in xpnn.linear.vjp(X, w)[1](dy)] == [(5, 7), (4, 7)]
    y, pullback = xpnn.linear.vjp(X, w, b)
    close(y, X @ w.T + b)
    for got, want in zip(pullback(dy), (dy @ w, dy.T @ X, dy.sum(0)), strict=True):
        close(got, want)


def test_vjp_of_integers(backend: str, close: Callable[..., None]) -> None:
    loss, pullback = xpnn.cross_entropy.vjp(X, TARGET)
    gradients = pullback(2.5)
    assert isinstance(gradients, tuple)
    assert len(gradients) == 2
    assert gradients[1] is None
    want, dx = loss64(X, TARGET)
    close(loss, want)
    close(gradients[0], 2.5 * dx)


def test_vjp_keeps_options(backend: str, close: Callable[..., None]) -> None:
    loss, pullback = xpnn.cross_entropy.vjp(X, TARGET, reduction="none")
    assert loss.shape == (5,)
    scale = RNG.normal(size=5)
    close(pullback(scale)[0], scale[:, None] * 5 * loss64(X, TARGET)[1])
    _, pullback = xpnn.softmax.vjp(X, axis=0)
    close(pullback(DY), softmax_gradient(X.T, DY.T).T)


def test_vjp_does_not_see_later_changes_of_results(backend: str, case: Any, close: Callable[..., None]) -> None:
    """The caller's inputs may be kept by reference, cotangents not."""
    arrays = case.arrays()
    y, pullback = case.kernel.vjp(*case.given(arrays), **case.options)
    dy = case.cotangent(y)
    first = pullback(dy)
    second = pullback(dy.copy())
    for a, b in zip(np.atleast_1d(first) if isinstance(first, np.ndarray) else first, second, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)


def test_backward_given_or_recomputed(backend: str, close: Callable[..., None]) -> None:
    want = softmax_gradient(X, DY)
    y = softmax64(X)
    close(xpnn.softmax.backward(DY, y=y), want)
    close(xpnn.softmax.backward(DY, y), want)
    close(xpnn.softmax.backward(dy=DY, y=y), want)
    close(xpnn.softmax.backward(DY, x=X), want)
    close(xpnn.softmax.backward(DY.T, y=y.T, axis=0), want.T)
    close(xpnn.softmax.backward(DY.T, x=X.T, axis=0), want.T)


def test_backward_believes_its_cache(backend: str, close: Callable[..., None]) -> None:
    """What is given is used, not computed again."""
    close(xpnn.relu.backward(DY, y=X), np.where(X > 0, DY, 0))
    close(xpnn.tanh.backward(DY, y=np.full_like(X, 0.5)), DY * 0.75)
    m, s = np.zeros(5), np.full(5, 2.0)
    close(xpnn.logsumexp.backward(np.ones(5), X, m=m, s=s), np.exp(X) / 2)


def test_backward_of_everything(backend: str, case: Any, close: Callable[..., None]) -> None:
    """backward(dy, inputs) alone equals the pullback, for every kernel."""
    arrays = case.arrays()
    y, pullback = case.kernel.vjp(*case.given(arrays), **case.options)
    dy = case.cotangent(y)
    d = case.kernel.declaration
    got = case.kernel.backward(dy, **arrays, **case.options)
    want = pullback(dy)
    if len(d.inputs) == 1:
        got, want = (got,), (want,)
    assert len(got) == len(want) == len(arrays)
    for (name, a), g, w in zip(arrays.items(), got, want, strict=True):
        assert (g is None) is (a.dtype.kind == "i" or (case.name, name) in NOT_DIFFERENTIATED), name
        if g is not None:
            assert g.shape == a.shape
            assert np.abs(w).max() > 0
            close(g, w)


def test_value_and_grad(backend: str, close: Callable[..., None]) -> None:
    want, dx = loss64(X, TARGET)
    for _ in range(2):  # the second time takes the short way
        loss, gradient = xpnn.cross_entropy.value_and_grad(X, TARGET)
        assert np.shape(loss) == ()
        close(loss, want)
        close(gradient, dx)


def test_value_and_grad_wrt(backend: str, close: Callable[..., None]) -> None:
    p, q = softmax64(X[0]), softmax64(X[1])
    loss, g = xpnn.cross_entropy_probs.value_and_grad(p, q)
    close(loss, -(q * np.log(p)).sum())
    close(g, -q / p)
    close(xpnn.cross_entropy_probs.value_and_grad(p, q, wrt="target")[1], -np.log(p))
    (only,) = xpnn.cross_entropy_probs.value_and_grad(p, q, wrt=("probs",))[1]
    close(only, -q / p)
    dq, dp = xpnn.cross_entropy_probs.value_and_grad(p, q, wrt=("target", "probs"))[1]
    close(dq, -np.log(p))
    close(dp, -q / p)


def test_value_and_grad_of_one_number(backend: str, close: Callable[..., None]) -> None:
    y, g = xpnn.tanh.value_and_grad(np.array(0.3))
    close(y, np.tanh(0.3))
    close(g, 1 - np.tanh(0.3) ** 2)
    y, g = xpnn.logsumexp.value_and_grad(X[0])
    close(y, np.log(np.exp(X[0]).sum()))
    close(g, softmax64(X[0]))


# --- out= ---------------------------------------------------------------------------------------------------------------


def test_out_of_every_call(backend: str, case: Any) -> None:
    """Forward, vjp, pullback and backward write where they are told and return that very array."""
    arrays, k, options = case.arrays(), case.kernel, case.options
    want = k(*case.given(arrays), **options)
    out = np.full_like(np.asarray(want), 7.0)
    assert k(*case.given(arrays), **options, out=out) is out
    np.testing.assert_array_equal(out, want)
    out[...] = 7.0
    y, pullback = k.vjp(*case.given(arrays), **options, out=out)
    assert y is out
    np.testing.assert_array_equal(out, want)

    dy = case.cotangent(want)
    gradients = pullback(dy)
    single = len(k.declaration.inputs) == 1
    wants = (gradients,) if single else gradients
    for function in (lambda **kw: pullback(dy, **kw), lambda **kw: k.backward(dy, **arrays, **options, **kw)):
        outs = tuple(None if w is None else np.full_like(w, 7.0) for w in wants)
        got = function(out=outs[0] if single else outs)
        for g, o, w in zip((got,) if single else got, outs, wants, strict=True):
            assert g is o
            if w is not None:
                np.testing.assert_allclose(o, w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sigmoid", "tanh", "relu", "log"])
def test_out_over_the_input(backend: str, name: str) -> None:
    k, x = getattr(xpnn, name), np.abs(X) + 0.1
    want, dx = k(x), k.backward(DY, x=x)
    for _ in range(2):
        a = x.copy()
        assert k(a, out=a) is a
        np.testing.assert_array_equal(a, want)
    d = DY.copy()
    assert k.backward(d, x=x, out=d) is d
    np.testing.assert_allclose(d, dx, rtol=1e-12, atol=1e-14)
    a = x.copy()
    k.backward(DY, x=a, out=a)
    np.testing.assert_allclose(a, dx, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("axis", [0, -1])
def test_gradient_over_the_logits(backend: str, axis: int) -> None:
    x = X if axis else X.T.copy()
    want, dx = xpnn.cross_entropy.value_and_grad(x, TARGET, axis=axis)
    for _ in range(2):
        a = x.copy()
        loss, g = xpnn.cross_entropy.value_and_grad(a, TARGET, out=a, axis=axis)
        assert g is a
        np.testing.assert_array_equal(a, dx)
        assert loss == want


def test_out_over_one_of_two_inputs(backend: str, close: Callable[..., None]) -> None:
    p, q = softmax64(X), softmax64(-X)
    dy = RNG.normal(size=5)
    a, b = p.copy(), q.copy()
    got = xpnn.cross_entropy_probs.backward(dy, a, b, out=(a, b))
    assert got[0] is a
    assert got[1] is b
    close(a, -dy[:, None] * q / p)
    close(b, -dy[:, None] * np.log(p))
    a, b = p.copy(), q.copy()
    xpnn.cross_entropy_probs.backward(dy, a, b, out=(b, a))  # crosswise
    close(b, -dy[:, None] * q / p)
    close(a, -dy[:, None] * np.log(p))


def test_out_of_linear_over_its_input(backend: str, close: Callable[..., None]) -> None:
    w, b = RNG.normal(size=(7, 7)), RNG.normal(size=7)
    x = X.copy()
    want = np.tanh(X @ w.T + b)
    assert xpnn.linear(x, w, b, activation=xpnn.tanh, out=x) is x
    close(x, want)


def test_out_partly(backend: str) -> None:
    """None in a tuple means: make that one."""
    p, q = softmax64(X), softmax64(-X)
    want = xpnn.cross_entropy_probs.backward(DY[:, 0], p, q)
    out = np.zeros_like(p)
    got = xpnn.cross_entropy_probs.backward(DY[:, 0], p, q, out=(None, out))
    assert got[1] is out
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("view", [np.s_[::2, :7], np.s_[:5, ::2], np.s_[4::-1, :7], np.s_[:5, 6::-1]])
def test_strided_out(backend: str, view: Any) -> None:
    big = np.full((10, 14), 7.0)
    out = big[view]
    untouched = big.copy()
    untouched[view] = 0
    for k in (xpnn.softmax, xpnn.sigmoid):
        assert k(X, out=out) is out
        np.testing.assert_array_equal(out, k(X))
        copy = big.copy()
        copy[view] = 0
        np.testing.assert_array_equal(copy, untouched)


# --- what arguments may be ----------------------------------------------------------------------------------------------


def test_inputs_are_never_changed(backend: str, case: Any) -> None:
    """Read-only inputs work, and writable ones keep their bytes."""
    for writable in (True, False):
        arrays = case.arrays()
        for a in arrays.values():
            a.flags.writeable = writable
        before = [a.tobytes() for a in arrays.values()]
        y, pullback = case.kernel.vjp(*case.given(arrays), **case.options)
        dy = case.cotangent(y)
        dy.flags.writeable = writable
        bits = dy.tobytes()
        pullback(dy)
        case.kernel.backward(dy, **arrays, **case.options)
        assert [a.tobytes() for a in arrays.values()] == before
        assert dy.tobytes() == bits


def test_results_are_fresh(backend: str, case: Any) -> None:
    """No result shares memory with an input or with another result, and results are writable."""
    arrays = case.arrays()
    y, pullback = case.kernel.vjp(*case.given(arrays), **case.options)
    dy = case.cotangent(y)
    gradients = pullback(dy)
    gradients = (gradients,) if isinstance(gradients, np.ndarray) else gradients
    results = [g for g in (y, *gradients) if isinstance(g, np.ndarray)]
    for i, a in enumerate(results):
        assert a.flags.writeable
        for b in (*arrays.values(), dy, *results[i + 1 :]):
            assert not np.shares_memory(a, b)


def test_lists(backend: str, close: Callable[..., None]) -> None:
    close(xpnn.softmax(X.tolist()), softmax64(X), dtype=np.float64)
    close(xpnn.cross_entropy(X.tolist(), TARGET.tolist()), loss64(X, TARGET)[0])
    close(xpnn.linear([1.0, 2.0], [[3.0, 4.0]], [5.0]), [16.0])
    close(xpnn.relu((-1, 2)), [0.0, 2.0])


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "uint64", "bool"])
def test_integers_compute_in_float64(backend: str, close: Callable[..., None], dtype: str) -> None:
    x = np.array([[0, 1, 1], [1, 0, 0]], dtype)
    close(xpnn.softmax(x), softmax64(x.astype(float)), dtype=np.float64)
    close(xpnn.tanh(x), np.tanh(x.astype(float)), dtype=np.float64)
    assert xpnn.softmax.vjp(x)[1](np.ones((2, 3))) is None
    assert xpnn.softmax.backward(np.ones((2, 3)), x=x) is None


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64", ">i4"])
def test_any_integer_target(backend: str, dtype: str) -> None:
    want = xpnn.cross_entropy.value_and_grad(X, TARGET)
    got = xpnn.cross_entropy.value_and_grad(X, TARGET.astype(dtype))
    assert got[0] == want[0]
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(backend: str, case: Any, dtype: Any) -> None:
    arrays = case.arrays(dtype=dtype)
    y, pullback = case.kernel.vjp(*case.given(arrays), **case.options)
    assert np.asarray(y).dtype == dtype
    gradients = pullback(case.cotangent(y))
    for g in (gradients,) if isinstance(gradients, np.ndarray) else gradients:
        assert g is None or g.dtype == dtype


def test_mixed_precision(backend: str, close: Callable[..., None]) -> None:
    """Computed in the wider dtype; gradients in each input's own."""
    x, w = X.astype(np.float32), RNG.normal(size=(4, 7))
    y, pullback = xpnn.linear.vjp(x, w)
    close(y, x.astype(float) @ w.T, dtype=np.float64)
    dy = RNG.normal(size=(5, 4))
    dx, dw = pullback(dy)
    close(dx, dy @ w, dtype=np.float32)
    close(dw, dy.T @ x.astype(float), dtype=np.float64)
