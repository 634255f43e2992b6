"""The lecture notes this library grew from, line by line: deep learning's forward and backward propagation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn

RNG = np.random.default_rng(8)
m, n0, n2 = 6, 4, 3  # examples, inputs, outputs
A, W, b = RNG.normal(size=(m, n0)), RNG.normal(size=(n2, n0)), RNG.normal(size=n2)
ACTIVATIONS = {
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    "tanh": (lambda z: (np.exp(z) - np.exp(-z)) / (np.exp(z) + np.exp(-z)), lambda z: 1 - np.tanh(z) ** 2),
    "relu": (lambda z: np.maximum(0, z), lambda z: 1.0 * (z > 0)),
}


def distribution(*shape: int) -> np.ndarray:
    p = RNG.uniform(0.1, 1, shape)
    return p / p.sum(-1, keepdims=True)


def slopes(f: Callable[[np.ndarray], Any], x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """∂f/∂x by central differences, f's shape then x's."""
    columns = []
    for i in range(x.size):
        e = np.zeros(x.size)
        e[i] = h
        e = e.reshape(x.shape)
        columns.append((np.asarray(f(x + e)) - np.asarray(f(x - e))) / (2 * h))
    return np.moveaxis(np.array(columns).reshape(*x.shape, *np.shape(columns[0])), range(x.ndim), range(-x.ndim, 0))


# --- the linear layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
def test_one_example(backend: str, name: str | None, close: Callable[..., None]) -> None:
    """z = W a + b, a' = g(z); dW = dz ⊗ a, db = dz, da = Wᵀ dz."""
    a, da_next = A[0], RNG.normal(size=n2)
    g, slope = ACTIVATIONS[name] if name else (lambda z: z, np.ones_like)
    z = W @ a + b
    y, pullback = xpnn.linear.vjp(a, W, b, activation=name and getattr(xpnn, name))
    assert y.shape == (n2,)
    close(y, g(z))
    dz = da_next * slope(z)
    da, dW, db = pullback(da_next)
    close(dW, np.outer(dz, a))
    close(db, dz)
    close(da, W.T @ dz)


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
def test_batch(backend: str, name: str | None, close: Callable[..., None]) -> None:
    """Z = A Wᵀ + b; dZ = dA ⊙ g′(Z), dW = dZᵀ A, db = Σ dZ, dA = dZ W."""
    dA_next = RNG.normal(size=(m, n2))
    g, slope = ACTIVATIONS[name] if name else (lambda z: z, np.ones_like)
    Z = A @ W.T + b
    y, pullback = xpnn.linear.vjp(A, W, b, activation=name and getattr(xpnn, name))
    close(y, g(Z))
    dZ = dA_next * slope(Z)
    dA, dW, db = pullback(dA_next)
    assert (dA.shape, dW.shape, db.shape) == ((m, n0), (n2, n0), (n2,))
    close(dW, dZ.T @ A)
    close(db, dZ.sum(0))
    close(dA, dZ @ W)


def test_a_batch_is_its_examples(backend: str, close: Callable[..., None]) -> None:
    """Rows of dA are the examples' own; dW and db are their sums."""
    dy = RNG.normal(size=(m, n2))
    dA, dW, db = xpnn.linear.vjp(A, W, b, activation=xpnn.tanh)[1](dy)
    parts = [xpnn.linear.vjp(A[i], W, b, activation=xpnn.tanh)[1](dy[i]) for i in range(m)]
    close(dA, np.array([p[0] for p in parts]))
    close(dW, sum(p[1] for p in parts))
    close(db, sum(p[2] for p in parts))


def test_fused_activation_is_the_two_steps(backend: str, close: Callable[..., None]) -> None:
    dy = RNG.normal(size=(m, n2))
    z, through_linear = xpnn.linear.vjp(A, W, b)
    y, through_g = xpnn.sigmoid.vjp(z)
    fused, pullback = xpnn.linear.vjp(A, W, b, activation=xpnn.sigmoid)
    close(fused, y)
    for got, want in zip(pullback(dy), through_linear(through_g(dy)), strict=True):
        close(got, want)


def test_layers_with_their_caches(backend: str) -> None:
    """An L-layer pass forward and backward, against central differences of the loss."""
    widths = [n0, 5, 4, 3]
    layers = [(RNG.normal(size=(o, i)), RNG.normal(size=o)) for i, o in itertools.pairwise(widths)]
    target = RNG.integers(0, 3, m)

    def loss(x: np.ndarray, last: np.ndarray) -> Any:
        a = x
        for w, c in layers[:-1]:
            a = xpnn.linear(a, w, c, activation=xpnn.tanh)
        return xpnn.cross_entropy(xpnn.linear(a, last, layers[-1][1]), target)

    a, caches = A, []
    for number, (w, c) in enumerate(layers):
        a, pullback = xpnn.linear.vjp(a, w, c, activation=xpnn.tanh if number < len(layers) - 1 else None)
        caches.append(pullback)
    _, d = xpnn.cross_entropy.value_and_grad(a, target)
    gradients = []
    for pullback in reversed(caches):
        d, dw, dc = pullback(d)
        gradients.append((dw, dc))
    np.testing.assert_allclose(d, slopes(lambda x: loss(x, layers[-1][0]), A), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(gradients[0][0], slopes(lambda w: loss(A, w), layers[-1][0]), rtol=1e-6, atol=1e-9)


# --- softmax ----------------------------------------------------------------------------------------------------------------


def test_softmax_and_its_jacobian(backend: str, close: Callable[..., None]) -> None:
    """yᵢ = eᶻⁱ / Σ eᶻʲ; ∂yᵢ/∂zⱼ = yᵢ(1 − yᵢ) for i = j, −yᵢ yⱼ for i ≠ j."""
    z = RNG.normal(size=5)
    y = np.exp(z) / np.exp(z).sum()
    close(xpnn.softmax(z), y)
    J = xpnn.softmax_jacobian(z)
    for i in range(5):
        for j in range(5):
            assert J[i, j] == pytest.approx(y[i] * (1 - y[i]) if i == j else -y[i] * y[j], rel=1e-13)
    np.testing.assert_allclose(J, slopes(xpnn.softmax, z), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("shape", "axis"), [((5,), -1), ((3, 5), -1), ((3, 5), 0), ((2, 3, 4), 1)])
def test_jacobian_times_vector(backend: str, shape: tuple[int, ...], axis: int, close: Callable[..., None]) -> None:
    z, dy = RNG.normal(size=shape), RNG.normal(size=shape)
    J = xpnn.softmax_jacobian(z, axis=axis)
    rows = np.moveaxis(dy, axis, -1)
    assert J.shape == (*rows.shape, shape[axis])
    want = np.moveaxis(np.einsum("...ij,...i->...j", J, rows), -1, axis)
    close(xpnn.softmax.vjp(z, axis=axis)[1](dy), want)


# --- cross-entropy ------------------------------------------------------------------------------------------------------------


def test_cross_entropy_of_probabilities(backend: str, close: Callable[..., None]) -> None:
    """H(ŷ, y) = −ŷᵀ log y; dH/dy = −ŷ / y."""
    y, y_hat = distribution(5), distribution(5)
    h, pullback = xpnn.cross_entropy_probs.vjp(y, y_hat)
    close(h, -(y_hat @ np.log(y)))
    close(pullback(1.0)[0], -y_hat / y)
    y, y_hat = distribution(4, 5), distribution(4, 5)
    close(xpnn.cross_entropy_probs(y, y_hat), -(y_hat * np.log(y)).sum(-1))


def test_chain_of_logarithm_and_product(backend: str, close: Callable[..., None]) -> None:
    """x → log x → yᵀ log x, whose derivative is diag(1/x)ᵀ y = (1/x) ⊙ y."""
    x, y = distribution(5), distribution(5)
    log_x, through_log = xpnn.log.vjp(x)
    product, through_product = xpnn.linear.vjp(log_x, y[None, :])
    d_log_x = through_product(np.ones(1))[0]
    close(d_log_x, y)
    dx = through_log(d_log_x)
    close(dx, np.diag(1 / x).T @ y)
    close(dx, y / x)
    close(product[0], -xpnn.cross_entropy_probs(x, y))
    close(-dx, xpnn.cross_entropy_probs.vjp(x, y)[1](1.0)[0])


@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_both_together(backend: str, scale: float, close: Callable[..., None]) -> None:
    """dH/dzⱼ = Σᵢ (dH/dyᵢ)(∂yᵢ/∂zⱼ) = yⱼ − ŷⱼ, in three ways: by the Jacobian, by two backwards, fused."""
    z, y_hat = RNG.normal(size=(m, 5)), distribution(m, 5)
    y = xpnn.softmax(z)
    dh = np.full(m, scale)
    dy = xpnn.cross_entropy_probs.backward(dh, y, y_hat)[0]
    by_hand = np.einsum("mi,mij->mj", dy, xpnn.softmax_jacobian(z))
    composed = xpnn.softmax.backward(dy, y=y)
    loss, pullback = xpnn.cross_entropy.vjp(z, y_hat, reduction="none")
    fused = pullback(dh)[0]
    close(loss, xpnn.cross_entropy_probs(y, y_hat))
    for gradient in (by_hand, composed, fused):
        close(gradient, scale * (y - y_hat))


def test_both_together_with_classes(backend: str, close: Callable[..., None]) -> None:
    """ŷ one-hot is a class number."""
    z, target = RNG.normal(size=(m, 5)), RNG.integers(0, 5, m)
    one_hot = np.eye(5)[target]
    loss, g = xpnn.cross_entropy.value_and_grad(z, target, reduction="sum")
    close(g, xpnn.softmax(z) - one_hot)
    other, same = xpnn.cross_entropy.value_and_grad(z, one_hot, reduction="sum")
    close(same, g)
    close(loss, other)


# --- the table of functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula_and_derivative(backend: str, name: str, close: Callable[..., None]) -> None:
    g, slope = ACTIVATIONS[name]
    x, dy = np.linspace(-6, 6, 101), RNG.normal(size=101)
    y, pullback = getattr(xpnn, name).vjp(x)
    close(y, g(x))
    close(pullback(dy), dy * slope(x))


def test_bounds_of_derivatives(backend: str) -> None:
    """At most 0.25 and 1, reached at 0; sigmoid maps into (0, 1), tanh into (−1, 1), zero-centred."""
    x = np.linspace(-30, 30, 60001)
    ones = np.ones_like(x)
    for name, bound in (("sigmoid", 0.25), ("tanh", 1.0)):
        y, pullback = getattr(xpnn, name).vjp(x)
        slope = pullback(ones)
        assert slope.max() == bound
        assert abs(x[slope.argmax()]) < 1e-12
        assert slope.min() >= 0
        assert (np.diff(y) >= 0).all()
    assert 0 < xpnn.sigmoid(x).min() < 1e-12
    np.testing.assert_allclose(xpnn.sigmoid(-x), 1 - xpnn.sigmoid(x), atol=1e-15)
    np.testing.assert_array_equal(xpnn.tanh(-x), -xpnn.tanh(x))


def test_ten_saturated_layers(backend: str) -> None:
    """The gradient vanishes: each layer multiplies by at most 0.25."""
    a, pullbacks = np.zeros(1), []
    for _ in range(10):
        a, pullback = xpnn.sigmoid.vjp(a)
        pullbacks.append(pullback)
    d = np.ones(1)
    for pullback in reversed(pullbacks):
        d = pullback(d)
    assert 0 < d[0] < 0.25**10 * 1.0001


def test_relu_slip_corrected(backend: str) -> None:
    """The notes print 1·(x > 0)·x; the slope of x ↦ x is 1, and 0 is taken at 0."""
    x, dy = np.array([-2.0, -0.0, 0.0, 1e-300, 0.5, 3.0]), np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    np.testing.assert_array_equal(xpnn.relu.vjp(x)[1](dy), [0, 0, 0, 4, 5, 6])
    np.testing.assert_array_equal(xpnn.relu.backward(dy, x=x), dy * (x > 0))
    assert (xpnn.relu.backward(dy, x=x) != dy * (x > 0) * x).any()
    assert "slip" in xpnn.relu.backward.__doc__
