"""Weights to start from: Xavier's and Kaiming's, which keep activations and gradients as large in every layer.

The formulas, names and defaults are those of `torch.nn.init` in PyTorch 2.13. Weights are (n_out, n_in), as `xpnn.linear` has
them, or (n_out, n_in, ...) with a receptive field behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from xpnn.backends.arrays import namespace, numpy_dtype, wrong

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
    ValueError
        For another nonlinearity.

    Examples
    --------
    >>> import xpnn.init
    >>> xpnn.init.calculate_gain("relu") ** 2
    2.0000000000000004
    """
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + (0.01 if param is None else param) ** 2))
    if nonlinearity not in _GAINS:
        known = ", ".join(map(repr, [*_GAINS, "leaky_relu"]))
        raise ValueError(wrong("calculate_gain", "nonlinearity", repr(nonlinearity), f"one of {known}"))
    return _GAINS[nonlinearity]


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
        As `calculate_gain` gives it for the activation behind.
    rng
        A `numpy.random.Generator`, a seed, or None for a seed of the system's.
    dtype
        The name of the weights' floating dtype.
    like
        An array in whose library, and on whose device, the weights are made; NumPy's by default.

    Returns
    -------
    array

    Raises
    ------
    ValueError
        For a shape of fewer than two dimensions.

    Examples
    --------
    >>> import xpnn.init
    >>> weight = xpnn.init.xavier_uniform((2, 4), rng=0)
    >>> weight.shape, bool(abs(weight).max() < 1)
    ((2, 4), True)
    """
    fan_in, fan_out = _fans("xavier_uniform", shape)
    return _uniform(gain * math.sqrt(2 / max(1, fan_in + fan_out)), shape, rng, dtype, like)


def xavier_normal(shape: Sequence[int], *, gain: float = 1.0, rng: Any = None, dtype: str = "float32", like: Any = None) -> Any:
    """Normally distributed weights of variance 2 gain² / (fan_in + fan_out); else as `xavier_uniform`.

    Examples
    --------
    >>> import xpnn.init
    >>> xpnn.init.xavier_normal((2, 4), rng=0).dtype
    dtype('float32')
    """
    fan_in, fan_out = _fans("xavier_normal", shape)
    return _normal(gain * math.sqrt(2 / max(1, fan_in + fan_out)), shape, rng, dtype, like)


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
    ValueError
        For a shape of fewer than two dimensions, another mode or nonlinearity.

    Examples
    --------
    >>> import xpnn.init
    >>> bool(abs(xpnn.init.kaiming_uniform((2, 6), rng=0)).max() < 1)
    True
    """
    return _uniform(_kaiming("kaiming_uniform", shape, a, mode, nonlinearity), shape, rng, dtype, like)


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
    return _normal(_kaiming("kaiming_normal", shape, a, mode, nonlinearity), shape, rng, dtype, like)


def _kaiming(name: str, shape: Sequence[int], a: float, mode: str, nonlinearity: str) -> float:
    """The standard deviation of Kaiming's weights."""
    fan_in, fan_out = _fans(name, shape)
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(wrong(name, "mode", repr(mode), "'fan_in' or 'fan_out'"))
    return calculate_gain(nonlinearity, a) / math.sqrt(max(1, fan_in if mode == "fan_in" else fan_out))


def _fans(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """How many terms an output has, and how many outputs an input is a term of."""
    if len(shape) < 2:
        raise ValueError(wrong(name, "shape", tuple(shape), "at least two dimensions: (n_out, n_in)"))
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def _uniform(deviation: float, shape: Sequence[int], rng: Any, dtype: str, like: Any) -> Any:
    limit = math.sqrt(3) * deviation  # the uniform distribution on (−limit, limit) has variance limit² / 3
    return _made(np.random.default_rng(rng).uniform(-limit, limit, tuple(shape)), dtype, like)


def _normal(deviation: float, shape: Sequence[int], rng: Any, dtype: str, like: Any) -> Any:
    return _made(np.random.default_rng(rng).normal(0.0, deviation, tuple(shape)), dtype, like)


def _made(values: np.ndarray[Any, Any], dtype: str, like: Any) -> Any:
    """Drawn numbers, the same for every library and dtype up to rounding, in the library of `like`."""
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(wrong("init", "dtype", repr(dtype), "'float16', 'bfloat16', 'float32' or 'float64'"))
    if like is None or isinstance(like, np.ndarray):
        return values.astype(numpy_dtype(dtype))
    xp = namespace(like)
    return xp.asarray(values, dtype=getattr(xp, dtype), device=array_api_compat.device(like))


__all__ = ["calculate_gain", "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"]
