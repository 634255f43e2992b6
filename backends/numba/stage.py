"""One stage of a loop program as a serial function over blocks of its grid."""

from __future__ import annotations

from xpnn.backends.numba.expression import Context, Scalars, Writer
from xpnn.backends.phases import DEAR, Phases
from xpnn.backends.program import ROW_REDUCTIONS, Node, Stage, walk

CHUNK = 512  # columns that one lane accumulator adds up before it is put aside: bounds the rounding error of long rows
BLOCK = 4096  # elements that one block holds, or one row


class StageWriter(Writer):
    """One stage: a serial function over blocks `first` to `last` of the grid."""

    def __init__(self, context: Context, stage: Stage, name: str, sums: dict[Node, str]) -> None:
        super().__init__(context)
        self.stage, self.name, self.sums = stage, name, sums
        phases = self.phases = Phases((*stage.stores, *stage.sums))
        self.roots, self.nodes, self.level = phases.roots, phases.nodes, phases.level
        self.output = {node: name for name, node in context.program.outputs.items() if node in stage.stores}
        self.inputs = {n.value: n for n in self.nodes if n.op == "input"}
        self.scalars = [n for n in self.nodes if n.shape == (1, 1) and n.op not in {"constant", "extent"}]
        self.is_map = not (stage.sums or any(n.op in ROW_REDUCTIONS or n.op == "gather" for n in self.nodes)) and (
            stage.shape[1] != 1 and all(s.shape[1] != 1 for s in stage.stores)
        )
        self.tables = [n for n in self.nodes if n.op == "column_sum" and n not in stage.sums]
        # what the first phase reads of a row waits for memory: the second one, which computes, asks for the next row's
        uses = phases.uses()
        wide = [n for n in self.inputs.values() if n.shape == stage.shape and 1 not in n.shape]
        self.ahead = [n.value for n in wide if 0 in uses.get(n, ()) and phases.last >= 2]
        self.kept: dict[Node, str] = {}
        self.scratch: list[str] = []
        self._plan_kept()
        self._plan_unsafe()

    # -- planning

    def _plan_kept(self) -> None:
        for node, phases in self.phases.uses(self.kept).items():
            if node.op not in DEAR or len(phases) < 2 or node.shape != self.stage.shape:
                continue
            for store in self.stage.stores:
                name = self.output[store]
                free = name not in self.kept.values() and name not in self.context.halves and store.shape == node.shape
                if free and self.level[store] >= max(phases):
                    self.kept[node] = name
                    break
            else:
                self.kept[node] = f"kept{len(self.scratch)}"
                self.scratch.append(self.kept[node])

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
        m, rows, columns = (
            self.context,
            self.context.extent(self.stage.shape[0]),
            self.context.extent(self.stage.shape[1]),
        )
        lines: list[str] = []
        values: dict[str, str] = {}
        for n in self.outer_scalars():
            more, text = scalars.value(n)
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

    def finish(self, s: Node) -> list[str]:
        """Add up what the blocks left, in their order."""
        name = self.sums[s]
        if s.op == "sum_rows":
            lines = [f"{name}_all = 0.0", "for b in range(blocks):", f"    {name}_all += {name}_parts[b]"]
            return [*lines, f"{name} = {'f' if s.dtype == 'float' else 'np.intp'}({name}_all)"]
        columns = self.context.extent(s.shape[1])
        output = self.context.output_of(s)
        target = self.table(s)
        lines = [] if output == target else [f"{target} = np.empty((1, {columns}), f)"]
        narrow: list[str] = []
        if output is not None and output != target:
            narrow = [f"for j in range({columns}):", f"    {self.context.put(output, '0', 'j', f'{target}[0, j]')}"]
        return [
            *lines,
            f"{name}_all = np.zeros({columns})",
            "for b in range(blocks):",
            f"    for j in range({columns}):",
            f"        {name}_all[j] += {name}_parts[b, j]",
            f"for j in range({columns}):",
            f"    {target}[0, j] = f({name}_all[j])",
            *narrow,
        ]

    def table(self, s: Node) -> str:
        """The array that holds the sums over rows for each column: an output, unless that is too narrow."""
        output = self.context.output_of(s)
        return output if output is not None and output not in self.context.halves else f"{self.sums[s]}_row"

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
        lines += [f"{self.table(t)}_i = row({self.table(t)}, 0)" for t in self.tables]
        rows = self.context.extent(self.stage.shape[0])
        lines += [f"{name}_next = row({name}, least(i + 1, {rows} - 1))" for name in self.ahead if not self.is_map]
        for store, name in self.output.items():
            if store.shape[1] != 1:
                lines.append(f"{name}_i = row({name}, {'i' if store.shape[0] != 1 else '0'})")
        return lines

    def _map(self) -> list[str]:
        columns = self.context.extent(self.stage.shape[1])
        scope: dict[Node, str] = {}
        body: list[str] = []
        for n in self.nodes:
            if n.shape[1] == 1 and n.shape[0] != 1:
                self._row_value(n, scope, body)
        head = [f"pieces = ({columns} + block - 1) // block", "for b in range(first, last):"]
        inner = ["i = b // pieces", "start = b % pieces * block", f"stop = least({columns}, start + block)"]
        step = self._column_body(0, scope, set(self.stage.stores), [], [])
        loop = ["for j in range(start, stop - W + 1, W):", "    n = W", *(f"    {line}" for line in step)]
        loop += ["n = (stop - start) % W", "if n:", "    j = stop - n", *(f"    {line}" for line in step)]
        return head + [f"    {line}" for line in (*inner, *self._row_views(), *body, *loop)]

    def _rows(self) -> list[str]:
        rows, columns = (self.context.extent(e) for e in self.stage.shape)
        head = [f"{name}_i = np.empty({columns}, f)" for name in self.scratch]
        head.append("for b in range(first, last):")
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
            sums = [s for s in self.stage.sums if s.op == "column_sum" and self.phases.target_level(s) == phase]
            if reductions or stores or sums:
                lines += self._column_loop(phase, scope, reductions, stores, sums)
            for s in self.stage.stores:
                if self.level[s] == phase and s.shape[1] == 1:
                    row = "i" if s.shape[0] != 1 else "0"
                    lines.append(self.context.put(self.output[s], row, "0", self._operand(s, scope)))
        for s in self.stage.sums:
            if s.op == "sum_rows":
                lines.append(f"{self.sums[s]} += {self._operand(s.args[0], scope)}")
        return lines

    def _column_loop(
        self, phase: int, scope: dict[Node, str], reductions: list[Node], stores: set[Node], sums: list[Node]
    ) -> list[str]:
        columns = self.context.extent(self.stage.shape[1])
        lines: list[str] = []
        accumulated: list[tuple[Node, str]] = []
        chunked = any(r.op == "row_sum" for r in reductions)
        inside: list[str] = []
        after: list[str] = []
        maxima = not stores and not sums and all(r.op == "row_max" and r.args[0].op == "input" for r in reductions)
        for r in reductions:
            name = self.fresh(r)
            lanes = f"{name}_lanes"
            accumulated.append((r, lanes))
            if maxima:
                lines.append(f"{lanes} = {self.context.crest(r.args[0].value, f'{columns} - {columns} % (4 * W)')}")
                after.append(f"{name} = peak({lanes})")
            elif r.op == "row_max":
                lines.append(f"{lanes} = spread(f(-np.inf))")
                after.append(f"{name} = peak({lanes})")
            else:
                lines.append(f"{lanes}_all = spread(f(0.0))")
                inside.append(f"{lanes} = spread(f(0.0))")
                after.append(f"{name} = total({lanes}_all)")
        hot = None if reductions or sums else self._one_hot(stores)
        body = self._column_body(phase, dict(scope), stores, accumulated, sums)
        ahead = [f"fetch({name}_next, j)" for name in self.ahead if phase == 1]
        if chunked:
            lines += [f"for start in range(0, {columns}, {CHUNK}):", *(f"    {line}" for line in inside)]
            lines += [f"    for j in range(start, least({columns} - W + 1, start + {CHUNK}), W):", "        n = W"]
            lines += [f"        {line}" for line in (*ahead, *body)]
            lines += [f"    {lanes}_all = {lanes}_all + {lanes}" for r, lanes in accumulated if r.op == "row_sum"]
        elif maxima:
            lines += [f"for j in range({columns} - {columns} % (4 * W), {columns} - W + 1, W):", "    n = W"]
            lines += [f"    {line}" for line in body]
        elif hot is not None:
            target = self._operand(hot.args[hot.args[0].op == "columns"], scope)
            plain = self._column_body(phase, scope | {hot: "False"}, stores, accumulated, sums)
            lines += [f"hot = {target} // W * W if 0 <= {target} < {columns} else {columns}"]
            lines += [f"for j in range(0, least({columns} - W + 1, hot), W):", "    n = W", *(f"    {line}" for line in plain)]
            lines += [f"if hot <= {columns} - W:", "    j, n = hot, W", *(f"    {line}" for line in body)]
            lines += [f"for j in range(hot + W, {columns} - W + 1, W):", "    n = W", *(f"    {line}" for line in plain)]
        else:
            lines += [f"for j in range(0, {columns} - W + 1, W):", "    n = W", *(f"    {line}" for line in body)]
        lines += [f"n = {columns} % W", "if n:", f"    j = {columns} - n"]
        lines += [f"    {line}" for line in inside]
        lines += [f"    {line}" for line in body]
        lines += [f"    {lanes}_all = {lanes}_all + {lanes}" for r, lanes in accumulated if r.op == "row_sum"]
        for r, lanes in accumulated:
            scope[r] = lanes.removesuffix("_lanes")
        return lines + after

    def _one_hot(self, stores: set[Node]) -> Node | None:
        """The one comparison of column numbers with a row's own, true in one vector of a row: the others do without it."""
        found = [
            n
            for n in dict.fromkeys(n for store in stores for n in self.roots[store])
            if n.op == "eq" and n.shape == self.stage.shape and any(a.op == "columns" for a in n.args)
        ]
        numbers = [a for n in found for a in n.args if a.op != "columns"]
        return found[0] if len(found) == 1 and all(a.dtype == "int" and a.shape[1] == 1 for a in numbers) else None

    def _column_body(
        self,
        phase: int,
        scope: dict[Node, str],
        stores: set[Node],
        accumulated: list[tuple[Node, str]],
        sums: list[Node],
    ) -> list[str]:
        """What one step along the columns does, given the values of its row."""
        lines: list[str] = []
        uses = self.phases.uses(self.kept)

        def lanes(n: Node) -> str:
            if n.shape[1] == 1:
                return self._operand(n, scope)
            if n in scope:
                return scope[n]
            if n in self.kept and phase > min(uses[n]):
                text, name = f"load({self.kept[n]}_i, j, n)", self.fresh(n)
            elif n.op == "input":
                text, name = self.context.load(n.value, "j, n"), f"{n.value}_j"
            elif n.op == "column_sum":
                table = self.table(n)
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
                lines.append(f"{name} = maximum(keep({value}, n, f(-np.inf)), {name})")
            else:
                lines.append(f"{name} = {name} + keep({value}, n, f(0.0))")
        for s in (s for s in self.stage.stores if s in stores):
            value = lanes(s)
            lines.append(self.context.store(self.output[s], "j, n", self._cast(s, value)))
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
            text, name = self.context.value(n.value, "i"), f"{n.value}_i"
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
            return self.context.pick(n.value, f"{n.value}_i", column)
        if n.op == "column_sum":
            return f"at({self.table(n)}_i, {column})"
        if n.op == "columns":
            return column
        args = [self._at(a, column, scope, lines) for a in n.args]
        return self.combine(n, args, [False] * len(args))
