"""What all emitted kernels share: parameters, numbers, values of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xpnn.backends.cupy.expression import TYPES, Context, Writer
from xpnn.backends.cupy.passes import Pass
from xpnn.backends.cupy.regime import WHAT, Regime
from xpnn.backends.program import ROW_REDUCTIONS, Node, within_pass


@dataclass(frozen=True)
class Sizes:
    """The grid of a pass, in numbers."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter: what it is, and of which array or number.

    `what` is "array" (its address), "rows" (elements from one row to the next), "number" (an option), or "size": then
    `name` is one of `Launch.sizes`.
    """

    what: str
    name: str
    text: str
    code: str  # of struct.pack


_BYTES = {
    "signed char": 1, "unsigned char": 1, "short": 2, "unsigned short": 2, "int": 4, "unsigned int": 4,
    "long long": 8, "unsigned long long": 8,
}  # fmt: skip
MEMORY = "extern __shared__ __align__(16) unsigned char memory[];"


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, and what to call it with.

    `shared` is in bytes; `sizes` the values of the parameters that are sizes; `scratch` the bytes of the arrays that only
    this launch and its successors use; `moves` the bytes read and written in global memory, each array counted as often as
    its elements are fetched.
    """

    function: str
    parameters: tuple[Parameter, ...]
    regime: Regime
    blocks: tuple[int, int]
    threads: int
    shared: int
    sizes: dict[str, int]
    scratch: dict[str, int]
    moves: tuple[int, int]
    text: str


class Writing(Writer):
    """A kernel in the making."""

    def __init__(self, context: Context, p: Pass, name: str, sizes: Sizes) -> None:
        rows, columns = p.shape
        extents = {rows: "rows", columns: "columns"} if columns != 1 else {rows: "rows"}
        super().__init__(context, {str(s): text for s, text in extents.items() if s != 1})
        self.pass_, self.name, self.sizes = p, name, sizes
        self.scalars: dict[Node, str] = {}

    # -- parameters

    def arrays(self) -> list[Parameter]:
        """The arrays that the pass reads, then those that it writes along rows."""
        result: list[Parameter] = []
        for n, node in self.pass_.inputs.items():
            result += self._array(n, node, "const ")
        for n, node in self.pass_.stores.items():
            result += self._array(n, node, "")
        return result

    def _array(self, name: str, node: Node, const: str) -> list[Parameter]:
        own, kind = self.context.name(name), self.context.types[name]
        found = [Parameter("array", name, f"{const}{kind}* {own}", "Q")]
        if node.shape[0] != 1:
            found.append(Parameter("rows", name, f"long long {own}_rows", "q"))
        return found

    def bytes_of(self, name: str, node: Node) -> int:
        """What one pass over an array moves."""
        kind = self.context.types[name]
        rows = self.sizes.rows if node.shape[0] != 1 else 1
        return rows * (self.sizes.columns if node.shape[1] != 1 else 1) * _BYTES.get(kind, self.context.size(kind))

    def moves(self) -> tuple[int, int]:
        """Bytes read and written, if each array is gone over once."""
        p = self.pass_
        return (
            sum(self.bytes_of(n, node) for n, node in p.inputs.items()),
            sum(self.bytes_of(n, node) for n, node in p.stores.items()),
        )

    def numbers(self) -> list[Parameter]:
        real = "d" if self.context.dtype == "float64" else "f"
        return [
            Parameter("number", n, f"{TYPES[node.dtype]} {self.context.name(n)}", "q" if node.dtype == "int" else real)
            for n, node in self.pass_.options.items()
        ]

    @property
    def index(self) -> Parameter:
        return Parameter("size", "columns", "column_t columns", "q" if self.context.wide else "i")

    def launch(
        self,
        parameters: list[Parameter],
        body: list[str],
        regime: Regime,
        blocks: tuple[int, int],
        *,
        shared: int = 0,
        more: dict[str, int] | None = None,
        scratch: dict[str, int] | None = None,
        moves: tuple[int, int] | None = None,
        title: str = "",
        name: str = "",
    ) -> Launch:
        """The kernel, finished."""
        parameters = [*parameters, *(Parameter("size", s, f"long long {n}", "q") for s, n in self.other_extents.items())]
        r = regime
        cluster = f"__cluster_dims__({r.cluster}, 1, 1) " if r.cluster > 1 else ""
        text = [
            f"// {title or WHAT[r.name]}",
            f'extern "C" __global__ void {cluster}__launch_bounds__({r.threads}, {r.resident})',
            f"{name or self.name}({', '.join(p.text for p in parameters)}) {{",
            *(f"  {line}" for line in body),
            "}",
        ]
        sizes = {"rows": self.sizes.rows, "columns": self.sizes.columns, **(more or {})}
        sizes |= {s: self.context.sizes[s] for s in self.other_extents}
        return Launch(
            name or self.name, tuple(parameters), r, blocks, r.threads, shared, sizes, scratch or {}, moves or self.moves(),
            "\n".join(text),
        )  # fmt: skip

    # -- single numbers, and values of a row

    def number(self, node: Node, lines: list[str]) -> str:
        """A (1, 1) value, computed where it is first needed."""
        if node in self.scalars:
            return self.scalars[node]
        if (leaf := self.leaf(node)) is not None:
            return leaf
        if node.op == "input":
            name, text = f"{self.context.name(node.value)}_0", f"to_real({self.context.name(node.value)}[0])"
        else:
            text = self.combine(node, [self.number(a, lines) for a in node.args])
            name = self.fresh(node)
        lines.append(f"const {TYPES[node.dtype]} {name} = {text};")
        self.scalars[node] = name
        return name

    def numbers_first(self, lines: list[str]) -> None:
        """The numbers that values of rows and columns are made of, ahead of all loops and while registers are free."""
        nodes = [n for root in self.pass_.roots for n in within_pass(root)]
        used = {a for n in nodes if n.shape != (1, 1) for a in n.args} | set(self.pass_.stores.values())
        used |= {a for s in self.pass_.sums.values() for a in s.args}
        for n in nodes:
            if n.shape == (1, 1) and n in used:
                self.number(n, lines)

    def row_value(self, node: Node, scope: dict[Node, str], lines: list[str], gather: Callable[..., str]) -> str:
        """A value of the row that `row` names; `gather` writes what takes a column's."""
        if node in scope:
            return scope[node]
        if node.shape == (1, 1):
            return self.number(node, lines)
        assert node.op not in ROW_REDUCTIONS, "reductions are in scope by then"
        if node.op == "gather":
            scope[node] = gather(node, self.row_value(node.args[1], scope, lines, gather), scope, lines)
            return scope[node]
        if node.op == "input":
            own = self.context.name(node.value)
            load = "whole" if node.dtype == "int" else "to_real"
            name, text = f"{own}_0", f"{load}({own}[row * {own}_rows])"
        else:
            text = self.combine(node, [self.row_value(a, scope, lines, gather) for a in node.args])
            name = self.fresh(node)
        lines.append(f"const {TYPES[node.dtype]} {name} = {text};")
        scope[node] = name
        return name
