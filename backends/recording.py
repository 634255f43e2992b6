"""A recording: symbolic arrays, whose operations become the nodes of a program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

from xpnn.backends.program import DType, Extent, Node, Program, Shape, derive, is_number, walk

_TO_BOOL = {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "isnan"}
_TO_FLOAT = {"div", "exp", "expm1", "log", "log1p", "sqrt", "tanh", "erf", "erfc"}
_TRACING = {__name__, "xpnn.backends.trace"}


class SubsetError(TypeError):
    """A kernel does something that cannot be fused; the message names its file and line."""


class BranchError(SubsetError):
    """A kernel branches on a number that is known only at run time; no backend falls back from that."""


def refuse(what: str, error: type[SubsetError] = SubsetError) -> NoReturn:
    """Raise for the innermost line that is not tracing's: the kernel's own."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _TRACING:
        frame = frame.f_back
    where = f"{Path(frame.f_code.co_filename)}:{frame.f_lineno}"
    raise error(f"{where}: in {frame.f_code.co_name}: {what}")


class DTypeToken:
    """The dtype of a traced array; equal to itself alone."""

    def __init__(self, name: DType) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<traced {self.name}>"


DTYPES = {name: DTypeToken(name) for name in ("float", "int", "bool")}


class Trace:
    """One recording: interns nodes, so that a common subexpression is one node, and unifies extents."""

    def __init__(self) -> None:
        self._nodes: dict[Any, Node] = {}
        self._same: dict[str, str] = {}
        self._seen: set[str] = set()

    def see(self, *nodes: Node) -> None:
        """Note that the formula looks at these."""
        self._seen |= {n.value for n in nodes if n.op == "input"}

    def node(self, op: str, args: tuple[Node, ...], shape: Shape, dtype: DType, value: Any = None) -> Node:
        self.see(*args)
        key = (op, args, shape, dtype, type(value), repr(value))
        if key not in self._nodes:
            self._nodes[key] = Node(op, args, shape, dtype, value)
        return self._nodes[key]

    def input(self, name: str, shape: Shape, dtype: DType) -> Array:
        return Array(self, self.node("input", (), shape, dtype, name))

    def option(self, name: str, value: float | int, off: Any) -> Array:
        return Option(self, self.node("option", (), (1, 1), "int" if isinstance(value, int) else "float", name), off)

    def program(
        self,
        name: str,
        inputs: dict[str, Any],
        options: dict[str, Any],
        outputs: dict[str, Any],
        index: dict[str, str | None],
    ) -> Program:
        """The finished recording, with extents that turned out equal written the same."""
        renamed: dict[Node, Node] = {}

        def settle(node: Node) -> Node:
            if node not in renamed:
                rows, columns = (e if e == 1 else self._root(e) for e in node.shape)
                value = self._root(node.value) if node.op in ("extent", "columns") else node.value
                renamed[node] = Node(node.op, tuple(map(settle, node.args)), (rows, columns), node.dtype, value)
            return renamed[node]

        taken = {*inputs, *options, *outputs}
        made, derived = derive({key: settle(self.lift(value).node) for key, value in outputs.items()}, taken)
        stored: dict[str, Node] = {}
        for key, node in made.items():
            # results are floats, but for the number of a column in each row
            dtype: DType = "int" if node.dtype == "int" and node.shape[0] != 1 == node.shape[1] else "float"
            if node.is_leaf or node in stored.values() or node.dtype != dtype:  # an array of its own
                node = Node("cast", (node,), node.shape, dtype)
            stored[key] = node
        read = {k: settle(v.node) for k, v in inputs.items()}
        self.see(*(value.node for value in outputs.values() if isinstance(value, Array)))
        leaves = {n.value: n for n in walk(stored.values()) if n.op == "option"}
        given = {k: settle(v.node) for k, v in options.items() if k in leaves or k in index.values()}
        numbers = given | {k: leaves[k] for k in derived}
        return Program(name, read, numbers, stored, index, frozenset(self._seen), derived)

    def lift(self, value: Any) -> Array:
        if isinstance(value, Array):
            return value
        if isinstance(value, bool | int | float):
            kind: DType = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
            return Array(self, self.node("constant", (), (1, 1), kind, value))
        refuse(f"it mixes traced arrays with {type(value).__name__}")

    def apply(self, op: str, *operands: Any, dtype: DType | None = None) -> Array:
        arrays = [self.lift(o) for o in operands]
        for a in arrays:
            if a.node.op == "transpose":
                refuse("it uses a transposed array outside matmul")
        if op == "floor" and arrays[0].node.dtype == "int":
            return arrays[0]
        values = arrays[1:] if op == "where" else arrays
        kinds = {a.node.dtype for a in values}
        if dtype is None:
            if op in _TO_BOOL:
                dtype = "bool"
            elif op in _TO_FLOAT or "float" in kinds:
                dtype = "float"
            else:
                dtype = "int" if "int" in kinds else "bool"
        rows_of_integers = any(a.node.dtype == "int" and a.node.shape[0] != 1 for a in arrays)
        if op in ("add", "sub", "mul") and dtype != "float" and not rows_of_integers:
            # whole numbers that are no one's index: they would overflow where NumPy's Python integers do not
            arrays, dtype, kinds = [self.lift(self._float(a)) for a in arrays], "float", {"float"}
        shape = (self.broadcast(a.node.shape[0] for a in arrays), self.broadcast(a.node.shape[1] for a in arrays))
        if op == "mul" and any(a.node.op == "constant" and a.node.value == 1 for a in arrays) and len(kinds) == 1:
            return next(a for a in reversed(arrays) if not (a.node.op == "constant" and a.node.value == 1))
        return Array(self, self.node(op, tuple(a.node for a in arrays), shape, dtype))

    def matmul(self, a: Array, b: Array) -> Array:
        inner, other = a.node.shape[1], b.node.shape[0]
        if inner == 1 or other == 1 or a.node.shape[0] == 1 or b.node.shape[1] == 1:
            refuse("it calls xp.matmul with something other than two Full or Matrix arrays")
        self.unify(inner, other)
        shape = (a.node.shape[0], b.node.shape[1])
        return Array(self, self.node("matmul", (a.node, b.node), shape, "float"))

    def _float(self, a: Array) -> Any:
        if a.node.op == "constant":
            return float(a.node.value)
        return Array(self, self.node("cast", (a.node,), a.node.shape, "float"))

    def broadcast(self, extents: Any) -> Extent:
        result: Extent = 1
        for e in extents:
            if e != 1:
                result = e if result == 1 else self.unify(result, e)
        return result

    def _root(self, symbol: str) -> str:
        while symbol in self._same:
            symbol = self._same[symbol]
        return symbol

    def unify(self, a: str, b: str) -> str:
        """Take two extents to be equal; the caller's arrays are checked against that."""
        a, b = sorted((self._root(a), self._root(b)), key=lambda symbol: (len(symbol), symbol))
        if a != b:
            self._same[b] = a
        return a


class Array:
    """A traced array: the operators and attributes that formulas may use."""

    def __init__(self, trace: Trace, node: Node) -> None:
        self.trace, self.node = trace, node

    @property
    def dtype(self) -> DTypeToken:
        self.trace.see(self.node)
        return DTYPES[self.node.dtype]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def shape(self) -> tuple[Any, Any]:
        def extent(e: Extent) -> Any:
            return 1 if e == 1 else Array(self.trace, self.trace.node("extent", (), (1, 1), "int", e))

        self.trace.see(self.node)
        return extent(self.node.shape[0]), extent(self.node.shape[1])

    @property
    def T(self) -> Array:
        if self.node.op == "transpose":
            return Array(self.trace, self.node.args[0])
        rows, columns = self.node.shape
        return Array(self.trace, self.trace.node("transpose", (self.node,), (columns, rows), self.node.dtype))

    def __add__(self, other: Any) -> Array:
        return self.trace.apply("add", self, other)

    def __radd__(self, other: Any) -> Array:
        return self.trace.apply("add", other, self)

    def __sub__(self, other: Any) -> Array:
        return self.trace.apply("sub", self, other)

    def __rsub__(self, other: Any) -> Array:
        return self.trace.apply("sub", other, self)

    def __mul__(self, other: Any) -> Array:
        return self.trace.apply("mul", self, other)

    def __rmul__(self, other: Any) -> Array:
        return self.trace.apply("mul", other, self)

    def __truediv__(self, other: Any) -> Array:
        return self.trace.apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Array:
        return self.trace.apply("div", other, self)

    def __neg__(self) -> Array:
        return self.trace.apply("neg", self)

    def __abs__(self) -> Array:
        return self.trace.apply("abs", self)

    def __lt__(self, other: Any) -> Array:
        return self.trace.apply("lt", self, other)

    def __le__(self, other: Any) -> Array:
        return self.trace.apply("le", self, other)

    def __gt__(self, other: Any) -> Array:
        return self.trace.apply("gt", self, other)

    def __ge__(self, other: Any) -> Array:
        return self.trace.apply("ge", self, other)

    def __eq__(self, other: Any) -> Any:
        return self.trace.apply("eq", self, other)

    def __ne__(self, other: Any) -> Any:
        return self.trace.apply("ne", self, other)

    def __and__(self, other: Any) -> Array:
        return self.trace.apply("and", self, other)

    def __or__(self, other: Any) -> Array:
        return self.trace.apply("or", self, other)

    def __invert__(self) -> Array:
        return self.trace.apply("not", self)

    __hash__ = None  # type: ignore[assignment]

    def __matmul__(self, other: Any) -> Array:
        return self.trace.matmul(self, other)

    def __pow__(self, exponent: Any) -> Array:
        if all(is_number(self.trace.lift(a).node) for a in (self, exponent)):
            return self.trace.apply("pow", self, exponent, dtype="float")
        if isinstance(exponent, Array) or exponent != 2:
            shown = "an array" if isinstance(exponent, Array) else repr(exponent)
            refuse(f"it uses the operator ** with arrays and {shown} (known is ** 2, and any power of run-time numbers)")
        return self * self

    def __rpow__(self, base: Any) -> Array:
        return self.trace.lift(base) ** self

    def _unknown(self, *operands: Any) -> NoReturn:
        refuse("it uses an operator other than + - * / ** 2 @, comparisons, & | ~")

    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __divmod__ = __xor__ = __lshift__ = __rshift__ = _unknown

    def __bool__(self) -> bool:
        refuse("it branches on a value that is known only at run time; use xp.where, or declare an off value", BranchError)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        refuse(f"it uses the attribute .{name} of an array")

    def __getitem__(self, key: Any) -> NoReturn:
        refuse("it indexes an array; use xp.take_along_axis or xp.where with xp.arange")

    def __iter__(self) -> NoReturn:
        refuse("it iterates over an array")

    def __float__(self) -> NoReturn:
        refuse("it turns an array into a Python number")

    __int__ = __float__
    __index__ = __float__


class Option(Array):
    """A run-time number. With a declared off value it is known to differ from that, so the formula may ask."""

    def __init__(self, trace: Trace, node: Node, off: Any) -> None:
        super().__init__(trace, node)
        self.off = off

    def __eq__(self, other: Any) -> Any:
        return False if self.off is not None and type(other) is not Option and other == self.off else super().__eq__(other)

    def __ne__(self, other: Any) -> Any:
        return True if self.off is not None and type(other) is not Option and other == self.off else super().__ne__(other)

    __hash__ = None

    def __bool__(self) -> bool:
        return True if self.off == 0 else super().__bool__()
