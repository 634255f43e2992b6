"""A caller's arrays in canonical form, and results back in the caller's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat
import numpy as np

from xpnn.backends import choice
from xpnn.backends.arrays import (
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
from xpnn.backends.bind import Bound
from xpnn.backends.kinds import Full, Index, Kind, Matrix, Row, Scalar
from xpnn.backends.prepare import Given, Prepared, default_given, kind_of, prepare, reach
from xpnn.backends.program import Shape
from xpnn.backends.task import HALF, OutOfRange

if TYPE_CHECKING:
    from xpnn.backends.kernel import Kernel


class Forgotten(NamedTuple):
    """What is left of an input that a pullback does not need."""

    shape: tuple[int, ...]
    dtype: Any


class Pulled(NamedTuple):
    """What a pullback makes, by name, of which results' cotangents; the kinds of results; and which arrays it reads."""

    gradients: tuple[str, ...]
    differentiable: tuple[str, ...]
    cotangents: Given
    roles: Given
    reads: set[str]


@dataclass(eq=False)
class Plan:
    """What calls share whose arrays are of the same kinds, dtypes and shapes, and whose specialising options are the same.

    `casts` are the dtypes of those arrays that are not used in their own. `asked` are the options that a kernel's `check` was
    last shown, `options` what it made of them; None where it left them as they were. `forms` is filled as results are asked
    for, `names` with lists of arguments and results that were worked out, `pulled` and `backward` with what their pullbacks do,
    and with the plans of those.
    """

    xp: Any
    lib: str
    dtype: Any
    given: Given
    frame: Frame
    casts: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] | None = None
    forms: dict[Any, Form] = field(default_factory=dict)
    names: dict[Any, tuple[str, ...]] = field(default_factory=dict)
    pulled: Pulled | None = None
    backward: dict[Any, Plan] = field(default_factory=dict)


class Form(NamedTuple):
    """A task made executable, with the results' canonical shapes, and what they are for the caller: shape and dtype."""

    ready: Prepared
    expected: dict[str, tuple[int, ...]]
    public: dict[str, tuple[tuple[int, ...], Any]]


@dataclass
class Call:
    """Accepted arrays, `raw`, and the plan to bring them into canonical form and take results back by."""

    kernel: Kernel
    what: str
    plan: Plan
    raw: dict[str, Any]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        plan = self.plan
        self.xp, self.lib, self.dtype, self.given, self.frame = plan.xp, plan.lib, plan.dtype, plan.given, plan.frame

    def prepared(self, wanted: tuple[str, ...]) -> Prepared:
        return self.form(wanted).ready

    def form(self, wanted: tuple[str, ...]) -> Form:
        """How the results wanted are made.

        Raises
        ------
        ValueError
            Where an argument's extent differs from that of an earlier one.
        BackendError
            Where a backend that was asked for by name cannot serve.
        """
        key = choice.current(), wanted
        found = self.plan.forms.get(key)
        if found is None:
            ready = prepare(self.kernel, self.given, self.options, wanted, self.lib, dtype_name(self.dtype))
            shapes = {n: tuple(a.shape) for n, a in self.raw.items()}
            extents = {n: self.frame.extents(shapes[n], kind) for n, (kind, _) in self.given.items()}
            if ready.symbols:
                check_extents(self.what, shapes, extents, ready.symbols)
            sizes = {"R": self.frame.rows, "C": self.frame.columns}
            for name, symbols in ready.symbols.items():
                sizes |= {s: size for s, size in zip(symbols, extents[name], strict=True) if isinstance(s, str)}
            expected = {n: tuple(1 if s == 1 else sizes[s] for s in ready.shapes[n]) for n in wanted if n in ready.shapes}
            public = {n: (self.public_shape(n, ready.shapes[n], e), self.dtype_of(n, ready)) for n, e in expected.items()}
            found = self.plan.forms[key] = Form(ready, expected, public)
        return found

    def arrays(self, planes: bool = False) -> dict[str, Any]:
        """The arrays in canonical form."""
        frame, xp, casts = self.frame, self.xp, self.plan.casts
        canonical = {}
        for n, (kind, _) in self.given.items():
            array = xp.astype(self.raw[n], casts[n]) if n in casts else self.raw[n]
            canonical[n] = frame.canonical(xp, array, kind, planes)
        return canonical

    def run(self, wanted: tuple[str, ...], out: Mapping[str, Any]) -> dict[str, Any]:
        """Results by name, canonical; `out` by name in the caller's shapes."""
        ready, expected, public = form = self.form(wanted)
        if out:
            self._check_out(out, public)
        if self.frame.rows == 0 or self.frame.columns == 0:
            results, done = self._nothing(expected, ready), {}
        else:
            planes = self.frame.has_planes and getattr(ready.execute, "takes_planes", False)
            targets = {n: self._target(o, ready.shapes[n], planes) for n, o in out.items() if n in ready.shapes}
            targets = {n: t for n, t in targets.items() if t is not None}
            values = {n: v for n, v in self.options.items() if n in ready.job.numbers}
            try:
                results = ready.execute(self.xp, self.arrays(planes), values, targets)
            except OutOfRange as error:
                raise self._worded(error) from None
            results = {n: v for n, v in results.items() if v is not None}
            done = {n: out[n] for n, t in targets.items() if results.get(n) is t}
        with np.errstate(all="ignore"):  # what is too large for half precision becomes an infinity
            return {n: done[n] if n in done else self._settled(n, results[n], form, out.get(n)) for n in wanted if n in results}

    def public_shape(self, name: str, shape: Shape, canonical: tuple[int, ...]) -> tuple[int, ...]:
        source = self.kernel.declaration.gradients.get(name)
        if source in self.raw:
            return tuple(self.raw[source].shape)
        return self.frame.result_shape(shape, canonical)

    def dtype_of(self, name: str, ready: Prepared) -> Any:
        """A result's dtype."""
        source = self.kernel.declaration.gradients.get(name)
        if source in self.raw:
            return self.raw[source].dtype
        if name in ready.integers:
            return np.dtype(np.int64) if self.lib in WRITABLE else self.xp.asarray(0).dtype
        wide = self.kernel.declaration.is_wide(name, ready.shapes[name][1] == 1)
        return wide_dtype(self.xp, self.dtype) if wide else self.dtype

    def _settled(self, name: str, value: Any, form: Form, out: Any) -> Any:
        """A result in the caller's shape and dtype, in `out` if there is one."""
        xp, shape = self.xp, form.ready.shapes[name]
        expected, (target, dtype) = form.expected[name], form.public[name]
        if value is out:
            return out
        if np.ndim(value) != 3 and tuple(np.shape(value)) != expected:
            value = xp.broadcast_to(value, expected)
        value = self.frame.restore(xp, value, shape)
        value = _unbroadcast(xp, value, target)
        if value.dtype != dtype:
            value = xp.astype(value, dtype)
        if out is None:
            return value[()] if target == () and self.lib == "numpy" else value
        if not (self.lib in WRITABLE and _same_memory(value, out)):
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

    def _target(self, out: Any, shape: Shape, planes: bool) -> Any:
        """`out` as canonical memory, if it can be viewed so."""
        if self.lib not in WRITABLE:
            return None
        kind = kind_of(shape)
        if kind is Full and out.shape != self.frame.shape:
            return None
        view = self.frame.canonical(self.xp, out, kind, planes)
        return view if np.may_share_memory(memory(view), memory(out)) else None  # a copy lies elsewhere

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
            shape, dtype = expected[name]
            if tuple(o.shape) != shape:
                raise ValueError(wrong(self.what, label, f"shape {tuple(o.shape)}", f"{shape}"))
            if o.dtype != dtype:
                raise TypeError(wrong(self.what, label, f"dtype {dtype_name(o.dtype)}", dtype_name(dtype)))
            if self.lib in WRITABLE:
                if self.lib == "numpy" and not o.flags.writeable:
                    raise ValueError(wrong(self.what, label, "a read-only array", "one that can be written"))
                for other, a in (*self.raw.items(), *taken):
                    if isinstance(a, Forgotten) or not np.shares_memory(memory(o), memory(a)):
                        continue
                    if not (_same_memory(o, a) and other in self.raw):
                        raise ValueError(
                            wrong(
                                self.what,
                                label,
                                f"memory that overlaps {other}",
                                "memory of its own, or exactly one input's",
                            )
                        )
                if not o.flags.c_contiguous and _overlaps_itself(o):
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


def _overlaps_itself(a: Any) -> bool:
    """Whether a step along some axis is shorter than what the axes of shorter steps span."""
    span = a.itemsize
    for step, count in sorted((abs(step), count) for step, count in zip(a.strides, a.shape, strict=True) if count > 1):
        if step < span:
            return True
        span += step * (count - 1)
    return False


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
    raw, options = bound.arrays, bound.options
    key: Any = None
    if all(type(a) is np.ndarray for a in raw.values()):
        arrays = tuple((n, a.dtype, a.shape) for n, a in raw.items())
        off = kernel.declaration.off
        chosen = tuple(  # of a run-time number its type
            type(v) if type(v) in (int, float) and (n not in off or v != off[n]) else (type(v), v) for n, v in options.items()
        )
        key = what, arrays, tuple(roles.items()), chosen, bound.axis, bound.axis_given, bound.span
    plan = kernel._plans.get(key)
    if plan is None or not _holds(kernel, plan, raw, options):
        plan, raw = _planned(kernel, what, bound, roles)
        if key is not None:
            if len(kernel._plans) >= 1000:
                kernel._plans.clear()
            kernel._plans[key] = plan
    elif plan.options is not None:
        options = plan.options
    if plan.frame.reach == "element" and plan.lib == "numpy" and _has_gaps(plan, raw):
        *lead, columns = shape = plan.frame.shape
        by_rows = Frame(shape, len(lead), math.prod(lead), columns)
        plan = Plan(plan.xp, plan.lib, plan.dtype, plan.given, by_rows, plan.casts)
    return Call(kernel, what, plan, raw, options)


def _holds(kernel: Kernel, plan: Plan, raw: Mapping[str, Any], options: dict[str, Any]) -> bool:
    """Whether a plan holds for options that may differ from its own in run-time numbers, which are checked anew."""
    check = kernel.declaration.check
    if check is None or options == plan.asked:
        return True
    checked = dict(options)
    check({n: kind for n, (kind, _) in plan.given.items()}, {n: a.shape for n, a in raw.items()}, checked)
    return plan.options is None and checked == options


def _has_gaps(plan: Plan, raw: Mapping[str, Any]) -> bool:
    """Whether an element-wise kernel's arrays have gaps between rows, which are then kept rather than copied."""
    shape = plan.frame.shape
    return (
        len(shape) >= 2
        and any(not a.flags.c_contiguous and a.shape == shape and a.dtype == plan.dtype for a in raw.values())
        and all(a.shape == shape for a in raw.values())
    )


def _planned(kernel: Kernel, what: str, bound: Bound, roles: Mapping[str, type[Kind]]) -> tuple[Plan, dict[str, Any]]:
    """The plan of a call, and its arrays."""
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
    asked, changed = dict(bound.options), None
    if d.check is not None:
        d.check(kinds, shapes, bound.options)
        changed = dict(bound.options) if bound.options != asked else None
    present: Given = {n: (k, "int" if k is Index else "float") for n, k in kinds.items() if n in d.inputs}
    far = reach(kernel, default_given(d) | present, bound.options)
    matrices = any(Matrix in i.kinds for i in d.inputs.values())
    axis = bound.axis if far != "row" or matrices or kernel.has_axis or d.span is not None else None
    if lib == "dask" and far != "row":  # flat, blocks would have to be put together anew
        axis, far = -1, "row"
    fr = frame(what, shapes, kinds, axis, far, bound.axis_given or matrices or d.span is not None, d.span, bound.span)
    given: Given = {n: (kinds[n], "int" if kinds[n] is Index else "float") for n in raw}
    own = {n: wide_dtype(xp, dtype) if n in wide else dtype for n in raw if kinds[n] is not Index}
    casts = {n: t for n, t in own.items() if raw[n].dtype != t}
    return Plan(xp, lib, dtype, given, fr, casts, asked, changed), raw
