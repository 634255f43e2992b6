"""Kernels as JAX functions: `jax.grad` and its kin use a kernel's own backward formula.

Each kernel of `xpnn` is here under its name, with its signature but `out`; `wrap` makes such a function of one's own. They
are composed on `jax.numpy`, for XLA to fuse, and work under `jax.jit`, `jax.vmap` and on any device. Options are Python
values, never traced.

>>> import jax, jax.numpy as jnp, xpnn.jax
>>> loss, dlogits = jax.value_and_grad(xpnn.jax.cross_entropy)(jnp.zeros((1, 2)), jnp.array([0]))
>>> dlogits.tolist()
[[-0.5, 0.5]]
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from xpnn import kernels
from xpnn.backends.arguments import Call, Form, collect
from xpnn.backends.bind import bind, by_position, needs_backward, outs, require, single
from xpnn.backends.call import made_by
from xpnn.backends.halves import Halves, cut
from xpnn.backends.kernel import Kernel
from xpnn.backends.prepare import Given, Prepared, backward_reads, kind_of, prepare, prepare_shapes

_KERNELS = {
    name: k for name, k in vars(kernels).items() if isinstance(k, Halves) or (isinstance(k, Kernel) and k.declaration.backward)
}
Arrays = dict[str, Any]

__all__ = ["wrap", *_KERNELS]


@functools.cache
def wrap(kernel: Kernel | Halves) -> Callable[..., Any]:
    """A kernel as a JAX function with a `jax.custom_vjp`.

    Parameters
    ----------
    kernel
        Any kernel with a backward, one's own included.

    Returns
    -------
    function
        Of the kernel's arguments, but `out`. Arrays are JAX's, or what `jnp.asarray` makes such; results are JAX's.
        Integer inputs, and those that the kernel calls constants, have gradient zero. It can be differentiated backwards,
        as often as wanted, but not forwards (`jax.jvp`).

    Raises
    ------
    TypeError
        Where the kernel has no backward.

    Examples
    --------
    >>> import jax, xpnn, xpnn.jax
    >>> @xpnn.kernel
    ... def cube(xp, x):
    ...     return x * x * x
    >>> @cube.backward
    ... def cube_backward(xp, dy, x):
    ...     return 3 * x * x * dy
    >>> float(jax.grad(xpnn.jax.wrap(cube))(2.0))
    12.0
    """
    if isinstance(kernel, Halves):
        return _of_halves(kernel)
    needs_backward(kernel)
    d, what = kernel.declaration, kernel.__name__

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = bind(kernel, what, by_position(kernel), args, kwargs)
        require(what, d, bound, tuple(d.inputs))
        bound.arrays = {n: jnp.asarray(a) for n, a in bound.arrays.items()}
        plain = collect(kernel, what, bound, {})
        call = _Differentiable(kernel, what, plain.plan, plain.raw, plain.options)
        made = made_by(call)
        results = call.run(made, outs(what, made, bound.out))
        return single(tuple(results[n] for n in made))

    signature = inspect.signature(kernel)
    parameters = [p for n, p in signature.parameters.items() if n != "out"]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = what
    function.__doc__ = kernel.__doc__
    return function


def _of_halves(kernel: Halves) -> Callable[..., Any]:
    whole = wrap(kernel.kernel)

    def function(x: Any, axis: int = -1) -> Any:
        halves = cut(kernel.__name__, jnp.asarray(x), axis)
        return jnp.reshape(whole(*halves.halves(halves.flat)), halves.half)

    function.__name__ = function.__qualname__ = kernel.__name__
    function.__doc__ = kernel.__doc__
    return function


class _Differentiable(Call):
    """A call whose formula JAX differentiates by the backward; what is done to shapes and dtypes around it, by itself."""

    def form(self, wanted: tuple[str, ...]) -> Form:
        form = super().form(wanted)
        return form._replace(ready=replace(form.ready, execute=functools.partial(self._execute, form.ready)))

    def _execute(self, ready: Prepared, xp: Any, arrays: Arrays, numbers: Mapping[str, Any], out: Mapping[str, Any]) -> Arrays:
        if not any(isinstance(a, jax.core.Tracer) for a in arrays.values()):
            return ready.execute(xp, arrays, numbers, out)
        kernel, d, made = self.kernel, self.kernel.declaration, ready.job.wanted
        shapes = prepare_shapes(kernel, self.given, self.options)
        roles: Given = {n: (kind_of(s), "float") for n, s in shapes.items()}
        cotangents = {n: "d" + n for n in d.differentiable if n in made}
        wrt = tuple("d" + n for n, (_, dtype) in self.given.items() if dtype == "float")
        known = self.given | roles | {name: roles[n] for n, name in cotangents.items()}
        reads = backward_reads(kernel, known, self.options, wrt)
        kept = tuple(n for n in (*made, *d.saved) if n in reads)
        asked = tuple(n for n in self.given if n in reads or d.inputs[n].optional)
        after = {n: known[n] for n in (*asked, *kept, *cotangents.values())}
        likes = {n: (a.shape, a.dtype) for n, a in arrays.items()}

        def compute(wanted: tuple[str, ...], arrays: Arrays) -> Arrays:
            task, expected, _ = super(_Differentiable, self).form(wanted)
            results = task.execute(xp, arrays, numbers, {})
            return {n: jnp.broadcast_to(results[n], shape) for n, shape in expected.items()}

        def forward(arrays: Arrays) -> tuple[Arrays, Arrays]:
            results = compute((*made, *(n for n in kept if n not in made)), arrays)
            return {n: results[n] for n in made}, {n: arrays[n] for n in asked} | {n: results[n] for n in kept}

        def backward(residuals: Arrays, dresults: Arrays) -> tuple[Arrays]:
            given = residuals | {name: dresults[n] for n, name in cotangents.items()}
            task = prepare(kernel, after, self.options, wrt, self.lib, ready.job.dtype)
            gradients = task.execute(xp, given, numbers, {})
            found = {n: (gradients.get("d" + n), *like) for n, like in likes.items()}
            return ({n: None if g is None else jnp.broadcast_to(g, s).astype(t) for n, (g, s, t) in found.items()},)

        formula = jax.custom_vjp(functools.partial(compute, made))
        formula.defvjp(forward, backward)
        return dict(formula(arrays))


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in _KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return wrap(_KERNELS[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *_KERNELS})
