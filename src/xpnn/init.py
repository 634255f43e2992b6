"""Weights to start from: Xavier's and Kaiming's, which keep activations and gradients as large in every layer.

The formulas, names and defaults are those of `torch.nn.init` in PyTorch 2.13. Weights are (n_out, n_in), as `xpnn.linear` has
them, or (n_out, n_in, ...) with a receptive field behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import array_api_compat
import numpy as np

from xpnn.backends.arrays import accept, library, namespace, numpy_dtype, wrong
from xpnn.backends.bind import option_value

Shape = tuple[int, ...]

_GAINS = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "sigmoid"), 1.0),
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 3 / 4,
}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor by which an activation makes up for the variance it takes.

    Parameters
    ----------
    nonlinearity
        "linear" (or "conv1d", "conv2d", "conv3d"), "sigmoid", "tanh", "relu", "selu" or "leaky_relu".
    param
        The negative slope of "leaky_relu"; 0.01 by default.

    Raises
    ------
    TypeError, ValueError
        For another nonlinearity, and a slope that is not a finite number.

    Examples
    --------
    >>> import xpnn.init
    >>> xpnn.init.calculate_gain("relu") ** 2
    2.0000000000000004
    """
    return _gain("calculate_gain", nonlinearity, "param", 0.01 if param is None else param)


def xavier_uniform(
    shape: Sequence[int], *, gain: float = 1.0, rng: Any = None, dtype: str = "float32", like: Any = None
) -> Any:
    """Weights uniform in (−a, a), a = gain · √(6 / (fan_in + fan_out)): of variance 2 gain² / (fan_in + fan_out).

    A layer's outputs have fan_in terms, and the gradients of its inputs fan_out: this is between what would keep the one and
    the other as large as they come in (Glorot and Bengio, 2010).

    Parameters
    ----------
    shape
        (n_out, n_in), or (n_out, n_in, ...): both fans are then multiplied by the size of the rest.
    gain
        As `calculate_gain` gives it for the activation behind; finite, not negative.
    rng
        A `numpy.random.Generator`, an integer as a seed, or None for a seed of the system's.
    dtype
        The name of the weights' floating dtype.
    like
        An array in whose library, and on whose device, the weights are made; NumPy's by default.

    Returns
    -------
    array

    Raises
    ------
    TypeError, ValueError
        For an argument that is not as above. Nothing is drawn from the generator then.

    Examples
    --------
    >>> import xpnn.init
    >>> weight = xpnn.init.xavier_uniform((2, 4), rng=0)
    >>> weight.shape, bool(abs(weight).max() < 1)
    ((2, 4), True)
    """
    what, sizes = "xavier_uniform", _sizes("xavier_uniform", shape)
    return _uniform(what, sizes, _xavier(what, sizes, gain), rng, dtype, like)


def xavier_normal(shape: Sequence[int], *, gain: float = 1.0, rng: Any = None, dtype: str = "float32", like: Any = None) -> Any:
    """Normally distributed weights of variance 2 gain² / (fan_in + fan_out); else as `xavier_uniform`.

    Examples
    --------
    >>> import xpnn.init
    >>> xpnn.init.xavier_normal((2, 4), rng=0).dtype
    dtype('float32')
    """
    what, sizes = "xavier_normal", _sizes("xavier_normal", shape)
    return _normal(what, sizes, _xavier(what, sizes, gain), rng, dtype, like)


def kaiming_uniform(
    shape: Sequence[int],
    *,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    rng: Any = None,
    dtype: str = "float32",
    like: Any = None,
) -> Any:
    """Weights uniform in (−b, b), b = gain · √(3 / fan): of variance gain² / fan, which is 2 / fan for ReLU.

    Half of what goes through a ReLU is lost, and with gain = √2 the rest is as large as before (He et al., 2015).

    Parameters
    ----------
    shape
        (n_out, n_in), or (n_out, n_in, ...).
    a
        The negative slope, where the nonlinearity is "leaky_relu"; 0 is ReLU.
    mode
        "fan_in" keeps activations as large in every layer, "fan_out" gradients.
    nonlinearity
        As `calculate_gain` takes it.
    rng, dtype, like
        As in `xavier_uniform`.

    Returns
    -------
    array

    Raises
    ------
    TypeError, ValueError
        For an argument that is not as above. Nothing is drawn from the generator then.

    Examples
    --------
    >>> import xpnn.init
    >>> bool(abs(xpnn.init.kaiming_uniform((2, 6), rng=0)).max() < 1)
    True
    """
    what, sizes = "kaiming_uniform", _sizes("kaiming_uniform", shape)
    return _uniform(what, sizes, _kaiming(what, sizes, a, mode, nonlinearity), rng, dtype, like)


def kaiming_normal(
    shape: Sequence[int],
    *,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    rng: Any = None,
    dtype: str = "float32",
    like: Any = None,
) -> Any:
    """Normally distributed weights of variance gain² / fan; else as `kaiming_uniform`.

    Examples
    --------
    >>> import xpnn.init
    >>> xpnn.init.kaiming_normal((2, 6), rng=0, dtype="float64").shape
    (2, 6)
    """
    what, sizes = "kaiming_normal", _sizes("kaiming_normal", shape)
    return _normal(what, sizes, _kaiming(what, sizes, a, mode, nonlinearity), rng, dtype, like)


def _sizes(what: str, shape: Any) -> Shape:
    """The weights' shape, of two dimensions or more."""
    expected = "at least two dimensions: (n_out, n_in)"
    if not isinstance(shape, Sequence) or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in shape):
        raise TypeError(wrong(what, "shape", repr(shape), f"a tuple of integers of {expected}"))
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(wrong(what, "shape", tuple(shape), f"{expected}, none negative"))
    return tuple(map(int, shape))


def _fans(sizes: Shape) -> tuple[int, int]:
    """How many terms an output has, and how many outputs an input is a term of."""
    field = math.prod(sizes[2:])
    return sizes[1] * field, sizes[0] * field


def _finite(what: str, name: str, value: Any) -> float:
    number: float = option_value(what, name, value, 1.0)
    if not math.isfinite(number):
        raise ValueError(wrong(what, name, number, "a finite number"))
    return number


def _gain(what: str, nonlinearity: Any, name: str, slope: Any) -> float:
    """The gain of an activation; `name` is what the caller calls the slope of leaky_relu."""
    negative = _finite(what, name, slope)
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + negative * negative))
    if not isinstance(nonlinearity, str) or nonlinearity not in _GAINS:
        known = ", ".join(map(repr, [*_GAINS, "leaky_relu"]))
        raise ValueError(wrong(what, "nonlinearity", repr(nonlinearity), f"one of {known}"))
    return _GAINS[nonlinearity]


def _xavier(what: str, sizes: Shape, gain: Any) -> float:
    """The standard deviation of Xavier's weights."""
    factor = _finite(what, "gain", gain)
    if factor < 0:
        raise ValueError(wrong(what, "gain", factor, "gain >= 0"))
    return factor * math.sqrt(2 / max(1, sum(_fans(sizes))))


def _kaiming(what: str, sizes: Shape, a: Any, mode: Any, nonlinearity: Any) -> float:
    """The standard deviation of Kaiming's weights."""
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(wrong(what, "mode", repr(mode), "'fan_in' or 'fan_out'"))
    fan_in, fan_out = _fans(sizes)
    return _gain(what, nonlinearity, "a", a) / math.sqrt(max(1, fan_in if mode == "fan_in" else fan_out))


def _uniform(what: str, sizes: Shape, deviation: float, rng: Any, dtype: Any, like: Any) -> Any:
    limit = math.sqrt(3) * deviation  # the uniform distribution on (−limit, limit) has variance limit² / 3
    return _made(what, lambda generator: generator.uniform(-limit, limit, sizes), rng, dtype, like)


def _normal(what: str, sizes: Shape, deviation: float, rng: Any, dtype: Any, like: Any) -> Any:
    return _made(what, lambda generator: generator.normal(0.0, deviation, sizes), rng, dtype, like)


def _made(what: str, draw: Callable[[np.random.Generator], Any], rng: Any, dtype: Any, like: Any) -> Any:
    """Drawn numbers, the same for every library and dtype up to rounding, in the library of `like`."""
    if not isinstance(rng, np.random.Generator | int | np.integer | None) or isinstance(rng, bool):
        raise TypeError(wrong(what, "rng", type(rng).__name__, "a numpy.random.Generator, an integer or None"))
    if isinstance(rng, int | np.integer) and rng < 0:
        raise ValueError(wrong(what, "rng", rng, "a seed that is not negative"))
    name = str(dtype) if isinstance(dtype, str | np.dtype) else ""
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(wrong(what, "dtype", repr(dtype), "'float16', 'bfloat16', 'float32' or 'float64'"))
    model = np.empty(0) if like is None else accept(what, "like", like, None)
    xp = namespace(model)
    if xp is np:
        return draw(np.random.default_rng(rng)).astype(numpy_dtype(name))
    if not hasattr(xp, name):
        raise ValueError(wrong(what, "dtype", repr(dtype), f"one that {library(model)} has"))
    values = draw(np.random.default_rng(rng))
    return xp.asarray(values, dtype=getattr(xp, name), device=array_api_compat.device(model))


__all__ = ["calculate_gain", "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"]
