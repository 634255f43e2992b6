"""Passes that end in sums over the rows, as CUDA kernels: partial sums first, then their sum, always in the same order."""

from __future__ import annotations

from dataclasses import replace

from xpnn.backends.cupy.expression import TYPES, as_float
from xpnn.backends.cupy.kernel import MEMORY, Launch, Parameter, Writing
from xpnn.backends.cupy.regime import Regime, Tree
from xpnn.backends.program import Node

THREADS = 512  # of a block that goes over values of rows
EACH = 16  # values that one of them adds up
STRIPS = 528  # blocks that a sum of columns is shared out over, where there are so many rows

VALUES = Regime("values", Tree(1, 1, 1), THREADS // 32)
SECOND = "the sum of what its blocks left"


def _no_gather(*_: object) -> str:
    raise AssertionError("a gather takes a pass along rows")


class ValuesKernel(Writing):
    """One number per row: stores, totals; then the results that are single numbers."""

    def write(self) -> list[Launch]:
        blocks = max(1, -(-self.sizes.rows // (THREADS * EACH)))
        p, single = self.pass_, blocks == 1
        lines: list[str] = []
        scope: dict[Node, str] = {}
        inner: list[str] = []
        self.numbers_first(lines)
        for n, node in p.stores.items():
            own, value = self.context.name(n), self.row_value(node, scope, inner, _no_gather)
            inner.append(f"from_real({own}[row * {own}_rows], {as_float(node, value)});")
        totals = {self.context.name(n): s for n, s in p.sums.items()}
        for n, s in totals.items():
            lines.append(f"double {n}_sum = 0;")
            inner.append(f"{n}_sum += {as_float(s.args[0], self.row_value(s.args[0], scope, inner, _no_gather))};")
        if p.sums or p.stores:
            lines += [
                f"constexpr long long EACH = {THREADS * EACH};",
                "const long long start = blockIdx.x * EACH, end = least<long long>(rows, start + EACH);",
                f"for (long long row = start + threadIdx.x; row < end; row += {THREADS}) {{",
                *(f"  {line}" for line in inner),
                "}",
            ]
        if p.sums:
            lines.append(MEMORY)
        for n in totals:
            lines.append(f"{n}_sum = over_block<{THREADS // 32}>({n}_sum, memory);")
        parameters = [*self.arrays(), *self.numbers()]
        shared = THREADS // 32 * 8 if p.sums else 0
        rows = Parameter("size", "rows", "long long rows", "q")
        if single:
            parameters += [*(self._total(n) for n in p.sums), *self._results(), rows]
            lines += self._finish()
            return [self.launch(parameters, lines, VALUES, (1, 1), shared=shared)]
        parts = [Parameter("array", f"{self.name}.{n}", f"double* {n}_parts", "Q") for n in totals]
        sizes = {q.name: 8 * blocks for q in parts}
        first = [*lines, *(f"if (threadIdx.x == 0) {n}_parts[blockIdx.x] = {n}_sum;" for n in totals)]
        result = [self.launch([*parameters, *parts, rows], first, VALUES, (blocks, 1), shared=shared, scratch=sizes)]
        if not p.sums and not p.scalars:
            return result
        return [*result, ValuesKernel(self.context, p, f"{self.name}_end", self.sizes).add(parts, blocks)]

    def add(self, parts: list[Parameter], blocks: int) -> Launch:
        """The second step: add up what the blocks left."""
        lines = [MEMORY] if parts else []
        for n in map(self.context.name, self.pass_.sums):
            lines += [
                f"double {n}_sum = 0;",
                f"for (int b = threadIdx.x; b < blocks; b += {THREADS}) {n}_sum += {n}_parts[b];",
                f"{n}_sum = over_block<{THREADS // 32}>({n}_sum, memory);",
            ]
        numbers = {n for n, node in self.pass_.inputs.items() if node.shape == (1, 1)}
        parameters = [
            *(q for q in self.arrays() if q.name in numbers),
            *self.numbers(),
            *(replace(q, text=f"const {q.text}") for q in parts),
            *(self._total(n) for n in self.pass_.sums),
            *self._results(),
            Parameter("size", "rows", "long long rows", "q"),
            Parameter("size", "blocks", "int blocks", "i"),
        ]
        lines += self._finish()
        moves = (8 * blocks * len(parts), self.context.real * (len(parts) + len(self.pass_.scalars)))
        return self.launch(
            parameters, lines, VALUES, (1, 1), shared=THREADS // 32 * 8, more={"blocks": blocks}, moves=moves, title=SECOND
        )

    def _total(self, name: str) -> Parameter:
        return Parameter("array", name, f"real* {self.context.name(name)}", "Q")

    def _results(self) -> list[Parameter]:
        types = self.context.types
        return [Parameter("array", n, f"{types[n]}* {self.context.name(n)}", "Q") for n in self.pass_.scalars]

    def _finish(self) -> list[str]:
        """What one thread does in the end: totals as arrays, results that are single numbers."""
        lines: list[str] = []
        for n in map(self.context.name, self.pass_.sums):
            lines += [f"const real {n}_0 = real({n}_sum);", f"{n}[0] = {n}_0;"]
        totals = {n: f"{self.context.name(n)}_0" for n in self.pass_.sums}
        for name, node in self.pass_.scalars.items():
            for leaf in _leaves(node):
                if leaf.value in totals:
                    self.scalars[leaf] = totals[leaf.value]
            value = as_float(node, self.number(node, lines))
            lines.append(f"from_real({self.context.name(name)}[0], {value});")
        return ["if (threadIdx.x == 0) {", *(f"  {line}" for line in lines), "}"] if lines else []


def _leaves(node: Node) -> list[Node]:
    return [node] if node.op == "input" else [leaf for a in node.args for leaf in _leaves(a)]


class ColumnKernel(Writing):
    """Sums of columns, and the stores that ride along: blocks of 32 x 8 threads, each with some columns of every eighth row."""

    def write(self, staged: bool) -> list[Launch]:
        p, rows, columns = self.pass_, self.sizes.rows, self.sizes.columns
        width = 16 // self.context.itemsize
        down = min(max(1, -(-STRIPS // -(-columns // (32 * width)))), -(-rows // 32))
        n = 1 if staged else width
        whole = "true" if columns % width == 0 else "false"
        suffix = "_each<1>" if staged else f"<1, {whole}>"
        lines = [
            f"constexpr int N = {'1' if staged else 'WIDTH'};",
            "const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;",
            "const column_t start = (column_t)blockIdx.x * 32 * N, first = start + lane * N;",
            MEMORY,
        ]
        scope: dict[Node, str] = {}
        row_lines: list[str] = []
        inner: list[str] = []
        loads: list[str] = []
        after: list[str] = []
        element_scope: dict[Node, str] = {}

        def element(node: Node) -> str:
            if node.shape == (1, 1):
                return self.number(node, lines)
            if node.shape[1] == 1:
                return self.row_value(node, scope, row_lines, _no_gather)
            if node in element_scope:
                return element_scope[node]
            if node.op == "input":
                own = self.context.name(node.value)
                where = loads if node.shape[0] != 1 else lines
                at = f" + row * {own}_rows" if node.shape[0] != 1 else ""
                where += [f"real {own}_v[1][N];", f"load{suffix}({own}_v, {own}{at}, first, columns);"]
                element_scope[node] = f"{own}_v[0][i]"
                return element_scope[node]
            if node.op == "columns":
                return "(first + i)"
            args = [element(a) for a in node.args]
            by_row = node.op == "div" and node.args[0].shape[1] != 1 and node.args[1].shape[1] == 1
            text = self.combine(node, args, by_row=by_row)
            name = self.fresh(node)
            inner.append(f"const {TYPES[node.dtype]} {name} = {text};")
            element_scope[node] = name
            return name

        sums = list(p.sums.items())
        self.numbers_first(lines)
        for k, (_, s) in enumerate(sums):
            inner.append(f"sum_{k}[i] += {as_float(s.args[0], element(s.args[0]))};")
        for name, node in p.stores.items():
            own = self.context.name(name)
            value = as_float(node, element(node))
            loads.append(f"real {own}_v[1][N];")
            inner.append(f"{own}_v[0][i] = {value};")
            after.append(f"store{suffix}({own} + row * {own}_rows, {own}_v, first, columns);")
        lines += [f"real sum_{k}[N] = {{}};" for k in range(len(sums))]
        lines += [
            "const long long top = blockIdx.y * each, end = least<long long>(rows, top + each);",
            "#pragma unroll 4",
            "for (long long row = top + warp; row < end; row += 8) {",
            *(f"  {line}" for line in [*row_lines, *self.before, *loads]),
            "  UNROLL for (int i = 0; i < N; ++i) {",
            *(f"    {line}" for line in inner),
            "  }",
            *(f"  {line}" for line in after),
            "}",
        ]
        for k in range(len(sums)):
            write = (
                f"[&](int c, real v) {{ if (start + c < columns) parts_{k}[(long long)blockIdx.y * columns + start + c] = v; }}"
            )
            lines.append(f"down<8>(sum_{k}, reinterpret_cast<real*>(memory), {write});")
        real = self.context.real
        parts = [Parameter("array", f"{self.name}.{name}", f"real* parts_{k}", "Q") for k, (name, _) in enumerate(sums)]
        parameters = [
            *self.arrays(), *self.numbers(), *parts, Parameter("size", "rows", "long long rows", "q"), self.index,
            Parameter("size", "each", "long long each", "q"),
        ]  # fmt: skip
        regime = Regime("columns", Tree(1, 1, n), 8)
        more = {"each": -(-rows // down), "blocks": down}
        blocks = (-(-columns // (32 * n)), down)
        scratch = {q.name: real * down * columns for q in parts}
        first = self.launch(parameters, lines, regime, blocks, shared=256 * n * real, more=more, scratch=scratch)
        return [first, *(self._add(k, name, parts[k], regime, more) for k, (name, _) in enumerate(sums))]

    def _add(self, k: int, name: str, parts: Parameter, regime: Regime, more: dict[str, int]) -> Launch:
        """The second step of one sum."""
        own, kind, columns = self.context.name(name), self.context.types[name], self.sizes.columns
        parameters = [
            Parameter("array", parts.name, "const real* parts", "Q"),
            Parameter("array", name, f"{kind}* {own}", "Q"),
            Parameter("size", "blocks", "int blocks", "i"),
            self.index,
        ]
        body = [MEMORY, f"add_parts(parts, {own}, blocks, columns, reinterpret_cast<real*>(memory));"]
        moves = (self.context.real * more["blocks"] * columns, self.context.size(kind) * columns)
        return self.launch(
            parameters, body, regime, (-(-columns // 32), 1), shared=256 * self.context.real, more=more, moves=moves,
            title=SECOND, name=f"{self.name}_end{k}",
        )  # fmt: skip
