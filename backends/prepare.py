"""Tasks made executable, and kept: what a kernel makes of arrays of given kinds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from xpnn.backends import choice
from xpnn.backends.arrays import numpy_dtype, wrong
from xpnn.backends.bind import needs_backward, option_value
from xpnn.backends.declare import Declaration, evaluate, is_dynamic
from xpnn.backends.kinds import Column, Full, Index, Kind, Matrix, Row, Scalar, Wide
from xpnn.backends.program import DType, Node, Shape, walk
from xpnn.backends.recording import BranchError, SubsetError
from xpnn.backends.task import HALF, BackendError, Executable, Task

if TYPE_CHECKING:
    from xpnn.backends.kernel import Kernel

T = TypeVar("T")
Reach = Literal["element", "all", "row"]
Given = dict[str, tuple[type[Kind], DType]]


def default_given(d: Declaration) -> Given:
    """The inputs as they usually come: required ones, of floats where there is a choice."""
    return {
        n: (i.kind("int" if Index in i.kinds else "float"), "int" if Index in i.kinds else "float")
        for n, i in d.inputs.items()
        if not i.optional
    }


def has_axis(kernel: Kernel) -> bool:
    """Whether rows are told from columns: by the formulas as they are usually called, or by the kind of any input."""
    inputs = kernel.declaration.inputs.values()
    if kernel.declaration.span is not None or any(Matrix in i.kinds for i in inputs):
        return False
    return reach(kernel) == "row" or any(kind not in (Full, Scalar) for i in inputs for kind in i.kinds)


def reach(kernel: Kernel, given: Given | None = None, options: Mapping[str, Any] | None = None) -> Reach:
    """How far a kernel looks, called so.

    "element": every result of an element is made of that element. "all": of everything, as a mean loss and its gradient
    are. In both cases rows are not told from columns, and the arrays may be flat. "row": anything else.
    """
    d = kernel.declaration
    inputs = default_given(d) if given is None else given
    chosen = d.options if options is None else options
    return _remembered(kernel, "reach", inputs, chosen, (*d.outputs, *d.saved), _reach)


def _reach(job: Task) -> Reach:
    d = job.declaration
    if any(kind not in (Full, Scalar) for kind, _ in job.given.values()):
        return "row"
    try:
        program = job.program()
        nodes = set(walk(program.outputs.values()))
        made = {n: node.shape for n, node in program.outputs.items()}
        if not set(made.values()) <= {("R", "C"), (1, 1)}:
            return "row"
        if d.backward is not None:
            made |= {"d" + n: made[n] for n in d.outputs}
            given = job.given | {n: (kind_of(shape), "float") for n, shape in made.items()}
            gradients = replace(job, given=given, wanted=tuple("d" + n for n in job.given)).program()
            nodes |= set(walk(gradients.outputs.values()))
    except (SubsetError, TypeError):
        return "row"
    if any(_tells_rows(n, nodes) for n in nodes):
        return "row"
    return "all" if any(n.op in {"row_sum", "sum_rows", "extent"} for n in nodes) else "element"


def _tells_rows(node: Node, nodes: Collection[Node]) -> bool:
    """Whether a node of a program comes out differently where the same elements have other rows and columns.

    The sum of a row does not matter where all that is made of it is the sum over the rows; nor do the number of rows and
    that of columns where they are multiplied with one another.
    """
    users = [n for n in nodes if node in n.args]
    if node.op == "row_sum":
        return not users or any(n.op != "sum_rows" for n in users)
    if _counted(node):
        products = [n for n in users if n.op == "mul" and {_counted(a) for a in n.args} == {"R", "C"}]
        return not users or any(n.op != "cast" and n not in products for n in users)
    return node.op in {"row_max", "column_sum", "gather", "columns"}


def _counted(node: Node) -> str | None:
    """The extent that a number is, or None."""
    node = node.args[0] if node.op == "cast" else node
    return node.value if node.op == "extent" else None


def kind_of(shape: Shape) -> type[Kind]:
    """The kind of a value by its symbolic shape."""
    rows, columns = shape
    if rows == "R":
        return {"C": Full, 1: Row}.get(columns, Wide)
    if rows == 1:
        return Scalar if columns == 1 else Column
    return Matrix


def results_of(job: Task) -> tuple[dict[str, Shape], frozenset[str]]:
    """The symbolic shape of each result, and those that are integers."""
    try:
        outputs = job.program().outputs
    except BranchError as error:
        try:
            return _results_by_trial(job)
        except ValueError:  # one number may be branched on where the formula is composed, an array may not
            raise error from None
    except SubsetError:
        return _results_by_trial(job)
    return {n: node.shape for n, node in outputs.items()}, frozenset(n for n, node in outputs.items() if node.dtype == "int")


def _results_by_trial(job: Task) -> tuple[dict[str, Shape], frozenset[str]]:
    """The same for a kernel that cannot be traced: run it on small arrays of telling sizes."""
    from xpnn.backends.composed import Shim

    extents = {Full: (7, 11), Row: (7, 1), Index: (7, 1), Column: (1, 11), Scalar: (1, 1)}
    values: dict[str, Any] = {}
    for name, (kind, dtype) in job.given.items():
        if kind not in extents:
            raise BackendError(f"kernel {job.declaration.name} uses a {kind.__name__} and leaves the subset that can be traced")
        values[name] = np.ones(extents[kind], {"float": np.float64, "int": np.int64, "bool": np.bool_}[dtype])
    with np.errstate(all="ignore"):
        results = evaluate(job.declaration, Shim(np, "cpu"), values, {**job.static, **job.numbers}, job.wanted)
    symbols: dict[int, Any] = {7: "R", 11: "C", 1: 1}
    arrays = {n: np.atleast_2d(v) for n, v in results.items() if v is not None}
    shapes = {n: (symbols[a.shape[0]], symbols[a.shape[1]]) for n, a in arrays.items()}
    return shapes, frozenset(n for n, a in arrays.items() if a.dtype.kind in "iu" and shapes[n] == ("R", 1))


@dataclass
class Prepared:
    """A task made executable, and where it runs. `integers` are the results that are none of floats."""

    job: Task
    execute: Executable
    shapes: dict[str, Shape]
    integers: frozenset[str]
    symbols: dict[str, Shape]
    backend: str
    reason: str


def prepare(
    kernel: Kernel, given: Given, options: Mapping[str, Any], wanted: tuple[str, ...], lib: str, dtype: str
) -> Prepared:
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
            execute = chosen.prepare(job) if d.driver is None else d.driver(job)
        except BackendError as error:
            if asked != "auto":
                raise
            reason, chosen = str(error), choice.backend("array-api")
            execute = chosen.prepare(job)
        try:
            symbols = {n: node.shape for n, node in job.program().inputs.items()}
        except SubsetError:
            symbols = {}
        found = Prepared(job, execute, *results_of(job), symbols, chosen.name, reason)
        kernel._tasks[key] = found
    return found


def prepare_shapes(kernel: Kernel, given: Given, options: Mapping[str, Any]) -> dict[str, Shape]:
    """The symbolic shapes of all outputs and saved values."""
    d = kernel.declaration
    return _remembered(kernel, "shapes", given, options, (*d.outputs, *d.saved), lambda job: results_of(job)[0])


def backward_reads(kernel: Kernel, given: Given, options: Mapping[str, Any], wanted: tuple[str, ...]) -> set[str]:
    """Which of the given arrays backward cannot do without."""

    def reads(job: Task) -> set[str]:
        try:
            return set(job.program().seen)
        except SubsetError:
            return set(kernel.declaration.backward_parameters)

    return _remembered(kernel, "reads", given, options, wanted, reads)


def _remembered(
    kernel: Kernel,
    what: str,
    given: Given,
    options: Mapping[str, Any],
    wanted: tuple[str, ...],
    find: Callable[[Task], T],
) -> T:
    """Something found out about a task, once for all calls like it."""
    d = kernel.declaration
    static = {n: v for n, v in options.items() if not is_dynamic(d, n, v)}
    dynamic = {n: v for n, v in options.items() if n not in static}
    types = tuple((n, type(v), v) for n, v in static.items())
    key = (what, tuple(given.items()), types, tuple((n, type(v)) for n, v in dynamic.items()), wanted)
    if key not in kernel._tasks:
        kernel._tasks[key] = find(Task(d, given, static, dynamic, wanted, "numpy", "float64"))
    return kernel._tasks[key]  # type: ignore[no-any-return]


def example_task(kernel: Kernel, dtype: str, direction: str, options: dict[str, Any], backend: str) -> Prepared:
    """The prepared task of a direction, for the inputs as they usually come."""
    d = kernel.declaration
    what = kernel.__name__
    given = default_given(d)
    merged = dict(d.options)
    for n, v in options.items():
        if n in d.inputs and d.inputs[n].optional:
            given[n] = (d.inputs[n].kind("float"), "float")
        elif n in d.inputs and len(d.inputs[n].kinds) > 1 and v in ("int", "float"):
            given[n] = (d.inputs[n].kind(v), v)
        elif n in d.options:
            merged[n] = option_value(what, n, v, d.options[n])
        else:
            raise TypeError(f"{what}: got an unexpected option {n!r}")
    if d.check is not None:
        shapes = {Full: (2, 3), Row: (2,), Column: (3,), Scalar: (), Index: (2,), Matrix: (3, 3)}
        d.check({n: kind for n, (kind, _) in given.items()}, {n: shapes[kind] for n, (kind, _) in given.items()}, merged)
    gradients = tuple("d" + n for n, (kind, kind_dtype) in given.items() if kind_dtype == "float")
    shapes_made = prepare_shapes(kernel, given, merged)
    made = tuple(n for n in d.outputs if n in shapes_made)
    if direction == "value_and_grad" and shapes_made[d.outputs[0]] != (1, 1):
        raise ValueError(wrong(what, "direction", repr(direction), "another one: the result is more than one number"))
    if direction == "forward":
        wanted = made
    elif direction in ("backward", "value_and_grad"):
        needs_backward(kernel)
        wanted = (
            gradients if direction == "backward" else (*made, *(f"d{n}" for n in d.default_wrt or [g[1:] for g in gradients]))
        )
    else:
        raise ValueError(wrong(what, "direction", repr(direction), "'forward', 'backward' or 'value_and_grad'"))
    if direction == "backward":
        roles = {n: kind_of(s) for n, s in prepare_shapes(kernel, given, merged).items()}
        known = {n: (roles[n], "float") for n in d.backward_parameters if n in roles}
        given = {n: g for n, g in given.items() if n in d.backward_parameters} | known  # type: ignore[assignment]
        given |= {"d" + n: (roles[n], "float") for n in d.differentiable if n in roles}
    with choice.use_backend(backend):
        return prepare(kernel, given, merged, wanted, "cupy" if backend == "cupy" else "numpy", dtype)


def warmup(kernel: Kernel, dtype: str, direction: str, options: dict[str, Any]) -> None:
    """`k.warmup(...)`."""
    ready = example_task(kernel, dtype, direction, options, backend="numba")
    if kernel.declaration.driver is None:
        ready.execute.warm()  # type: ignore[attr-defined]
        return
    for columns in (1, 65):  # what a driver runs is compiled when it is first run: on short rows and on longer ones
        arrays = {}
        for name, (kind, _) in ready.job.given.items():
            wide = dtype in HALF and kernel.declaration.is_wide(name, kind in (Row, Scalar))
            shape = (columns, 1) if kind is Matrix else (1, columns) if kind in (Column, Wide) else (1, 1)
            arrays[name] = np.zeros(shape, np.int64 if kind is Index else numpy_dtype("float32" if wide else dtype))
        with choice.use_backend("numba"):
            ready.execute(np, arrays, ready.job.numbers, {})


def source(kernel: Kernel, backend: str, dtype: str, direction: str, shape: tuple[int, int], options: dict[str, Any]) -> str:
    """`k.source(...)`."""
    if backend not in ("numba", "cupy"):
        raise BackendError(f"{kernel.__name__}.source: backend {backend!r} has no code of its own; expected 'numba' or 'cupy'")
    if (driver := kernel.declaration.driver) is not None:
        names = [k.__name__ for k in driver.stages]
        calls = " and ".join(f"{name}.source" for name in names)
        raise BackendError(
            f"{kernel.__name__}.source: it has no code of its own: it runs {' and '.join(names)} by chunks of rows; see {calls}"
        )
    if backend == "cupy":
        from xpnn.backends.cupy.emit import Emitted, unit

        parts = cuda(kernel, dtype, direction, shape, options)
        products = "".join(f"// {part}\n" for part in parts if isinstance(part, str))
        loops = [part for part in parts if isinstance(part, Emitted)]
        return products + (unit(loops) if loops else "")
    job = example_task(kernel, dtype, direction, options, "numba").job
    program = job.program()
    return choice.backend("numba").source(program, dtype, job.wide(program))  # type: ignore[attr-defined, no-any-return]


def cuda(kernel: Kernel, dtype: str, direction: str, shape: Any, options: dict[str, Any], device: Any = None) -> list[Any]:
    """The steps of a direction on CuPy arrays of a shape: emitted kernels, and products in words."""
    from xpnn.backends.cupy import machine

    if len(tuple(shape)) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(wrong(f"{kernel.__name__}.source", "shape", shape, "a number of rows and of columns, at least 1"))
    job = example_task(kernel, dtype, direction, options, "cupy").job
    program = job.program()
    return choice.backend("cupy").emitted(  # type: ignore[attr-defined, no-any-return]
        program, dtype, job.wide(program), shape, device or machine.assumed()
    )
