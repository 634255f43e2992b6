"""Kernels as PyTorch's operators: eager ones with as little as possible in between, and registered ones for compilers.

An eager call of plain tensors goes straight to the kernel's arrays, under an `autograd.Function` where a gradient is wanted.
All else (`torch.compile`, fake tensors, subclasses, functorch) calls the operators that `torch.library` knows, three a kernel:
`xpnn::NAME`, `xpnn::NAME_backward`, and for losses `xpnn::NAME_value_and_grad`, the fused pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xpnn.backends.kernel import Kernel
from xpnn.backends.kinds import Index
from xpnn.torch.arrays import FLOATS, HALF, array, place, tensor

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_TYPES = {bool: "bool", int: "int", float: "float", str: "str", type(None): "int?"}  # of options, by their defaults
ops: dict[str, Op] = {}


class Op:
    """A kernel on tensors.

    Parameters
    ----------
    kernel
        What is computed.
    inputs
        Those of the kernel's inputs that PyTorch has, all unless given.
    options
        Those of its options.
    constants
        Inputs without a gradient.
    """

    def __init__(
        self,
        kernel: Kernel,
        inputs: tuple[str, ...] | None = None,
        options: tuple[str, ...] | None = None,
        constants: tuple[str, ...] = (),
    ) -> None:
        d = kernel.declaration
        self.kernel, self.name = kernel, kernel.__name__
        self.inputs = inputs or tuple(d.inputs)
        self.defaults = {n: v for n, v in d.options.items() if options is None or n in options}
        if kernel.has_axis:
            self.defaults["axis"] = -1
        self.is_loss = "reduction" in self.defaults
        self.optional = frozenset(n for n in self.inputs if d.inputs[n].optional)
        self.constants = frozenset(constants)
        self.variables = tuple(n for n in self.inputs if n not in constants and d.inputs[n].kinds != (Index,))
        self.usual = d.default_wrt if d.default_wrt is not None and len(d.default_wrt) == 1 else None
        self.reads = tuple(n for n in d.backward_parameters if n in self.inputs)
        self.reads_output = d.outputs[0] in d.backward_parameters
        self.alone = len(d.inputs) == 1
        ops[self.name] = self
        _register(self)

    def __call__(self, tensors: Sequence[torch.Tensor | None], **options: Any) -> torch.Tensor:
        """The kernel's first output. Half precision has float32 losses."""
        first: Any = tensors[0]
        if first.dtype not in FLOATS:
            raise TypeError(f"{self.name}: {self.inputs[0]}: got dtype {first.dtype}, expected floating numbers")
        plain = not torch.compiler.is_compiling()
        needs = False
        for t in tensors:
            if t is not None:
                plain = plain and type(t) in PLAIN
                needs = needs or t.requires_grad
        needs = needs and torch.is_grad_enabled()
        if needs:
            self._check_constants(tensors)
        if plain:
            try:
                args, kwargs = self.arguments(tensors, options)
            except (RuntimeError, TypeError):  # no memory to look at: functorch's tensors, say, or another device's
                plain = False
        fused = needs and self.is_loss and options["reduction"] != "none" and first.dtype is not torch.float16
        if not plain:
            return self._dispatched(tensors, options, fused)
        if not needs:
            with place(first):
                return tensor(self.kernel(*args, **kwargs)).contiguous()
        return (_Fused if fused else _Simple).apply(self, args, kwargs, *tensors)

    def arguments(
        self, tensors: Sequence[torch.Tensor | None], options: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The kernel's arguments, defaults left out, for which there is a shorter way."""
        args, kwargs, optional = [], {}, self.optional
        for name, t in zip(self.inputs, tensors, strict=True):
            if t is not None:
                if name in optional:
                    kwargs[name] = array(t)
                else:
                    args.append(array(t))
        defaults = self.defaults
        for name, value in options.items():
            if value != defaults[name]:
                kwargs[name] = value
        return args, kwargs

    def _check_constants(self, tensors: Sequence[torch.Tensor | None]) -> None:
        for name, t in zip(self.inputs, tensors, strict=True):
            if t is not None and t.requires_grad and name in self.constants:
                raise RuntimeError(f"{self.name}: {name}: got a tensor that requires grad, expected a constant: detach it")

    def _dispatched(self, tensors: Sequence[torch.Tensor | None], options: dict[str, Any], fused: bool) -> torch.Tensor:
        values = [options[n] for n in self.defaults]
        if not fused:
            return getattr(torch.ops.xpnn, self.name)(*tensors, *values)
        wanted = ",".join(n for n, t in zip(self.inputs, tensors, strict=True) if t is not None and t.requires_grad)
        return getattr(torch.ops.xpnn, f"{self.name}_value_and_grad")(*tensors, *values, wanted)[0]

    def value_and_grad(self, args: list[Any], kwargs: dict[str, Any], wanted: tuple[str, ...]) -> tuple[Any, tuple[Any, ...]]:
        """The value of a loss and the gradients wanted, in one pass."""
        if wanted == self.usual:
            value, gradient = self.kernel.value_and_grad(*args, **kwargs)
            return value, (gradient,)
        return self.kernel.value_and_grad(*args, wrt=wanted, **kwargs)

    def backward(self, dy: Any, known: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Gradients by input, from a cotangent and what the backward reads."""
        options = {n: v for n, v in options.items() if v != self.defaults[n]}
        if self.alone:  # positional: there is a shorter way
            return {self.inputs[0]: self.kernel.backward(dy, *known.values(), **options)}
        d = self.kernel.declaration
        found = self.kernel.backward(dy, **known, **options)
        names = [n for n, i in d.inputs.items() if n in known or not i.optional]
        return dict(zip(names, found, strict=True))


# --- eager ---


class _Fused(torch.autograd.Function):
    """A loss whose forward pass computes the gradients too, to be multiplied by the loss's own."""

    @staticmethod
    def forward(ctx: Any, op: Op, args: list[Any], kwargs: dict[str, Any], *tensors: torch.Tensor | None) -> torch.Tensor:
        needs = ctx.needs_input_grad[3:]
        wanted = tuple(n for n, need in zip(op.inputs, needs, strict=True) if need)
        with place(tensors[0]):
            loss, gradients = op.value_and_grad(args, kwargs, wanted)
            ctx.save_for_backward(*map(tensor, gradients))
            ctx.op = op
            return tensor(loss)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = iter(_scaled(ctx.op, ctx.saved_tensors, dloss))
        return tuple(next(gradients) if need else None for need in ctx.needs_input_grad)


class _Simple(torch.autograd.Function):
    """Forward and backward pass of a kernel, one after the other."""

    @staticmethod
    def forward(ctx: Any, op: Op, args: list[Any], kwargs: dict[str, Any], *tensors: torch.Tensor | None) -> torch.Tensor:
        with place(tensors[0]):
            y = tensor(op.kernel(*args, **kwargs)).contiguous()
        ctx.op = op
        ctx.options = {n: v for n, v in kwargs.items() if n in op.defaults}
        _save(ctx, op, tensors, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        op, needs = ctx.op, ctx.needs_input_grad[3:]
        with place(dy):
            known = {n: array(t) for n, t in zip(ctx.names, ctx.saved_tensors, strict=True)}
            found = op.backward(array(dy), known, ctx.options)
            gradients = [tensor(found[n]) if need else None for n, need in zip(op.inputs, needs, strict=True)]
        return None, None, None, *_last(op, gradients)


def _save(ctx: Any, op: Op, tensors: Sequence[torch.Tensor | None], y: torch.Tensor) -> None:
    """Keep what the backward reads."""
    kept = {n: t for n, t in zip(op.inputs, tensors, strict=True) if t is not None and n in op.reads}
    if op.reads_output:
        kept[op.kernel.declaration.outputs[0]] = y
    ctx.names = tuple(kept)
    ctx.save_for_backward(*kept.values())


_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(op: Op, gradients: Sequence[torch.Tensor], dloss: torch.Tensor) -> Sequence[torch.Tensor]:
    """Gradients for a cotangent of 1, made those for another: in place where no later backward pass will want them again."""
    if not (dloss.is_cpu and dloss.item() == 1):  # a look at a GPU's number would wait for it
        gradients = [g * dloss for g in gradients] if _keeps_graph() else [g.mul_(dloss) for g in gradients]
    return _last(op, gradients)


def _last(op: Op, gradients: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Gradients as they are; where they may be differentiated again, made to refuse it."""
    if not torch.is_grad_enabled():  # it is, under create_graph=True
        return gradients
    return _Last.apply(op.name, torch.zeros((), requires_grad=True), *gradients)


class _Last(torch.autograd.Function):
    """Passes gradients on and cannot be differentiated: kernels have no second derivatives, and zeros would be wrong."""

    @staticmethod
    def forward(ctx: Any, name: str, anchor: torch.Tensor, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.name = name
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name}: second derivatives: got a gradient of a gradient, expected none: xpnn has first ones")


# --- registered ---


def _register(op: Op) -> None:
    """Make a kernel known to torch.library."""
    n, count = len(op.inputs), len(op.variables)
    names = tuple(op.defaults)
    arrays = ", ".join(f"Tensor{'?' if i in op.optional else ''} {i}" for i in op.inputs)
    options = "".join(f", {_TYPES[type(op.defaults[name])]} {name}" for name in names)
    gradients = ", ".join(["Tensor"] * count)

    def split(values: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        return values[:n], dict(zip(names, values[n:], strict=False))

    def forward(*values: Any) -> torch.Tensor:
        tensors, chosen = split(values)
        with place(tensors[0]):
            return tensor(op.kernel(*(a := op.arguments(tensors, chosen))[0], **a[1])).contiguous()

    def backward(dy: torch.Tensor, y: torch.Tensor | None, *values: Any) -> Any:
        tensors, chosen = split(values)
        known = {i: t for i, t in zip(op.inputs, tensors, strict=True) if t is not None and i in op.reads}
        if y is not None:
            known[op.kernel.declaration.outputs[0]] = y
        with place(dy):
            found = op.backward(array(dy), {i: array(t) for i, t in known.items()}, chosen)
            return unused_as_empty(dy, [found.get(i) for i in op.variables])

    def value_and_grad(*values: Any) -> Any:
        tensors, chosen = split(values[:-1])
        wanted = tuple(values[-1].split(","))
        with place(tensors[0]):
            loss, found = op.value_and_grad(*op.arguments(tensors, chosen), wanted)
            by_name = dict(zip(wanted, found, strict=True))
            return tensor(loss), *unused_as_empty(tensors[0], [by_name.get(i) for i in op.variables], True)

    def unused_as_empty(like: torch.Tensor, found: Sequence[Any], always: bool = False) -> Any:
        made = tuple(like.new_empty(0) if g is None else tensor(g).contiguous() for g in found)
        return made if always or count > 1 else made[0]

    def shape_of(*values: Any) -> torch.Tensor:
        """What comes out, without computing it."""
        tensors, chosen = split(values)
        first = tensors[0]
        floats = [t for t, i in zip(tensors, op.inputs, strict=True) if t is not None and i in op.variables]
        return first.new_empty(_shape(op, tensors, chosen), dtype=_dtype(op, floats))

    def gradients_like(like: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        return [like.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]

    def fake_backward(dy: torch.Tensor, y: torch.Tensor | None, *values: Any) -> Any:
        by_name = {i: t for i, t in zip(op.inputs, values, strict=False) if t is not None and t.dtype in FLOATS}
        made = gradients_like(dy, [dy if op.alone else by_name.get(i) for i in op.variables])
        return tuple(made) if count > 1 else made[0]

    def keep(ctx: Any, inputs: Sequence[Any], output: torch.Tensor) -> None:
        tensors, chosen = split(inputs)
        ctx.options = tuple(chosen.values())
        _save(ctx, op, tensors, output)

    def differentiate(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        known = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        y = known.pop(op.kernel.declaration.outputs[0], None) if op.reads_output else None
        found = getattr(torch.ops.xpnn, f"{op.name}_backward")(dy, y, *(known.get(i) for i in op.inputs), *ctx.options)
        by_name = dict(zip(op.variables, found if count > 1 else (found,), strict=True))
        needs = ctx.needs_input_grad[:n]
        return *(by_name[i] if need else None for i, need in zip(op.inputs, needs, strict=True)), *(None for _ in names)

    define = torch.library.custom_op
    plain = define(f"xpnn::{op.name}", forward, mutates_args=(), schema=f"({arrays}{options}) -> Tensor")
    plain.register_fake(shape_of)
    plain.register_autograd(differentiate, setup_context=keep)
    optional = ", ".join(f"Tensor? {i}" for i in op.inputs)
    schema = f"(Tensor dy, Tensor? y, {optional}{options}) -> {f'({gradients})' if count > 1 else gradients}"
    define(f"xpnn::{op.name}_backward", backward, mutates_args=(), schema=schema).register_fake(fake_backward)
    if not op.is_loss:
        return

    def fake_both(*values: Any) -> Any:
        by_name = {i: t for i, t in zip(op.inputs, values, strict=False) if i in values[-1].split(",")}
        return shape_of(*values[:-1]), *gradients_like(values[0], [by_name.get(i) for i in op.variables])

    def keep_both(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        _, *found = output
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)  # zeros of the gradients' size
        ctx.wanted = inputs[-1].split(",")
        ctx.save_for_backward(*found)

    def differentiate_both(ctx: Any, dloss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        by_name: dict[str, Any] = {}
        if dloss is not None:
            saved = dict(zip(op.variables, ctx.saved_tensors, strict=True))
            wanted = [i for i in op.inputs if i in ctx.wanted]
            by_name = dict(zip(wanted, _last(op, [saved[i] * dloss for i in wanted]), strict=True))
        return *(by_name.get(i) for i in op.inputs), *(None for _ in names), None

    both = define(
        f"xpnn::{op.name}_value_and_grad",
        value_and_grad,
        mutates_args=(),
        schema=f"({arrays}{options}, str wrt) -> (Tensor, {gradients})",
    )
    both.register_fake(fake_both)
    both.register_autograd(differentiate_both, setup_context=keep_both)


def _shape(op: Op, tensors: Sequence[Any], options: dict[str, Any]) -> Sequence[int]:
    """The shape of a kernel's first output."""
    first = tensors[0].shape
    if op.is_loss and options["reduction"] != "none":
        return ()
    inputs = op.kernel.declaration.inputs
    if not op.is_loss or not any(Index in inputs[i].kinds for i in op.inputs):
        full = [t.shape for t, i in zip(tensors, op.inputs, strict=True) if i not in op.optional]
        return torch.broadcast_shapes(*full)
    axis = options.get("axis", -1) % len(first)
    return *first[:axis], *first[axis + 1 :]


def _dtype(op: Op, floats: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype of a kernel's first output: what its inputs promote to, and float32 for a loss of half precision."""
    dtype = floats[0].dtype
    for t in floats[1:]:
        dtype = torch.promote_types(dtype, t.dtype) if t.dtype in FLOATS else dtype
    return torch.float32 if op.is_loss and dtype in HALF else dtype
