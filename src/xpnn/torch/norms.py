"""`torch.nn.functional`'s norms, with its signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import xpnn
from xpnn.torch.arrays import HALF, ArgumentError, ArgumentTypeError, check_tensor
from xpnn.torch.ops import Op

_LAYER_NORM = Op(xpnn.layer_norm)
_RMS_NORM = Op(xpnn.rms_norm, options={"eps": 1e-6})  # a number always: None is replaced below


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Mean 0 and variance 1 along the last dimensions, scaled and shifted, as `torch.nn.functional.layer_norm`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
    tensor([[-1.,  1.]])
    """
    _check_dtypes(input, weight, bias)
    return _by_rows(_LAYER_NORM, input, normalized_shape, (weight, bias), eps)


def _check_dtypes(input: Any, *parameters: Any) -> None:
    """Raise where PyTorch does: for parameters of other dtypes than the input's, but for float32 beside half precision."""
    dtypes = [p.dtype for p in parameters if isinstance(p, torch.Tensor)]
    if not dtypes or not isinstance(input, torch.Tensor) or (input.is_cuda and torch.is_autocast_enabled("cuda")):
        return
    wanted = torch.float32 if input.dtype in HALF and dtypes[0] is torch.float32 else input.dtype
    for name, p in zip(("weight", "bias"), parameters, strict=True):
        if isinstance(p, torch.Tensor) and p.dtype is not wanted:
            raise ArgumentTypeError(f"layer_norm: {name}: got dtype {p.dtype}, expected {wanted} beside {input.dtype} input")


def rms_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """A mean square of 1 along the last dimensions, scaled, as `torch.nn.functional.rms_norm`.

    Without `eps` it is that of what is computed in: float32's for half precision.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.rms_norm(torch.tensor([[1.0, 7.0]]), (2,), torch.tensor([5.0, 10.0]))
    tensor([[ 1., 14.]])
    """
    if eps is None:
        eps = torch.finfo(torch.float64 if getattr(input, "dtype", None) is torch.float64 else torch.float32).eps
    return _by_rows(_RMS_NORM, input, normalized_shape, (weight,), eps)


def _by_rows(op: Op, input: Any, shape: Any, parameters: tuple[torch.Tensor | None, ...], eps: Any) -> torch.Tensor:
    """An operator along the last dimensions, which become one."""
    if not isinstance(shape, Sequence) or not shape or any(isinstance(n, str | float) for n in shape):
        raise ArgumentTypeError(f"{op.name}: normalized_shape: got {shape!r}, expected at least one integer in a tuple or list")
    if eps is None or isinstance(eps, str):
        raise ArgumentTypeError(f"{op.name}: eps: got {eps!r}, expected a number")
    shape, eps = tuple(shape), float(eps)
    check_tensor(op.name, "input", input)
    if tuple(input.shape[-len(shape) :]) != shape:
        raise ArgumentError(f"{op.name}: normalized_shape: got {shape}, expected the end of input's shape {tuple(input.shape)}")
    for name, p in zip(op.inputs[1:], parameters, strict=True):
        if p is None:
            continue
        check_tensor(op.name, name, p)
        if tuple(p.shape) != shape:
            raise ArgumentError(f"{op.name}: {name}: got shape {tuple(p.shape)}, expected normalized_shape's {shape}")
    if len(shape) == 1:
        return op((input, *parameters), (eps,))
    flat = (None if p is None else p.flatten() for p in parameters)
    return op((input.flatten(-len(shape)), *flat), (eps,)).reshape(input.shape)
