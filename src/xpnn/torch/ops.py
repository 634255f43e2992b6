"""Kernels as PyTorch's operators: eager ones with as little as possible in between, and registered ones for compilers.

An eager call of plain tensors goes straight to the kernel's arrays, under an `autograd.Function` where a gradient is wanted.
All else (`torch.compile`, fake tensors, subclasses, functorch) calls the operators that `torch.library` knows, three a kernel:
`xpnn::NAME`, `xpnn::NAME_backward`, and for losses `xpnn::NAME_value_and_grad`, the fused pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active as is_transformed
from torch._C import _len_torch_dispatch_stack as count_modes
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from xpnn.backends.kernel import Kernel
from xpnn.backends.kinds import Full, Index
from xpnn.torch.arrays import FLOATS, HALF, ArgumentError, ArgumentTypeError, NoMemory, array, check_tensor, place, tensor
from xpnn.torch.layout import Order, as_given, as_stored, empty, laid

# losses in this dtype are scaled, so that gradients fit into it: those for a cotangent of 1, of a single pass, might not
SCALED = torch.float16
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_TYPES = {bool: "bool", int: "int", float: "float", str: "str", type(None): "int?"}  # of options, by their defaults
ops: dict[str, Op] = {}


def has_tangent(tensors: Iterable[Any]) -> bool:
    """Whether a tensor is one of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class Op:
    """A kernel on tensors.

    Parameters
    ----------
    kernel
        What is computed.
    inputs
        Those of the kernel's inputs that PyTorch has, all unless given.
    options
        Those of its options; with other defaults, as a dict.
    constants
        Inputs without a gradient.
    """

    def __init__(
        self,
        kernel: Kernel,
        inputs: tuple[str, ...] | None = None,
        options: tuple[str, ...] | dict[str, Any] | None = None,
        constants: tuple[str, ...] = (),
    ) -> None:
        d = kernel.declaration
        self.kernel, self.name = kernel, kernel.__name__
        self.inputs = inputs or tuple(d.inputs)
        self.defaults = {n: v for n, v in d.options.items() if options is None or n in options}
        if isinstance(options, dict):
            self.defaults |= options
        if kernel.has_axis:
            self.defaults["axis"] = -1
        self.is_loss = "reduction" in self.defaults
        self.reduction = list(self.defaults).index("reduction") if self.is_loss else -1
        self.optional = frozenset(n for n in self.inputs if d.inputs[n].optional)
        self.required = len(self.inputs) - len(self.optional)  # these come first
        self.constants = frozenset(constants)
        self.variables = tuple(n for n in self.inputs if n not in constants and d.inputs[n].kinds != (Index,))
        self.usual = d.default_wrt if d.default_wrt is not None and len(d.default_wrt) == 1 else None
        self.reads = tuple(n for n in d.backward_parameters if n in self.inputs)
        self.reads_output = d.outputs[0] in d.backward_parameters
        self.rest = (None,) * (len(self.inputs) - 1)
        self.first, self.output = self.inputs[:1], d.outputs[0]
        self.alone, self.spans = len(d.inputs) == 1, d.span is not None
        self.elementwise = not kernel.has_axis and all(i.kinds == (Full,) for i in d.inputs.values()) and not self.spans
        self.changed = functools.lru_cache(1000, typed=True)(self._changed)  # 1, 1.0 and True are not the same
        ops[self.name] = self
        _register(self)

    def __call__(self, tensors: tuple[Any, ...], options: tuple[Any, ...] = ()) -> torch.Tensor:
        """The kernel's first output, float32 for a loss of half precision.

        Optional inputs at the end may be left out; options are in the order of `defaults`.
        """
        try:
            if forward_ad._current_level >= 0 or is_compiling() or count_modes() or is_transformed():
                return self._dispatched(tensors, options)
            needs = 0
            for t in tensors:
                if t is not None:
                    if type(t) not in PLAIN:
                        return self._dispatched(tensors, options)
                    needs += t.requires_grad
            first = tensors[0]
            dtype = first.dtype
            if dtype not in FLOATS:
                raise self._not_floating(dtype)
            if not (needs and torch.is_grad_enabled()):
                return self.forward(tensors, options)
            wanted = self.first if needs == 1 and first.requires_grad else self._wanted(tensors)
            if self.is_loss and options[self.reduction] != "none" and dtype is not SCALED:
                return _run_fused(self, options, wanted, *tensors)
            return _run_simple(self, options, wanted, *tensors)
        except NoMemory:  # a meta tensor, say
            return self._dispatched(tensors, options)
        except AttributeError:
            self._check_tensors(tensors)
            raise
        except (ArgumentError, ArgumentTypeError):
            raise
        except ValueError as error:
            raise ArgumentError(*error.args) from error
        except TypeError as error:
            raise ArgumentTypeError(*error.args) from error

    def _check_tensors(self, tensors: Sequence[Any]) -> None:
        for name, t in zip(self.inputs, tensors, strict=False):
            if t is not None or name not in self.optional:
                check_tensor(self.name, "input" if name in ("x", "logits") else name, t)

    def _not_floating(self, dtype: torch.dtype) -> Exception:
        return ArgumentTypeError(f"{self.name}: input: got dtype {dtype}, expected floating numbers")

    def _wanted(self, tensors: Sequence[Any]) -> tuple[str, ...]:
        """The inputs that a gradient is wanted of."""
        wanted = tuple([n for n, t in zip(self.inputs, tensors, strict=False) if t is not None and t.requires_grad])
        for name in wanted:
            if name in self.constants:
                raise ArgumentError(f"{self.name}: {name}: got a tensor that requires grad, expected a constant: detach it")
        return wanted

    def arguments(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
        """The kernel's arguments, defaults left out, for which there is a shorter way."""
        kwargs = self.options(options)
        try:  # what `array` does; in a small call, calls of it would be felt
            args = [t.numpy() for t in tensors if t is not None]
        except (RuntimeError, TypeError):
            args = [array(t) for t in tensors if t is not None]
        required = self.required
        if len(args) > required:
            names = [n for n, t in zip(self.inputs, tensors, strict=False) if t is not None]
            if self.spans and len(args) == len(tensors):
                return [args[0], None, *args[1:]], kwargs
            return args[:required], kwargs | dict(zip(names[required:], args[required:], strict=True))
        return args, kwargs

    def options(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The options that do not have their defaults; not to be written to."""
        try:
            return self.changed(*values)
        except TypeError:  # one is a list, say: the kernel words the error
            return self._changed(*values)

    def _changed(self, *values: Any) -> dict[str, Any]:
        known = self.kernel.declaration.options | {"axis": -1}  # the kernel's own defaults
        return {n: v for n, v in zip(self.defaults, values, strict=True) if v != known[n]}

    def forward(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> torch.Tensor:
        """The kernel itself."""
        order = None
        if self.elementwise and not tensors[0].is_contiguous():
            order, tensors = as_stored(tensors)
        if not (first := tensors[0]).is_cuda:  # a context manager would be felt
            args, kwargs = self.arguments(tensors, options)
            y = self.kernel(*args, **kwargs)
        else:
            with place(first):
                args, kwargs = self.arguments(tensors, options)
                y = self.kernel(*args, **kwargs)
        return tensor(y).contiguous() if order is None else as_given(y, order)

    def _dispatched(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> torch.Tensor:
        """By the registered operators: the fused one where gradients are wanted, or forward alone."""
        self._check_tensors(tensors)
        if has_tangent(tensors):  # not to be lost silently
            raise ArgumentError(f"{self.name}: input: got a tangent, expected none: xpnn has no forward-mode derivatives")
        if tensors[0].dtype not in FLOATS:
            raise self._not_floating(tensors[0].dtype)
        values = [*tensors, *[None] * (len(self.inputs) - len(tensors)), *options]
        wanted = self._wanted(tensors) if torch.is_grad_enabled() else ()
        if wanted and self.is_loss and options[self.reduction] != "none" and tensors[0].dtype is not SCALED:
            return getattr(torch.ops.xpnn, f"{self.name}_value_and_grad")(*values, ",".join(wanted))[0]
        return getattr(torch.ops.xpnn, self.name)(*values)

    def value_and_grad(
        self, tensors: Sequence[Any], options: tuple[Any, ...], wanted: tuple[str, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The value of a loss and the gradients wanted, in one pass."""
        order = None
        if self.elementwise and not tensors[0].is_contiguous():
            order, tensors = as_stored(tensors)
        args, kwargs = self.arguments(tensors, options)
        if wanted == self.usual:
            loss, gradient = self.kernel.value_and_grad(*args, **kwargs)
            return tensor(loss), (as_given(gradient, order),)
        loss, gradients = self.kernel.value_and_grad(*args, wrt=wanted, **kwargs)
        return tensor(loss), tuple([as_given(g, order) for g in gradients])

    def gradients(
        self, dy: torch.Tensor, known: dict[str, torch.Tensor], options: tuple[Any, ...], wanted: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        """The gradients wanted, by input, from a cotangent and what the backward reads."""
        changed, order = self.options(options), None
        if self.elementwise and not next(iter(known.values())).is_contiguous():
            order, (*read, dy) = as_stored([*known.values(), dy])
            known = dict(zip(known, read, strict=True))
        with place(dy):
            arrays = {n: array(t) for n, t in known.items()}
            if self.alone:  # positional: there is a shorter way
                return {self.inputs[0]: as_given(self.kernel.backward(array(dy), *arrays.values(), **changed), order)}
            found = self.kernel.backward(array(dy), **arrays, **changed, wrt=wanted)
            return {n: as_given(g, order) for n, g in zip(wanted, found, strict=True)}

    def order(self, tensors: Iterable[torch.Tensor | None]) -> Order | None:
        """That of results of these, of which the first decides."""
        return as_stored([t for t in tensors if t is not None])[0] if self.elementwise else None


# --- eager ---


class _Fused(torch.autograd.Function):  # type: ignore[misc]
    """A loss whose forward pass computes the gradients too, to be multiplied by the loss's own."""

    @staticmethod
    def forward(ctx: Any, op: Op, options: tuple[Any, ...], wanted: tuple[str, ...], *tensors: Any) -> torch.Tensor:
        if not (first := tensors[0]).is_cuda:
            loss, gradients = op.value_and_grad(tensors, options, wanted)
        else:
            with place(first):
                loss, gradients = op.value_and_grad(tensors, options, wanted)
        ctx.made = op, wanted
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        op, wanted = ctx.made
        _refuse_second(op)
        return _placed(op, wanted, _scaled(op, ctx.saved_tensors, dloss))


class _Simple(torch.autograd.Function):  # type: ignore[misc]
    """Forward and backward pass of a kernel, one after the other."""

    @staticmethod
    def forward(ctx: Any, op: Op, options: tuple[Any, ...], wanted: tuple[str, ...], *tensors: Any) -> torch.Tensor:
        y = op.forward(tensors, options)
        ctx.made = op, options, wanted, _save(ctx, op, tensors, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        op, options, wanted, names = ctx.made
        _refuse_second(op)
        found = op.gradients(dy, dict(zip(names, ctx.saved_tensors, strict=True)), options, wanted)
        return _placed(op, wanted, [found[n] for n in wanted])


def _placed(op: Op, wanted: tuple[str, ...], gradients: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """A gradient for each argument of `forward` above; PyTorch allows for None beyond the last."""
    if wanted == op.first:
        return None, None, None, gradients[0], *op.rest
    by_name = dict(zip(wanted, gradients, strict=True))
    return None, None, None, *map(by_name.get, op.inputs)


# PyTorch's own `apply` first looks for transforms of torch.func, as `Op` did
_run_fused, _run_simple = (super(torch.autograd.Function, f).apply for f in (_Fused, _Simple))


def _save(ctx: Any, op: Op, tensors: Sequence[torch.Tensor | None], y: torch.Tensor) -> tuple[str, ...]:
    """Keep what the backward reads, and return its names."""
    if not op.reads:
        ctx.save_for_backward(y)
        return (op.output,)
    kept = {n: t for n, t in zip(op.inputs, tensors, strict=False) if t is not None and n in op.reads}
    if op.reads_output:
        kept[op.output] = y
    ctx.save_for_backward(*kept.values())
    return tuple(kept)


_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(op: Op, gradients: Sequence[torch.Tensor], dloss: torch.Tensor) -> Sequence[torch.Tensor]:
    """Gradients for a cotangent of 1, made those for another: in place where no later backward pass will want them again.

    Where one may, what is handed out is not what is kept: its owner may write to it, and the later pass will.
    """
    if _keeps_graph():
        return [g * dloss for g in gradients]
    if not (dloss.is_cpu and dloss.item() == 1):  # a look at a GPU's number would wait for it
        return [g.mul_(dloss) for g in gradients]
    return gradients


def _refuse_second(op: Op) -> None:
    """Raise where gradients are to be differentiated again: what kernels make has no history, so a part would be missing."""
    if torch.is_grad_enabled():  # it is, under create_graph=True
        raise RuntimeError(f"{op.name}: second derivatives: got create_graph=True, expected False: xpnn has first ones alone")


# --- registered ---


def _register(op: Op) -> None:
    """Make a kernel known to torch.library."""
    n, count = len(op.inputs), len(op.variables)
    names = tuple(op.defaults)
    arrays = ", ".join(f"Tensor{'?' if i in op.optional else ''} {i}" for i in op.inputs)
    options = "".join(f", {_TYPES[type(op.defaults[name])]} {name}" for name in names)
    gradients = ", ".join(["Tensor"] * count)

    def forward(*values: Any) -> torch.Tensor:
        return op.forward(values[:n], values[n:])

    def fake(*values: Any) -> torch.Tensor:
        shape = _shape(op, values[:n], dict(zip(names, values[n:], strict=True)))
        return empty(values[0], shape, _dtype(op, values), op.order(values[:n]))

    def keep(ctx: Any, inputs: Sequence[Any], output: torch.Tensor) -> None:
        ctx.options = inputs[n:]
        ctx.names = _save(ctx, op, inputs[:n], output)

    def differentiate(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _refuse_second(op)
        known = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        needs = dict(zip(op.inputs, ctx.needs_input_grad, strict=False))
        wanted = ",".join(i for i in op.variables if needs[i])
        made = getattr(torch.ops.xpnn, f"{op.name}_backward")
        found = made(dy, *map(known.get, (op.output, *op.inputs)), *ctx.options, wanted)
        by_name = dict(zip(op.variables, found if count > 1 else (found,), strict=True))
        return *(by_name[i] if needs[i] else None for i in op.inputs), *(None for _ in names)

    def backward(dy: torch.Tensor, *values: Any) -> Any:
        given = zip((op.output, *op.inputs), values, strict=False)
        known = {i: t for i, t in given if t is not None}
        found = op.gradients(dy, known, values[n + 1 : -1], tuple(values[-1].split(",")))
        made = filled(dy, found, op.order([*known.values(), dy]))
        return made if count > 1 else made[0]

    def fake_backward(dy: torch.Tensor, *values: Any) -> Any:
        wanted = values[-1].split(",")
        by_name = {i: t for i, t in zip(op.inputs, values[1:], strict=False) if i in wanted and t is not None}
        made = shaped(dy, {op.inputs[0]: dy} if op.alone else by_name, op.order([*values[: n + 1], dy]))
        return made if count > 1 else made[0]

    def value_and_grad(*values: Any) -> Any:
        wanted = tuple(values[-1].split(","))
        with place(values[0]):
            loss, found = op.value_and_grad(values[:n], values[n:-1], wanted)
        return loss, *filled(values[0], dict(zip(wanted, found, strict=True)), op.order(values[:n]))

    def fake_both(*values: Any) -> Any:
        wanted = values[-1].split(",")
        by_name = {i: t for i, t in zip(op.inputs, values, strict=False) if i in wanted}
        return fake(*values[:-1]), *shaped(values[0], by_name, op.order(values[:n]))

    def keep_both(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros of the gradients' size
        ctx.wanted = inputs[-1].split(",")
        ctx.save_for_backward(*output[1:])

    def differentiate_both(ctx: Any, dloss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        _refuse_second(op)
        by_name: dict[str, Any] = {}
        if dloss is not None:
            saved = dict(zip(op.variables, ctx.saved_tensors, strict=True))
            by_name = {i: saved[i] * dloss for i in ctx.wanted}
        return *map(by_name.get, op.inputs), *(None for _ in names), None

    def filled(like: torch.Tensor, found: dict[str, torch.Tensor], order: Order | None) -> tuple[torch.Tensor, ...]:
        """A gradient for each variable, of no elements where there is none."""
        return tuple(laid(found[i], order) if i in found else like.new_empty(0) for i in op.variables)

    def shaped(like: torch.Tensor, found: dict[str, torch.Tensor], order: Order | None) -> tuple[torch.Tensor, ...]:
        """What `filled` returns for gradients of these tensors, as far as shapes, dtypes and strides go."""
        return tuple(
            empty(found[i], found[i].shape, found[i].dtype, order) if i in found else like.new_empty(0) for i in op.variables
        )

    def define(suffix: str, function: Any, schema: str, fake: Any) -> Any:
        made = torch.library.custom_op(f"xpnn::{op.name}{suffix}", function, mutates_args=(), schema=schema)
        made.register_fake(fake)
        return made

    define("", forward, f"({arrays}{options}) -> Tensor", fake).register_autograd(differentiate, setup_context=keep)
    optional = "".join(f", Tensor? {i}" for i in (op.output, *op.inputs))
    returned = f"({gradients})" if count > 1 else gradients
    define("_backward", backward, f"(Tensor cotangent{optional}{options}, str wrt) -> {returned}", fake_backward)
    if op.is_loss:
        schema = f"({arrays}{options}, str wrt) -> (Tensor, {gradients})"
        both = define("_value_and_grad", value_and_grad, schema, fake_both)
        both.register_autograd(differentiate_both, setup_context=keep_both)


def _shape(op: Op, tensors: Sequence[Any], options: dict[str, Any]) -> Sequence[int]:
    """The shape of a kernel's first output."""
    first = tensors[0].shape
    if op.is_loss and options["reduction"] != "none":
        return ()
    inputs = op.kernel.declaration.inputs
    if not op.is_loss or not any(Index in inputs[i].kinds for i in op.inputs):
        full = [t.shape for t, i in zip(tensors, op.inputs, strict=True) if i not in op.optional]
        shape: Sequence[int] = torch.broadcast_shapes(*full)
        return shape
    axis = options.get("axis", -1) % len(first)
    return *first[:axis], *first[axis + 1 :]


def _dtype(op: Op, tensors: Sequence[Any]) -> torch.dtype:
    """The dtype of a kernel's first output: what its inputs promote to, and float32 for a loss of half precision."""
    dtype = tensors[0].dtype
    for i, t in zip(op.inputs, tensors, strict=False):
        if i in op.variables and t is not None and t.dtype in FLOATS:
            dtype = torch.promote_types(dtype, t.dtype)
    return torch.float32 if op.is_loss and dtype in HALF else dtype
