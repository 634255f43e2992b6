"""Expressions of a program as CUDA C++."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from xpnn.backends.program import Node, limit

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
    "and": "&&", "or": "||",
}  # fmt: skip
_CALLS = {
    "abs": "magnitude", "exp": "exp", "expm1": "expm1", "log": "log", "log1p": "log1p", "sqrt": "sqrt", "tanh": "tanh",
    "erf": "erf", "erfc": "erfc", "floor": "floor",
    "maximum": "maximum", "minimum": "minimum",
}  # fmt: skip
_PREFIX = {"neg": "-", "not": "!"}
READABLE = {"row_max": "max", "row_sum": "sum", "gather": "taken"}
TYPES = {"float": "real", "int": "long long", "bool": "bool"}

# names that C++, CUDA or emitted code uses itself
_WORDS = re.findall(
    r"\w+",
    """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t char8_t class co_await
    co_return co_yield compl concept const const_cast consteval constexpr constinit continue decltype default delete do
    double dynamic_cast else enum explicit export extern false final float for friend goto if import inline int long
    module mutable namespace new noexcept not not_eq nullptr operator or or_eq override private protected public
    register reinterpret_cast requires return short signed sizeof static static_assert static_cast struct switch
    template this thread_local throw true try typedef typeid typename typeof union unsigned using virtual void volatile
    wchar_t while xor xor_eq half std errno assert linux unix index
    threadIdx blockIdx blockDim gridDim warpSize
    exp expm1 log log1p tanh erf erfc sqrt floor fabs real column_t least whole maximum minimum magnitude masked clear fill copy
    alike down put to_real from_real load store memory area lane warp first row rows columns width chunk chunks slots column
    blocks start end each top together wanted mine rank parts
    """,
)
_OURS = re.compile(
    "|".join(_WORDS)
    + r"|[A-Z]\w*|_\w*|[bcik]|(over|load|store|add|cluster|in|host|near|by|extent)_\w*"
    + r"|\w*_(\d+|v\d*|row|rows|lanes|parts?|sum|here)|(total|row|sums|number)\d+"
)


def identifier(name: str) -> str:
    """A Python name as one that C++ knows."""
    return re.sub(r"[^A-Za-z0-9_]", lambda m: f"u{ord(m[0]):04x}", name)


def safe_names(given: list[str]) -> dict[str, str]:
    """Names for a program's arrays and numbers that nothing else has: `user_..._` where there is any doubt.

    What is derived from them ends with a suffix that no such name has, so that derived names do not meet either.
    """
    safe: dict[str, str] = {}
    for name in given:
        new = identifier(name)
        if new != name or _OURS.fullmatch(new):
            new = f"user_{new}_"
        while new in safe.values() or (new != name and new in given):
            new += "_"
        safe[name] = new
    return safe


@dataclass(frozen=True)
class Context:
    """What the parts of one module share: the C++ element type of each array, and its name there."""

    dtype: str
    types: dict[str, str]
    names: dict[str, str]
    wide: bool  # whether a column's number takes 64 bits
    sizes: dict[str, int]  # the numbers that the extents' symbols stand for

    @property
    def real(self) -> int:
        """The bytes of what is computed in."""
        return 8 if self.dtype == "float64" else 4

    @property
    def itemsize(self) -> int:
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    def size(self, kind: str) -> int:
        """The bytes of an element, T or real."""
        return self.itemsize if kind == "T" else self.real

    def name(self, name: str) -> str:
        return self.names.get(name, name)


def constant(node: Node, kind: str) -> str:
    if isinstance(node.value, str):
        single, double = (limit(node.value, dtype) for dtype in ("float32", "float64"))
        return f"real(sizeof(real) == 8 ? {double!r} : {single!r})"
    if kind == "float":
        text = repr(float(node.value))
        return {"inf": "INF", "-inf": "(-INF)", "nan": "NOT_A_NUMBER"}.get(text, f"real({text})")
    return {True: "true", False: "false"}[node.value] if isinstance(node.value, bool) else f"{node.value}ll"


class Writer:
    """Expressions as text. `extents` says what the number of rows and of columns is called."""

    def __init__(self, context: Context, extents: dict[str, str]) -> None:
        self.context, self.extents = context, extents
        self.counts: Counter[str] = Counter()
        self.divisors: dict[str, str] = {}
        self.before: list[str] = []  # what a loop needs defined ahead of it
        self.other_extents: dict[str, str] = {}  # those that are not the grid's, by symbol

    def fresh(self, node: Node) -> str:
        base = READABLE.get(node.op, node.op)
        k = self.counts[base]
        self.counts[base] += 1
        return f"{base}_{k}"

    def leaf(self, node: Node) -> str | None:
        """A node that needs no computation and no array."""
        if node.op == "constant":
            return constant(node, node.dtype)
        if node.op == "extent":
            if node.value not in self.extents:
                self.other_extents.setdefault(node.value, f"extent_{len(self.other_extents)}")
            return f"(long long)({self.extents.get(node.value) or self.other_extents[node.value]})"
        if node.op == "option":
            return self.context.name(node.value)
        return None

    def combine(self, node: Node, args: list[str], by_row: bool = False) -> str:
        """One operation on values already in variables. `by_row`: many elements are divided by one number."""
        values = node.args[1:] if node.op == "where" else node.args
        if any(a.dtype == "float" for a in values) or node.dtype == "float":
            start = len(node.args) - len(values)
            args = args[:start] + [as_float(a, t) for a, t in zip(values, args[start:], strict=True)]
        if node.op == "cast":
            return args[0] if node.dtype == "float" else f"(({TYPES[node.dtype]}){args[0]})"
        if node.op == "where":
            return f"({args[0]} ? {args[1]} : {args[2]})"
        if node.op == "isnan":
            return f"({args[0]} != {args[0]})"
        if node.op == "div" and by_row:
            return f"{self._divisor(args[1])}.divide({args[0]})"
        if node.op in _INFIX:
            return f"({args[0]} {_INFIX[node.op]} {args[1]})"
        if node.op in _PREFIX:
            return f"({_PREFIX[node.op]}{args[0]})"
        return f"{_CALLS[node.op]}({', '.join(args)})"

    def _divisor(self, text: str) -> str:
        if text not in self.divisors:
            name = self.divisors[text] = f"by_{len(self.divisors)}"
            self.before.append(f"const Divisor {name}({text});")
        return self.divisors[text]


def as_float(node: Node, text: str) -> str:
    if node.dtype == "float":
        return text
    if node.op == "constant":
        return constant(node, "float")
    return f"({text} ? real(1) : real(0))" if node.dtype == "bool" else f"real({text})"
