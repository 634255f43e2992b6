"""`torch.nn.functional`'s normalizers and losses, with its signatures."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn import _reduction

import xpnn
from xpnn.torch.arrays import FLOATS, HALF, ArgumentError, ArgumentTypeError, check_tensor, dimension
from xpnn.torch.ops import Op

_SOFTMAX, _LOG_SOFTMAX = Op(xpnn.softmax), Op(xpnn.log_softmax)
_CROSS_ENTROPY = Op(
    xpnn.cross_entropy,
    inputs=("logits", "target", "weight", "divisor"),
    options=("ignore_index", "reduction", "label_smoothing"),
    constants=("weight", "divisor"),
)
_LINEAR_CROSS_ENTROPY = Op(
    xpnn.linear_cross_entropy,
    options=("reduction", "ignore_index", "label_smoothing", "chunk_size"),
    constants=("weight",),
)
_NLL_LOSS = Op(xpnn.nll_loss, constants=("weight",))
_BINARY, _KL_DIV = Op(xpnn.binary_cross_entropy_with_logits), Op(xpnn.kl_div)
_MSE_LOSS, _HUBER_LOSS, _SMOOTH_L1_LOSS = Op(xpnn.mse_loss), Op(xpnn.huber_loss), Op(xpnn.smooth_l1_loss)


# --- what arguments mean ---


def _reduction_of(name: str, size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """PyTorch's `reduction`, from its forerunners where they are given."""
    if size_average is None and reduce is None:
        if not isinstance(reduction, str):
            raise ArgumentError(f"{name}: reduction: got {reduction!r}, expected a string")
        return reduction
    return str(_reduction.legacy_get_string(size_average, reduce))


def _axis(name: str, dim: Any, ndim: int) -> int:
    """A dimension as an axis, -1 for the last."""
    dim = dimension(name, dim)
    if not -max(ndim, 1) <= dim < max(ndim, 1):
        raise IndexError(f"{name}: dim: got {dim}, expected -{max(ndim, 1)} <= dim < {max(ndim, 1)}")
    return -1 if dim in (-1, ndim - 1) else dim


def _classes(name: str, input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> tuple[int, torch.Tensor]:
    """The axis of the classes, which is 1, or the last; and the target, of whose dtypes not all are PyTorch's."""
    try:
        ndim, dtype, weights = input.dim(), target.dtype, None if weight is None else weight.dtype
    except AttributeError:  # no tensors: the operator words the error
        return -1, target
    if dtype is torch.int64 and weight is None and ndim > 1:
        return (1 if ndim > 2 else -1), target
    if dtype is not torch.int64 and dtype is not torch.uint8 and dtype not in FLOATS:
        raise ArgumentTypeError(f"{name}: target: got dtype {dtype}, expected int64 or uint8, or floats for probabilities")
    if weights is not None and weights is not input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise ArgumentTypeError(f"{name}: weight: got dtype {weights}, expected input's {input.dtype}")
    if ndim == 0:
        raise ArgumentError(f"{name}: input: got no dimensions, expected at least one")
    if ndim == 1 and target.shape == (1,) and dtype not in FLOATS:
        target = target[0]
    return (1 if ndim > 2 else -1), target


def _narrow(loss: torch.Tensor, input: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    """A loss in the dtype that PyTorch gives it: that of half precision again, unless autocast widens it."""
    dtype = input.dtype
    if dtype not in HALF or any(t is not None and t.dtype in FLOATS and t.dtype is not dtype for t in others):
        return loss
    return loss if torch.is_autocast_enabled(loss.device.type) else loss.to(dtype)


def _as(dtype: torch.dtype, loss: torch.Tensor) -> torch.Tensor:
    """A loss in a dtype that not all of its arguments decide, unless autocast widens it."""
    return loss if torch.is_autocast_enabled(loss.device.type) else loss.to(dtype)


def _check_floats(name: str, target: Any) -> None:
    if isinstance(target, torch.Tensor) and target.dtype not in FLOATS:
        raise ArgumentTypeError(f"{name}: target: got dtype {target.dtype}, expected floating numbers")


def _warn_of_sizes(input: torch.Tensor, target: torch.Tensor) -> None:
    try:
        same = target.shape == input.shape
    except AttributeError:  # no tensors: the operator words the error
        return
    if not same:
        warnings.warn(
            f"target has shape {tuple(target.shape)}, input {tuple(input.shape)}: they are broadcast, which is rarely meant",
            stacklevel=3,
        )


# --- normalizers ---


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """exp(x) / Σ exp(x) along a dimension, as `torch.nn.functional.softmax`.

    Parameters
    ----------
    dim
        The dimension; without one, 0 for 0, 1 or 3 dimensions and else 1, with a warning, as in PyTorch.
    dtype
        What the input is converted to first.

    Examples
    --------
    >>> import torch, xpnn.torch
    >>> xpnn.torch.softmax(torch.zeros(2), dim=0)
    tensor([0.5000, 0.5000])
    """
    return _along(_SOFTMAX, input, dim, _stacklevel, dtype)


def log_softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x − log Σ exp(x) along a dimension, as `torch.nn.functional.log_softmax`; arguments are those of `softmax`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.log_softmax(torch.tensor([0.0, -1000.0]), dim=0)
    tensor([    0., -1000.])
    """
    return _along(_LOG_SOFTMAX, input, dim, _stacklevel, dtype)


def _along(op: Op, input: torch.Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None) -> torch.Tensor:
    check_tensor(op.name, "input", input)
    if dim is None:
        warnings.warn(f"{op.name} without dim is deprecated: pass dim=", stacklevel=stacklevel)
        dim = 0 if input.dim() in (0, 1, 3) else 1
    if dtype is None and input.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise ArgumentTypeError(f"{op.name}: dtype: got {dtype!r}, expected a torch.dtype")
        input = input.to(dtype)
    return op((input,), (_axis(op.name, dim, input.dim()),))


# --- losses ---


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of logits against class numbers or probabilities, as `torch.nn.functional.cross_entropy`.

    Where the logits require grad and the reduction is "mean" or "sum", loss and gradient are computed in one pass; the
    gradient is then the only array of the logits' size. float16 takes two passes: a gradient too small for it must meet the
    loss's scale first.

    Parameters
    ----------
    input
        Logits, of shape (C,), (N, C), or (N, C, d1, ...).
    target
        Classes, of the shape of `input` without C; or probabilities, of its shape.
    weight
        A weight for each class, or None. A constant.

    Raises
    ------
    IndexError
        For a class outside [0, C) that is not `ignore_index`; on CUDA its loss is NaN, or IndexError under XPNN_CHECK=1.

    Examples
    --------
    >>> import torch, xpnn.torch
    >>> xpnn.torch.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    axis, target = _classes("cross_entropy", input, target, weight)
    options = (ignore_index, _reduction_of("cross_entropy", size_average, reduce, reduction), label_smoothing, axis)
    loss = _CROSS_ENTROPY((input, target) if weight is None else (input, target, weight), options)
    return loss if loss.dtype is input.dtype else _narrow(loss, input, target)


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> torch.Tensor:
    """The cross-entropy of x Wᵀ + b, whose logits are never held as a whole; as `torch.nn.functional.linear_cross_entropy`.

    Parameters
    ----------
    input
        x, of shape (N, D) or (D,).
    linear_weight
        W, of shape (C, D). More dimensions, which PyTorch takes, are a ValueError.
    target
        Classes, of shape (N,) or (); or probabilities, of shape (N, C) or (C,).
    options
        PyTorch's `LinearCrossEntropyOptions`, of which `batch_chunk_size` is followed; without it, chunks are of 48 MiB, or
        of a twentieth of all logits where that is more. Sums are in float32 in any case.

    Examples
    --------
    >>> import torch, xpnn.torch
    >>> xpnn.torch.linear_cross_entropy(torch.ones(1, 3), torch.zeros(2, 3), torch.tensor([0]))
    tensor(0.6931)
    """
    for name, t in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        check_tensor("linear_cross_entropy", name, t)
    if input.dim() not in (1, 2):
        raise ArgumentError(f"linear_cross_entropy: input: got {input.dim()} dimensions, expected 1 or 2")
    if linear_weight.dim() != 2:
        raise ArgumentError(f"linear_cross_entropy: linear_weight: got {linear_weight.dim()} dimensions, expected 2")
    if target.is_floating_point() and ignore_index is not None:
        raise ArgumentError("linear_cross_entropy: ignore_index: got one, expected none with probability targets")
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if isinstance(t, torch.Tensor) and t.dtype is not input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise ArgumentTypeError(f"linear_cross_entropy: {name}: got dtype {t.dtype}, expected input's {input.dtype}")
    _, target = _classes("linear_cross_entropy", input, target, weight)
    reduction = _reduction_of("linear_cross_entropy", None, None, reduction)
    chunk_size = None if options is None else options.batch_chunk_size
    loss = _LINEAR_CROSS_ENTROPY(
        (input, linear_weight, target, linear_bias, weight),
        (reduction, -100 if ignore_index is None else ignore_index, label_smoothing, chunk_size),
    )
    return _narrow(loss, input, linear_weight)


def nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The negative log-likelihood of classes, as `torch.nn.functional.nll_loss`; arguments are those of `cross_entropy`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.nll_loss(torch.tensor([[-1.0, -0.5]]), torch.tensor([0]))
    tensor(1.)
    """
    axis, target = _classes("nll_loss", input, target, weight)
    options = (ignore_index, _reduction_of("nll_loss", size_average, reduce, reduction), axis)
    loss = _NLL_LOSS((input, target, weight), options)
    return _narrow(loss, input)


def binary_cross_entropy_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Binary cross-entropy of logits, as `torch.nn.functional.binary_cross_entropy_with_logits`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.binary_cross_entropy_with_logits(torch.tensor([0.0]), torch.tensor([1.0]))
    tensor(0.6931)
    """
    reduction = _reduction_of("binary_cross_entropy_with_logits", size_average, reduce, reduction)
    _check_floats("binary_cross_entropy_with_logits", target)
    loss = _BINARY((input, target, weight, pos_weight), (reduction,))
    return _as(target.dtype, loss)


def kl_div(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> torch.Tensor:
    """t (log t − x), the terms of Kullback and Leibler's divergence, as `torch.nn.functional.kl_div`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.kl_div(torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0, 0.0]]), reduction="batchmean")
    tensor(0.)
    """
    reduction = _reduction_of("kl_div", size_average, reduce, reduction)
    _check_floats("kl_div", target)
    return _narrow(_KL_DIV((input, target), (reduction, log_target)), input, target)


def mse_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x − t)², as `torch.nn.functional.mse_loss`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.mse_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
    tensor(4.5000)
    """
    _warn_of_sizes(input, target)
    reduction = _reduction_of("mse_loss", size_average, reduce, reduction)
    return _narrow(_MSE_LOSS((input, target, weight), (reduction,)), input, target, weight)


def huber_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Huber's loss, as `torch.nn.functional.huber_loss`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.huber_loss(torch.tensor([0.5, -3.0]), torch.zeros(2), reduction="none")
    tensor([0.1250, 2.5000])
    """
    _warn_of_sizes(input, target)
    reduction = _reduction_of("huber_loss", None, None, reduction)
    loss = _HUBER_LOSS((input, target, weight), (reduction, delta))
    return _as(input.dtype if weight is None else torch.promote_types(input.dtype, weight.dtype), loss)


def smooth_l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> torch.Tensor:
    """|x − t| with its corner rounded off, as `torch.nn.functional.smooth_l1_loss`.

    >>> import torch, xpnn.torch
    >>> xpnn.torch.smooth_l1_loss(torch.tensor([0.5, -3.0]), torch.zeros(2), reduction="none", beta=2.0)
    tensor([0.0625, 2.0000])
    """
    _warn_of_sizes(input, target)
    reduction = _reduction_of("smooth_l1_loss", size_average, reduce, reduction)
    return _narrow(_SMOOTH_L1_LOSS((input, target), (reduction, beta)), input, target)


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | float | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The loss of a causal language model with the signature of Transformers' hook: `model.loss_function = causal_lm_loss`.

    Parameters
    ----------
    logits
        Of shape (..., T, V). They are read in the dtype that they have; the loss is float32 (float64 for float64).
    labels
        Tokens, of shape (..., T): the logits of one place are those of the next one's token.
    vocab_size
        V, the number of tokens that there are.
    num_items_in_batch
        What the sum of the losses is divided by, such as the tokens of all batches whose gradients are added up; or None for
        the labels that count.
    shift_labels
        Labels that are already those of the next place; `labels` is then not read.
    kwargs
        What else models pass, which means nothing to a loss.

    Examples
    --------
    >>> import torch, xpnn.torch
    >>> xpnn.torch.causal_lm_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]), vocab_size=4)
    tensor(1.3863)
    """
    if shift_labels is None:
        if labels is None:
            raise TypeError("causal_lm_loss: labels: got None, expected labels or shift_labels")
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if (length := logits.shape[-1]) != vocab_size:
        raise ArgumentError(f"causal_lm_loss: vocab_size: got {vocab_size}, expected {length}, the length of logits' rows")
    divisor = None
    if num_items_in_batch is not None:
        divisor = torch.as_tensor(num_items_in_batch, dtype=torch.float64, device=logits.device)
    return _CROSS_ENTROPY(
        (logits.view(-1, vocab_size), shift_labels.reshape(-1).to(logits.device), None, divisor),
        (ignore_index, "mean", 0.0, -1),
    )
