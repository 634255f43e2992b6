"""Calls that look harmless and once gave wrong numbers or raised the wrong thing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn

RNG = np.random.default_rng(12)
X = RNG.normal(size=(2, 4))


@pytest.mark.parametrize("activation", [None, xpnn.tanh])
def test_linear_gradient_over_its_input(activation: Any, close: Callable[..., None], backend: str) -> None:
    """dx written over x must not spoil dW, which is computed from x."""
    x, weight, dy = RNG.normal(size=(5, 4)), RNG.normal(size=(4, 4)), RNG.normal(size=(5, 4))
    expected = xpnn.linear.vjp(x, weight, activation=activation)[1](dy)
    own = x.copy()
    _, pullback = xpnn.linear.vjp(own, weight, activation=activation)
    dx, dw = pullback(dy, out=(own, None))
    assert dx is own
    close(dx, expected[0])
    close(dw, expected[1])


def test_rows_that_only_an_option_brings(backend: str, close: Callable[..., None]) -> None:
    """Whether rows matter is a question of the call, not of the defaults."""

    @xpnn.kernel
    def k(xp, x, *, norm=False):
        return x / xp.sum(x, axis=-1, keepdims=True) if norm else x * 1.0

    @k.backward
    def k_backward(xp, dy, x, *, norm=False):
        return dy

    close(k(X), X)
    close(k(X, norm=True), X / X.sum(-1, keepdims=True))
    close(k(np.asfortranarray(X), norm=True), X / X.sum(-1, keepdims=True))


def test_rows_that_only_an_input_or_backward_brings(backend: str, close: Callable[..., None]) -> None:
    @xpnn.kernel
    def k(xp, x, w=None):
        return x * 1.0 if w is None else x * xp.sum(w, axis=-1, keepdims=True)

    @k.backward
    def k_backward(xp, dy, x, w):
        return dy - xp.sum(dy, axis=-1, keepdims=True), None

    close(k(X, X), X * X.sum(-1, keepdims=True))
    close(k.backward(X, X)[0], X - X.sum(-1, keepdims=True))


def test_vjp_must_not_write_over_what_its_pullback_reads(backend: str) -> None:
    p = np.array([2.0, 4.0])
    with pytest.raises(ValueError, match="out: got the memory of x"):
        xpnn.log.vjp(p, out=p)
    assert p.tolist() == [2.0, 4.0]
    y, pullback = xpnn.tanh.vjp(p, out=p)  # reads its output alone
    assert y is p
    assert pullback(np.ones(2)).any()


def test_a_backward_declared_again(close: Callable[..., None]) -> None:
    @xpnn.kernel
    def k(xp, x):
        return x * x

    @k.backward
    def first(xp, dy, x):
        return dy * x

    close(k.backward(X, X), X * X)

    @k.backward
    def second(xp, dy, x):
        return 2 * dy * x

    close(k.backward(X, X), 2 * X * X)


def test_whole_numbers_do_not_overflow(backend: str, close: Callable[..., None]) -> None:
    @xpnn.kernel
    def k(xp, x, *, n=1):
        return x + n * n

    close(k(X, n=2**32), X + 2.0**64)

    @xpnn.kernel
    def squares(xp, x):
        return x + xp.arange(x.shape[-1]) * xp.arange(x.shape[-1])

    for dtype in ("f4", "f8"):
        close(squares(X.astype(dtype)), X.astype(dtype) + np.arange(4.0, dtype=dtype) ** 2)
    with pytest.raises(ValueError, match=r"ignore_index.*64 bits"):
        xpnn.cross_entropy(X, np.array([0, 1]), ignore_index=2**70)


def test_checks_are_never_skipped() -> None:
    def check(kinds: Any, shapes: Any, options: Any) -> None:
        if shapes["x"][-1] % 2:
            raise ValueError("odd")

    @xpnn.kernel(check=check)
    def k(xp, x):
        return x * 2.0

    k(X)
    k(X)
    with pytest.raises(ValueError, match="odd"):
        k(np.ones((2, 3)))


NAMES = ["size", "rows", "columns", "shape", "entry", "limit", "outside", "dtype", "empty", "ndarray", "a0", "r0", "out_"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_will_do(name: str, close: Callable[..., None]) -> None:
    """For an input and for an output, at the first call and at the next."""
    scope: dict[str, Any] = {}
    exec(f"def k(xp, {name}): return {name} * 2.0\ndef m(xp, x, *, beta=1.0): return x * beta", scope)
    k, m = xpnn.kernel(scope["k"]), xpnn.kernel(outputs=(name,))(scope["m"])
    for _ in range(3):
        close(k(X), X * 2)
        close(m(X), X)
        close(m(X, beta=3.0), X * 3)


def test_operators_outside_the_subset_fall_back(close: Callable[..., None]) -> None:
    k = xpnn.kernel(lambda xp, x: 2**x)
    close(k(X), 2**X)
    assert "power" in k.explain(X)


def test_scalar_gradients_keep_their_shape(backend: str, close: Callable[..., None]) -> None:
    @xpnn.kernel
    def k(xp, x, c: xpnn.Scalar):
        return x * c

    @k.backward
    def k_backward(xp, dy, x, c):
        return dy * c, xp.sum(dy * x, axis=None)

    for c in (np.array(2.0), np.array([2.0])):
        dx, dc = k.vjp(X, c)[1](X)
        close(dx, X * 2)
        close(dc, np.full(c.shape, np.sum(X * X)))


def test_subclasses_are_numpy_arrays(close: Callable[..., None]) -> None:
    class Sub(np.ndarray):
        pass

    assert xpnn.softmax.explain(X.view(Sub)) == "numba"
    close(xpnn.softmax(X.view(Sub)), xpnn.softmax(X))
    close(xpnn.cross_entropy(X.view(Sub), np.array([0, 1])), xpnn.cross_entropy(X, np.array([0, 1])))


def test_activations_with_more_than_one_result_are_refused() -> None:
    two = xpnn.kernel(outputs=("y", "z"))(lambda xp, x: (x, x * 2.0))
    with pytest.raises(TypeError, match="linear: activation"):
        xpnn.linear(X, np.ones((3, 4)), activation=two)


def test_results_are_floats_on_every_backend(backend: str) -> None:
    k = xpnn.kernel(lambda xp, x: xp.where(x > 0, 1, 0))
    assert k(X).dtype == np.float64
    assert k(X.astype("f4")).dtype == np.float32
