"""Weights to start from: bounds, variances, fans, libraries; as PyTorch's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xpnn
from xpnn import init

ALL = [init.xavier_uniform, init.xavier_normal, init.kaiming_uniform, init.kaiming_normal]
UNIFORM = [init.xavier_uniform, init.kaiming_uniform]
SHAPES = [(200, 300), (300, 200), (40, 30, 5, 7)]


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    field = int(np.prod(shape[2:]))
    return shape[1] * field, shape[0] * field


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_mean_and_variance(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """Both as derived; uniform weights come near their bounds, which none crosses, and normal ones go beyond."""
    fan_in, fan_out = fans(shape)
    xavier = "xavier" in function.__name__
    for options, variance in (
        [({}, 2 / (fan_in + fan_out)), ({"gain": 3.0}, 18 / (fan_in + fan_out))]
        if xavier
        else [
            ({}, 2 / fan_in),
            ({"mode": "fan_out"}, 2 / fan_out),
            ({"a": 0.5}, 1.6 / fan_in),
            ({"nonlinearity": "tanh"}, 25 / 9 / fan_in),
        ]
    ):
        weight = function(shape, rng=1, dtype="float64", **options)
        assert weight.shape == shape
        assert np.var(weight) == pytest.approx(variance, rel=0.03)
        assert abs(np.mean(weight)) < 4 * math.sqrt(variance / weight.size)
        limit, farthest = math.sqrt(3 * variance), np.max(np.abs(weight))
        if function in UNIFORM:
            assert 0.99 * limit < farthest <= limit
        else:
            assert farthest > 2 * limit


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_as_large_as_pytorchs(load_library: Any, function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    torch = load_library("torch").xp
    kaiming = "kaiming" in function.__name__
    for options in [{"a": 0.3, "mode": "fan_out"}, {"nonlinearity": "relu"}] if kaiming else [{}, {"gain": 1.7}]:
        theirs = getattr(torch.nn.init, f"{function.__name__}_")(torch.empty(shape), **options)
        ours = function(shape, rng=2, **options)
        assert np.std(ours) == pytest.approx(float(theirs.std()), rel=0.03)


def test_gains_of_torch(load_library: Any) -> None:
    torch = load_library("torch").xp
    for name in ("linear", "conv1d", "conv2d", "conv3d", "sigmoid", "tanh", "relu", "selu", "leaky_relu"):
        assert init.calculate_gain(name) == pytest.approx(torch.nn.init.calculate_gain(name), rel=1e-15)
    for slope in (0.0, 0.2, -1.0, 3):
        want = torch.nn.init.calculate_gain("leaky_relu", slope)
        assert init.calculate_gain("leaky_relu", slope) == pytest.approx(want, rel=1e-15)


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_seeds_and_generators(function: Callable[..., Any]) -> None:
    """A seed gives the same weights each time; a generator goes on; none gives others each time."""
    np.testing.assert_array_equal(function((3, 4), rng=5), function((3, 4), rng=5))
    np.testing.assert_array_equal(function((3, 4), rng=5), function((3, 4), rng=np.random.default_rng(5)))
    rng = np.random.default_rng(5)
    assert (function((3, 4), rng=rng) != function((3, 4), rng=rng)).all()
    assert (function((3, 4), rng=5) != function((3, 4), rng=6)).all()
    assert (function((3, 4)) != function((3, 4))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_libraries(library: Any, function: Callable[..., Any], dtype: str) -> None:
    """The same numbers, in the library of an array."""
    like = library.array([1.0])
    weight = function((3, 4), rng=5, dtype=dtype, like=like)
    want = function((3, 4), rng=5, dtype=dtype)
    assert want.dtype == dtype
    assert library.numpy(weight).dtype == dtype
    np.testing.assert_array_equal(library.numpy(weight), want)
    assert xpnn.linear(library.array(np.ones((2, 4), dtype)), weight).shape == (2, 3)


def test_half_precision_and_numpy() -> None:
    wide = init.xavier_uniform((3, 4), rng=5, dtype="float64", like=np.ones(1))
    for dtype in ("float16", "bfloat16"):
        half = init.xavier_uniform((3, 4), rng=5, dtype=dtype)
        assert half.dtype.name == dtype
        np.testing.assert_array_equal(half, wide.astype(half.dtype))
    assert init.xavier_uniform([3, 4]).dtype == np.float32


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_nothing(function: Callable[..., Any]) -> None:
    for shape in ((0, 3), (3, 0), (0, 0), (2, 3, 0)):
        assert function(shape).shape == shape


NAN, INF = math.nan, math.inf
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"shape": (3,)}, ValueError, "shape: got (3,), expected at least two dimensions: (n_out, n_in), none negative"),
    ({"shape": ()}, ValueError, "shape: got (), expected at least two dimensions"),
    ({"shape": (2, -3)}, ValueError, "shape: got (2, -3), expected at least two dimensions: (n_out, n_in), none negative"),
    ({"shape": 3}, TypeError, "shape: got 3, expected a tuple of integers of at least two dimensions: (n_out, n_in)"),
    ({"shape": (2, 3.0)}, TypeError, "shape: got (2, 3.0), expected a tuple of integers"),
    ({"shape": (2, True)}, TypeError, "shape: got (2, True), expected a tuple of integers"),
    ({"shape": "ab"}, TypeError, "shape: got 'ab', expected a tuple of integers"),
    ({"rng": np.random.RandomState(0)}, TypeError, "rng: got RandomState, expected a numpy.random.Generator, an integer"),
    ({"rng": 1.5}, TypeError, "rng: got float, expected a numpy.random.Generator"),
    ({"rng": -1}, ValueError, "rng: got -1, expected a seed that is not negative"),
    ({"dtype": "int32"}, ValueError, "dtype: got 'int32', expected 'float16', 'bfloat16', 'float32' or 'float64'"),
    ({"dtype": np.dtype("int64")}, ValueError, "dtype: got dtype('int64'), expected 'float16'"),
    ({"dtype": ["float32"]}, ValueError, "dtype: got ['float32'], expected 'float16'"),
    ({"like": "numpy"}, TypeError, "like: got str, expected an array"),
]
BAD_GAINS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gain": NAN}, ValueError, "gain: got nan, expected a finite number"),
    ({"gain": INF}, ValueError, "gain: got inf, expected a finite number"),
    ({"gain": -1}, ValueError, "gain: got -1.0, expected gain >= 0"),
    ({"gain": "1"}, TypeError, "gain: got '1', expected a number"),
]
BAD_SLOPES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"a": NAN}, ValueError, "a: got nan, expected a finite number"),
    ({"a": -INF}, ValueError, "a: got -inf, expected a finite number"),
    ({"a": None}, TypeError, "a: got None, expected a number"),
    ({"mode": "fan"}, ValueError, "mode: got 'fan', expected 'fan_in' or 'fan_out'"),
    ({"nonlinearity": "gelu"}, ValueError, "nonlinearity: got 'gelu', expected one of 'linear', 'conv1d'"),
    ({"nonlinearity": ["relu"]}, ValueError, "nonlinearity: got ['relu'], expected one of 'linear'"),
]
REFUSED = [(f, *case) for f in ALL for case in (*BAD, *(BAD_GAINS if "xavier" in f.__name__ else BAD_SLOPES))]


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"), REFUSED, ids=[f"{f.__name__}-{next(iter(a))}" for f, a, _, _ in REFUSED]
)
def test_bad_arguments(function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """The function, the argument, what came and what was expected; the generator is where it was."""
    rng = np.random.default_rng(0)
    with pytest.raises(error, match=f"^{re.escape(f'{function.__name__}: {message}')}"):
        function(**{"shape": (2, 3), "rng": rng} | arguments)
    assert rng.random() == np.random.default_rng(0).random()


def test_bad_gains() -> None:
    with pytest.raises(ValueError, match=r"^calculate_gain: nonlinearity: got 'gelu', expected one of 'linear'"):
        init.calculate_gain("gelu")
    with pytest.raises(ValueError, match=r"^calculate_gain: param: got nan, expected a finite number"):
        init.calculate_gain("leaky_relu", NAN)
    assert init.calculate_gain("leaky_relu", 1e200) == 0


def test_a_dtype_that_a_library_lacks(load_library: Any) -> None:
    like = load_library("array_api_strict").array([1.0])
    with pytest.raises(ValueError, match=r"^xavier_normal: dtype: got 'float16', expected one that array_api_strict has"):
        init.xavier_normal((2, 3), dtype="float16", like=like)


def test_an_arrays_dtype_is_a_dtype() -> None:
    weight = np.ones(2, "float64")
    assert init.xavier_normal((2, 3), dtype=weight.dtype).dtype == weight.dtype
