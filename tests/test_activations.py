"""The element-wise activations: PyTorch's values, gradients and edges, their tails, and their place in a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest

import xpnn
from xpnn.curves import refusal

INF, NAN = np.inf, np.nan
RNG = np.random.default_rng(17)

ONE_INPUT = [n for n in xpnn.kernels.__all__ if isinstance(k := getattr(xpnn, n), xpnn.Kernel) and refusal(k) is None]
CALLS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ONE_INPUT),
    ("leaky_relu", {"negative_slope": -0.4}), ("leaky_relu", {"negative_slope": 1.5}),
    ("elu", {"alpha": 1.7}), ("elu", {"alpha": -0.6}), ("celu", {"alpha": 2.5}), ("celu", {"alpha": -300.0}),
    ("gelu", {"approximate": "tanh"}),
    ("softplus", {"beta": 0.3}), ("softplus", {"beta": -2.0}), ("softplus", {"threshold": 3.0}),
    ("hardtanh", {"min_val": -0.1, "max_val": 3.3}), ("hardtanh", {"min_val": 0.5, "max_val": 0.5}),
]  # fmt: skip
KINKS = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 3.3, -0.1, 20.0, np.nextafter(20.0, 30.0)]


def named(call: tuple[str, dict[str, Any]]) -> str:
    return "-".join([call[0], *(f"{n}={v}" for n, v in call[1].items())])


@pytest.mark.parametrize("call", CALLS, ids=named)
def test_of_torch(backend: str, load_library: Any, call: Any, close: Callable[..., None]) -> None:
    """Values and gradients, at the kinks too, and where exponentials overflow or vanish."""
    torch = load_library("torch").xp
    name, options = call
    x = np.concatenate([RNG.normal(size=60) * 4, KINKS, [1e-300, -1e-300, 36.0, -36.0, 700.0, -700.0, 1e5, -1e5]])
    dy = RNG.normal(size=x.size)
    theirs = torch.tensor(x, requires_grad=True)
    want = getattr(torch.nn.functional, name)(theirs, **options)
    want.backward(torch.tensor(dy))
    y, pullback = getattr(xpnn, name).vjp(x, **options)
    assert np.array_equal(np.isfinite(y), np.isfinite(want.detach().numpy()))
    finite = np.isfinite(y)
    np.testing.assert_allclose(y[finite], want.detach().numpy()[finite], rtol=1e-11, atol=1e-14)
    gradient = theirs.grad.numpy()
    lost = np.isnan(gradient)  # in PyTorch by infinity times zero
    relative = 1e-7 if name == "hardsigmoid" else 1e-11  # whose 1/6 is a float32 in PyTorch
    np.testing.assert_allclose(pullback(dy)[~lost], gradient[~lost], rtol=relative, atol=1e-14)


@pytest.mark.parametrize("call", CALLS, ids=named)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edges_of_torch(backend: str, load_library: Any, call: Any, dtype: Any) -> None:
    """NaN, infinities, signed zeros: values and gradients."""
    torch = load_library("torch").xp
    name, options = call
    x = np.array([NAN, INF, -INF, 0.0, -0.0], dtype)
    theirs = torch.tensor(x, requires_grad=True)
    want = getattr(torch.nn.functional, name)(theirs, **options)
    want.sum().backward()
    y, pullback = getattr(xpnn, name).vjp(x, **options)
    expected = want.detach().numpy().copy()
    if name == "gelu":  # PyTorch's loop for many elements gives NaN here, that for few does not
        expected[1] = INF
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    if name != "relu":  # which gives 0 where PyTorch keeps −0
        np.testing.assert_array_equal(np.signbit(y[3:]), np.signbit(expected[3:]))
    gradient = theirs.grad.numpy().copy()
    if name in ("elu", "selu", "celu", "hardswish"):  # PyTorch's loop for many elements gives NaN, that for few the cotangent
        gradient[0] = NAN
    np.testing.assert_allclose(pullback(np.ones_like(x)), gradient, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("call", [*((name, {}) for name in ONE_INPUT), ("gelu", {"approximate": "tanh"})], ids=named)
def test_large_numbers_saturate(backend: str, call: Any, dtype: Any) -> None:
    """No overflow on the way: finite in, finite out, and a gradient that is 0 or a slope."""
    name, options = call
    x = np.array([1e4, -1e4, 1e30, -1e30, np.finfo(dtype).max / 2, np.finfo(dtype).min / 2], dtype)
    y, pullback = getattr(xpnn, name).vjp(x, **options)
    dx = pullback(np.ones_like(x))
    assert np.isfinite(y).all()
    assert np.array_equal(dx[::2], np.repeat(dx[:1], 3))
    assert np.array_equal(dx[1::2], np.repeat(dx[1:2], 3))
    assert ((np.abs(dx) == 0) | (np.abs(dx) > 1e-3)).all()


# --- tails, where a formula taken as it is printed cancels ---

mp = mpmath.mp
TAILS: dict[str, Any] = {
    "sigmoid": lambda x: 1 / (1 + mp.exp(-x)),
    "silu": lambda x: x / (1 + mp.exp(-x)),
    "mish": lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
    "softplus": lambda x: mp.log1p(mp.exp(x)),
    "elu": lambda x: mp.expm1(x) if x < 0 else x,
    "gelu": lambda x: x * mp.ncdf(x),
}


@pytest.mark.parametrize("name", TAILS)
def test_tails(backend: str, name: str) -> None:
    """Value and derivative far left, close to 0 and far right, to a relative error, in float64."""
    x = np.array([-600.0, -37.0, -20.0, -9.0, -1e-12, 1e-12, 8.0, 15.0])
    if name == "gelu":
        x = np.array([-37.0, -20.0, -9.0, -4.0, -1e-12, 1e-12, 4.0, 9.0])
    y, pullback = getattr(xpnn, name).vjp(x)
    dx = pullback(np.ones_like(x))
    with mpmath.workdps(400):
        for at, value, slope in zip(x.tolist(), y.tolist(), dx.tolist(), strict=True):
            a = mpmath.mpf(at)
            relative = max(1, abs(at) ** 2 if name == "gelu" else 1) * 1e-14
            assert abs(value - TAILS[name](a)) <= relative * abs(TAILS[name](a)), at
            if name != "sigmoid" or at < 0:  # of sigmoid the output is cached, which is 1 far right
                truth = mpmath.diff(TAILS[name], a, h=mpmath.mpf("1e-100"))
                assert abs(slope - truth) <= relative * abs(truth), at


# --- arguments ---


def test_what_makes_no_sense_is_refused(backend: str) -> None:
    x = np.zeros(3)
    with pytest.raises(ValueError, match=r"hardtanh: min_val: got 2\.0, expected at most max_val, which is 1\.0"):
        xpnn.hardtanh(x, min_val=2.0)
    with pytest.raises(ValueError, match=r"celu: alpha: got 0\.0, expected a number other than 0"):
        xpnn.celu(x, alpha=0)
    for kernel, args in ((xpnn.gelu, (x,)), (xpnn.geglu, (x, x))):
        with pytest.raises(ValueError, match=f"{kernel.__name__}: approximate: got 'erf', expected 'none' or 'tanh'"):
            kernel(*args, approximate="erf")
        with pytest.raises(ValueError, match="approximate"):
            kernel.backward(x, *args, approximate="erf")


# --- gated ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "gate", "options"), [("swiglu", "silu", {}), ("geglu", "gelu", {}), ("geglu", "gelu", {"approximate": "tanh"})]
)
def test_halves_of_one_array(
    backend: str, name: str, gate: str, options: dict[str, Any], dtype: Any, close: Callable[..., None]
) -> None:
    """Views of an array are read where they lie, and give the product of the gate and the other half."""
    h, dy = RNG.normal(size=(5, 24)).astype(dtype), RNG.normal(size=(5, 12)).astype(dtype)
    kernel, own = getattr(xpnn, name), getattr(xpnn, gate)
    y, pullback = kernel.vjp(h[:, :12], h[:, 12:], **options)
    g, back = own.vjp(h[:, :12], **options)
    close(y, g * h[:, 12:], dtype=dtype)
    dgate, dup = pullback(dy)
    close(dgate, back(dy * h[:, 12:]), dtype=dtype)
    close(dup, dy * g, dtype=dtype)


def test_one_number_gates_many(backend: str) -> None:
    """Gradients of a broadcast input are summed up."""
    gate, up, dy = RNG.normal(size=(4, 1)), RNG.normal(size=(4, 6)), RNG.normal(size=(4, 6))
    _, pullback = xpnn.swiglu.vjp(gate, up)
    _, full = xpnn.swiglu.vjp(np.broadcast_to(gate, up.shape), up)
    np.testing.assert_allclose(pullback(dy)[0], full(dy)[0].sum(1, keepdims=True), rtol=1e-13)


# --- after a linear layer ---


@pytest.mark.parametrize("name", ONE_INPUT)
def test_activation_of_a_layer(backend: str, name: str, close: Callable[..., None]) -> None:
    """The same as the layer and the activation one after the other, forward and backward."""
    activation = getattr(xpnn, name)
    x, weight, bias = RNG.normal(size=(6, 5)) * 2, RNG.normal(size=(4, 5)), RNG.normal(size=4)
    dy = RNG.normal(size=(6, 4))
    y, pullback = xpnn.linear.vjp(x, weight, bias, activation=activation)
    z, first = xpnn.linear.vjp(x, weight, bias)
    a, second = activation.vjp(z)
    close(y, a)
    close(xpnn.linear(x, weight, bias, activation=activation), a)
    for got, want in zip(pullback(dy), first(second(dy)), strict=True):
        close(got, want)


@pytest.mark.parametrize("name", ["sigmoid", "gelu", "hardswish"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_activation_of_a_layer_in_half_precision(backend: str, name: str, dtype: str) -> None:
    """As near to float64 as the roundings of the product, the result and what is kept allow."""
    import ml_dtypes

    half = np.dtype(getattr(ml_dtypes, dtype, dtype))
    activation = getattr(xpnn, name)
    arrays = [a.astype(half) for a in (RNG.normal(size=(6, 5)), RNG.normal(size=(4, 5)), RNG.normal(size=4))]
    dy = RNG.normal(size=(6, 4)).astype(half)
    y, pullback = xpnn.linear.vjp(*arrays, activation=activation)
    wide, wide_pullback = xpnn.linear.vjp(*(a.astype(np.float64) for a in arrays), activation=activation)
    eps = float(ml_dtypes.finfo(half).eps)
    assert y.dtype == half
    np.testing.assert_allclose(y.astype(np.float64), wide, rtol=4 * eps, atol=8 * eps)
    for got, want in zip(pullback(dy), wide_pullback(dy.astype(np.float64)), strict=True):
        assert got.dtype == half
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=8 * eps, atol=16 * eps * np.abs(want).max())
