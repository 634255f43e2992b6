"""A traced kernel as data: nodes over symbolic shapes, cut into matrix products and fused loops.

A node's shape is a pair of symbols, such as ("R", "C"); 1 stands for a missing extent, so a row's value is ("R", 1), a
column's (1, "C") and a number (1, 1). Nodes are shared (common subexpressions are one node) and compared by identity.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal

import numpy as np

Extent = str | Literal[1]
Shape = tuple[Extent, Extent]
DType = Literal["float", "int", "bool"]

LIMITS = ("eps", "max", "min", "smallest_normal")  # what differs between floating-point dtypes, by its name in NumPy's finfo
ROW_REDUCTIONS = {"row_sum", "row_max"}  # over the columns of one row
GRID_REDUCTIONS = {"column_sum", "sum_rows"}  # over the rows: known only when every row is done
_NUMBERS = {  # operations on numbers, as Python has them
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "pow": "({} ** {})", "neg": "(-{})",
    "cast": "{}",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    `value` is a constant's value, or its name in `LIMITS`; an input's or option's name; or an extent's symbol.
    """

    op: str
    args: tuple[Node, ...]
    shape: Shape
    dtype: DType
    value: Any = None

    @property
    def is_leaf(self) -> bool:
        return self.op in {"input", "option", "constant", "extent", "columns"}


def limit(value: Any, dtype: Any) -> Any:
    """A constant's value, looked up for a dtype where it is one of `LIMITS`."""
    return float(getattr(np.finfo(dtype), value)) if isinstance(value, str) else value


def walk(roots: Iterable[Node]) -> list[Node]:
    """All nodes below some roots, arguments first."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in order:
            for arg in node.args:
                visit(arg)
            order[node] = None

    for root in roots:
        visit(root)
    return list(order)


@dataclass(frozen=True)
class Program:
    """What a kernel computes in one direction, for given dtypes and options.

    `inputs` and `options` are leaf nodes by name, `outputs` the results by name. `index` names the inputs that must lie in
    [0, C), with the option whose value is exempt. Extents that the formula takes to be equal have the same symbol.
    `seen` names the inputs that the formula looked at, if only at their shape, or for what no output depends on: a formula
    that is run as it stands cannot do without them. `derived` are those of the options that the caller does not give: numbers
    made of run-time options alone, which `numbers` computes.
    """

    name: str
    inputs: dict[str, Node]
    options: dict[str, Node]
    outputs: dict[str, Node]
    index: dict[str, str | None] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()
    derived: dict[str, Node] = field(default_factory=dict)

    def numbers(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the loops are called with, given the caller's options: these, and the derived numbers, in double precision.

        A formula that runs as it stands computes these in Python too: 1 - 0.999 in float32 would be off by 3e-5 of itself.
        """
        if not self.derived:
            return options
        values = zip(self.derived.items(), eval(self._derive, {}, options), strict=True)
        return {**options, **{name: float(v) if node.dtype == "float" else v for (name, node), v in values}}

    @functools.cached_property
    def _derive(self) -> CodeType:
        return compile(f"[{', '.join(map(_as_python, self.derived.values()))}]", self.name, "eval")

    def text(self) -> str:
        """The program, one operation a line; equal programs have equal text."""
        nodes = walk(self.outputs.values())
        number = {node: f"%{i}" for i, node in enumerate(nodes)}
        lines = [f"{name}: {list(node.shape)} {node.dtype}" for name, node in (self.inputs | self.options).items()]
        lines += [f"{name} = {_as_python(node)}" for name, node in self.derived.items()]
        for node in nodes:
            args = ", ".join([number[a] for a in node.args] + ([repr(node.value)] if node.value is not None else []))
            lines.append(f"{number[node]} = {node.op}({args}) {list(node.shape)} {node.dtype}")
        lines += [f"{name} = {number[node]}" for name, node in self.outputs.items()]
        return "\n".join([*lines, *(f"index {name} except {exempt}" for name, exempt in self.index.items())])

    def digest(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    def reads(self) -> set[str]:
        """The names of the inputs that some output depends on."""
        return {n.value for n in walk(self.outputs.values()) if n.op == "input"}


def derive(outputs: Mapping[str, Node], taken: Container[str]) -> tuple[dict[str, Node], dict[str, Node]]:
    """Outputs in which each number made of options alone has become an option of its own; and what these are."""
    nodes = walk(outputs.values())
    numbers = {n for n in nodes if is_number(n)}
    used = {a for n in nodes if n not in numbers for a in n.args} | {*outputs.values()}
    largest = [n for n in nodes if n in numbers & used and n.args and any(a.op == "option" for a in walk([n]))]
    names = (name for k in itertools.count() if (name := f"derived{k}") not in taken)
    new = {n: Node("option", (), (1, 1), n.dtype, next(names)) for n in largest}
    changed = dict(zip(outputs, substitute(outputs.values(), new), strict=True))
    return changed, {leaf.value: n for n, leaf in new.items()}


def is_number(node: Node) -> bool:
    """Whether a value is made of options and constants alone, by operations that Python has."""
    if node.op == "constant":
        return not isinstance(node.value, str) and math.isfinite(node.value)  # one of LIMITS is the dtype's
    if node.op not in _NUMBERS or node.shape != (1, 1) or (node.op == "cast" and node.dtype != "float"):
        return node.op == "option"
    return all(map(is_number, node.args))


def _as_python(node: Node) -> str:
    """A number made of options, as a Python expression."""
    if node.op == "option":
        return str(node.value)
    if node.op == "constant":
        return f"({node.value!r})" if node.value < 0 else repr(node.value)
    return _NUMBERS[node.op].format(*map(_as_python, node.args))


@dataclass(frozen=True)
class Product:
    """One matrix product, left to BLAS: `result = left @ right`, each perhaps transposed."""

    result: str
    left: str
    right: str
    transpose: tuple[bool, bool]


@dataclass(frozen=True)
class Loop:
    """Everything between two rounds of products, fused."""

    program: Program


Step = Product | Loop


def steps(program: Program) -> list[Step]:
    """Cut a program at its matrix products.

    A product's operands and result are materialised; anything else that a later loop needs it recomputes from the inputs.
    Intermediate arrays are named `t0`, `t1`, ...
    """
    nodes = walk(program.outputs.values())
    products = [n for n in nodes if n.op == "matmul"]
    if not products:
        return [Loop(program)]

    when: dict[Node, int] = {}  # a loop's number; a product runs just before the loop of the same number
    for node in nodes:
        when[node] = max((when[a] for a in node.args), default=0)
        if node.op == "matmul":
            when[node] = max(when[a] + (not _is_array(_untransposed(a))) for a in node.args)

    names: dict[Node, str] = {node: name for name, node in program.outputs.items()}
    names |= {node: name for name, node in program.inputs.items()}
    for product in products:
        for node in (*map(_untransposed, product.args), product):
            if node not in names:
                names[node] = next(t for k in itertools.count() if (t := f"t{k}") not in {*names.values(), *program.options})
    operands = {_untransposed(a) for p in products for a in p.args}

    result: list[Step] = []
    for number in range(max(when.values()) + 1):
        for p in products:
            if when[p] == number:
                left, right = p.args
                flipped = (left.op == "transpose", right.op == "transpose")
                result.append(Product(names[p], names[_untransposed(left)], names[_untransposed(right)], flipped))
        made = {
            names[n]: n
            for n in nodes
            if when[n] == number and not _is_array(n) and (n in operands or n in program.outputs.values())
        }
        if made:
            leaves: dict[Node, Node] = {p: Node("input", (), p.shape, p.dtype, names[p]) for p in products if when[p] <= number}
            outputs = dict(zip(made, substitute(made.values(), leaves), strict=True))
            used = [n for n in walk(outputs.values()) if n.op in {"input", "option"}]
            options = {n.value: n for n in used if n.op == "option"}
            result.append(
                Loop(
                    Program(
                        program.name,
                        {n.value: n for n in used if n.op == "input"},
                        options,
                        outputs,
                        program.index,
                        derived={name: n for name, n in program.derived.items() if name in options},
                    )
                )
            )
    return result


def _untransposed(node: Node) -> Node:
    return node.args[0] if node.op == "transpose" else node


def _is_array(node: Node) -> bool:
    """Whether a node's values lie in memory without a loop having run."""
    return node.op in {"input", "matmul", "transpose"}


def substitute(roots: Iterable[Node], replace: dict[Node, Node]) -> list[Node]:
    """The same expressions with some nodes replaced; untouched parts are shared."""
    done = dict(replace)

    def visit(node: Node) -> Node:
        if node not in done:
            args = tuple(visit(a) for a in node.args)
            same = all(a is b for a, b in zip(args, node.args, strict=True))
            done[node] = node if same else Node(node.op, args, node.shape, node.dtype, node.value)
        return done[node]

    return [visit(r) for r in roots]


# --- loops into stages -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One pass over the rows of one grid: what it stores, and what it sums over the rows."""

    shape: Shape
    stores: tuple[Node, ...]
    sums: tuple[Node, ...]


def stages(program: Program) -> list[Stage]:
    """The passes of a loop program, in order.

    A sum over the rows is known only when its pass is done, so what needs it goes into a later pass. Everything is placed
    as late as that allows: the mean loss is then summed in the pass that writes the gradient, and only the number of valid
    rows, which the gradient divides by, takes a (cheap) pass of its own before.
    """
    nodes = walk(program.outputs.values())
    sums = [n for n in nodes if n.op in GRID_REDUCTIONS]
    stores = [n for n in program.outputs.values() if n.shape != (1, 1) and n not in sums]
    ready: dict[Node, int] = {}
    for node in nodes:
        ready[node] = max((ready[a] for a in node.args), default=0) + (node in sums)
    last = max([ready[n] for n in stores] + [ready[n.args[0]] for n in sums], default=0)

    place = dict.fromkeys(stores, last)
    for total in reversed(sums):  # whatever uses a sum stands after it, so it is placed by now
        users = [place[root] for root in place if total in within_pass(root)]
        place[total] = min(users, default=last + 1) - 1

    result = []
    for number in range(last + 1):
        grids: dict[Shape, list[Node]] = {}
        for node, at in place.items():
            if at == number:
                grids.setdefault(_grid(node), []).append(node)
        for rows, columns in [shape for shape in grids if shape[1] == 1]:  # a row's value rides along with a full grid
            wider = next((shape for shape in grids if shape[0] == rows and shape[1] != 1), None)
            if wider is not None:
                grids[wider] += grids.pop((rows, columns))
        for shape, members in grids.items():
            mine = tuple(m for m in members if m in sums)
            result.append(Stage(shape, tuple(m for m in members if m not in mine), mine))
    return result


def within_pass(root: Node) -> list[Node]:
    """What one pass evaluates for a store or a sum over rows, arguments first; sums of earlier passes are leaves."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in order:
            for arg in () if node.op in GRID_REDUCTIONS else node.args:
                visit(arg)
            order[node] = None

    for start in root.args if root.op in GRID_REDUCTIONS else (root,):
        visit(start)
    return list(order)


def _grid(root: Node) -> Shape:
    """The rows and columns that a pass must run over to evaluate a root."""
    nodes = within_pass(root)
    extents = []
    for axis in (0, 1):
        named = {n.shape[axis] for n in nodes} - {1}
        if len(named) > 1:
            raise ValueError(f"one loop cannot run over several extents: {sorted(map(str, named))}")
        extents.append(named.pop() if named else 1)
    return extents[0], extents[1]
