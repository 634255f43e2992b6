"""Tensors as arrays and back: the same memory, on the CPU and on CUDA devices."""

from __future__ import annotations

import contextlib
import functools
import operator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
HALF = frozenset((torch.float16, torch.bfloat16))
_HERE: AbstractContextManager[Any] = contextlib.nullcontext()


@functools.cache
def _bfloat16() -> Any:
    from xpnn.backends.arrays import numpy_dtype

    return numpy_dtype("bfloat16")


class ArgumentError(ValueError, RuntimeError):
    """An argument of a wrong value or shape: PyTorch mostly calls that a RuntimeError."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of a wrong type or dtype."""


def check_tensor(name: str, argument: str, value: Any) -> None:
    """Raise for what is no tensor."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(f"{name}: {argument}: got {type(value).__name__}, expected a tensor")


def dimension(name: str, dim: Any) -> int:
    """A dimension's number as PyTorch takes it: of any type of integers."""
    try:
        if not isinstance(dim, bool):
            return operator.index(dim)
    except TypeError:
        pass
    raise ArgumentTypeError(f"{name}: dim: got {dim!r}, expected an integer")


class NoMemory(ArgumentTypeError):
    """A tensor without memory that an array could share."""


def array(tensor: torch.Tensor) -> Any:
    """A tensor's memory as an array of NumPy, or of CuPy; bfloat16, which not every exchange knows, by way of 16 bits."""
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError):  # it is not looked at beforehand: that would be felt in a small call
        t = tensor.detach()
    if t.dtype is torch.bfloat16:
        return array(t.view(torch.uint16)).view(_bfloat16())
    if t.is_cuda:
        import cupy

        return cupy.from_dlpack(t)
    try:
        return t.numpy()
    except (RuntimeError, TypeError) as error:
        raise NoMemory(f"xpnn.torch: got a tensor on {t.device} ({error}), expected a dense one on cpu or cuda") from error


def tensor(array: Any) -> torch.Tensor:
    """An array's memory as a tensor."""
    try:
        return torch.from_numpy(np.asarray(array))
    except TypeError:  # of CuPy, or of a dtype that is not NumPy's own
        pass
    if isinstance(array, np.ndarray | np.generic) or array.dtype == _bfloat16():
        return tensor(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def place(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Where arrays like a tensor's are to be worked on: for CUDA, on PyTorch's current stream, in memory from its allocator."""
    return _on_cuda(tensor.device) if tensor.is_cuda else _HERE


@contextlib.contextmanager
def _on_cuda(device: torch.device) -> Any:
    import cupy

    stream = torch.cuda.current_stream(device)
    with (
        cupy.cuda.Device(device.index),
        cupy.cuda.Stream.from_external(stream),
        cupy.cuda.using_allocator(_allocator().malloc),
    ):
        yield


@functools.cache
def _allocator() -> Any:
    """PyTorch's caching allocator as CuPy calls one."""
    import cupy

    def allocate(size: int, device: int) -> int:
        return int(torch.cuda.caching_allocator_alloc(size, device, torch.cuda.current_stream(device)))

    def free(pointer: int, device: int) -> None:
        torch.cuda.caching_allocator_delete(pointer)

    return cupy.cuda.PythonFunctionAllocator(allocate, free)
