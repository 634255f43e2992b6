"""A loop program as the passes that a GPU makes over it, and the arrays they hand to one another.

Sums over rows never use atomics, so they end with a pass of their own: a pass along the rows leaves one number per row
(`.row0`), and a pass over those adds them up (`.total0`). Sums of columns are added up over blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from xpnn.backends.phases import Phases
from xpnn.backends.program import ROW_REDUCTIONS, Node, Program, Shape, Stage, stages, substitute, walk, within_pass

Kind = Literal["rows", "columns", "values"]


@dataclass(frozen=True)
class Pass:
    """One pass: what it reads is in the nodes; what it writes and what it adds up, by name.

    `scalars` are results that are single numbers, known once this pass's totals are.
    """

    kind: Kind
    shape: Shape
    stores: dict[str, Node]
    sums: dict[str, Node]
    scalars: dict[str, Node]

    @property
    def roots(self) -> tuple[Node, ...]:
        return (*self.stores.values(), *self.sums.values())

    @property
    def inputs(self) -> dict[str, Node]:
        """The arrays that the pass reads."""
        return {n.value: n for n in self._leaves() if n.op == "input" and n.value not in self.sums}

    def gathered(self) -> set[str]:
        """The arrays of which single columns are read."""
        gathers = [n for r in self.roots for n in within_pass(r) if n.op == "gather"]
        return {n.value for n in walk([g.args[0] for g in gathers]) if n.op == "input"}

    def unsafe(self) -> set[tuple[str, str]]:
        """Pairs (output, input) that must not share memory: threads would write what others still read."""
        phases = Phases(self.roots)
        uses = phases.uses()
        pairs = {(o, i) for o in (*self.sums, *self.scalars) for i in self.inputs}
        for o, store in self.stores.items():
            for i, node in self.inputs.items():
                late = [g for g in phases.nodes if g.op == "gather" and phases.level[g] >= phases.level[store]]
                read = {n.value for n in walk([g.args[0] for g in late]) if n.op == "input"}
                again = max(uses.get(node, {0})) > phases.level[store]  # read in a later phase
                # a number of the row is read by many threads, and written by one
                shared = store.shape[1] == 1 and (self.kind == "rows" or len(self.stores) > 1)
                if node.shape != store.shape or i in read or again or shared:
                    pairs.add((o, i))
        return pairs

    @property
    def options(self) -> dict[str, Node]:
        return {n.value: n for n in self._leaves() if n.op == "option"}

    def _leaves(self) -> list[Node]:
        roots = [a for r in self.sums.values() for a in r.args] + [*self.stores.values(), *self.scalars.values()]
        return [n for n in walk(roots) if n.is_leaf]


@dataclass(frozen=True)
class Plan:
    """The passes in order, and the shapes of the arrays that only they see."""

    passes: list[Pass]
    scratch: dict[str, Shape]

    def unsafe(self) -> set[tuple[str, str]]:
        """Pairs (output, input) that must not share memory, also where an earlier pass writes what a later one reads."""
        pairs = set().union(*(p.unsafe() for p in self.passes))
        for number, first in enumerate(self.passes):
            for later in self.passes[number + 1 :]:
                pairs |= {(o, i) for o in (*first.stores, *first.sums, *first.scalars) for i in later.inputs}
        return pairs


def plan(program: Program) -> Plan:
    """The passes of a loop program."""
    names = {node: name for name, node in program.outputs.items()}
    known: dict[Node, Node] = {}  # what earlier passes made, as arrays
    scratch: dict[str, Shape] = {}
    passes: list[Pass] = []

    def fresh(prefix: str, shape: Shape) -> str:
        name = f".{prefix}{sum(n.startswith('.' + prefix) for n in scratch)}"  # no array of the program's is called so
        scratch[name] = shape
        return name

    def keep(node: Node, name: str) -> None:
        known[node] = Node("input", (), node.shape, "float", name)

    def add(kind: Kind, shape: Shape, stores: dict[str, Node], sums: dict[str, Node]) -> None:
        settled = dict(zip(stores, substitute(stores.values(), known), strict=True))
        totals = {
            n: Node(s.op, tuple(substitute(s.args, known)), s.shape, s.dtype) for n, s in sums.items()
        }  # the sum itself is not known yet
        passes.append(Pass(kind, shape, settled, totals, {}))

    for stage in stages(program):
        stores = {names[s]: s for s in stage.stores}
        totals = {s: fresh("total", (1, 1)) for s in stage.sums if s.op == "sum_rows"}
        columns = {s: names.get(s) or fresh("sums", s.shape) for s in stage.sums if s.op == "column_sum"}
        gathers = any(n.op == "gather" for root in (*stage.stores, *stage.sums) for n in within_pass(root))
        if stage.shape[1] == 1 and not gathers:
            add("values", stage.shape, stores, {name: s for s, name in totals.items()})
        else:
            first, wide = _before_columns(stage, stores, columns)
            for node in [n for s in columns for n in _row_values(s)]:
                name = fresh("row", (stage.shape[0], 1))
                first[name] = node
            rows = {s: fresh("row", (stage.shape[0], 1)) for s in totals if s.args[0].op != "input"}
            first |= {rows[s]: s.args[0] for s in rows}
            if first:
                add("rows", stage.shape, first, {})
                for name, node in first.items():
                    if name in scratch:
                        keep(node, name)
            if columns:
                add("columns", stage.shape, wide, {name: s for s, name in columns.items()})
            if totals:
                add("values", (stage.shape[0], 1), {}, {name: s for s, name in totals.items()})
        for s, name in (totals | columns).items():
            keep(s, name)

    scalars = {name: node for name, node in program.outputs.items() if node.shape == (1, 1)}
    if scalars:
        if not any(p.kind == "values" for p in passes):
            passes.append(Pass("values", (1, 1), {}, {}, {}))
        at = max(k for k, p in enumerate(passes) if p.kind == "values")
        old = passes[at]
        settled = dict(zip(scalars, substitute(scalars.values(), known), strict=True))
        passes[at] = Pass(old.kind, old.shape, old.stores, old.sums, settled)
    return Plan(passes, scratch)


def _before_columns(stage: Stage, stores: dict[str, Node], columns: Iterable[Node]) -> tuple[dict[str, Node], dict[str, Node]]:
    """The stores that go along rows, and those that ride with the sums of columns."""
    if not columns:
        return stores, {}
    rides = {n: s for n, s in stores.items() if s.shape == stage.shape and not any(map(_is_row_work, within_pass(s)))}
    return {n: s for n, s in stores.items() if n not in rides}, rides


def _is_row_work(node: Node) -> bool:
    return node.op in ROW_REDUCTIONS or node.op == "gather"


def _row_values(root: Node) -> list[Node]:
    """The largest expressions below a sum of columns that are one number per row and take the whole row to know."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node.shape[1] == 1 and node.shape[0] != 1 and any(map(_is_row_work, within_pass(node))):
            found[node] = None
        else:
            for a in node.args:
                visit(a)

    for a in root.args:
        visit(a)
    return list(found)
