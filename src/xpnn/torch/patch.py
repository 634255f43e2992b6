"""xpnn's functions in the place of PyTorch's own, for as long as wanted."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active as is_transformed
from torch.compiler import is_compiling

from xpnn.torch import activations, functional, norms
from xpnn.torch.arrays import FLOATS, HALF
from xpnn.torch.ops import PLAIN, has_tangent

FUNCTIONS = {
    name: function
    for home in (activations, functional, norms)
    for name, function in vars(home).items()
    if getattr(function, "__module__", None) == home.__name__ and hasattr(torch.nn.functional, name)
}
NAMES = tuple(sorted(FUNCTIONS))


class Patch:
    """Functions of `torch.nn.functional` replaced by xpnn's; made by `patch`. A context manager, whose end undoes it."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._made: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        for name in names:
            original = getattr(torch.nn.functional, name)
            ours = _drop_in(original, FUNCTIONS[name])
            setattr(torch.nn.functional, name, ours)
            self._made[name] = original, ours

    def undo(self) -> None:
        """Put PyTorch's own functions back; a second time does nothing.

        Raises
        ------
        RuntimeError
            Where something else was put in the place of ours meanwhile; nothing is then changed.
        """
        F = torch.nn.functional
        for name, (_, ours) in self._made.items():
            if getattr(F, name) is not ours:
                raise RuntimeError(f"patch: torch.nn.functional.{name}: got another function, expected ours: undo that first")
        for name, (original, _) in self._made.items():
            setattr(F, name, original)
        self._made = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def patch(*names: str) -> Patch:
    """Replace functions of `torch.nn.functional`, and so the losses of modules such as `torch.nn.CrossEntropyLoss`.

    What xpnn does not serve goes to PyTorch's own function: other devices, layouts and dtypes, subclasses of tensors,
    transforms of `torch.func`, `inplace=True`, weights that require grad.

    Parameters
    ----------
    names
        The functions to replace; all that `xpnn.torch` has unless given.

    Returns
    -------
    Patch
        With `undo()`; or use it in a `with` statement.

    Raises
    ------
    ValueError
        For a name that `xpnn.torch` does not have.

    Examples
    --------
    >>> import torch, xpnn.torch
    >>> with xpnn.torch.patch():
    ...     torch.nn.CrossEntropyLoss()(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"patch: names: got {name!r}, expected some of {', '.join(NAMES)}")
    return Patch(names or NAMES)


def _drop_in(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(ours).parameters)
    last = names.index("inplace") if "inplace" in names else len(names)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        over = kwargs.get("inplace") or (len(args) > last and args[last])  # the input is to be written to
        return (ours if not over and _serves(ours, args, kwargs) else original)(*args, **kwargs)

    return function


def _serves(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether xpnn can do what is asked for. Arguments that make no sense count as served: then xpnn words the error."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    compiling = is_compiling()
    if not tensors or tensors[0].dtype not in FLOATS or (not compiling and is_transformed()) or has_tangent(tensors):
        return False
    if {t.dtype for t in tensors} >= HALF:  # neither holds the other
        return False
    for t in tensors:
        if not (t.is_cpu or (t.is_cuda and _has_cupy())) or t.layout is not torch.strided or t.is_complex():
            return False
        if not compiling and type(t) not in PLAIN:
            return False
    if function is functional.linear_cross_entropy:
        weight = kwargs.get("linear_weight", args[1] if len(args) > 1 else None)
        return weight is not None and weight.dim() == 2
    if function in (functional.cross_entropy, functional.nll_loss):  # its class weights have no gradient
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if weight is not None and weight.dtype is not tensors[0].dtype and not torch.is_autocast_enabled(weight.device.type):
            return False
        return weight is None or not weight.requires_grad
    return True


@functools.cache
def _has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None
