"""From a caller's arguments to a task and back: the one place where arguments are checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat
import numpy as np

from xpnn.backends import choice
from xpnn.backends.arrays import (
    IMMUTABLE, Frame, accept, check_extents, dtype_class, dtype_name, frame, library, namespace, wrong,
)  # fmt: skip
from xpnn.backends.declare import Declaration, evaluate, is_dynamic
from xpnn.backends.kinds import Column, Full, Index, Kind, Matrix, Row, Scalar, Wide
from xpnn.backends.program import DType, Shape
from xpnn.backends.task import BackendError, Executable, OutOfRange, Task
from xpnn.backends.trace import SubsetError

if TYPE_CHECKING:
    from xpnn.backends.kernel import Kernel

Given = dict[str, tuple[type[Kind], DType]]


# --- binding arguments -------------------------------------------------------------------------------------------------


@dataclass
class Bound:
    """A call's arguments by role. `arrays` are as the caller passed them, None left out."""

    arrays: dict[str, Any]
    options: dict[str, Any]
    axis: int
    axis_given: bool
    out: Any


def _bind(kernel: Kernel, what: str, positional: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
    """Sort arguments into arrays, options, axis and out."""
    d = kernel.declaration
    if len(args) > len(positional):
        raise TypeError(f"{what}: takes {len(positional)} positional arguments ({', '.join(positional)}), got {len(args)}")
    values = dict(zip(positional, args, strict=False))
    arrays_known = {*positional, *d.inputs}
    options = dict(d.options)
    bound = Bound({}, options, -1, False, None)
    for name, value in kwargs.items():
        if name in values:
            raise TypeError(f"{what}: {name} was given twice")
        if name == "out":
            bound.out = value
        elif name == "axis" and kernel.has_axis:
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(wrong(what, "axis", repr(value), "an integer"))
            bound.axis, bound.axis_given = int(value), True
        elif name in d.options:
            options[name] = _option(what, name, value, d.options[name])
        elif name in arrays_known:
            values[name] = value
        else:
            known = [*arrays_known, *d.options, *(["axis"] if kernel.has_axis else []), "out"]
            raise TypeError(f"{what}: got an unexpected argument {name!r}, expected one of {', '.join(sorted(known))}")
    bound.arrays = {n: v for n, v in values.items() if v is not None}
    return bound


def _option(what: str, name: str, value: Any, default: Any) -> Any:
    """An option's value in its default's type."""
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool | np.bool_), "True or False"
    elif isinstance(default, int):
        fits, kind = isinstance(value, numbers.Integral) and not isinstance(value, bool), "an integer"
        value = int(value) if fits else value
    elif isinstance(default, float):
        fits, kind = isinstance(value, numbers.Real) and not isinstance(value, bool), "a number"
        value = float(value) if fits else value
    elif isinstance(default, str):
        fits, kind = isinstance(value, str), "a string"
    else:
        try:
            hash(value)
            fits, kind = True, ""
        except TypeError:
            fits, kind = False, "something hashable"
    if not fits:
        raise TypeError(wrong(what, name, repr(value), kind))
    return value


def _require(what: str, d: Declaration, bound: Bound, names: tuple[str, ...]) -> None:
    missing = [n for n in names if n not in bound.arrays and not (n in d.inputs and d.inputs[n].optional)]
    if missing:
        raise TypeError(f"{what}: missing {', '.join(missing)}")


# --- what a kernel makes of which kinds ----------------------------------------------------------------------------------


def _default_given(d: Declaration) -> Given:
    """The inputs as they usually come: required ones, of floats where there is a choice."""
    return {n: (i.kind("int" if Index in i.kinds else "float"), "int" if Index in i.kinds else "float") for n, i in d.inputs.items() if not i.optional}


def has_axis(kernel: Kernel) -> bool:
    d = kernel.declaration
    return aware(kernel) and not any(Matrix in i.kinds for i in d.inputs.values())


def aware(kernel: Kernel) -> bool:
    """Whether a kernel tells rows from columns; all others are run on flat arrays."""
    known = kernel._tasks.get("aware")
    if known is None:
        d = kernel.declaration
        known = any(k not in (Full, Scalar) for i in d.inputs.values() for k in i.kinds)
        if not known:
            try:
                job = Task(d, _default_given(d), dict(d.options), {}, (*d.outputs, *d.saved), "numpy", "float64")
                program = job.program()
                nodes = set(program.outputs.values())
                while grown := {a for n in nodes for a in n.args} - nodes:
                    nodes |= grown
                reduces = any(n.op in {"row_sum", "row_max", "column_sum", "sum_rows", "gather", "columns", "extent"} for n in nodes)
                known = reduces or any(n.shape != ("R", "C") for n in program.outputs.values())
            except SubsetError:
                known = True
        kernel._tasks["aware"] = known
    return bool(known)


def kind_of(shape: Shape) -> type[Kind]:
    """The kind of a value by its symbolic shape."""
    rows, columns = shape
    if rows == "R":
        return {"C": Full, 1: Row}.get(columns, Wide)
    if rows == 1:
        return Scalar if columns == 1 else Column
    return Matrix


def result_shapes(job: Task) -> dict[str, Shape]:
    """The symbolic shape of each result."""
    try:
        program = job.program()
    except SubsetError:
        return _shapes_by_trial(job)
    return {n: node.shape for n, node in program.outputs.items()}


def _shapes_by_trial(job: Task) -> dict[str, Shape]:
    """The same for a kernel that cannot be traced: run it on small arrays of telling sizes."""
    from xpnn.backends.composed import Shim

    extents = {Full: (3, 5), Row: (3, 1), Index: (3, 1), Column: (1, 5), Scalar: (1, 1)}
    values: dict[str, Any] = {}
    for name, (kind, dtype) in job.given.items():
        if kind not in extents:
            raise BackendError(f"kernel {job.declaration.name} uses a {kind.__name__} and leaves the subset that can be traced")
        values[name] = np.ones(extents[kind], {"float": np.float64, "int": np.int64, "bool": np.bool_}[dtype])
    with np.errstate(all="ignore"):
        results = evaluate(job.declaration, Shim(np, "cpu"), values, {**job.static, **job.numbers}, job.wanted)
    symbols: dict[int, Any] = {3: "R", 5: "C", 1: 1}
    shapes = {n: np.shape(v) or (1, 1) for n, v in results.items() if v is not None}
    return {n: (symbols[s[0]], symbols[s[1]]) for n, s in shapes.items()}


# --- running -----------------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A task made executable, and where it runs."""

    job: Task
    execute: Executable
    shapes: dict[str, Shape]
    symbols: dict[str, Shape]
    backend: str
    reason: str


def prepare(kernel: Kernel, given: Given, options: Mapping[str, Any], wanted: tuple[str, ...], lib: str, dtype: str) -> Prepared:
    """The prepared task, from the kernel's store or made now.

    Raises
    ------
    BackendError
        Where a backend that was asked for by name cannot serve.
    """
    d = kernel.declaration
    asked = choice.current()
    static = {n: v for n, v in options.items() if not is_dynamic(d, n, v)}
    dynamic = {n: v for n, v in options.items() if n not in static}
    types = tuple((n, type(v), v) for n, v in static.items())
    key = (asked, lib, dtype, tuple(given.items()), types, tuple((n, type(v)) for n, v in dynamic.items()), wanted)
    found = kernel._tasks.get(key)
    if found is None:
        job = Task(d, given, static, dynamic, wanted, lib, dtype)
        chosen = choice.for_library(lib) if asked == "auto" else choice.backend(asked)
        reason = ""
        try:
            execute = chosen.prepare(job)
        except BackendError as error:
            if asked != "auto":
                raise
            reason, chosen = str(error), choice.backend("array-api")
            execute = chosen.prepare(job)
        try:
            symbols = {n: node.shape for n, node in job.program().inputs.items()}
        except SubsetError:
            symbols = {}
        found = Prepared(job, execute, result_shapes(job), symbols, chosen.name, reason)
        kernel._tasks[key] = found
    return found  # type: ignore[no-any-return]


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
        sizes = {s: size for n, sym in ready.symbols.items() for s, size in zip(sym, self.canonical[n].shape, strict=True) if s != 1}
        sizes |= {"R": self.frame.rows, "C": self.frame.columns}
        expected = {n: tuple(1 if s == 1 else sizes[s] for s in ready.shapes[n]) for n in wanted if n in ready.shapes}
        self._check_out(out, {n: self.public_shape(n, ready.shapes[n], expected[n]) for n in expected})
        if self.frame.rows == 0 or self.frame.columns == 0:
            results = self._nothing(expected)
        else:
            targets = {n: self._target(o, ready.shapes[n]) for n, o in out.items() if n in ready.shapes}
            targets = {n: t for n, t in targets.items() if t is not None}
            values = {n: v for n, v in self.options.items() if n in ready.job.numbers}
            try:
                results = ready.execute(self.xp, self.canonical, values, targets)
            except OutOfRange as error:
                raise self._worded(error) from None
            results = {n: v for n, v in results.items() if v is not None}
        return {n: self._settled(n, results[n], ready.shapes[n], expected[n], out.get(n)) for n in wanted if n in results}

    def public_shape(self, name: str, shape: Shape, canonical: tuple[int, ...]) -> tuple[int, ...]:
        source = self.kernel.declaration.gradients.get(name)
        if source in self.raw:
            return tuple(self.raw[source].shape)
        return self.frame.result_shape(shape, canonical)

    def _settled(self, name: str, value: Any, shape: Shape, expected: tuple[int, ...], out: Any) -> Any:
        """A result in the caller's shape and dtype, in `out` if there is one."""
        xp = self.xp
        source = self.kernel.declaration.gradients.get(name)
        value = xp.broadcast_to(value, expected) if tuple(np.shape(value)) != expected else value
        target = self.public_shape(name, shape, expected)
        value = self.frame.restore(xp, value, shape)
        if source in self.raw:
            value = _unbroadcast(xp, value, target)
            if value.dtype != self.raw[source].dtype:
                value = xp.astype(value, self.raw[source].dtype)
        if out is None:
            return value[()] if target == () and self.lib == "numpy" else value
        if value is not out and not (self.lib == "numpy" and _same_memory(value, out)):
            out[...] = value
        return out

    def _nothing(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Results where there are no rows or no columns."""
        empty: dict[str, Any] = {}
        for name, shape in expected.items():
            if self.frame.columns == 0 and self.frame.rows and math.prod(shape):
                raise ValueError(wrong(self.what, next(iter(self.raw)), f"shape {self.frame.shape}", f"at least one element along axis {self.frame.axis}"))
            mean = shape == (1, 1) and self.options.get("reduction") == "mean" and name in self.kernel.declaration.outputs
            empty[name] = self.xp.full(shape, math.nan if mean else 0.0, dtype=self.dtype)
        return empty

    def _target(self, out: Any, shape: Shape) -> Any:
        """`out` as canonical memory, if it can be viewed so."""
        if self.lib != "numpy":
            return None
        kind = kind_of(shape)
        if kind is Full and out.shape != self.frame.shape:
            return None
        view = self.frame.canonical(self.xp, out, kind)
        return view if np.shares_memory(view, out) else None

    def _check_out(self, out: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        taken: list[tuple[str, Any]] = []
        for name, o in out.items():
            label = f"out[{name}]" if len(out) > 1 else "out"
            if library(o) != self.lib:
                raise TypeError(wrong(self.what, label, type(o).__name__, f"a {self.lib} array like the inputs"))
            if self.lib in IMMUTABLE:
                raise TypeError(wrong(self.what, label, f"a {self.lib} array", f"None: {self.lib} arrays cannot be written"))
            if name not in shapes:
                raise TypeError(wrong(self.what, label, "an array", f"None: there is no {name}"))
            source = self.kernel.declaration.gradients.get(name)
            dtype = self.raw[source].dtype if source in self.raw else self.dtype
            if tuple(o.shape) != shapes[name]:
                raise ValueError(wrong(self.what, label, f"shape {tuple(o.shape)}", f"{shapes[name]}"))
            if o.dtype != dtype:
                raise TypeError(wrong(self.what, label, f"dtype {dtype_name(o.dtype)}", dtype_name(dtype)))
            if self.lib == "numpy":
                if not o.flags.writeable:
                    raise ValueError(wrong(self.what, label, "a read-only array", "one that can be written"))
                for other, a in (*self.raw.items(), *taken):
                    if isinstance(a, Forgotten):
                        continue
                    same = _same_memory(o, a) and other in self.raw
                    if not same and np.shares_memory(o, a):
                        raise ValueError(wrong(self.what, label, f"memory that overlaps {other}", "memory of its own, or exactly one input's"))
                taken.append((label, o))

    def _worded(self, error: OutOfRange) -> IndexError:
        position = tuple(int(i) for i in np.unravel_index(error.row, self.frame.lead)) if self.frame.lead else ()
        at = ", ".join(map(str, position))
        exempt, value = self.options.get("ignore_index"), int(self.raw[error.name][position])
        other = "" if exempt is None else f" or ignore_index ({exempt})"
        return IndexError(wrong(self.what, f"{error.name}[{at}]" if at else error.name, value, f"0 <= {error.name} < {error.columns}{other}"))


def _same_memory(a: Any, b: Any) -> bool:
    return bool(a.__array_interface__["data"][0] == b.__array_interface__["data"][0] and a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype)


def _unbroadcast(xp: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """Sum a gradient over the axes along which its input was repeated."""
    if tuple(value.shape) == shape:
        return value
    if value.ndim > len(shape):
        value = xp.sum(value, axis=tuple(range(value.ndim - len(shape))))
    repeated = tuple(i for i, (have, want) in enumerate(zip(value.shape, shape, strict=True)) if have != want)
    return xp.reshape(xp.sum(value, axis=repeated, keepdims=True) if repeated else value, shape)


def _collect(kernel: Kernel, what: str, bound: Bound, roles: Mapping[str, type[Kind]]) -> Call:
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
        devices = {str(d) for a in raw.values() if (d := array_api_compat.device(a)) is not None}  # a traced array has none
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
    floats = [raw[n].dtype for n in raw if kinds[n] is not Index and classes[n] == "float"]
    dtype = xp.result_type(*floats) if floats else np.dtype(np.float64) if xp is np else xp.float64
    shapes = {n: tuple(a.shape) for n, a in raw.items()}
    if d.check is not None:
        d.check(kinds, shapes, bound.options)
    fr = frame(what, shapes, kinds, bound.axis, aware(kernel), bound.axis_given)
    canonical: dict[str, Any] = {}
    given: Given = {}
    for n, a in raw.items():
        if kinds[n] is not Index and a.dtype != dtype:
            a = xp.astype(a, dtype)
        canonical[n] = fr.canonical(xp, a, kinds[n])
        given[n] = (kinds[n], "int" if kinds[n] is Index else "float")
    if not aware(kernel) and lib == "numpy":
        fr, canonical = _keep_strides(fr, raw, canonical, dtype)
    return Call(kernel, what, xp, lib, dtype, raw, given, fr, canonical, bound.options)


def _keep_strides(fr: Frame, raw: Mapping[str, Any], canonical: dict[str, Any], dtype: Any) -> tuple[Frame, dict[str, Any]]:
    """For an element-wise kernel on arrays with gaps between rows: keep the rows rather than copy."""
    gaps = [a for a in raw.values() if not a.flags.c_contiguous and a.ndim == 2 and a.shape == fr.shape and a.dtype == dtype]
    if not gaps or len(fr.shape) != 2 or any(a.shape != fr.shape for a in raw.values()):
        return fr, canonical
    rows, columns = fr.shape
    return Frame(fr.shape, 1, rows, columns), {n: np.asarray(a, dtype) for n, a in raw.items()}


# --- directions ----------------------------------------------------------------------------------------------------------


def _outs(what: str, names: tuple[str, ...], out: Any) -> dict[str, Any]:
    """`out` by result: one array for one result, else a tuple."""
    if out is None:
        return {}
    values = out if isinstance(out, tuple) else (out,)
    if len(values) != len(names):
        raise TypeError(wrong(what, "out", f"{len(values)} arrays", f"{len(names)}: {', '.join(names)}"))
    return {n: v for n, v in zip(names, values, strict=True) if v is not None}


def _single(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def forward(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`k(...)`."""
    d, what = kernel.declaration, kernel.__name__
    bound = _bind(kernel, what, tuple(d.inputs), args, kwargs)
    _require(what, d, bound, tuple(d.inputs))
    call = _collect(kernel, what, bound, {})
    results = call.run(d.outputs, _outs(what, d.outputs, bound.out))
    if set(kwargs) <= {"out"}:
        remember(call, "forward", args, d.outputs, d.outputs)
    return _single(tuple(results[n] for n in d.outputs))


def _float_inputs(call: Call) -> tuple[str, ...]:
    return tuple(n for n in call.kernel.declaration.inputs if n in call.raw and dtype_class(call.xp, call.what, n, call.raw[n].dtype) == "float")


def _needs_backward(kernel: Kernel) -> None:
    if kernel.declaration.backward is None:
        name = kernel.__name__
        raise TypeError(f"{name}: it has no backward; add one with @{name}.backward above a function (xp, dy, ...)")


def vjp(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """`k.vjp(...)`."""
    _needs_backward(kernel)
    d, what = kernel.declaration, kernel.__name__
    bound = _bind(kernel, what, tuple(d.inputs), args, kwargs)
    _require(what, d, bound, tuple(d.inputs))
    call = _collect(kernel, what, bound, {})
    wrt = tuple("d" + n for n in _float_inputs(call))
    shapes = call.prepared((*d.outputs, *d.saved)).shapes
    roles = {n: kind_of(s) for n, s in shapes.items()}
    cotangents: Given = {"d" + n: (roles[n], "float") for n in d.outputs}
    everything: Given = call.given | {n: (roles[n], "float") for n in (*d.outputs, *d.saved)} | cotangents
    static = {n: v for n, v in call.options.items() if not is_dynamic(d, n, v)}
    numbers_ = {n: v for n, v in call.options.items() if n not in static}
    try:
        reads = Task(d, everything, static, numbers_, wrt, call.lib, "").program().reads()
    except SubsetError:
        reads = set(d.backward_parameters)
    keep = tuple(n for n in (*d.outputs, *d.saved) if n in reads)
    wanted = (*d.outputs, *(n for n in keep if n not in d.outputs))
    results = call.run(wanted, _outs(what, d.outputs, bound.out))
    saved = {n: call.frame.canonical(call.xp, call.xp.asarray(results[n]), roles[n]) for n in keep}
    kept_given = {n: g for n, g in call.given.items() if n in reads or d.inputs[n].optional}
    kept_canonical = {n: call.canonical[n] for n in kept_given}
    kept_raw = {n: a if n in kept_given else Forgotten(tuple(a.shape), a.dtype) for n, a in call.raw.items()}
    passed = tuple(call.raw)
    shapes_out = {n: tuple(np.shape(results[n])) for n in d.outputs}
    value = _single(tuple(results[n] for n in d.outputs))
    del results  # what the pullback does not need is not kept alive by it
    call = Call(kernel, what, call.xp, call.lib, call.dtype, {}, {}, call.frame, {}, call.options)

    def pullback(*dy: Any, out: Any = None) -> Any:
        """The gradients for cotangents of the outputs."""
        label = f"{what} pullback"
        if len(dy) != len(d.outputs):
            raise TypeError(f"{label}: takes {len(d.outputs)} cotangents, got {len(dy)}")
        given, raw, canonical = dict(kept_given), dict(kept_raw), dict(kept_canonical)
        for name, value in zip(d.outputs, dy, strict=True):
            if value is None:
                continue
            array = accept(label, "d" + name, value, call.lib)
            if library(array) != call.lib:
                raise TypeError(wrong(label, "d" + name, f"a {library(array)} array", f"a {call.lib} array like the inputs"))
            if tuple(array.shape) != shapes_out[name]:
                raise ValueError(wrong(label, "d" + name, f"shape {tuple(array.shape)}", f"{shapes_out[name]}"))
            array = array if array.dtype == call.dtype else call.xp.astype(array, call.dtype)
            given["d" + name], canonical["d" + name] = cotangents["d" + name], call.frame.canonical(call.xp, array, roles[name])
            raw["d" + name] = array
        canonical |= saved
        given |= {n: (roles[n], "float") for n in saved}
        back = Call(kernel, label, call.xp, call.lib, call.dtype, raw, given, call.frame, canonical, call.options)
        return _gradients(back, passed, out)

    return value, pullback


def _gradients(call: Call, names: tuple[str, ...], out: Any) -> Any:
    """One gradient for a single input, else a tuple over the inputs named, None where there is none."""
    floats = [n for n in names if n not in call.raw or dtype_class(call.xp, call.what, n, call.raw[n].dtype) == "float"]
    outs = _outs(call.what, tuple("d" + n for n in names), out)
    results = call.run(tuple("d" + n for n in floats), outs)
    gradients = tuple(results.get("d" + n) for n in names)
    return gradients[0] if len(call.kernel.declaration.inputs) == 1 else gradients


def backward(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`k.backward(...)`."""
    _needs_backward(kernel)
    d, what = kernel.declaration, f"{kernel.__name__}.backward"
    arrays = tuple(n for n in d.backward_parameters if n not in d.options)
    positional = (*arrays, *(n for n in (*d.inputs, *d.outputs, *d.saved) if n not in arrays))
    bound = _bind(kernel, what, positional, args, kwargs)
    _require(what, d, bound, tuple(n for n in d.cotangents() if n in arrays)[:1])
    made = {*d.outputs, *d.saved}
    if any(n in made and n not in bound.arrays for n in arrays):  # to be recomputed
        lacking = [n for n in arrays if n in made and n not in bound.arrays]
        missing = [n for n, i in d.inputs.items() if not i.optional and n not in bound.arrays]
        if missing:
            raise TypeError(f"{what}: missing {', '.join(lacking)} (or {', '.join(missing)}, to compute it from)")
    _require(what, d, bound, tuple(n for n in arrays if n in d.inputs))
    given = _default_given(d)
    for n, i in d.inputs.items():
        if n in bound.arrays:
            is_int = "int" in str(getattr(bound.arrays[n], "dtype", ""))
            given[n] = (i.kind("int" if is_int else "float"), "int" if is_int else "float")
    forward_task = prepare_shapes(kernel, given, bound.options)
    roles = {n: kind_of(s) for n, s in forward_task.items()}
    roles |= {"d" + n: roles[n] for n in d.outputs}
    call = _collect(kernel, what, bound, roles)
    names = tuple(n for n, i in d.inputs.items() if n in call.raw or not i.optional)
    return _gradients(call, names, bound.out)


def prepare_shapes(kernel: Kernel, given: Given, options: Mapping[str, Any]) -> dict[str, Shape]:
    """The symbolic shapes of all outputs and saved values."""
    d = kernel.declaration
    static = {n: v for n, v in options.items() if not is_dynamic(d, n, v)}
    dynamic = {n: v for n, v in options.items() if n not in static}
    key = ("shapes", tuple(given.items()), tuple(static.items()), tuple(dynamic))
    if key not in kernel._tasks:
        kernel._tasks[key] = result_shapes(Task(d, given, static, dynamic, (*d.outputs, *d.saved), "numpy", "float64"))
    return kernel._tasks[key]  # type: ignore[no-any-return]


def value_and_grad(
    kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any], wrt: str | tuple[str, ...] | None
) -> tuple[Any, Any]:
    """`k.value_and_grad(...)`."""
    _needs_backward(kernel)
    d, what = kernel.declaration, f"{kernel.__name__}.value_and_grad"
    bound = _bind(kernel, what, tuple(d.inputs), args, kwargs)
    _require(what, d, bound, tuple(d.inputs))
    call = _collect(kernel, what, bound, {})
    floats = _float_inputs(call)
    names = (wrt,) if isinstance(wrt, str) else wrt if wrt is not None else tuple(n for n in d.default_wrt or floats if n in floats)
    for n in names:
        if n not in floats:
            raise ValueError(wrong(what, "wrt", repr(n), f"floating inputs that were passed: {', '.join(floats)}"))
    gradients = tuple("d" + n for n in names)
    ready = call.prepared((*d.outputs, *gradients))
    size = {"R": math.prod(call.frame.lead), "C": call.frame.columns}
    shape = ready.shapes[d.outputs[0]]
    if math.prod(size.get(str(s), 2) for s in shape if s != 1) != 1 or (shape[0] == "R" and call.frame.lead):
        hint = "; pass reduction='mean' or 'sum'" if "reduction" in d.options else ""
        raise ValueError(wrong(what, "the result", "more than one number", f"one number{hint}"))
    results = call.run((*d.outputs, *gradients), _outs(what, gradients, bound.out))
    if set(kwargs) <= {"out"} and wrt is None:
        remember(call, "value_and_grad", args, (*d.outputs, *gradients), gradients)
    for n in names:
        if "d" + n not in results:
            raise ValueError(wrong(what, "wrt", repr(n), "an input that the kernel has a gradient for"))
    single = isinstance(wrt, str) or (wrt is None and len(names) == 1)
    found = tuple(results.get(n) for n in gradients)
    return _single(tuple(results[n] for n in d.outputs)), found[0] if single else found


# --- the fast path: positional, contiguous NumPy arrays, seen before -------------------------------------------------------


def remember(call: Call, direction: str, args: tuple[Any, ...], wanted: tuple[str, ...], given_out: tuple[str, ...]) -> None:
    """Store a short way for calls like this one, where there is one.

    It is a function of the arrays, written for their number, kinds and dimensions; it returns None where anything is not
    as it was when it was made, and the call then takes the long way, which also words the errors.
    """
    ready, fr = call.prepared(wanted), call.frame
    compiled = getattr(ready.execute, "compiled", None)
    kinds = {n: kind for n, (kind, _) in call.given.items()}
    if compiled is None or len(args) != len(call.raw) or not all(type(a) is np.ndarray and a.ndim for a in args[:1]):
        return
    e = compiled.emitted
    known = all(type(a) is np.ndarray and kinds[n] in (Full, Index) and a.dtype == (np.int64 if kinds[n] is Index else call.dtype) for n, a in zip(kinds, args, strict=True))
    results = {n: ready.shapes[n] for n in e.outputs}
    plain = set(results.values()) <= {("R", "C"), ("R", 1), (1, 1)} and fr.axis in (None, len(fr.shape) - 1)
    ambiguous = Index in kinds.values() and len(fr.shape) > 2
    if not known or not plain or ambiguous or tuple(e.inputs) != tuple(kinds) or set(wanted) != set(results):
        return

    first = next(iter(kinds))
    two_dimensional = len(fr.shape) == 2 and fr.axis is not None
    lines = [f"def fast({', '.join(kinds)}, out=None):", f"    shape, size = {first}.shape, {first}.size"]
    lines.append(f"    if type({first}) is not ndarray or not size or not {first}.flags.c_contiguous: return None")
    if fr.axis is None:
        lines.append("    rows, columns = 1, size")
    else:
        lines += ["    columns = shape[-1]", "    rows = size // columns"]
    passed = []
    for n, kind in kinds.items():
        if n != first:
            fits = "shape" if kind is Full else "shape[:-1]"
            lines.append(f"    if type({n}) is not ndarray or {n}.dtype is not {n}_dtype or {n}.shape != {fits}: return None")
            lines.append(f"    if not {n}.flags.c_contiguous: return None")
        view = f"{n}.reshape(rows, {'columns' if kind is Full else '1'})"
        passed.append(n if kind is Full and two_dimensional else view)
    for n, shape in results.items():
        extents = {("R", "C"): "(rows, columns)", ("R", 1): "(rows, 1)", (1, 1): "(1, 1)"}[shape]  # type: ignore[index]
        if given_out == (n,) and shape == ("R", "C"):
            free = f"{first} is out" if (n, first) not in e.unsafe else "False"
            lines += [f"    if out is None: {n} = empty({extents}, dtype)", "    else:"]
            lines.append("        if type(out) is not ndarray or out.dtype is not dtype or out.shape != shape: return None")
            lines.append("        if not out.flags.c_contiguous or not out.flags.writeable: return None")
            lines.append(f"        if {' or '.join(f'may_share_memory(out, {k})' for k in kinds)}:")
            lines.append(f"            if not ({free}): return None")
            lines.append(f"        {n} = out.reshape({extents})")
        else:
            lines.append(f"    {n} = empty({extents}, dtype)")
        passed.append(n)
    if len(given_out) != 1 or results[given_out[0]] != ("R", "C"):
        lines.insert(1, "    if out is not None: return None")
    passed += [f"{n}_value" for n in e.numbers]
    lines.append(f"    if size < limit: outside = entry(0, 1, {', '.join(passed)})")
    lines.append(f"    else: outside = run(size, {', '.join(passed)})")
    lines.append("    if outside >= 0: return None")
    back = {("R", "C"): "" if two_dimensional else ".reshape(shape)", ("R", 1): ".reshape(shape[:-1])[()]", (1, 1): "[0, 0]"}
    values = {n: n + back[results[n]] for n in wanted}  # type: ignore[index]
    for n in given_out:
        if results[n] == ("R", "C"):
            lines.append(f"    if out is not None: return {', '.join('out' if k == n else v for k, v in values.items())}")
    lines.append(f"    return {', '.join(values.values())}")
    scope = {f"{n}_dtype": a.dtype for n, a in zip(kinds, args, strict=True)} | {f"{n}_value": call.options[n] for n in e.numbers}
    scope |= {"may_share_memory": np.may_share_memory}
    scope |= {"ndarray": np.ndarray, "empty": np.empty, "dtype": call.dtype, "limit": compiled.serial_below}
    scope |= {"entry": compiled.call, "run": compiled.direct}
    exec("\n".join(lines), scope)
    call.kernel._fast[direction, *choice.state(), args[0].dtype, args[0].ndim, len(args)] = scope["fast"]


# --- looking inside ---------------------------------------------------------------------------------------------------------


def example_task(kernel: Kernel, dtype: str, direction: str, options: dict[str, Any], backend: str) -> Prepared:
    """The prepared task of a direction, for the inputs as they usually come."""
    d = kernel.declaration
    what = kernel.__name__
    given = _default_given(d)
    merged = dict(d.options)
    for n, v in options.items():
        if n in d.inputs and d.inputs[n].optional:
            given[n] = (d.inputs[n].kind("float"), "float")
        elif n in d.options:
            merged[n] = _option(what, n, v, d.options[n])
        else:
            raise TypeError(f"{what}: got an unexpected option {n!r}")
    gradients = tuple("d" + n for n, (kind, kind_dtype) in given.items() if kind_dtype == "float")
    if direction == "forward":
        wanted = d.outputs
    elif direction in ("backward", "value_and_grad"):
        _needs_backward(kernel)
        wanted = gradients if direction == "backward" else (*d.outputs, *(f"d{n}" for n in d.default_wrt or [g[1:] for g in gradients]))
    else:
        raise ValueError(wrong(what, "direction", repr(direction), "'forward', 'backward' or 'value_and_grad'"))
    if direction == "backward":
        roles = {n: kind_of(s) for n, s in prepare_shapes(kernel, given, merged).items()}
        known = {n: (roles[n], "float") for n in d.backward_parameters if n in roles}
        given = {n: g for n, g in given.items() if n in d.backward_parameters} | known  # type: ignore[assignment]
        given |= {"d" + n: (roles[n], "float") for n in d.outputs}
    with choice.use_backend(backend):
        return prepare(kernel, given, merged, wanted, "numpy", dtype)


def source(kernel: Kernel, backend: str, dtype: str, direction: str, options: dict[str, Any]) -> str:
    """`k.source(...)`."""
    if backend != "numba":
        raise BackendError(f"{kernel.__name__}.source: backend {backend!r} has no code of its own; expected 'numba'")
    ready = example_task(kernel, dtype, direction, options, "numba")
    return choice.backend("numba").source(ready.job.program(), dtype)  # type: ignore[attr-defined, no-any-return]


def explain(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """`k.explain(...)`."""
    d, what = kernel.declaration, kernel.__name__
    bound = _bind(kernel, what, tuple(d.inputs), args, kwargs)
    _require(what, d, bound, tuple(d.inputs))
    ready = _collect(kernel, what, bound, {}).prepared(d.outputs)
    return ready.backend + (f": {ready.reason}" if ready.reason else "")
