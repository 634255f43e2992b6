"""One stage of a loop program as a serial function over blocks of its grid: what is common to all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from xpnn.backends.numba.expression import Context, Scalars, Writer
from xpnn.backends.phases import Phases
from xpnn.backends.program import ROW_REDUCTIONS, Node, Stage, walk

BLOCK = 4096  # elements that one block holds, or one row


def is_map(stage: Stage) -> bool:
    """Whether nothing is computed of a row, so that it may be cut anywhere."""
    nodes = Phases((*stage.stores, *stage.sums)).nodes
    narrow = stage.shape[1] == 1 or any(s.shape[1] == 1 for s in stage.stores)
    return not (stage.sums or narrow or any(n.op in ROW_REDUCTIONS or n.op == "gather" for n in nodes))


def has_rows(stage: Stage) -> bool:
    """Whether there is a value for each of several rows of columns: something is computed of a row, or read of it."""
    nodes = Phases((*stage.stores, *stage.sums)).nodes
    return 1 not in stage.shape and any(n.shape[0] != 1 == n.shape[1] for n in nodes)


class StageWriter(Writer, ABC):
    """One stage: a serial function over blocks `first` to `last` of the grid."""

    def __init__(self, context: Context, stage: Stage, name: str, sums: dict[Node, str]) -> None:
        super().__init__(context)
        self.stage, self.name, self.sums = stage, name, sums
        phases = self.phases = Phases((*stage.stores, *stage.sums))
        self.roots, self.nodes, self.level = phases.roots, phases.nodes, phases.level
        self.output = {node: name for name, node in context.program.outputs.items() if node in stage.stores}
        self.inputs = {n.value: n for n in self.nodes if n.op == "input"}
        self.scalars = [n for n in self.nodes if n.shape == (1, 1) and n.op not in {"constant", "extent"}]
        self.tables = [n for n in self.nodes if n.op == "column_sum" and n not in stage.sums]
        self.kept: dict[Node, str] = {}
        self.plan()
        self._plan_unsafe()

    def plan(self) -> None:
        """Decide what is kept between phases."""

    def _plan_unsafe(self) -> None:
        """Outputs that are written before an input is read for the last time, or in another order."""
        last = {n: max(phases) for n, phases in self.phases.uses(self.kept).items()}
        for gathered in (n for n in self.nodes if n.op == "gather"):
            for n in walk([gathered.args[0]]):  # read at the start of its phase
                last[n] = max(last.get(n, 0), self.level[gathered])
        for store, name in self.output.items():
            first = min([self.level[store]] + [self.level[k] for k, kept in self.kept.items() if kept == name])
            for n in self.inputs.values():
                if store.shape != self.stage.shape or n.shape != store.shape or first < last.get(n, 0):
                    self.context.unsafe.add((name, n.value))

    # -- the stage function

    def parameters(self) -> list[str]:
        """The stage's parameters but `first`, `last`."""
        result = [name for name, n in self.inputs.items() if n.shape != (1, 1)]
        result += [self.table(t) for t in self.tables]
        result += self.output.values()
        result += [f"{self.sums[s]}_parts" for s in self.stage.sums]
        result += [self.scalar_name(n) for n in self.outer_scalars()]
        result += [self.context.extent(e) for e in self.context.extents]
        result += ["plane"] if self.context.planes else []
        return [*dict.fromkeys(result), "block"]

    def outer_scalars(self) -> list[Node]:
        """Numbers that are computed before the stage: those that the rows use directly."""
        used = {a for n in self.nodes if n.shape != (1, 1) for a in n.args} | set(self.roots)
        return [n for n in self.scalars if n in used]

    def scalar_name(self, node: Node) -> str:
        if node.op == "option":
            return str(node.value)
        if node in self.sums:
            return self.sums[node]
        return f"number{self.scalars.index(node)}"

    def launch(self, scalars: Scalars) -> list[str]:
        m = self.context
        lines: list[str] = []
        values: dict[str, str] = {}
        for n in self.outer_scalars():
            more, text = scalars.value(n)
            lines += more
            values[self.scalar_name(n)] = text
        lines += self.blocks()
        for s in self.stage.sums:
            extent = f"f(0.0), blocks, {m.extent(s.shape[1])}" if s.op == "column_sum" else "0.0, 1, blocks"
            lines.append(f"{self.sums[s]}_parts = room({extent})")
        args = [values.get(name, name) for name in self.parameters()]
        return [*lines, f"launch(runner, {self.name}, ({', '.join(args)},), blocks, least(blocks, threads))"]

    @abstractmethod
    def blocks(self) -> list[str]:
        """The rows of a block, and how many blocks there are: whatever the number of threads."""

    def finish(self, s: Node) -> list[str]:
        """Add up what the blocks left, in their order."""
        name = self.sums[s]
        if s.op == "sum_rows":
            lines = [*self.sum_begun(f"{name}_all", "0.0"), "for b in range(blocks):"]
            lines += [f"    {line}" for line in self.sum_plus(f"{name}_all", f"{name}_parts[0, b]")]
            return [*lines, f"{name} = {'f' if s.dtype == 'float' else 'np.intp'}({self.sum_settled(f'{name}_all')})"]
        columns = self.context.extent(s.shape[1])
        output = self.context.output_of(s)
        target = self.table(s)
        lines = [] if output == target else [f"{target} = room(f(0.0), 1, {columns})"]
        narrow: list[str] = []
        if output is not None and output != target:
            narrow = [f"for j in range({columns}):", f"    {self.context.put(output, '0', 'j', f'{target}[0, j]')}"]
        return [
            *lines,
            f"{name}_all = room(0.0, 1, {columns})",
            f"for j in range({columns}):",
            f"    {name}_all[0, j] = 0.0",
            "for b in range(blocks):",
            f"    for j in range({columns}):",
            f"        {name}_all[0, j] += {name}_parts[b, j]",
            f"for j in range({columns}):",
            f"    {target}[0, j] = f({name}_all[0, j])",
            *narrow,
        ]

    # Sums are double, of float32; in float64 what each addition loses is added up as well. Beside inf that is NaN.

    def sum_begun(self, name: str, nothing: str) -> list[str]:
        """A sum of nothing."""
        return [f"{name} = {nothing}", *([f"{name}_part = {name}"] if self.context.dtype == "float64" else [])]

    def sum_plus(self, name: str, value: str) -> list[str]:
        """Add to a sum."""
        if self.context.dtype != "float64":
            return [f"{name} = {name} + {value}"]
        over = f"({name}_next - {name})"
        lost = f"({name} - ({name}_next - {over})) + ({value} - {over})"
        return [f"{name}_next = {name} + {value}", f"{name}_part = {name}_part + ({lost})", f"{name} = {name}_next"]

    def sum_settled(self, name: str) -> str:
        """A sum, rounded once."""
        part = f"{name}_part"
        return name if self.context.dtype != "float64" else f"where({part} == {part}, {name} + {part}, {name})"

    def table(self, s: Node) -> str:
        """The array that holds the sums over rows for each column: an output, unless that is too narrow."""
        output = self.context.output_of(s)
        return output if output is not None and output not in self.context.halves else f"{self.sums[s]}_row"

    def write(self) -> list[list[str]]:
        """The stage's functions, those that it calls first."""
        return [self.function(self.name, [*self.parameters(), "first", "last"], self.body())]

    @abstractmethod
    def body(self) -> list[str]:
        """What is done for blocks `first` to `last`."""

    def function(self, name: str, parameters: list[str], body: list[str]) -> list[str]:
        return [
            '@njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)',
            f"def {name}({', '.join(parameters)}):",
            *(f"    {line}" for line in body),
        ]

    def cast(self, node: Node, text: str) -> str:
        return text if node.dtype == "float" else self.as_float(node, text, node.shape[1] != 1)

    def operand(self, n: Node, scope: dict[Node, str]) -> str:
        if n in scope:
            return scope[n]
        if (leaf := self.leaf(n)) is not None:
            return leaf
        assert n.shape == (1, 1), n
        return self.scalar_name(n)
