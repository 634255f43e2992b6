"""A stage as loops along each row, a vector of columns at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable

from xpnn.backends.numba.expression import Scalars
from xpnn.backends.numba.stage import BLOCK, StageWriter, is_map
from xpnn.backends.phases import DEAR
from xpnn.backends.program import ROW_REDUCTIONS, Node

# columns whose sum is added up in the lanes' own precision; the sums of such chunks are, in double. In single precision a
# thousand equal chunks would all be rounded the same way, and be off by hundreds of ULP
CHUNK = 128
MEANWHILE = "meanwhile"  # stands for what is done of the row before after each chunk
STREAMED = 3 << 23, 3 << 10  # bytes of a result, and of its rows, from which it is written around the caches


class LoopWriter(StageWriter):
    """Row after row, or without regard to rows where nothing is computed of one."""

    def plan(self) -> None:
        phases = self.phases
        self.is_map = is_map(self.stage)
        # what the first phase reads of a row waits for memory: the second one, which computes, asks for the next row's
        uses = phases.uses()
        wide = [n for n in self.inputs.values() if n.shape == self.stage.shape and 1 not in n.shape]
        self.ahead = [n.value for n in wide if 0 in uses.get(n, ()) and phases.last >= 2]
        self.scratch: list[str] = []
        self._plan_kept()
        self.streamed = self._plan_streamed()
        self.waits = bool(self.streamed) and phases.last >= 2
        self.functions: list[list[str]] = []

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

    def _plan_streamed(self) -> str:
        """The output, if any, that may be written around the caches: the only one of the last phase, which only stores.

        Where rows have three phases, the last one then waits for the next row's second, and is done along with it: one
        computes while the other writes.
        """
        last = self.phases.last
        late = [s for s in self.stage.stores if self.level[s] == last and s.shape[1] != 1]
        if len(late) != 1 or late[0].shape != self.stage.shape or late[0].dtype != "float":
            return ""
        if self.is_map:
            return self.output[late[0]] if len(self.stage.stores) == 1 else ""
        sums = any(s.op == "column_sum" and self.phases.target_level(s) == last for s in self.stage.sums)
        before = any(r.op == "row_sum" and self.level[r] == last for r in self.phases.reductions)
        return self.output[late[0]] if before and not sums else ""

    # -- the stage function

    def parameters(self) -> list[str]:
        return [*super().parameters(), *(["streamed"] if self.streamed else [])]

    def blocks(self) -> list[str]:
        rows, columns = map(self.context.extent, self.stage.shape)
        if self.is_map:
            rows_of_blocks = f"({rows} + block // {columns}) // (block // {columns} + 1)"
            return [f"block = {4 * BLOCK}", f"blocks = {rows_of_blocks} * (({columns} + block - 1) // block)"]
        sums = any(s.op == "column_sum" for s in self.stage.sums)
        block = f"least(256, {rows} // 64 + 16)" if sums else f"{BLOCK} // {columns} + 1"
        return [f"block = {block}", f"blocks = ({rows} + block - 1) // block"]

    def launch(self, scalars: Scalars) -> list[str]:
        lines = super().launch(scalars)
        if self.streamed:
            rows, columns = map(self.context.extent, self.stage.shape)
            whole, one = (size // self.context.size(self.streamed) for size in STREAMED)
            enough = f"{rows} * {columns} >= {whole} and {columns} >= {one}"
            over = [n for n, node in self.inputs.items() if node.shape == self.stage.shape]
            lines[-1:-1] = [f"streamed = {' and '.join([enough, *(f'apart({self.streamed}, {n})' for n in over)])}"]
        return lines

    def write(self) -> list[list[str]]:
        stage = super().write()
        return [*self.functions, *stage]

    def body(self) -> list[str]:
        body = self._map() if self.is_map else self._rows()
        return [*body, "if streamed:", "    settle()"] if self.streamed else body

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
        """Blocks of rows or of pieces of a row: `block` columns at most, in as many rows as have about so many elements."""
        rows, columns = map(self.context.extent, self.stage.shape)
        scope: dict[Node, str] = {}
        body: list[str] = []
        for n in self.nodes:
            if n.shape[1] == 1 and n.shape[0] != 1:
                self._row_value(n, scope, body)
        head = [f"pieces, tall = ({columns} + block - 1) // block, block // {columns} + 1", "for b in range(first, last):"]
        inner = [f"for i in range(b // pieces * tall, least({rows}, b // pieces * tall + tall)):"]
        piece = ["start = b % pieces * block", f"stop = least({columns}, start + block)"]
        loop = self._store_loop(0, scope, set(self.stage.stores))
        inner += [f"    {line}" for line in (*piece, *self._row_views(), *body, *loop)]
        return head + [f"    {line}" for line in inner]

    def _rows(self) -> list[str]:
        rows, columns = (self.context.extent(e) for e in self.stage.shape)
        head = [f"{name} = room(f(0.0), 2, {columns})" for name in self.scratch]
        row, waiting = self._one_row()
        own = list(self.scratch)
        if self.streamed in self.kept.values():
            own.append("kept_rows")
            head.append(f"kept_rows = room(f(0.0), 2, {columns} if streamed else 0)")
        if self.waits:
            head += ["pending = False", *(f"{n}_before = {first}" for n, first in waiting.items())]
        head.append("for b in range(first, last):")
        inner: list[str] = []
        for s in self.stage.sums:
            if s.op == "sum_rows":
                inner += self.sum_begun(self.sums[s], "0.0")
            else:
                name = f"{self.sums[s]}_parts"
                inner += [
                    f"{name}_b = row({name}, b)",
                    f"for k in range(0, {columns}, W):",
                    f"    store({name}_b, k, {columns} - k, f(0.0))",
                ]
        inner += [f"for i in range(b * block, least({rows}, b * block + block)):", *(f"    {line}" for line in row)]
        for s in self.stage.sums:
            if s.op == "sum_rows":
                inner.append(f"{self.sums[s]}_parts[0, b] = {self.sum_settled(self.sums[s])}")
        tail = ["if pending:", f"    {self.finish_last}"] if self.waits else []
        return [*head, *(f"    {line}" for line in inner), *tail, *(f"hold({name})" for name in own)]

    def _one_row(self) -> tuple[list[str], dict[str, str]]:
        """What is done for a row; and the variables, if any, that its last phase needs when it waits, with first values."""
        lines = self._row_views()
        lines += [f"{name}_i = row({name}, i % 2)" for name in self.scratch]
        if self.streamed:  # a line that two rows share is written through the caches, and would be waited for
            rows, columns = (self.context.extent(e) for e in self.stage.shape)
            lines.append(f"fetch_to_write(row({self.streamed}, least(i + 1, {rows} - 1)), {columns} - 1)")
        if self.streamed in self.kept.values():
            lines.append(f"{self.streamed}_kept = row(kept_rows, i % 2) if streamed else {self.streamed}_i")
        scope: dict[Node, str] = {}
        for phase in range(self.phases.last + 1):
            for n in self.nodes:
                if n.shape[1] == 1 and n.shape[0] != 1 and self.level[n] == phase and n.op not in ROW_REDUCTIONS:
                    self._row_value(n, scope, lines)
            reductions = [n for n in self.nodes if n.op in ROW_REDUCTIONS and self.level[n] == phase + 1]
            stores = {s for s in self.stage.stores if self.level[s] == phase and s.shape[1] != 1}
            sums = [s for s in self.stage.sums if s.op == "column_sum" and self.phases.target_level(s) == phase]
            if (reductions or stores or sums) and not (self.waits and phase == self.phases.last):
                lines += self._column_loop(phase, scope, reductions, stores, sums)
            for s in self.stage.stores:
                if self.level[s] == phase and s.shape[1] == 1:
                    row = "i" if s.shape[0] != 1 else "0"
                    lines.append(self.context.put(self.output[s], row, "0", self.operand(s, scope)))
        for s in self.stage.sums:
            if s.op == "sum_rows":
                lines += self.sum_plus(self.sums[s], self.operand(s.args[0], scope))
        return self._waiting(lines, scope) if self.waits else (lines, {})

    def _waiting(self, lines: list[str], scope: dict[Node, str]) -> tuple[list[str], dict[str, str]]:
        """A row's last phase as a function; called at once or, `streamed`, chunk by chunk while the next row is computed."""
        name = f"{self.name}_finish"
        columns = self.context.extent(self.stage.shape[1])
        body = self._store_loop(self.phases.last, scope, {s for s, n in self.output.items() if n == self.streamed})
        text = "\n".join(body)

        def used(names: Iterable[str]) -> list[str]:
            return [n for n in dict.fromkeys(names) if re.search(rf"\b{n}\b", text)]

        full = [n for n, node in (*self.inputs.items(), *((o, s) for s, o in self.output.items())) if node.shape[0] != 1]
        values = {f"{n}_i": f"row({n}, 0)" for n in (*full, *self.scratch)} | {f"{self.streamed}_kept": "row(kept_rows, 0)"}
        zeros = {"float": "f(0.0)", "int": "0", "bool": "False"}
        values |= {scope[n]: zeros[n.dtype] for n in scope if n.shape[1] == 1 and n.shape[0] != 1}
        own = {n: values[n] for n in used(values)}
        common = used([*self.parameters(), *(f"{n}_i" for n in self.inputs), *(f"{self.table(t)}_i" for t in self.tables)])
        common = [n for n in common if n not in own]
        self.functions.append(self.function(name, [*own, *common, "start", "stop"], body))

        def call(start: str, stop: str, suffix: str = "") -> str:
            return f"invoke({name}, ({', '.join([*(n + suffix for n in own), *common, start, stop])}))"

        self.finish_last = call("0", columns, "_before")
        at = next(k for k, line in enumerate(lines) if line.strip() == MEANWHILE)
        lines[at : at + 1] = ["    if pending:", f"        {call('start', f'least({columns}, start + {CHUNK})', '_before')}"]
        lines += ["if streamed:", *(f"    {n}_before = {n}" for n in own), "    pending = True", "else:"]
        return [*lines, f"    {call('0', columns)}"], own

    def _store_loop(self, phase: int, scope: dict[Node, str], stores: set[Node]) -> list[str]:
        """Columns `start` to `stop` of a phase that only stores; if `streamed`, cut where lines of memory begin.

        Odd vectors come apart from whole ones: a row's ends, and the one that holds the column compared with.
        """
        hot = self._one_hot(stores)
        out = self.streamed or self.output[next(iter(stores))]
        long = f"{self.context.extent(self.stage.shape[1])} >= {STREAMED[1] // self.context.size(out)}"  # holds if streamed
        lines_of_memory = long if self.is_map else "streamed" if self.streamed else "False"
        lines = [f"start, whole, rest, stop = cut({out}_i, start, stop, {lines_of_memory})"]
        # the ends come first: after stores around the caches, one through them waits
        lines += ["for j, n in ((start, whole - start), (rest, stop - rest)):", "    if n:"]
        lines += [f"        {line}" for line in self._column_body(phase, dict(scope), stores, [], [])]
        loops = ["whole, rest"]
        if hot is not None:
            target = self.operand(hot.args[hot.args[0].op == "columns"], scope)
            lines += [
                f"hot = {target} - ({target} - whole) % W if whole <= {target} < rest else rest",
                "if hot < rest:",
                "    j = hot",
            ]
            lines += [f"    {line}" for line in self._column_body(phase, dict(scope), stores, [], [], whole=True)]
            loops = ["whole, hot", "hot + W, rest"]
        for ends in loops:
            known = scope | ({hot: "False"} if hot else {})
            lines.append(f"for j in range({ends}, W):")
            lines += [f"    {line}" for line in self._column_body(phase, known, stores, [], [], whole=True)]
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
                lines.append(f"{lanes}_all = doubled(spread(f(0.0)))")
                inside.append(f"{lanes} = spread(f(0.0))")
                after.append(f"{name} = f(total({lanes}_all))")
        if not reductions and not sums:
            return ["start, stop = 0, " + columns, *self._store_loop(phase, scope, stores)]
        body = self._column_body(phase, dict(scope), stores, accumulated, sums)
        ahead = [f"fetch({name}_next, j)" for name in self.ahead if phase == 1]
        if chunked:
            lines += [f"for start in range(0, {columns}, {CHUNK}):", *(f"    {line}" for line in inside)]
            lines += [f"    for j in range(start, least({columns} - W + 1, start + {CHUNK}), W):", "        n = W"]
            lines += [f"        {line}" for line in (*ahead, *body)]
            lines += [f"    {lanes}_all = {lanes}_all + doubled({lanes})" for r, lanes in accumulated if r.op == "row_sum"]
            lines += [f"    {MEANWHILE}"] if self.waits and phase == self.phases.last - 1 else []
        elif maxima:
            lines += [f"for j in range({columns} - {columns} % (4 * W), {columns} - W + 1, W):", "    n = W"]
            lines += [f"    {line}" for line in body]
        else:
            lines += [f"for j in range(0, {columns} - W + 1, W):", "    n = W", *(f"    {line}" for line in body)]
        lines += [f"n = {columns} % W", "if n:", f"    j = {columns} - n"]
        lines += [f"    {line}" for line in inside]
        lines += [f"    {line}" for line in body]
        lines += [f"    {lanes}_all = {lanes}_all + doubled({lanes})" for r, lanes in accumulated if r.op == "row_sum"]
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
        whole: bool = False,
    ) -> list[str]:
        """What one step along the columns does, given the values of its row; if `whole`, always with W columns."""
        lines: list[str] = ["n = W"] if whole else []
        uses = self.phases.uses(self.kept)

        def lanes(n: Node) -> str:
            if n.shape[1] == 1:
                return self.operand(n, scope)
            if n in scope:
                return scope[n]
            if n in self.kept and phase > min(uses[n]):
                text, name = f"load({self._kept(n)}, j, n)", self.fresh(n)
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
                lines.append(f"store({self._kept(n)}, j, n, {name})")
            return name

        for r, name in accumulated:
            value = lanes(r.args[0])
            if r.op == "row_max":
                lines.append(f"{name} = maximum(keep({value}, n, f(-np.inf)), {name})")
            else:
                lines.append(f"{name} = {name} + keep({value}, n, f(0.0))")
        # everything is read before anything is written: a result may lie over an input, or hold what was kept
        written = [(s, lanes(s)) for s in self.stage.stores if s in stores]
        added = [(s, lanes(s.args[0])) for s in sums]
        for s, value in written:
            name, value = self.output[s], self.cast(s, value)
            streaming = whole and name == self.streamed
            c = self.context
            lines.append(c.stream(name, "j, n", value) if streaming else c.store(name, "j, n", value))
        for s, value in added:
            parts = f"{self.sums[s]}_parts_b"
            lines.append(f"store({parts}, j, n, load({parts}, j, n) + {value})")
        return lines

    def _kept(self, node: Node) -> str:
        """The row in which a value is kept between phases."""
        name = self.kept[node]
        return f"{name}_kept" if name == self.streamed else f"{name}_i"

    # -- values of a row

    def _row_value(self, n: Node, scope: dict[Node, str], lines: list[str]) -> None:
        if n in scope:
            return
        if n.op == "input":
            text, name = self.context.value(n.value, "i"), f"{n.value}_i"
        elif n.op == "gather":
            text, name = self._at(n.args[0], self.operand(n.args[1], scope), scope, lines), self.fresh(n)
        else:
            args = [self.operand(a, scope) for a in n.args]
            text, name = self.combine(n, args, [False] * len(args)), self.fresh(n)
        lines.append(f"{name} = {text}")
        scope[n] = name

    def _at(self, n: Node, column: str, scope: dict[Node, str], lines: list[str]) -> str:
        """A full value at one column, computed from the inputs there."""
        if n.shape[1] == 1:
            return self.operand(n, scope)
        if n.op == "input":
            return self.context.pick(n.value, f"{n.value}_i", column)
        if n.op == "column_sum":
            return f"at({self.table(n)}_i, {column})"
        if n.op == "columns":
            return column
        args = [self._at(a, column, scope, lines) for a in n.args]
        return self.combine(n, args, [False] * len(args))
