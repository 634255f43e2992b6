"""Expressions of a program as Python text."""

from __future__ import annotations

from collections import Counter

import numpy as np

from xpnn.backends.program import Extent, Node, Program, limit

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
}
_CALLS = {
    "abs": "absolute", "neg": "negative", "exp": "exp", "expm1": "expm1", "log": "log", "log1p": "log1p", "sqrt": "sqrt",
    "tanh": "tanh", "erf": "erf", "erfc": "erfc", "floor": "floor", "maximum": "maximum", "minimum": "minimum",
    "and": "logical_and", "or": "logical_or", "not": "logical_not",
}  # fmt: skip
READABLE = {"row_max": "max", "row_sum": "sum", "sum_rows": "total", "column_sum": "sums", "gather": "taken"}


class Context:
    """What the parts of one emitted module share.

    `dtype` is what is computed in, `halves` the half type of the arrays that are stored in one; `extents` says where each
    symbolic extent is read from; `unsafe` collects (output, input) pairs that must not share memory. As `planes`, an array of
    rows and columns has three axes, of which the first two are its rows: `plane` of them lie side by side.
    """

    def __init__(self, program: Program, dtype: str, halves: dict[str, str], planes: bool = False) -> None:
        self.program, self.dtype, self.halves, self.planes = program, dtype, halves, planes
        self.unsafe: set[tuple[str, str]] = set()
        self.extents: dict[str, str] = {}
        for name, node in (program.inputs | program.outputs).items():
            axes = ["shape[0]", "shape[1]"]
            if self.in_planes(node):
                axes = [f"shape[0] * {name}.shape[1]", "shape[2]"]
                self.plane = f"{name}.shape[1]"
            for axis, symbol in zip(axes, node.shape, strict=True):
                if symbol != 1:
                    self.extents.setdefault(symbol, f"{name}.{axis}")

    def in_planes(self, node: Node) -> bool:
        """Whether an array comes as planes."""
        return self.planes and 1 not in node.shape

    @property
    def lanes(self) -> int:
        """How many values one vector holds."""
        return 64 // np.dtype(self.dtype).itemsize

    def extent(self, symbol: Extent) -> str:
        """The variable that holds an extent."""
        return "1" if symbol == 1 else symbol.replace(".", "_")

    def size(self, name: str) -> int:
        """Bytes of a floating value of an array."""
        return 2 if name in self.halves else np.dtype(self.dtype).itemsize

    def load(self, name: str, columns: str) -> str:
        """Lanes of an array's row; `columns` says which."""
        return self.call("load", name, f"{name}_i", columns)

    def store(self, name: str, columns: str, value: str) -> str:
        return self.call("store", name, f"{name}_i", columns, value)

    def stream(self, name: str, columns: str, value: str) -> str:
        """Whole lanes of an array's row; around the caches if `streamed`."""
        return self.call("stream", name, f"{name}_i", columns, value, "streamed")

    def crest(self, name: str, count: str) -> str:
        """The maxima of the lanes of a row's first columns."""
        return self.call("crest", name, f"{name}_i", count)

    def pick(self, name: str, row: str, column: str) -> str:
        """One value, or NaN outside the row."""
        return self.call("at", name, row, column)

    def value(self, name: str, i: str, j: str = "0") -> str:
        """One value of a matrix that is known to be there."""
        return self.pick(name, f"row({name}, {i})", j) if name in self.halves else f"{name}[{i}, {j}]"

    def put(self, name: str, i: str, j: str, value: str) -> str:
        """Write one value of a matrix."""
        if name in self.halves:
            return self.call("put", name, f"row({name}, {i})", j, value)
        return f"{name}[{i}, {j}] = {value}"

    def call(self, function: str, name: str, *arguments: str) -> str:
        """A call of a function in its form for an array's dtype."""
        return f"{function}{'_' + self.halves[name] if name in self.halves else ''}({', '.join(arguments)})"

    def output_of(self, node: Node) -> str | None:
        """The output array that a node's values go to."""
        return next((n for n, v in self.program.outputs.items() if v is node and v.shape != (1, 1)), None)


class Writer:
    """Expressions as text."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.counts: Counter[str] = Counter()

    def fresh(self, node: Node) -> str:
        base = READABLE.get(node.op, node.op)
        k = self.counts[base]
        self.counts[base] += 1
        return f"{base}_{k}"

    def constant(self, node: Node, kind: str) -> str:
        value = limit(node.value, self.context.dtype)
        if kind == "float":
            text = {"inf": "np.inf", "-inf": "-np.inf", "nan": "np.nan"}.get(repr(float(value)), repr(float(value)))
            return f"f({text})"
        return repr(value)

    def leaf(self, node: Node) -> str | None:
        if node.op == "constant":
            return self.constant(node, node.dtype)
        if node.op == "extent":
            return self.context.extent(node.value)
        return None

    def combine(self, node: Node, args: list[str], wide: list[bool]) -> str:
        """One operation on values already in variables; `wide` says which of them are lanes."""
        if node.op in {"columns", "input", "option", "gather"}:
            raise AssertionError(node.op)
        values = node.args[1:] if node.op == "where" else node.args
        mixed = any(a.dtype == "float" for a in values) or node.dtype == "float"
        if mixed:
            start = len(node.args) - len(values)
            args = args[:start] + [self.as_float(a, t, w) for a, t, w in zip(values, args[start:], wide[start:], strict=True)]
        if node.op == "cast":
            return f"to_int({args[0]})" if node.dtype == "int" and node.args[0].dtype == "float" else args[0]
        if node.op == "where":
            return f"where({', '.join(args)})"
        if node.op == "isnan":
            return f"({args[0]} != {args[0]})"
        if node.op == "div" and wide[0] and node.args[0].shape[1] != 1 == node.args[1].shape[1]:
            return f"divide({args[0]}, {args[1]})"
        if node.op == "exp" and _nonpositive(node.args[0]):
            return f"exp_nonpositive({args[0]})"
        if node.op in _INFIX:
            return f"({args[0]} {_INFIX[node.op]} {args[1]})"
        return f"{_CALLS[node.op]}({', '.join(args)})"

    def as_float(self, node: Node, text: str, wide: bool) -> str:
        if node.dtype == "float":
            return text
        if node.op == "constant":
            return self.constant(node, "float")
        if node.dtype == "bool":
            return f"where({text}, f(1.0), f(0.0))"
        return f"to_float(f(0.0), {text})" if wide else f"f({text})"


def _nonpositive(node: Node) -> bool:
    """Whether a value is known to be at most zero (or NaN): x - max(x), -|x|, -x**2 / 2."""
    if node.op == "sub":
        a, b = node.args
        return b.op == "row_max" and b.args[0] is a
    if node.op == "mul":  # a negative number times a square
        number, square = node.args
        return number.op == "constant" and number.value <= 0 and square.op == "mul" and square.args[0] is square.args[1]
    return node.op == "neg" and node.args[0].op == "abs"


class Scalars(Writer):
    """Numbers that `call` computes between stages."""

    def __init__(self, context: Context, sums: dict[Node, str]) -> None:
        super().__init__(context)
        self.names: dict[Node, str] = {s: name for s, name in sums.items() if s.shape == (1, 1)}

    def value(self, node: Node) -> tuple[list[str], str]:
        lines: list[str] = []

        def visit(n: Node) -> str:
            if n in self.names:
                return self.names[n]
            if (leaf := self.leaf(n)) is not None:
                return leaf
            if n.op == "option":
                return str(n.value)
            if n.op == "input":
                return self.context.value(n.value, "0")
            args = [visit(a) for a in n.args]
            name = self.fresh(n)
            lines.append(f"{name} = {self.combine(n, args, [False] * len(args))}")
            self.names[n] = name
            return name

        return lines, visit(node)
