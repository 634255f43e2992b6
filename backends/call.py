"""From a caller's arrays to a task and back, in each direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from xpnn.backends.arguments import Call, Forgotten, Plan, Pulled, collect
from xpnn.backends.arrays import FAST, WRITABLE, accept, dtype_class, dtype_name, library, memory, wide_dtype, wrong
from xpnn.backends.bind import bind, by_position, needs_backward, outs, require, single
from xpnn.backends.fast import remember
from xpnn.backends.kinds import Full
from xpnn.backends.prepare import Given, backward_reads, default_given, kind_of, prepare_shapes

if TYPE_CHECKING:
    from xpnn.backends.kernel import Kernel


def forward(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`k(...)`."""
    d, what = kernel.declaration, kernel.__name__
    bound = bind(kernel, what, by_position(kernel), args, kwargs)
    require(what, d, bound, tuple(d.inputs))
    call = collect(kernel, what, bound, {})
    made = made_by(call)
    results = call.run(made, outs(what, made, bound.out))
    remember(call, "forward", args, made, made, kwargs)
    return single(tuple(results[n] for n in made))


def made_by(call: Call) -> tuple[str, ...]:
    """The outputs that there are for the options given: a formula returns None for the others."""
    names = call.plan.names.get(made_by)
    if names is None:
        shapes = prepare_shapes(call.kernel, call.given, call.options)
        names = call.plan.names[made_by] = tuple(n for n in call.kernel.declaration.outputs if n in shapes)
    return names


def _float_inputs(call: Call) -> tuple[str, ...]:
    return tuple(
        n
        for n in call.kernel.declaration.inputs
        if n in call.raw and dtype_class(call.xp, call.what, n, call.raw[n].dtype) == "float"
    )


def _pulled(call: Call) -> Pulled:
    """What a pullback of calls like this one has to do with, found once."""
    kernel, d = call.kernel, call.kernel.declaration
    gradients = tuple("d" + n for n in _float_inputs(call))
    roles: Given = {n: (kind_of(s), "float") for n, s in prepare_shapes(kernel, call.given, call.options).items()}
    differentiable = tuple(n for n in d.differentiable if n in made_by(call))
    cotangents: Given = {"d" + n: roles[n] for n in differentiable}
    reads = backward_reads(kernel, call.given | roles | cotangents, call.options, gradients)
    call.plan.pulled = Pulled(gradients, differentiable, cotangents, roles, reads)
    return call.plan.pulled


def vjp(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """`k.vjp(...)`."""
    needs_backward(kernel)
    d, what = kernel.declaration, kernel.__name__
    bound = bind(kernel, what, by_position(kernel), args, kwargs)
    require(what, d, bound, tuple(d.inputs))
    call = collect(kernel, what, bound, {})
    made = made_by(call)
    everything, differentiable, cotangents, roles, reads = call.plan.pulled or _pulled(call)
    for n in reads & call.raw.keys():
        for o in outs(what, made, bound.out).values():
            if call.lib in WRITABLE and library(o) == call.lib and np.may_share_memory(memory(o), memory(call.raw[n])):
                raise ValueError(wrong(what, "out", f"the memory of {n}", f"other memory: the pullback reads {n}"))
    keep = tuple(n for n in (*made, *d.saved) if n in reads)
    wanted = (*made, *(n for n in keep if n not in made))
    results = call.run(wanted, outs(what, made, bound.out))
    saved = {n: np.asarray(results[n]) if call.lib == "numpy" else results[n] for n in keep}
    kept_given = {n: g for n, g in call.given.items() if n in reads or d.inputs[n].optional}
    kept_raw = {n: a if n in kept_given else Forgotten(tuple(a.shape), a.dtype) for n, a in call.raw.items()}
    passed = tuple(n for n in d.inputs if n in call.raw)
    cached = {n: call.raw[n] for n in kept_given} | {n: results[n] for n in keep}
    order = tuple(n for n in d.backward_parameters if n not in d.options)
    # the same calls as `backward` would get; it has a short way for some
    usual = set(kwargs) <= {"out"} and len(d.outputs) == 1 and set(order) == {*cached, *cotangents}
    usual = usual and len(everything) == len(d.inputs)
    shapes_out = {n: tuple(np.shape(results[n])) for n in differentiable}
    value = single(tuple(results[n] for n in made))
    del results  # what the pullback does not need is not kept alive by it
    call = Call(kernel, what, call.plan, {}, call.options)

    def pullback(*dy: Any, wrt: str | tuple[str, ...] | None = None, out: Any = None) -> Any:
        """The gradients for cotangents of the outputs; of all inputs, or of those named."""
        label = f"{what} pullback"
        if len(dy) != len(differentiable):
            names = ", ".join(cotangents)
            raise TypeError(f"{label}: takes {len(differentiable)} cotangents ({names}; None for zero), got {len(dy)}")
        if all(value is None for value in dy):  # no cotangent at all stands for 1, in the fused pass
            raise TypeError(wrong(label, ", ".join(cotangents), "None", "at least one array"))
        arguments = tuple(cached[n] if n in cached else dy[0] for n in order) if usual else ()
        if arguments and wrt is None:
            short = kernel._short("backward", arguments)
            found = None if short is None else short(*arguments, out=out)
            if found is not None:
                return found
        given, raw = dict(kept_given), kept_raw | saved
        for name, value in zip(differentiable, dy, strict=True):
            if value is None:
                continue
            array = accept(label, "d" + name, value, call.lib)
            if library(array) != call.lib:
                raise TypeError(wrong(label, "d" + name, type(array).__name__, f"a {call.lib} array like the inputs"))
            if tuple(array.shape) != shapes_out[name]:
                raise ValueError(wrong(label, "d" + name, f"shape {tuple(array.shape)}", f"{shapes_out[name]}"))
            own = wide_dtype(call.xp, call.dtype) if d.is_wide("d" + name, True) else call.dtype
            given["d" + name] = cotangents["d" + name]
            raw["d" + name] = array if array.dtype == own else call.xp.astype(array, own)
        given |= {n: roles[n] for n in saved}
        given = {n: given[n] for n in sorted(given, key=lambda n: order.index(n) if n in order else len(order))}
        # shapes are those of the forward's plan; cotangents are there or not
        plans, key = call.plan.backward, tuple(n for n in cotangents if n in raw)
        if (plan := plans.get(key)) is None:
            casts = {n: t for n, t in call.plan.casts.items() if n in kept_given}
            plan = plans[key] = Plan(call.xp, call.lib, call.dtype, given, call.frame, casts)
        back = Call(kernel, label, plan, raw, call.options)
        if wrt is not None:
            return _gradients(back, passed, out, wrt)
        gradients = _gradients(back, passed, out)
        if usual and all(type(a) in FAST for a in arguments):
            remember(back, "backward", arguments, everything, everything, {})
        return gradients

    return value, pullback


def _gradients(call: Call, names: tuple[str, ...], out: Any, wrt: str | tuple[str, ...] | None = None) -> Any:
    """One gradient for a single input, else a tuple over the inputs named, None where there is none.

    Those that `wrt` does not name, where it is given, are not computed.
    """
    kinds = {n: "float" if n not in call.raw else dtype_class(call.xp, call.what, n, call.raw[n].dtype) for n in names}
    floats = tuple(n for n in names if kinds[n] == "float")
    alone = len(call.kernel.declaration.inputs) == 1
    if wrt is not None:
        names = floats = _named(call.what, wrt, floats)
        alone = isinstance(wrt, str)
        _refuse_constants(call, names, tuple("d" + n for n in names))
    targets = outs(call.what, tuple("d" + n for n in names), out)
    results = call.run(tuple("d" + n for n in floats), targets)
    gradients = tuple(results.get("d" + n) for n in names)
    return gradients[0] if alone else gradients


def backward(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`k.backward(...)`."""
    needs_backward(kernel)
    d, what = kernel.declaration, f"{kernel.__name__}.backward"
    wrt = kwargs.pop("wrt", None)
    arrays = tuple(n for n in d.backward_parameters if n not in d.options)
    positional = (*arrays, *(n for n in (*d.inputs, *d.outputs, *d.saved) if n not in arrays))
    bound = bind(kernel, what, positional, args, kwargs)
    taken = tuple(n for n in d.cotangents() if n in arrays)
    if not any(n in bound.arrays for n in taken):
        require(what, d, bound, taken[:1])
    made = {*d.outputs, *d.saved}
    if any(n in made and n not in bound.arrays for n in arrays):  # to be recomputed
        lacking = [n for n in arrays if n in made and n not in bound.arrays]
        missing = [n for n, i in d.inputs.items() if not i.optional and n not in bound.arrays]
        if missing:
            raise TypeError(f"{what}: missing {', '.join(lacking)} (or {', '.join(missing)}, to compute it from)")
    require(what, d, bound, tuple(n for n in arrays if n in d.inputs))
    given = default_given(d)
    for n, i in d.inputs.items():
        if n in bound.arrays:
            is_int = "int" in dtype_name(getattr(bound.arrays[n], "dtype", ""))
            given[n] = (i.kind("int" if is_int else "float"), "int" if is_int else "float")
    forward_task = prepare_shapes(kernel, given, bound.options)
    roles = {n: kind_of(s) for n, s in forward_task.items()}
    roles |= {"d" + n: roles[n] for n in d.differentiable if n in roles}
    for n in bound.arrays:
        if n not in d.inputs and n not in roles:
            raise TypeError(wrong(what, n, "an array", "None: there is no such output with these options"))
    call = collect(kernel, what, bound, roles)
    _refuse_other_shapes(call)
    names = tuple(n for n, i in d.inputs.items() if n in call.raw or not i.optional)
    gradients = _gradients(call, names, bound.out, wrt)
    if set(kwargs) <= {"out"} and wrt is None and len(_float_inputs(call) or names) == len(d.inputs):
        made_here = tuple("d" + n for n in names)
        remember(call, "backward", args, made_here, made_here, {})
    return gradients


def _refuse_other_shapes(call: Call) -> None:
    """Raise for a cotangent or a cached result that would be broadcast against the inputs, or they against it."""
    d = call.kernel.declaration
    full = {n: tuple(call.raw[n].shape) for n, (kind, _) in call.given.items() if kind is Full}
    inputs = [shape for n, shape in full.items() if n in d.inputs]
    others = {n: shape for n, shape in full.items() if n not in d.inputs}
    cached = [shape for n, shape in others.items() if n not in d.cotangents()]
    if not others:
        return
    expected = np.broadcast_shapes(*inputs) if inputs else (*cached, *others.values())[0]
    for name, shape in others.items():
        if shape != expected:
            raise ValueError(wrong(call.what, name, f"shape {shape}", f"{expected}"))


def value_and_grad(
    kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any], wrt: str | tuple[str, ...] | None
) -> tuple[Any, Any]:
    """`k.value_and_grad(...)`."""
    needs_backward(kernel)
    d, what = kernel.declaration, f"{kernel.__name__}.value_and_grad"
    bound = bind(kernel, what, by_position(kernel), args, kwargs)
    require(what, d, bound, tuple(d.inputs))
    call = collect(kernel, what, bound, {})
    cacheable = wrt is None or isinstance(wrt, str)
    names = call.plan.names.get(wrt) if cacheable else None
    if names is None:
        names = _one_number(call, wrt)
        if cacheable:
            call.plan.names[wrt] = names
    gradients = tuple("d" + n for n in names)
    made = made_by(call)
    results = call.run((*made, *gradients), outs(what, gradients, bound.out))
    if set(kwargs) <= {"out"} and wrt is None:
        remember(call, "value_and_grad", args, (*made, *gradients), gradients, {})
    alone = isinstance(wrt, str) or (wrt is None and len(names) == 1)
    found = tuple(results.get(n) for n in gradients)
    return single(tuple(results[n] for n in made)), found[0] if alone else found


def _one_number(call: Call, wrt: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The inputs that `value_and_grad` differentiates by, where the result is one number.

    Raises
    ------
    ValueError
        Where it is not, or where an input has no gradient.
    """
    d = call.kernel.declaration
    names = _differentiated(call, wrt)
    shape = prepare_shapes(call.kernel, call.given, call.options)[d.outputs[0]]
    along = call.frame.axis is not None and shape[1] != 1  # one number for each column, be there only one
    if along or call.frame.result_shape(shape, (2, 2)) != ():
        if math.prod(call.frame.shape) == 1:
            raise ValueError(wrong(call.what, "the result", "an array of one number", "a number, without dimensions"))
        hint = "; pass reduction='mean' or 'sum'" if "reduction" in d.options else ""
        raise ValueError(wrong(call.what, "the result", "more than one number", f"one number{hint}"))
    _refuse_constants(call, names, (*made_by(call), *("d" + n for n in names)))
    return names


def _refuse_constants(call: Call, names: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Raise for a name without a gradient among the results that are wanted."""
    shapes, d = call.prepared(wanted).shapes, call.kernel.declaration
    if without := [n for n in names if "d" + n not in shapes]:
        usual = [n for n in d.default_wrt or _float_inputs(call) if n in call.raw and n not in without]
        raise ValueError(wrong(call.what, "wrt", repr(without[0]), f"one with a gradient: {', '.join(usual)}"))


def _differentiated(call: Call, wrt: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The inputs that `value_and_grad` differentiates by: those asked for, or the usual ones."""
    d, what, floats = call.kernel.declaration, call.what, _float_inputs(call)
    if wrt is None:
        usual = [n for n in d.default_wrt or d.inputs if n in call.raw and (d.default_wrt or n in floats)]
        for n in usual or d.inputs:
            if n not in floats:  # or the gradients returned would be fewer than those expected
                got = f"dtype {dtype_name(call.raw[n].dtype)}"
                raise TypeError(
                    wrong(what, n, got, "floating numbers, to differentiate by; for the value alone, call the kernel")
                )
        return tuple(usual)
    return _named(what, wrt, floats)


def _named(what: str, wrt: str | tuple[str, ...], floats: tuple[str, ...]) -> tuple[str, ...]:
    """The inputs that `wrt` names."""
    names: Any = (wrt,) if isinstance(wrt, str) else wrt
    if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        raise TypeError(wrong(what, "wrt", repr(wrt), "the name of an input, or a tuple of names"))
    for n in names:
        if n not in floats:
            raise ValueError(wrong(what, "wrt", repr(n), f"floating inputs that were passed: {', '.join(floats)}"))
    if len(set(names)) < len(names):
        raise ValueError(wrong(what, "wrt", repr(wrt), "each name once"))
    return tuple(names)


def explain(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """`k.explain(...)`."""
    d, what = kernel.declaration, kernel.__name__
    bound = bind(kernel, what, by_position(kernel), args, kwargs)
    require(what, d, bound, tuple(d.inputs))
    call = collect(kernel, what, bound, {})
    ready = call.prepared(made_by(call))
    return ready.backend + (f": {ready.reason}" if ready.reason else "")
