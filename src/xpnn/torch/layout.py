"""The order in which a tensor's elements lie in memory, such as channels_last, which element-wise functions keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._prims_common import compute_elementwise_output_logical_to_physical_perm

from xpnn.torch.arrays import tensor

Order = tuple[int, ...]


def storage_order(t: torch.Tensor) -> Order | None:
    """The dimensions from the largest stride to the smallest; None where they come so."""
    if t.layout is not torch.strided:
        return None
    strides = t.stride()
    if all(type(s) is int for s in (*t.shape, *strides)) and 0 not in strides:
        order = range(t.dim()) if t.is_contiguous() else sorted(range(t.dim()), key=strides.__getitem__, reverse=True)
    else:  # expanded, or of a size that is not known yet: as PyTorch has it, which takes ten times as long
        order = compute_elementwise_output_logical_to_physical_perm(t)[0]
    return None if [*order] == [*range(t.dim())] else tuple(order)


def as_stored(tensors: Sequence[Any]) -> tuple[Order | None, Sequence[Any]]:
    """The first tensor's order, and all in it; None and all as they are, where shapes differ. Numbers are left alone."""
    order = storage_order(tensors[0])
    if order is None or any(t is not None and t.dim() and t.shape != tensors[0].shape for t in tensors):
        return None, tensors
    return order, [t.permute(order) if t is not None and t.dim() else t for t in tensors]


def as_given(array: Any, order: Order | None) -> torch.Tensor:
    """A result of arrays in an order, as a tensor of the dimensions that were given; no view, which could not be written to."""
    return tensor(array.transpose(_inverse(order)) if order is not None and array.ndim else array)


def laid(t: torch.Tensor, order: Order | None) -> torch.Tensor:
    """A tensor whose elements lie in an order, itself if it is one."""
    if order is None or not t.dim():
        return t.contiguous()
    stored = t.permute(order)
    return t if stored.is_contiguous() else stored.contiguous().permute(_inverse(order))


def empty(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, order: Order | None) -> torch.Tensor:
    """A tensor without values, whose elements lie in an order."""
    if order is None or not shape:
        return like.new_empty(shape, dtype=dtype)
    return like.new_empty([shape[k] for k in order], dtype=dtype).permute(_inverse(order))


def _inverse(order: Order) -> Order:
    return tuple(sorted(range(len(order)), key=order.__getitem__))
