"""From a loop program to the text of a Numba module.

One stage becomes one serial function over a range of blocks; `call` runs the stages in order, each shared out over threads,
and adds up what they leave in fixed order. Rows are cut into `Lanes`; reductions split a row into phases:

    phase 0   max over the columns
    phase 1   e = exp(x - max), stored in the output's own row, and its sum
    phase 2   e / sum

A value that is dear to compute and needed in two phases is kept in the row of an output that is written later.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from xpnn.backends.program import GRID_REDUCTIONS, ROW_REDUCTIONS, Node, Program, Stage, stages, substitute, walk, within_pass

CHUNK = 2048  # columns that one lane accumulator adds up before it is put aside: bounds the rounding error of long rows
BLOCK = 4096  # elements that one block holds, or one row
DEAR = {"exp", "log", "tanh"}
SERIAL_BELOW = 30_000  # work units (elements, and 8 more for a dear operation) that a second thread does not pay for

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_CALLS = {
    "abs": "absolute", "neg": "negative", "exp": "exp", "log": "log", "sqrt": "sqrt", "tanh": "tanh",
    "maximum": "maximum", "minimum": "minimum", "and": "logical_and", "or": "logical_or", "not": "logical_not",
}  # fmt: skip
_READABLE = {"row_max": "max", "row_sum": "sum", "sum_rows": "total", "column_sum": "sums", "gather": "taken"}


@dataclass(frozen=True)
class Emitted:
    """A module's text, and how to call its `call(runner, threads, *inputs, *outputs, *numbers)`.

    `index` is the order in which `call` checks its index inputs: it returns -1, or check number + 8 * row.
    `unsafe` holds the pairs (output, input) that must not share memory. `work` is the cost per element.
    """

    text: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: tuple[str, ...]
    index: tuple[str, ...]
    unsafe: frozenset[tuple[str, str]]
    work: int


def emit(program: Program, dtype: str, banner: str) -> Emitted:
    """Write the module that computes a loop program in float32 or float64."""
    given = (*program.inputs, *program.outputs, *program.options)
    safe: dict[str, str] = {}
    for name in given:
        while _OURS.fullmatch(name) or name in {*safe.values(), *given} - {name}:
            name += "_"
        safe[given[len(safe)]] = name
    emitted = _Module(_renamed(program, safe), dtype, banner).emit()
    back = {new: old for old, new in safe.items()}
    names = (tuple(back[n] for n in group) for group in (emitted.inputs, emitted.outputs, emitted.numbers, emitted.index))
    return Emitted(emitted.text, *names, frozenset((back[a], back[b]) for a, b in emitted.unsafe), emitted.work)


# names that emitted code uses itself: none of them ends with an underscore
_OURS = re.compile(
    r"[bfijnCRW]|np|njit|types|real|runner|threads|call|launch|signature|first|last|blocks?|start|stop|pieces|column|range"
    r"|absolute|at|columns|divide|exp\w*|keep|least|load|log\w*|maximum|minimum|negative|peak|row|spread|sqrt|store|tanh"
    r"|to_float|total|where|\w*_([bij]|\d+|parts|parts_b|lanes|lanes_all|row|all)|(stage|number|total|sums|t)\d+"
)


def _renamed(program: Program, names: dict[str, str]) -> Program:
    """The same program with other names for its arrays and numbers."""
    if all(a == b for a, b in names.items()):
        return program
    leaves = (*program.inputs.values(), *program.options.values())
    new = {n: Node(n.op, (), n.shape, n.dtype, names[n.value]) for n in leaves}
    outputs = substitute(program.outputs.values(), new)
    return Program(
        program.name,
        {names[k]: new[v] for k, v in program.inputs.items()},
        {names[k]: new[v] for k, v in program.options.items()},
        {names[k]: v for k, v in zip(program.outputs, outputs, strict=True)},
        {names[k]: names.get(v, v) if v else v for k, v in program.index.items()},
    )


class _Module:
    def __init__(self, program: Program, dtype: str, banner: str) -> None:
        self.program, self.dtype, self.banner = program, dtype, banner
        self.unsafe: set[tuple[str, str]] = set()
        self.extents: dict[str, str] = {}
        for name, node in program.inputs.items():
            for axis, symbol in enumerate(node.shape):
                if symbol != 1:
                    self.extents.setdefault(symbol, f"{name}.shape[{axis}]")
        for name, node in program.outputs.items():
            for axis, symbol in enumerate(node.shape):
                if symbol != 1:
                    self.extents.setdefault(symbol, f"{name}.shape[{axis}]")

    def extent(self, symbol: Any) -> str:
        """The variable that holds an extent."""
        return "1" if symbol == 1 else str(symbol).replace(".", "_")

    def emit(self) -> Emitted:
        p = self.program
        plan = stages(p)
        sums = {s: f"{_READABLE[s.op]}{k}" for k, s in enumerate(s for stage in plan for s in stage.sums)}
        bodies = [_StageWriter(self, stage, f"stage{k}", sums) for k, stage in enumerate(plan)]
        functions = [b.write() for b in bodies]
        functions.append(self._call(bodies, sums))
        text = "\n\n".join([self._header("\n".join("\n".join(f) for f in functions)), *("\n".join(f) for f in functions)]) + "\n"
        nodes = walk(p.outputs.values())
        work = 1 + 8 * sum(n.op in DEAR for n in nodes) + sum(n.op == "div" for n in nodes)
        return Emitted(text, tuple(p.inputs), tuple(p.outputs), tuple(p.options), tuple(p.index), frozenset(self.unsafe), work)

    def _header(self, used: str) -> str:
        names = ["absolute", "at", "columns", "divide", "exp", "exp_nonpositive", "keep", "least", "load", "log", "logical_and",
                 "logical_not", "logical_or", "maximum", "minimum", "negative", "peak", "row", "spread", "sqrt", "store",
                 "tanh", "to_float", "total", "where"]  # fmt: skip
        wanted = sorted(n for n in names if f"{n}(" in used)
        lines = [f'"""{self.banner}', "", *(f"    {line}" for line in self.program.text().splitlines()), '"""', ""]
        lines += ["import numpy as np", "from numba import njit, types", ""]
        if wanted:
            lines.append(f"from xpnn.backends.numba.lanes import {', '.join(wanted)}")
        lines += ["from xpnn.backends.numba.launch import launch, signature", "", f"f = np.{self.dtype}"]
        lines.append(f"real = types.{self.dtype}")
        lines.append(f"W = {64 // (4 if self.dtype == 'float32' else 8)}  # lanes")
        return "\n".join(lines) + "\n"

    def type_of(self, node: Node) -> str:
        return {"float": "f", "int": "i", "bool": "b"}[node.dtype]

    def _call(self, bodies: list[_StageWriter], sums: dict[Node, str]) -> list[str]:
        p = self.program
        parameters = ["runner", "threads", *p.inputs, *p.outputs, *p.options]
        spec = ["i", "i"]
        spec += [f"r{self.type_of(n)}" for n in p.inputs.values()] + ["wf"] * len(p.outputs)
        spec += [self.type_of(n) for n in p.options.values()]
        codes = " ".join(spec)
        lines = [f'@njit(signature(real, "{codes}"), nogil=True, error_model="numpy", cache=True)', f"def call({', '.join(parameters)}):"]
        body = [f"{self.extent(s)} = {source}" for s, source in self.extents.items()]
        for k, (name, exempt) in enumerate(p.index.items()):
            columns = self.extent(self._index_columns())
            test = f"{name}[i, 0] < 0 or {name}[i, 0] >= {columns}"
            if exempt in p.options:
                test = f"({test}) and {name}[i, 0] != {exempt}"
            body += [f"for i in range({name}.shape[0]):", f"    if {test}:", f"        return {k} + 8 * i"]
        scalars = _Scalars(self, sums)
        written: set[Node] = set()
        for b in bodies:
            body += b.launch(scalars)
            for s in b.stage.sums:
                body += b.finish(s, self._output_of(s))
                written.add(s)
        for name, node in p.outputs.items():
            if node.shape == (1, 1):
                lines_, value = scalars.value(node, set(sums))
                body += [*lines_, f"{name}[0, 0] = {value}"]
        body.append("return -1")
        return [*lines, *(f"    {line}" for line in body)]

    def _output_of(self, node: Node) -> str | None:
        return next((n for n, v in self.program.outputs.items() if v is node and v.shape != (1, 1)), None)

    def _index_columns(self) -> Any:
        return next(n.shape[1] for n in self.program.inputs.values() if n.shape[1] != 1 and n.shape[0] != 1)


@dataclass
class _Scope:
    """Variables that hold nodes' values, and the lines that made them."""

    names: dict[Node, str] = field(default_factory=dict)


class _Writer:
    """Expressions as text."""

    def __init__(self, module: _Module) -> None:
        self.module = module
        self.counts: Counter[str] = Counter()

    def fresh(self, node: Node) -> str:
        base = _READABLE.get(node.op, node.op)
        k = self.counts[base]
        self.counts[base] += 1
        return f"{base}_{k}"

    def constant(self, node: Node, kind: str) -> str:
        value = node.value
        if kind == "float":
            text = {"inf": "np.inf", "-inf": "-np.inf", "nan": "np.nan"}.get(repr(float(value)), repr(float(value)))
            return f"f({text})"
        return repr(value)

    def leaf(self, node: Node) -> str | None:
        if node.op == "constant":
            return self.constant(node, node.dtype)
        if node.op == "extent":
            return self.module.extent(node.value)
        return None

    def combine(self, node: Node, args: list[str], wide: list[bool]) -> str:
        """One operation on values already in variables; `wide` says which of them are lanes."""
        if node.op in {"columns", "input", "option", "gather"}:
            raise AssertionError(node.op)
        values = node.args[1:] if node.op == "where" else node.args
        mixed = any(a.dtype == "float" for a in values) or node.dtype == "float"
        if mixed:
            start = len(node.args) - len(values)
            args = args[:start] + [
                self._as_float(a, t, w) for a, t, w in zip(values, args[start:], wide[start:], strict=True)
            ]
        if node.op == "cast":
            return args[0] if node.dtype == "float" else f"np.intp({args[0]})"
        if node.op == "where":
            return f"where({', '.join(args)})"
        if node.op == "isnan":
            return f"({args[0]} != {args[0]})"
        if node.op == "div" and wide[0] and not wide[1]:
            return f"divide({args[0]}, {args[1]})"
        if node.op == "exp" and _nonpositive(node.args[0]):
            return f"exp_nonpositive({args[0]})"
        if node.op in _INFIX:
            return f"({args[0]} {_INFIX[node.op]} {args[1]})"
        return f"{_CALLS[node.op]}({', '.join(args)})"

    def _as_float(self, node: Node, text: str, wide: bool) -> str:
        if node.dtype == "float":
            return text
        if node.op == "constant":
            return self.constant(node, "float")
        if node.dtype == "bool":
            return f"where({text}, f(1.0), f(0.0))"
        return f"to_float(f(0.0), {text})" if wide else f"f({text})"


def _nonpositive(node: Node) -> bool:
    """Whether a value is known to be at most zero (or NaN): x - max(x), -|x|."""
    if node.op == "sub":
        a, b = node.args
        return b.op == "row_max" and b.args[0] is a
    return node.op == "neg" and node.args[0].op == "abs"


class _Scalars(_Writer):
    """Numbers that `call` computes between stages."""

    def __init__(self, module: _Module, sums: dict[Node, str]) -> None:
        super().__init__(module)
        self.names: dict[Node, str] = {s: name for s, name in sums.items() if s.shape == (1, 1)}

    def value(self, node: Node, known: set[Node]) -> tuple[list[str], str]:
        lines: list[str] = []

        def visit(n: Node) -> str:
            if n in self.names:
                return self.names[n]
            if (leaf := self.leaf(n)) is not None:
                return leaf
            if n.op == "option":
                return str(n.value)
            if n.op == "input":
                return f"{n.value}[0, 0]"
            args = [visit(a) for a in n.args]
            name = self.fresh(n)
            lines.append(f"{name} = {self.combine(n, args, [False] * len(args))}")
            self.names[n] = name
            return name

        return lines, visit(node)


class _StageWriter(_Writer):
    """One stage: a serial function over blocks `first` to `last` of the grid."""

    def __init__(self, module: _Module, stage: Stage, name: str, sums: dict[Node, str]) -> None:
        super().__init__(module)
        self.stage, self.name, self.sums = stage, name, sums
        self.roots = {root: within_pass(root) for root in (*stage.stores, *stage.sums)}
        self.nodes = list(dict.fromkeys(n for nodes in self.roots.values() for n in nodes))
        self.level: dict[Node, int] = {}
        for n in self.nodes:
            inner = () if n.op in GRID_REDUCTIONS else n.args
            self.level[n] = max((self.level[a] for a in inner), default=0) + (n.op in ROW_REDUCTIONS)
        self.output = {node: name for name, node in module.program.outputs.items() if node in stage.stores}
        self.inputs = {n.value: n for n in self.nodes if n.op == "input"}
        self.scalars = [n for n in self.nodes if n.shape == (1, 1) and not (n.op in {"constant", "extent"})]
        self.is_map = not (stage.sums or any(n.op in ROW_REDUCTIONS or n.op == "gather" for n in self.nodes)) and (
            stage.shape[1] != 1 and all(s.shape[1] != 1 for s in stage.stores)
        )
        self.tables = [n for n in self.nodes if n.op == "column_sum" and n not in stage.sums]
        self.kept: dict[Node, str] = {}
        self._plan_kept()
        self._plan_unsafe()

    # -- planning

    def target_level(self, root: Node) -> int:
        return self.level[root.args[0] if root.op in GRID_REDUCTIONS else root]

    def uses(self) -> dict[Node, set[int]]:
        """The phases in whose column loops each full value is needed, were nothing kept."""
        needed: dict[Node, set[int]] = {}

        def visit(n: Node, phase: int) -> None:
            if n.shape[1] == 1 or phase in needed.setdefault(n, set()):
                return
            needed[n].add(phase)
            if n in self.kept and phase > min(needed[n]):
                return
            for a in () if n.op in GRID_REDUCTIONS else n.args:
                visit(a, phase)

        jobs = [(n.args[0], self.level[n] - 1) for n in self.nodes if n.op in ROW_REDUCTIONS]
        jobs += [(r.args[0] if r.op in GRID_REDUCTIONS else r, self.target_level(r)) for r in self.roots]
        for node, phase in sorted(jobs, key=lambda job: job[1]):
            visit(node, phase)
        return needed

    def _plan_kept(self) -> None:
        for node, phases in self.uses().items():
            if node.op not in DEAR or len(phases) < 2 or node.shape != self.stage.shape:
                continue
            for store in self.stage.stores:
                free = self.output[store] not in self.kept.values() and store.shape == node.shape
                if free and self.level[store] >= max(phases):
                    self.kept[node] = self.output[store]
                    break

    def _plan_unsafe(self) -> None:
        """Outputs that are written before an input is read for the last time, or in another order."""
        last = {n: max(phases) for n, phases in self.uses().items()}
        for gathered in (n for n in self.nodes if n.op == "gather"):
            for n in walk([gathered.args[0]]):  # read at the start of its phase
                last[n] = max(last.get(n, 0), self.level[gathered])
        for store, name in self.output.items():
            first = min([self.level[store]] + [self.level[k] for k, kept in self.kept.items() if kept == name])
            for n in self.inputs.values():
                if store.shape != self.stage.shape or n.shape != store.shape or first < last.get(n, 0):
                    self.module.unsafe.add((name, n.value))

    # -- the stage function

    def parameters(self) -> list[str]:
        """The stage's parameters but `first`, `last`."""
        result = [name for name, n in self.inputs.items() if n.shape != (1, 1)]
        result += [self.module._output_of(t) or f"{self.sums[t]}_row" for t in self.tables]
        result += self.output.values()
        result += [f"{self.sums[s]}_parts" for s in self.stage.sums]
        result += [self.scalar_name(n) for n in self.outer_scalars()]
        result += [self.module.extent(e) for e in self.module.extents]
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

    def launch(self, scalars: _Scalars) -> list[str]:
        m, rows, columns = self.module, self.module.extent(self.stage.shape[0]), self.module.extent(self.stage.shape[1])
        lines: list[str] = []
        values: dict[str, str] = {}
        for n in self.outer_scalars():
            more, text = scalars.value(n, set(self.sums))
            lines += more
            values[self.scalar_name(n)] = text
        if self.is_map:
            lines += [f"block = {4 * BLOCK}", f"blocks = {rows} * (({columns} + block - 1) // block)"]
        elif any(s.op == "column_sum" for s in self.stage.sums):
            lines += [f"block = least(256, {rows} // 64 + 16)", f"blocks = ({rows} + block - 1) // block"]
        else:
            lines += [f"block = {BLOCK} // {columns} + 1", f"blocks = ({rows} + block - 1) // block"]
        for s in self.stage.sums:
            extent = f"(blocks, {m.extent(s.shape[1])}), f" if s.op == "column_sum" else "blocks, np.float64"
            lines.append(f"{self.sums[s]}_parts = np.empty({extent})")
        args = [values.get(name, name) for name in self.parameters()]
        joined = ", ".join(args)
        return [*lines, f"launch(runner, {self.name}, ({joined},), blocks, threads)"]

    def finish(self, s: Node, output: str | None) -> list[str]:
        """Add up what the blocks left, in their order."""
        name = self.sums[s]
        if s.op == "sum_rows":
            lines = [f"{name}_all = 0.0", "for b in range(blocks):", f"    {name}_all += {name}_parts[b]"]
            return [*lines, f"{name} = {'f' if s.dtype == 'float' else 'np.intp'}({name}_all)"]
        columns = self.module.extent(s.shape[1])
        target = output or f"{name}_row"
        lines = [] if output else [f"{target} = np.empty((1, {columns}), f)"]
        return [
            *lines,
            f"{name}_all = np.zeros({columns})",
            "for b in range(blocks):",
            f"    for j in range({columns}):",
            f"        {name}_all[j] += {name}_parts[b, j]",
            f"for j in range({columns}):",
            f"    {target}[0, j] = f({name}_all[j])",
        ]

    def write(self) -> list[str]:
        head = [
            '@njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)',
            f"def {self.name}({', '.join(self.parameters())}, first, last):",
        ]
        return head + [f"    {line}" for line in (self._map() if self.is_map else self._rows())]

    def _row_views(self) -> list[str]:
        """Views of the rows that the column loops run along."""
        lines = []
        for name, n in self.inputs.items():
            if n.shape[1] != 1:
                lines.append(f"{name}_i = row({name}, {'i' if n.shape[0] != 1 else '0'})")
        for t in self.tables:
            name = self.module._output_of(t) or f"{self.sums[t]}_row"
            lines.append(f"{name}_i = row({name}, 0)")
        for store, name in self.output.items():
            if store.shape[1] != 1:
                lines.append(f"{name}_i = row({name}, {'i' if store.shape[0] != 1 else '0'})")
        return lines

    def _map(self) -> list[str]:
        columns = self.module.extent(self.stage.shape[1])
        scope: dict[Node, str] = {}
        body: list[str] = []
        for n in self.nodes:
            if n.shape[1] == 1 and n.shape[0] != 1:
                self._row_value(n, scope, body)
        head = [f"pieces = ({columns} + block - 1) // block", "for b in range(first, last):"]
        inner = ["i = b // pieces", f"start = b % pieces * block", f"stop = least({columns}, start + block)"]
        step = self._column_body(0, scope, set(self.stage.stores), [])
        loop = ["for j in range(start, stop - W + 1, W):", "    n = W", *(f"    {line}" for line in step)]
        loop += ["n = (stop - start) % W", "if n:", "    j = stop - n", *(f"    {line}" for line in step)]
        return head + [f"    {line}" for line in (*inner, *self._row_views(), *body, *loop)]

    def _rows(self) -> list[str]:
        rows, columns = (self.module.extent(e) for e in self.stage.shape)
        head = ["for b in range(first, last):"]
        inner: list[str] = []
        for s in self.stage.sums:
            if s.op == "sum_rows":
                inner.append(f"{self.sums[s]} = 0.0")
            else:
                name = f"{self.sums[s]}_parts"
                inner += [
                    f"{name}_b = row({name}, b)",
                    f"for j in range(0, {columns}, W):",
                    f"    store({name}_b, j, {columns} - j, f(0.0))",
                ]
        inner += [f"for i in range(b * block, least({rows}, b * block + block)):"]
        inner += [f"    {line}" for line in self._one_row()]
        for s in self.stage.sums:
            if s.op == "sum_rows":
                inner.append(f"{self.sums[s]}_parts[b] = {self.sums[s]}")
        return head + [f"    {line}" for line in inner]

    def _one_row(self) -> list[str]:
        lines = self._row_views()
        scope: dict[Node, str] = {}
        for phase in range(max(self.level.values(), default=0) + 1):
            for n in self.nodes:
                if n.shape[1] == 1 and n.shape[0] != 1 and self.level[n] == phase and n.op not in ROW_REDUCTIONS:
                    self._row_value(n, scope, lines)
            reductions = [n for n in self.nodes if n.op in ROW_REDUCTIONS and self.level[n] == phase + 1]
            stores = {s for s in self.stage.stores if self.level[s] == phase and s.shape[1] != 1}
            sums = [s for s in self.stage.sums if s.op == "column_sum" and self.target_level(s) == phase]
            if reductions or stores or sums:
                lines += self._column_loop(phase, scope, reductions, stores, sums)
            for s in self.stage.stores:
                if self.level[s] == phase and s.shape[1] == 1:
                    lines.append(f"{self.output[s]}[{'i' if s.shape[0] != 1 else '0'}, 0] = {self._operand(s, scope)}")
        for s in self.stage.sums:
            if s.op == "sum_rows":
                lines.append(f"{self.sums[s]} += {self._operand(s.args[0], scope)}")
        return lines

    def _column_loop(
        self, phase: int, scope: dict[Node, str], reductions: list[Node], stores: set[Node], sums: list[Node]
    ) -> list[str]:
        columns = self.module.extent(self.stage.shape[1])
        lines: list[str] = []
        accumulated: list[tuple[Node, str]] = []
        chunked = any(r.op == "row_sum" for r in reductions)
        inside: list[str] = []
        after: list[str] = []
        for r in reductions:
            name = self.fresh(r)
            lanes = f"{name}_lanes"
            accumulated.append((r, lanes))
            if r.op == "row_max":
                lines.append(f"{lanes} = spread(f(-np.inf))")
                after.append(f"{name} = peak({lanes})")
            else:
                lines.append(f"{lanes}_all = spread(f(0.0))")
                inside.append(f"{lanes} = spread(f(0.0))")
                after.append(f"{name} = total({lanes}_all)")
        body = self._column_body(phase, dict(scope), stores, accumulated, sums)
        if chunked:
            lines += [f"for start in range(0, {columns}, {CHUNK}):", *(f"    {line}" for line in inside)]
            lines += [f"    for j in range(start, least({columns} - W + 1, start + {CHUNK}), W):", "        n = W"]
            lines += [f"        {line}" for line in body]
            lines += [f"    {lanes}_all = {lanes}_all + {lanes}" for r, lanes in accumulated if r.op == "row_sum"]
        else:
            lines += [f"for j in range(0, {columns} - W + 1, W):", "    n = W", *(f"    {line}" for line in body)]
        lines += [f"n = {columns} % W", "if n:", f"    j = {columns} - n"]
        lines += [f"    {line}" for line in inside]
        lines += [f"    {line}" for line in body]
        lines += [f"    {lanes}_all = {lanes}_all + {lanes}" for r, lanes in accumulated if r.op == "row_sum"]
        for r, lanes in accumulated:
            scope[r] = lanes.removesuffix("_lanes")
        return lines + after

    def _column_body(
        self, phase: int, scope: dict[Node, str], stores: set[Node], accumulated: list[tuple[Node, str]], sums: list[Node] = []
    ) -> list[str]:
        """What one step along the columns does, given the values of its row."""
        lines: list[str] = []
        uses = self.uses()

        def lanes(n: Node) -> str:
            if n.shape[1] == 1:
                return self._operand(n, scope)
            if n in scope:
                return scope[n]
            if n in self.kept and phase > min(uses[n]):
                text, name = f"load({self.kept[n]}_i, j, n)", self.fresh(n)
            elif n.op == "input":
                text, name = f"load({n.value}_i, j, n)", f"{n.value}_j"
            elif n.op == "column_sum":
                table = self.module._output_of(n) or f"{self.sums[n]}_row"
                text, name = f"load({table}_i, j, n)", f"{table}_j"
            elif n.op == "columns":
                text, name = "columns(f(0.0), j)", "column"
            else:
                args = [lanes(a) for a in n.args]
                text, name = self.combine(n, args, [a.shape[1] != 1 for a in n.args]), self.fresh(n)
            lines.append(f"{name} = {text}")
            scope[n] = name
            if n in self.kept and phase == min(uses[n]):
                lines.append(f"store({self.kept[n]}_i, j, n, {name})")
            return name

        for r, name in accumulated:
            value = lanes(r.args[0])
            if r.op == "row_max":
                lines.append(f"{name} = maximum({name}, keep({value}, n, f(-np.inf)))")
            else:
                lines.append(f"{name} = {name} + keep({value}, n, f(0.0))")
        for s in self.stage.stores:
            if s in stores:
                lines.append(f"store({self.output[s]}_i, j, n, {self._cast(s, lanes(s))})")
        for s in sums:
            parts = f"{self.sums[s]}_parts_b"
            lines.append(f"store({parts}, j, n, load({parts}, j, n) + {lanes(s.args[0])})")
        return lines

    def _cast(self, node: Node, text: str) -> str:
        return text if node.dtype == "float" else self._as_float(node, text, node.shape[1] != 1)

    # -- values of a row

    def _operand(self, n: Node, scope: dict[Node, str]) -> str:
        if n in scope:
            return scope[n]
        if (leaf := self.leaf(n)) is not None:
            return leaf
        assert n.shape == (1, 1), n
        return self.scalar_name(n)

    def _row_value(self, n: Node, scope: dict[Node, str], lines: list[str]) -> None:
        if n in scope:
            return
        if n.op == "input":
            text, name = f"{n.value}[i, 0]", f"{n.value}_i"
        elif n.op == "gather":
            text, name = self._at(n.args[0], self._operand(n.args[1], scope), scope, lines), self.fresh(n)
        else:
            args = [self._operand(a, scope) for a in n.args]
            text, name = self.combine(n, args, [False] * len(args)), self.fresh(n)
        lines.append(f"{name} = {text}")
        scope[n] = name

    def _at(self, n: Node, column: str, scope: dict[Node, str], lines: list[str]) -> str:
        """A full value at one column, computed from the inputs there."""
        if n.shape[1] == 1:
            return self._operand(n, scope)
        if n.op == "input":
            return f"at({n.value}_i, {column})"
        if n.op == "column_sum":
            return f"at({self.module._output_of(n) or self.sums[n] + '_row'}_i, {column})"
        if n.op == "columns":
            return column
        args = [self._at(a, column, scope, lines) for a in n.args]
        return self.combine(n, args, [False] * len(args))
