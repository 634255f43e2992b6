"""What a kernel declares: its formulas, and what the names of their parameters mean."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from xpnn.backends.kinds import Column, Full, Index, Kind, Matrix, Row, Scalar, Wide, kinds_of
from xpnn.backends.program import DType, Program, Shape
from xpnn.backends.recording import Array, SubsetError, Trace
from xpnn.backends.trace import Namespace

Formula = Callable[..., Any]
Check = Callable[[dict[str, type[Kind]], dict[str, tuple[int, ...]], dict[str, Any]], None]


class Driver(Protocol):
    """Makes a task executable, by running other kernels."""

    @property
    def stages(self) -> tuple[Any, ...]:
        """The kernels that it runs."""
        ...

    def __call__(self, job: Any) -> Any: ...


@dataclass(frozen=True)
class Input:
    """An array parameter; `optional` ones may be None."""

    name: str
    kinds: tuple[type[Kind], ...]
    optional: bool

    def kind(self, dtype: DType) -> type[Kind]:
        """The kind that an array of a dtype has where the annotation leaves a choice."""
        if dtype == "int" and Index in self.kinds:
            return Index
        return next((k for k in self.kinds if k is not Index), Index)


@dataclass(eq=False)
class Declaration:
    """A kernel's formulas and the roles of their parameters."""

    name: str
    forward: Formula
    inputs: dict[str, Input]
    options: dict[str, Any]
    outputs: tuple[str, ...]
    saved: tuple[str, ...]
    off: dict[str, Any]
    default_wrt: tuple[str, ...] | None
    domain: dict[str, str]
    variants: tuple[dict[str, Any], ...]
    check: Check | None = None
    driver: Driver | None = None
    span: str | None = None
    wide: tuple[str, ...] = ()
    backward: Formula | None = None
    backward_parameters: tuple[str, ...] = field(default=())

    def cotangents(self) -> tuple[str, ...]:
        """The cotangents that the backward reads, the first output's in any case."""
        return tuple("d" + n for n in self.differentiable)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The outputs that have a cotangent."""
        return tuple(n for k, n in enumerate(self.outputs) if k == 0 or "d" + n in self.backward_parameters)

    def is_wide(self, name: str, narrow: bool) -> bool:
        """Whether half precision is too little for an array, and float32 is used in its place.

        So it is for a loss (an output of that name) and its cotangent, and for what there is one of in a row (`narrow`): saved
        values, and beside a loss all others. And for what the kernel declares so.
        """
        if name in self.saved:
            return narrow
        source = self.gradients.get(name) or name.removeprefix("d")
        if name in self.wide or source in self.wide:
            return True
        return "loss" in self.outputs and (narrow or name == "loss" or source == "loss")

    @functools.cached_property
    def gradients(self) -> dict[str, str]:
        """The input that each gradient belongs to."""
        return {"d" + name: name for name in self.inputs}


def parse(
    formula: Formula,
    *,
    outputs: tuple[str, ...],
    saved: tuple[str, ...],
    off: Mapping[str, Any],
    wrt: tuple[str, ...] | None,
    domain: Mapping[str, str],
    variants: tuple[dict[str, Any], ...],
    check: Check | None,
    driver: Driver | None,
    span: str | None,
    wide: tuple[str, ...],
) -> Declaration:
    """Read a forward formula's signature.

    Raises
    ------
    TypeError
        Where the signature is not that of a formula.
    """
    parameters = list(inspect.signature(formula).parameters.values())
    name = formula.__name__
    if not parameters or parameters[0].name != "xp":
        raise TypeError(f"kernel {name}: the first parameter must be xp, got {parameters[0].name if parameters else 'none'}")
    hints = typing.get_type_hints(formula)
    inputs: dict[str, Input] = {}
    options: dict[str, Any] = {}
    for p in parameters[1:]:
        kinds = kinds_of(hints.get(p.name))
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise TypeError(f"kernel {name}: *{p.name} is not a parameter a formula can have")
        if p.kind is not p.KEYWORD_ONLY or kinds is not None:
            if p.default not in (p.empty, None):
                raise TypeError(f"kernel {name}: input {p.name} may default to None only, got {p.default!r}")
            inputs[p.name] = Input(p.name, kinds or (Full,), p.default is None)
        elif p.default is p.empty:
            raise TypeError(f"kernel {name}: option {p.name} needs a default")
        else:
            options[p.name] = p.default
    if not inputs:
        raise TypeError(f"kernel {name}: at least one input is needed")
    names_given = {"outputs": outputs, "saved": saved, "wrt": wrt or (), "wide": wide}
    for setting, value, fits, expected in (
        *((n, v, _holds_only(v, str), "a tuple of names") for n, v in names_given.items()),
        ("variants", variants, _holds_only(variants, Mapping), "a tuple of dicts"),
        *((n, v, isinstance(v, Mapping), "a dict") for n, v in (("off", off), ("domain", domain))),
    ):
        if not fits:
            raise TypeError(f"kernel {name}: {setting}: got {value!r}, expected {expected}")
    if not outputs:
        raise TypeError(f"kernel {name}: outputs: got none, expected at least one name")
    for what, keys, known in (
        ("off", off, options), ("wrt", wrt or (), inputs), ("domain", domain, inputs), ("wide", wide, [*inputs, *outputs]),
        *(("variants", v, options) for v in variants),
    ):  # fmt: skip
        for key in keys:
            if key not in known:
                kind = "option" if known is options else "input" if known is inputs else "input or output"
                raise TypeError(f"kernel {name}: {what} names {key!r}, which is not an {kind}")
    if span is not None and not str(span).isidentifier():
        raise TypeError(f"kernel {name}: span: got {span!r}, expected a name")
    names = [*inputs, *options, *outputs, *saved, *([] if span is None else [span])]
    twice = {n for n in names if names.count(n) > 1 or n in {"xp", "axis", "out", "wrt"}}
    if twice:
        raise TypeError(f"kernel {name}: the names {sorted(twice)} stand for two things")
    known_off, domains = dict(off), dict(domain)
    return Declaration(
        name, formula, inputs, options, outputs, saved, known_off, wrt, domains, variants, check, driver, span, wide
    )


def _holds_only(values: Any, kind: type) -> bool:
    """Whether a setting is a tuple or a list of such: a string would pass for its letters."""
    return isinstance(values, tuple | list) and all(isinstance(v, kind) for v in values)


def parse_backward(declaration: Declaration, formula: Formula) -> None:
    """Attach a backward formula; each parameter must be something that is known by then."""
    d = declaration
    known = {*d.inputs, *d.options, *d.outputs, *d.saved, *("d" + n for n in d.outputs)}
    parameters = list(inspect.signature(formula).parameters)
    if not parameters or parameters[0] != "xp":
        raise TypeError(f"backward of {d.name}: the first parameter must be xp")
    for p in parameters[1:]:
        if p not in known:
            raise TypeError(f"backward of {d.name}: parameter {p!r} is none of {sorted(known)}")
    d.backward, d.backward_parameters = formula, tuple(parameters[1:])


def evaluate(
    declaration: Declaration, xp: Any, values: Mapping[str, Any], options: Mapping[str, Any], wanted: tuple[str, ...]
) -> dict[str, Any]:
    """Run the formulas that some results need.

    `values` holds inputs and, where the caller has them, outputs, saved values and cotangents; `wanted` names outputs,
    saved values and gradients. Every direction is this one function: forward asks for the outputs, backward gives the
    cotangent and asks for gradients, and asking for both without one is the fused pass of a kernel whose result is one
    number: its cotangent is 1.
    """
    d = declaration
    env = dict(values)
    made = (*d.outputs, *d.saved)
    gradients = d.gradients
    needed = {n for n in wanted if n in made}
    backward = [n for n in wanted if n in gradients]
    if backward:
        needed |= {n for n in d.backward_parameters if n in made}
    if any(n not in env for n in needed):
        result = d.forward(xp, **{n: env.get(n) for n in d.inputs}, **options)
        if not isinstance(result, tuple):
            result = (result,)
        if len(result) != len(made):
            raise TypeError(f"kernel {d.name}: the formula returned {len(result)} values, declared are {made}")
        for name, value in zip(made, result, strict=True):
            env.setdefault(name, value)
    if backward:
        assert d.backward is not None
        if not any(n in env for n in d.cotangents()):
            env[d.cotangents()[0]] = 1.0
        arguments = {n: options[n] if n in d.options else env.get(n) for n in d.backward_parameters}
        result = d.backward(xp, **arguments)
        if not isinstance(result, tuple):
            result = (result,)
        if len(result) != len(d.inputs):
            raise TypeError(
                f"backward of {d.name}: returned {len(result)} gradients, expected {len(d.inputs)}, one for each of "
                f"{tuple(d.inputs)} (None where there is none)"
            )
        env |= zip(gradients, result, strict=True)
    return {n: env[n] for n in wanted}


def static_options(declaration: Declaration, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options a program is specialised for: all but run-time numbers, and those that have their off value."""
    return {n: v for n, v in options.items() if not is_dynamic(declaration, n, v)}


def is_dynamic(declaration: Declaration, name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (name in declaration.off and value == declaration.off[name])


def trace(
    declaration: Declaration,
    kinds: Mapping[str, type[Kind]],
    dtypes: Mapping[str, DType],
    options: Mapping[str, Any],
    wanted: tuple[str, ...],
) -> Program:
    """Record the program that makes some results from given values.

    `kinds` and `dtypes` describe the values given: inputs, outputs, saved values, cotangents.
    """
    d = declaration
    recording = Trace()
    owner = {"d" + name: name for name in d.outputs}  # a cotangent has its output's extents
    inputs = {n: recording.input(n, _shape(owner.get(n, n), kinds[n]), dtypes[n]) for n in kinds}
    if not any(Matrix in i.kinds for i in d.inputs.values()):  # without products there is one number of columns
        for array in inputs.values():
            if array.node.shape[1] != 1:
                recording.unify("C", str(array.node.shape[1]))
    numbers = {n: recording.option(n, v, d.off.get(n)) for n, v in options.items() if is_dynamic(d, n, v)}
    results = evaluate(d, Namespace(recording), inputs, {**options, **numbers}, wanted)
    for name, value in results.items():
        source = d.gradients.get(name)
        if value is not None and source is not None:
            like = (
                inputs[source]
                if source in inputs
                else recording.input(source, _shape(source, d.inputs[source].kind("float")), "float")
            )
            results[name] = _as_wide(recording, d, name, recording.lift(value), like)
    outputs = {n: v for n, v in results.items() if v is not None}
    exempt = "ignore_index" if "ignore_index" in d.options else None
    index = {n: exempt for n, k in kinds.items() if k is Index}
    return recording.program(d.name, inputs, numbers, outputs, index)


def _shape(name: str, kind: type[Kind]) -> Shape:
    if kind is Full:
        return ("R", "C")
    if kind in (Row, Index):
        return ("R", 1)
    if kind is Wide:
        return ("R", f"{name}.1")
    if kind is Column:
        return (1, f"{name}.1")
    if kind is Matrix:
        return (f"{name}.0", f"{name}.1")
    assert kind is Scalar
    return (1, 1)


def _as_wide(recording: Trace, d: Declaration, name: str, value: Array, source: Array) -> Array:
    """A gradient in its input's shape; one that is the same along an axis is repeated."""
    have, want = value.node.shape, source.node.shape
    shape: list[Any] = []
    for h, w in zip(have, want, strict=True):
        if h == 1 or h == w:
            shape.append(w)
        elif w != 1:
            shape.append(recording.unify(h, w))
        else:
            raise TypeError(f"backward of {d.name}: {name} has shape {have}, expected {want}; sum it first")
    if value.node.shape == tuple(shape) or value.node.op == "matmul":
        return value
    return Array(recording, recording.node("cast", (value.node,), (shape[0], shape[1]), "float"))


__all__ = [
    "Declaration",
    "Formula",
    "Input",
    "SubsetError",
    "evaluate",
    "parse",
    "parse_backward",
    "static_options",
    "trace",
]
