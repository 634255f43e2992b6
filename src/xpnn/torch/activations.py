"""`torch.nn.functional`'s activations, with its signatures; and the gates of two tensors, which it lacks."""

from __future__ import annotations

from typing import Any

import torch

import xpnn
from xpnn.torch.arrays import ArgumentError, check_tensor, dimension
from xpnn.torch.ops import Op

_OPS = {
    kernel.__name__: Op(kernel)
    for kernel in (
        xpnn.relu, xpnn.sigmoid, xpnn.tanh, xpnn.leaky_relu, xpnn.elu, xpnn.selu, xpnn.celu, xpnn.gelu, xpnn.silu, xpnn.mish,
        xpnn.softplus, xpnn.hardtanh, xpnn.hardsigmoid, xpnn.hardswish, xpnn.relu6, xpnn.swiglu, xpnn.geglu,
        xpnn.glu.kernel,
    )
}  # fmt: skip


def _elsewhere(name: str, inplace: bool) -> Op:
    """The operator, which never writes over its input."""
    if inplace:
        raise ArgumentError(f"{name}: inplace: got True, expected False")
    return _OPS[name]


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """max(0, x), as `torch.nn.functional.relu`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.relu(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    return _elsewhere("relu", inplace)((input,))


def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)), as `torch.nn.functional.sigmoid`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.sigmoid(torch.tensor([-1000.0, 0.0]))
    tensor([0.0000, 0.5000])
    """
    return _OPS["sigmoid"]((input,))


def tanh(input: torch.Tensor) -> torch.Tensor:
    """The hyperbolic tangent, as `torch.nn.functional.tanh`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.tanh(torch.tensor([0.0, 100.0]))
    tensor([0., 1.])
    """
    return _OPS["tanh"]((input,))


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """x above 0, `negative_slope` x below, as `torch.nn.functional.leaky_relu`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.leaky_relu(torch.tensor([-1.0, 2.0]))
    tensor([-0.0100,  2.0000])
    """
    return _elsewhere("leaky_relu", inplace)((input,), (negative_slope,))


def elu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """x above 0, α (exp(x) − 1) below, as `torch.nn.functional.elu`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.elu(torch.tensor([-1000.0, 2.0]))
    tensor([-1.,  2.])
    """
    return _elsewhere("elu", inplace)((input,), (alpha,))


def selu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """λ x above 0, λ α (exp(x) − 1) below, as `torch.nn.functional.selu`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.selu(torch.tensor([-1000.0, 1.0]))
    tensor([-1.7581,  1.0507])
    """
    return _elsewhere("selu", inplace)((input,))


def celu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """x above 0, α (exp(x / α) − 1) below, as `torch.nn.functional.celu`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.celu(torch.tensor([-1000.0, 2.0]))
    tensor([-1.,  2.])
    """
    return _elsewhere("celu", inplace)((input,), (alpha,))


def silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """x σ(x), as `torch.nn.functional.silu`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.silu(torch.tensor([-1000.0, 1.0]))
    tensor([0.0000, 0.7311])
    """
    return _elsewhere("silu", inplace)((input,))


def mish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """x tanh(log(1 + exp(x))), as `torch.nn.functional.mish`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.mish(torch.tensor([-1000.0, 1.0]))
    tensor([0.0000, 0.8651])
    """
    return _elsewhere("mish", inplace)((input,))


def hardtanh(input: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """x, cut off at two bounds, as `torch.nn.functional.hardtanh`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.hardtanh(torch.tensor([-3.0, 0.5]))
    tensor([-1.0000,  0.5000])
    """
    return _elsewhere("hardtanh", inplace)((input,), (min_val, max_val))


def hardsigmoid(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """min(max(0, x + 3), 6) / 6, as `torch.nn.functional.hardsigmoid`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.hardsigmoid(torch.tensor([-4.0, 0.0]))
    tensor([0.0000, 0.5000])
    """
    return _elsewhere("hardsigmoid", inplace)((input,))


def hardswish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """x min(max(0, x + 3), 6) / 6, as `torch.nn.functional.hardswish`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.hardswish(torch.tensor([-1.5, 4.0]))
    tensor([-0.3750,  4.0000])
    """
    return _elsewhere("hardswish", inplace)((input,))


def relu6(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """min(max(0, x), 6), as `torch.nn.functional.relu6`; `inplace=True` is a ValueError.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.relu6(torch.tensor([-1.0, 7.0]))
    tensor([0., 6.])
    """
    return _elsewhere("relu6", inplace)((input,))


def gelu(input: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """x Φ(x), or nearly so by a hyperbolic tangent, as `torch.nn.functional.gelu`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.gelu(torch.tensor([-1000.0, 1.0]))
    tensor([-0.0000, 0.8413])
    """
    return _OPS["gelu"]((input,), (approximate,))


def softplus(input: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    """log(1 + exp(β x)) / β, as `torch.nn.functional.softplus`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.softplus(torch.tensor([-1000.0, 0.0]))
    tensor([0.0000, 0.6931])
    """
    return _OPS["softplus"]((input,), (beta, threshold))


def glu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """One half times the logistic function of the other, as `torch.nn.functional.glu`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.glu(torch.tensor([3.0, 5.0, 0.0, 1000.0]))
    tensor([1.5000, 5.0000])
    """
    return _OPS["glu"](_halves(input, dim))


def _halves(input: Any, dim: Any) -> tuple[Any, ...]:
    check_tensor("glu", "input", input)
    dim = dimension("glu", dim)
    if not -input.dim() <= dim < input.dim():
        raise (IndexError if input.dim() else ArgumentError)(f"glu: dim: got {dim}, expected one of {input.dim()} dimensions")
    if input.shape[dim] % 2:
        raise ArgumentError(f"glu: input: got {input.shape[dim]} elements along dimension {dim}, expected an even number")
    return tuple(input.chunk(2, dim))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) ⊙ up in one pass, and both gradients in another.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.4621])
    """
    return _OPS["swiglu"]((gate, up))


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """gelu(gate) ⊙ up in one pass, and both gradients in another.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.geglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.6827])
    """
    return _OPS["geglu"]((gate, up), (approximate,))
