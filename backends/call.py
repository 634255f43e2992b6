"""From a caller's arrays to a task and back, in each direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat
import numpy as np

from xpnn.backends.arrays import (
    FAST,
    IMMUTABLE,
    WRITABLE,
    Frame,
    accept,
    address,
    check_extents,
    dtype_class,
    dtype_name,
    frame,
    library,
    memory,
    namespace,
    wide_dtype,
    wrong,
)
from xpnn.backends.bind import Bound, bind, needs_backward, outs, require, single
from xpnn.backends.fast import remember
from xpnn.backends.kinds import Full, Index, Kind, Matrix, Row, Scalar
from xpnn.backends.prepare import (
    Given,
    Prepared,
    backward_reads,
    default_given,
    kind_of,
    prepare,
    prepare_shapes,
    reach,
)
from xpnn.backends.program import Shape
from xpnn.backends.task import HALF, OutOfRange

if TYPE_CHECKING:
    from xpnn.backends.kernel import Kernel


class Forgotten(NamedTuple):
    """What is left of an input that a pullback does not need."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass
class Call:
    """Accepted arrays in canonical form, and the frame to take results back."""

    kernel: Kernel
    what: str
    xp: Any
    lib: str
    dtype: Any
    raw: dict[str, Any]
    given: Given
    frame: Frame
    canonical: dict[str, Any]
    options: dict[str, Any]

    def prepared(self, wanted: tuple[str, ...]) -> Prepared:
        return prepare(self.kernel, self.given, self.options, wanted, self.lib, dtype_name(self.dtype))

    def run(self, wanted: tuple[str, ...], out: Mapping[str, Any]) -> dict[str, Any]:
        """Results by name, canonical; `out` by name in the caller's shapes."""
        ready = self.prepared(wanted)
        shapes = {n: a.shape for n, a in self.raw.items()}
        if ready.symbols:
            check_extents(self.what, shapes, self.canonical, ready.symbols)
        expected = self.expected(ready, wanted)
        public = {n: (self.public_shape(n, ready.shapes[n], e), self.dtype_of(n, ready)) for n, e in expected.items()}
        self._check_out(out, public)
        if self.frame.rows == 0 or self.frame.columns == 0:
            results = self._nothing(expected, ready)
        else:
            targets = {n: self._target(o, ready.shapes[n]) for n, o in out.items() if n in ready.shapes}
            targets = {n: t for n, t in targets.items() if t is not None}
            values = {n: v for n, v in self.options.items() if n in ready.job.numbers}
            try:
                results = ready.execute(self.xp, self.canonical, values, targets)
            except OutOfRange as error:
                raise self._worded(error) from None
            results = {n: v for n, v in results.items() if v is not None}
        with np.errstate(all="ignore"):  # what is too large for half precision becomes an infinity
            return {n: self._settled(n, results[n], ready, expected[n], out.get(n)) for n in wanted if n in results}

    def expected(self, ready: Prepared, wanted: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """The canonical shape of each result."""
        sizes = {
            s: size for n, sym in ready.symbols.items() for s, size in zip(sym, self.canonical[n].shape, strict=True) if s != 1
        }
        sizes |= {"R": self.frame.rows, "C": self.frame.columns}
        return {n: tuple(1 if s == 1 else sizes[s] for s in ready.shapes[n]) for n in wanted if n in ready.shapes}

    def public_shape(self, name: str, shape: Shape, canonical: tuple[int, ...]) -> tuple[int, ...]:
        source = self.kernel.declaration.gradients.get(name)
        if source in self.raw:
            return tuple(self.raw[source].shape)
        return self.frame.result_shape(shape, canonical)

    def dtype_of(self, name: str, ready: Prepared) -> Any:
        """A result's dtype."""
        if name in ready.integers:
            return np.dtype(np.int64) if self.lib in WRITABLE else self.xp.asarray(0).dtype
        wide = self.kernel.declaration.is_wide(name, ready.shapes[name][1] == 1)
        return wide_dtype(self.xp, self.dtype) if wide else self.dtype

    def _settled(self, name: str, value: Any, ready: Prepared, expected: tuple[int, ...], out: Any) -> Any:
        """A result in the caller's shape and dtype, in `out` if there is one."""
        xp, shape = self.xp, ready.shapes[name]
        source = self.kernel.declaration.gradients.get(name)
        value = xp.broadcast_to(value, expected) if tuple(np.shape(value)) != expected else value
        target = self.public_shape(name, shape, expected)
        value = self.frame.restore(xp, value, shape)
        if source in self.raw:
            value = _unbroadcast(xp, value, target)
            if value.dtype != self.raw[source].dtype:
                value = xp.astype(value, self.raw[source].dtype)
        elif value.dtype != (dtype := self.dtype_of(name, ready)):
            value = xp.astype(value, dtype)
        if out is None:
            return value[()] if target == () and self.lib == "numpy" else value
        if value is not out and not (self.lib in WRITABLE and _same_memory(value, out)):
            out[...] = value
        return out

    def _nothing(self, expected: Mapping[str, tuple[int, ...]], ready: Prepared) -> dict[str, Any]:
        """Results where there are no rows or no columns."""
        empty: dict[str, Any] = {}
        for name, shape in expected.items():
            if self.frame.axis is not None and self.frame.columns == 0 and self.frame.rows and math.prod(shape):
                raise ValueError(
                    wrong(
                        self.what,
                        next(iter(self.raw)),
                        f"shape {self.frame.shape}",
                        f"at least one element along axis {self.frame.axis}",
                    )
                )
            mean = shape == (1, 1) and self.options.get("reduction") == "mean" and name in self.kernel.declaration.outputs
            empty[name] = self.xp.full(shape, math.nan if mean else 0, dtype=self.dtype_of(name, ready))
        return empty

    def _target(self, out: Any, shape: Shape) -> Any:
        """`out` as canonical memory, if it can be viewed so."""
        if self.lib not in WRITABLE:
            return None
        kind = kind_of(shape)
        if kind is Full and out.shape != self.frame.shape:
            return None
        view = self.frame.canonical(self.xp, out, kind)
        return view if np.shares_memory(memory(view), memory(out)) else None

    def _check_out(self, out: Mapping[str, Any], expected: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        taken: list[tuple[str, Any]] = []
        for name, o in out.items():
            label = f"out[{name}]" if len(out) > 1 else "out"
            if library(o) != self.lib:
                raise TypeError(wrong(self.what, label, type(o).__name__, f"a {self.lib} array like the inputs"))
            if self.lib in IMMUTABLE:
                raise TypeError(wrong(self.what, label, f"a {self.lib} array", f"None: {self.lib} arrays cannot be written"))
            if name not in expected:
                raise TypeError(wrong(self.what, label, "an array", f"None: there is no {name}"))
            source = self.kernel.declaration.gradients.get(name)
            shape, dtype = expected[name]
            if source in self.raw:
                dtype = self.raw[source].dtype
            if tuple(o.shape) != shape:
                raise ValueError(wrong(self.what, label, f"shape {tuple(o.shape)}", f"{shape}"))
            if o.dtype != dtype:
                raise TypeError(wrong(self.what, label, f"dtype {dtype_name(o.dtype)}", dtype_name(dtype)))
            if self.lib in WRITABLE:
                if self.lib == "numpy" and not o.flags.writeable:
                    raise ValueError(wrong(self.what, label, "a read-only array", "one that can be written"))
                for other, a in (*self.raw.items(), *taken):
                    if isinstance(a, Forgotten):
                        continue
                    same = _same_memory(o, a) and other in self.raw
                    if not same and np.shares_memory(memory(o), memory(a)):
                        raise ValueError(
                            wrong(
                                self.what,
                                label,
                                f"memory that overlaps {other}",
                                "memory of its own, or exactly one input's",
                            )
                        )
                if 0 in [s for s, n in zip(o.strides, o.shape, strict=True) if n > 1]:
                    raise ValueError(wrong(self.what, label, "an array whose elements share memory", "one element each"))
                taken.append((label, o))

    def _worded(self, error: OutOfRange) -> IndexError:
        position = tuple(int(i) for i in np.unravel_index(error.row, self.frame.lead)) if self.frame.lead else ()
        at = ", ".join(map(str, position))
        exempt = self.options.get("ignore_index")
        value = error.value if self.lib == "cupy" else int(self.raw[error.name][position])  # a uint64 was cut to 63 bits
        other = "" if exempt is None else f" or ignore_index ({exempt})"
        return IndexError(
            wrong(
                self.what,
                f"{error.name}[{at}]" if at else error.name,
                value,
                f"0 <= {error.name} < {error.columns}{other}",
            )
        )


def _same_memory(a: Any, b: Any) -> bool:
    return bool(address(a) == address(b) and a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype)


def _unbroadcast(xp: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """Sum a gradient over the axes along which its input was repeated."""
    if tuple(value.shape) == shape:
        return value
    if value.ndim < len(shape):
        return xp.reshape(value, shape)
    if value.ndim > len(shape):
        value = xp.sum(value, axis=tuple(range(value.ndim - len(shape))))
    repeated = tuple(i for i, (have, want) in enumerate(zip(value.shape, shape, strict=True)) if have != want)
    return xp.reshape(xp.sum(value, axis=repeated, keepdims=True) if repeated else value, shape)


def _double(xp: Any) -> Any:
    """What integers are computed in: float64, or float32 where the library has no wider one, as JAX by default."""
    if xp is np:
        return np.dtype(np.float64)
    known = xp.__array_namespace_info__().dtypes(kind="real floating")
    return known.get("float64", xp.float32)


def collect(kernel: Kernel, what: str, bound: Bound, roles: Mapping[str, type[Kind]]) -> Call:
    """Accept arrays and bring them into canonical form. `roles` gives the kinds of what is not an input."""
    d = kernel.declaration
    libs = {library(v) for v in bound.arrays.values() if not isinstance(v, bool | int | float | list | tuple)} - {"builtins"}
    if len(libs) > 1:
        raise TypeError(wrong(what, "arrays", f"a mix of {' and '.join(sorted(libs))}", "one library's"))
    lib = libs.pop() if libs else "numpy"
    raw = {n: accept(what, n, v, lib) for n, v in bound.arrays.items()}
    first = next(iter(raw.values()))
    xp = namespace(first)
    if lib == "numpy" and type(first) is not np.ndarray:
        raise TypeError(wrong(what, next(iter(raw)), type(first).__name__, "an array"))
    if lib != "numpy":
        devices = {str(array_api_compat.device(a)) for a in raw.values()} - {"None"}  # a traced array has none
        if len(devices) > 1:
            raise TypeError(wrong(what, "arrays", f"devices {' and '.join(sorted(devices))}", "one device"))
    classes = {n: dtype_class(xp, what, n, a.dtype) for n, a in raw.items()}
    kinds: dict[str, type[Kind]] = {}
    for n in raw:
        kinds[n] = d.inputs[n].kind(classes[n]) if n in d.inputs else roles[n]
        choices = d.inputs[n].kinds if n in d.inputs else ()
        if (kinds[n] is Index and classes[n] != "int") or (Index in choices and classes[n] == "bool"):
            other = " or floats" if len(choices) > 1 else ""
            raise TypeError(wrong(what, n, f"dtype {dtype_name(raw[n].dtype)}", f"integers{other}"))
    floats = {n: raw[n].dtype for n in raw if kinds[n] is not Index and classes[n] == "float"}
    wide = {n for n in raw if d.is_wide(n, kinds[n] in (Row, Scalar))}  # these do not decide
    found = list(dict.fromkeys(floats[n] for n in floats if n not in wide)) or list(dict.fromkeys(floats.values()))
    if {dtype_name(t) for t in found} >= HALF:  # neither holds the other
        one, other = (next(n for n in floats if dtype_name(floats[n]) == half) for half in sorted(HALF))
        raise TypeError(
            wrong(what, f"{one} and {other}", f"dtypes {' and '.join(sorted(HALF))}", "one dtype of half precision")
        )
    dtype = (found[0] if len(found) == 1 else xp.result_type(*found)) if found else _double(xp)
    shapes = {n: tuple(a.shape) for n, a in raw.items()}
    if d.check is not None:
        d.check(kinds, shapes, bound.options)
    present: Given = {n: (k, "int" if k is Index else "float") for n, k in kinds.items() if n in d.inputs}
    far = reach(kernel, default_given(d) | present, bound.options)
    matrices = any(Matrix in i.kinds for i in d.inputs.values())
    axis = bound.axis if far != "row" or matrices or kernel.has_axis else None
    if lib == "dask" and far != "row":  # flat, blocks would have to be put together anew
        axis, far = -1, "row"
    fr = frame(what, shapes, kinds, axis, far, bound.axis_given or matrices)
    canonical: dict[str, Any] = {}
    given: Given = {}
    for n, a in raw.items():
        if kinds[n] is not Index and a.dtype != (own := wide_dtype(xp, dtype) if n in wide else dtype):
            a = xp.astype(a, own)
        canonical[n] = fr.canonical(xp, a, kinds[n])
        given[n] = (kinds[n], "int" if kinds[n] is Index else "float")
    if far == "element" and lib == "numpy":
        fr, canonical = _keep_strides(fr, raw, canonical, dtype)
    return Call(kernel, what, xp, lib, dtype, raw, given, fr, canonical, bound.options)


def _keep_strides(fr: Frame, raw: Mapping[str, Any], canonical: dict[str, Any], dtype: Any) -> tuple[Frame, dict[str, Any]]:
    """For an element-wise kernel on arrays with gaps between rows: keep the rows rather than copy."""
    gaps = [a for a in raw.values() if not a.flags.c_contiguous and a.ndim == 2 and a.shape == fr.shape and a.dtype == dtype]
    if not gaps or len(fr.shape) != 2 or any(a.shape != fr.shape for a in raw.values()):
        return fr, canonical
    rows, columns = fr.shape
    return Frame(fr.shape, 1, rows, columns), {n: np.asarray(a, dtype) for n, a in raw.items()}


# --- directions ---


def forward(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`k(...)`."""
    d, what = kernel.declaration, kernel.__name__
    bound = bind(kernel, what, tuple(d.inputs), args, kwargs)
    require(what, d, bound, tuple(d.inputs))
    call = collect(kernel, what, bound, {})
    made = made_by(call)
    results = call.run(made, outs(what, made, bound.out))
    if set(kwargs) <= {"out"}:
        remember(call, "forward", args, made, made)
    return single(tuple(results[n] for n in made))


def made_by(call: Call) -> tuple[str, ...]:
    """The outputs that there are for the options given: a formula returns None for the others."""
    shapes = prepare_shapes(call.kernel, call.given, call.options)
    return tuple(n for n in call.kernel.declaration.outputs if n in shapes)


def _float_inputs(call: Call) -> tuple[str, ...]:
    return tuple(
        n
        for n in call.kernel.declaration.inputs
        if n in call.raw and dtype_class(call.xp, call.what, n, call.raw[n].dtype) == "float"
    )


def vjp(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """`k.vjp(...)`."""
    needs_backward(kernel)
    d, what = kernel.declaration, kernel.__name__
    bound = bind(kernel, what, tuple(d.inputs), args, kwargs)
    require(what, d, bound, tuple(d.inputs))
    call = collect(kernel, what, bound, {})
    wrt = tuple("d" + n for n in _float_inputs(call))
    roles = {n: kind_of(s) for n, s in prepare_shapes(kernel, call.given, call.options).items()}
    made = made_by(call)
    differentiable = tuple(n for n in d.differentiable if n in made)
    cotangents: Given = {"d" + n: (roles[n], "float") for n in differentiable}
    everything: Given = call.given | {n: (roles[n], "float") for n in roles} | cotangents
    reads = backward_reads(kernel, everything, call.options, wrt)
    for n in reads & call.raw.keys():
        for o in outs(what, made, bound.out).values():
            if call.lib in WRITABLE and library(o) == call.lib and np.may_share_memory(memory(o), memory(call.raw[n])):
                raise ValueError(wrong(what, "out", f"the memory of {n}", f"other memory: the pullback reads {n}"))
    keep = tuple(n for n in (*made, *d.saved) if n in reads)
    wanted = (*made, *(n for n in keep if n not in made))
    results = call.run(wanted, outs(what, made, bound.out))
    saved = {
        n: call.frame.canonical(call.xp, np.asarray(results[n]) if call.lib == "numpy" else results[n], roles[n]) for n in keep
    }
    kept_given = {n: g for n, g in call.given.items() if n in reads or d.inputs[n].optional}
    kept_canonical = {n: call.canonical[n] for n in kept_given}
    kept_raw = {n: a if n in kept_given else Forgotten(tuple(a.shape), a.dtype) for n, a in call.raw.items()}
    passed = tuple(call.raw)
    cached = {n: call.raw[n] for n in kept_given} | {n: results[n] for n in keep}
    order = tuple(n for n in d.backward_parameters if n not in d.options)
    # the same calls as `backward` would get; it has a short way for some
    usual = set(kwargs) <= {"out"} and len(d.inputs) == len(d.outputs) == 1 and set(order) == {*cached, *cotangents}
    shapes_out = {n: tuple(np.shape(results[n])) for n in differentiable}
    value = single(tuple(results[n] for n in made))
    del results  # what the pullback does not need is not kept alive by it
    call = Call(kernel, what, call.xp, call.lib, call.dtype, {}, {}, call.frame, {}, call.options)

    def pullback(*dy: Any, out: Any = None) -> Any:
        """The gradients for cotangents of the outputs."""
        label = f"{what} pullback"
        if len(dy) != len(differentiable):
            names = ", ".join(cotangents)
            raise TypeError(f"{label}: takes {len(differentiable)} cotangents ({names}; None for zero), got {len(dy)}")
        if all(value is None for value in dy):  # no cotangent at all stands for 1, in the fused pass
            raise TypeError(wrong(label, ", ".join(cotangents), "None", "at least one array"))
        arguments = tuple(cached[n] if n in cached else dy[0] for n in order) if usual else ()
        if arguments:
            short = kernel._short("backward", arguments)
            gradient = None if short is None else short(*arguments, out=out)
            if gradient is not None:
                return gradient
        given, raw, canonical = dict(kept_given), dict(kept_raw), dict(kept_canonical)
        for name, value in zip(differentiable, dy, strict=True):
            if value is None:
                continue
            array = accept(label, "d" + name, value, call.lib)
            if library(array) != call.lib:
                raise TypeError(wrong(label, "d" + name, type(array).__name__, f"a {call.lib} array like the inputs"))
            if tuple(array.shape) != shapes_out[name]:
                raise ValueError(wrong(label, "d" + name, f"shape {tuple(array.shape)}", f"{shapes_out[name]}"))
            own = wide_dtype(call.xp, call.dtype) if d.is_wide("d" + name, True) else call.dtype
            array = array if array.dtype == own else call.xp.astype(array, own)
            given["d" + name], canonical["d" + name] = (
                cotangents["d" + name],
                call.frame.canonical(call.xp, array, roles[name]),
            )
            raw["d" + name] = array
        canonical |= saved
        given |= {n: (roles[n], "float") for n in saved}
        given = {n: given[n] for n in sorted(given, key=lambda n: order.index(n) if n in order else len(order))}
        back = Call(kernel, label, call.xp, call.lib, call.dtype, raw, given, call.frame, canonical, call.options)
        gradients = _gradients(back, passed, out)
        if usual and all(type(a) in FAST for a in arguments):
            remember(back, "backward", arguments, wrt, wrt)
        return gradients

    return value, pullback


def _gradients(call: Call, names: tuple[str, ...], out: Any) -> Any:
    """One gradient for a single input, else a tuple over the inputs named, None where there is none."""
    floats = [n for n in names if n not in call.raw or dtype_class(call.xp, call.what, n, call.raw[n].dtype) == "float"]
    targets = outs(call.what, tuple("d" + n for n in names), out)
    results = call.run(tuple("d" + n for n in floats), targets)
    gradients = tuple(results.get("d" + n) for n in names)
    return gradients[0] if len(call.kernel.declaration.inputs) == 1 else gradients


def backward(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`k.backward(...)`."""
    needs_backward(kernel)
    d, what = kernel.declaration, f"{kernel.__name__}.backward"
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
            is_int = "int" in str(getattr(bound.arrays[n], "dtype", ""))
            given[n] = (i.kind("int" if is_int else "float"), "int" if is_int else "float")
    forward_task = prepare_shapes(kernel, given, bound.options)
    roles = {n: kind_of(s) for n, s in forward_task.items()}
    roles |= {"d" + n: roles[n] for n in d.differentiable if n in roles}
    for n in bound.arrays:
        if n not in d.inputs and n not in roles:
            raise TypeError(wrong(what, n, "an array", "None: there is no such output with these options"))
    call = collect(kernel, what, bound, roles)
    names = tuple(n for n, i in d.inputs.items() if n in call.raw or not i.optional)
    gradients = _gradients(call, names, bound.out)
    if set(kwargs) <= {"out"} and len(d.inputs) == 1:
        remember(call, "backward", args, ("d" + names[0],), ("d" + names[0],))
    return gradients


def value_and_grad(
    kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any], wrt: str | tuple[str, ...] | None
) -> tuple[Any, Any]:
    """`k.value_and_grad(...)`."""
    needs_backward(kernel)
    d, what = kernel.declaration, f"{kernel.__name__}.value_and_grad"
    bound = bind(kernel, what, tuple(d.inputs), args, kwargs)
    require(what, d, bound, tuple(d.inputs))
    call = collect(kernel, what, bound, {})
    names = _differentiated(call, wrt)
    gradients = tuple("d" + n for n in names)
    made = made_by(call)
    size = {"R": call.frame.rows, "C": call.frame.columns}
    shape = prepare_shapes(kernel, call.given, call.options)[d.outputs[0]]
    if math.prod(size.get(str(s), 2) for s in shape if s != 1) != 1 or (
        shape[0] == "R" and call.frame.axis is not None and call.frame.lead
    ):
        hint = "; pass reduction='mean' or 'sum'" if "reduction" in d.options else ""
        raise ValueError(wrong(what, "the result", "more than one number", f"one number{hint}"))
    ready = call.prepared((*made, *gradients))
    if without := [n for n in names if "d" + n not in ready.shapes]:
        usual = [n for n in d.default_wrt or _float_inputs(call) if n in call.raw and n not in without]
        raise ValueError(wrong(what, "wrt", repr(without[0]), f"one with a gradient: {', '.join(usual)}"))
    results = call.run((*made, *gradients), outs(what, gradients, bound.out))
    if set(kwargs) <= {"out"} and wrt is None:
        remember(call, "value_and_grad", args, (*made, *gradients), gradients)
    alone = isinstance(wrt, str) or (wrt is None and len(names) == 1)
    found = tuple(results.get(n) for n in gradients)
    return single(tuple(results[n] for n in made)), found[0] if alone else found


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
    bound = bind(kernel, what, tuple(d.inputs), args, kwargs)
    require(what, d, bound, tuple(d.inputs))
    call = collect(kernel, what, bound, {})
    ready = call.prepared(made_by(call))
    return ready.backend + (f": {ready.reason}" if ready.reason else "")
