"""A stage as loops along many rows at once, a lane for each: of short rows, and of what has one value a row."""

from __future__ import annotations

from xpnn.backends.numba.stage import BLOCK, StageWriter
from xpnn.backends.phases import DEAR
from xpnn.backends.program import ROW_REDUCTIONS, Node


class TileWriter(StageWriter):
    """Tiles of W rows, turned so that a line holds a column of them: what is computed of a row is computed of W rows.

    All of a tile is read before any of it is written.
    """

    def plan(self) -> None:
        full = [n for n in (*self.inputs.values(), *self.stage.stores) if self._is_full(n)]
        self.tiles = {n: f"{self.output.get(n, n.value)}_tile" for n in full}
        for node, phases in self.phases.uses().items():  # what is dear to compute and needed again
            if node.op in DEAR and len(phases) > 1 and self._is_full(node):
                self.kept[node] = f"kept{len(self.kept)}"
                self.tiles[node] = f"{self.kept[node]}_tile"
        self.uses = self.phases.uses(self.kept)

    def _is_full(self, n: Node) -> bool:
        return 1 not in n.shape

    def blocks(self) -> list[str]:
        rows, columns = map(self.context.extent, self.stage.shape)
        sums = any(s.op == "column_sum" for s in self.stage.sums)
        block = f"least(256, {rows} // 64)" if sums else f"{BLOCK} // {columns}"
        return [f"block = {block} // W * W + W", f"blocks = ({rows} + block - 1) // block"]

    def body(self) -> list[str]:
        rows, columns = map(self.context.extent, self.stage.shape)
        head: list[str] = []
        if self.tiles:
            head = [f"pitch = ({columns} + W - 1) // W * W", f"tiles = desk(f(0.0), {len(self.tiles)} * pitch, W)"]
            head += [f"{tile} = row(tiles, {k} * pitch)" for k, tile in enumerate(self.tiles.values())]
        head += [f"{name}_row = row({name}, 0)" for name, n in self.inputs.items() if n.shape[0] == 1 != n.shape[1]]
        head += [f"{self.table(t)}_row = row({self.table(t)}, 0)" for t in self.tables]
        before: list[str] = []
        after: list[str] = []
        for s in self.stage.sums:
            parts = f"{self.sums[s]}_parts"
            if s.op == "sum_rows":
                before.append(f"{self.sums[s]} = nothing(f(0.0))")
                after.append(f"{parts}[0, b] = total({self.sums[s]})")
            else:
                before += [f"for j in range({columns}):", f"    {parts}[b, j] = f(0.0)"]
        inner = [
            *before,
            f"stop = least({rows}, b * block + block)",
            "for i in range(b * block, stop, W):",
            "    n = least(W, stop - i)",
            *(f"    {line}" for line in self._tile()),
            *after,
        ]
        tail = ["hold(tiles)"] if self.tiles else []
        return [*head, "for b in range(first, last):", *(f"    {line}" for line in inner), *tail]

    def _tile(self) -> list[str]:
        c = self.context
        lines = [c.call("turn", n.value, n.value, "i", "n", tile) for n, tile in self.tiles.items() if n.op == "input"]
        scope: dict[Node, str] = {}
        for phase in range(self.phases.last + 1):
            for n in self.nodes:
                if n.shape[0] != 1 == n.shape[1] and self.level[n] == phase and n.op not in ROW_REDUCTIONS:
                    self._row_value(n, scope, lines)
            self._column_loop(phase, scope, lines)
            for s, name in self.output.items():
                if self.level[s] == phase and s.shape[1] == 1:
                    lines.append(c.call("store_rows", name, "f(0.0)", name, "i", "n", self.operand(s, scope)))
        for s in self.stage.sums:
            if s.op == "sum_rows":
                name = self.sums[s]
                lines.append(f"{name} = add_up({name}, {self.operand(s.args[0], scope)}, n)")
        lines += [c.call("turn_back", n, n, "i", "n", self.tiles[s]) for s, n in self.output.items() if s in self.tiles]
        return lines

    def _column_loop(self, phase: int, scope: dict[Node, str], lines: list[str]) -> None:
        columns = self.context.extent(self.stage.shape[1])
        reductions = [n for n in self.nodes if n.op in ROW_REDUCTIONS and self.level[n] == phase + 1]
        stores = [s for s in self.stage.stores if self._is_full(s) and self.level[s] == phase]
        sums = [s for s in self.stage.sums if s.op == "column_sum" and self.phases.target_level(s) == phase]
        if not (reductions or stores or sums):
            return
        names = {r: self.fresh(r) for r in reductions}
        lines += [f"{name} = spread(f({'-np.inf' if r.op == 'row_max' else 0.0}))" for r, name in names.items()]
        added = [name for r, name in names.items() if r.op == "row_sum"]
        body: list[str] = []
        inner = dict(scope)
        for r, name in names.items():
            value = self._lanes(r.args[0], phase, inner, body)
            body.append(f"{name} = maximum({value}, {name})" if r.op == "row_max" else f"{name}_lanes = {name}_lanes + {value}")
        for s in stores:
            body.append(f"set_line({self.tiles[s]}, j, {self.cast(s, self._lanes(s, phase, inner, body))})")
        for s in sums:
            value = self._lanes(s.args[0], phase, inner, body)
            body.append(f"{self.sums[s]}_parts[b, j] += total(keep({value}, n, f(0.0)))")
        if added:  # W columns at a time: fewer roundings
            lines.append(f"for start in range(0, {columns}, W):")
            lines += [f"    {name}_lanes = spread(f(0.0))" for name in added]
            lines += [f"    for j in range(start, least({columns}, start + W)):", *(f"        {line}" for line in body)]
            lines += [f"    {name} = {name} + {name}_lanes" for name in added]
        else:
            lines += [f"for j in range({columns}):", *(f"    {line}" for line in body)]
        scope |= names

    def _lanes(self, n: Node, phase: int, scope: dict[Node, str], lines: list[str]) -> str:
        """The values of column `j`: lanes where rows differ, else a number."""
        if n.shape[1] == 1:
            return self.operand(n, scope)
        if n.op == "columns":
            return "j"
        if n in scope:
            return scope[n]
        kept = n in self.kept and phase > min(self.uses[n])
        name = f"{n.value}_j" if n.op == "input" else self.fresh(n)
        if self._is_full(n) and (n.op == "input" or kept):
            text = f"line({self.tiles[n]}, j)"
        elif n.op == "input":
            text = self.context.pick(n.value, f"{n.value}_row", "j")
        elif n.op == "column_sum":
            text = f"at({self.table(n)}_row, j)"
        else:
            args = [self._lanes(a, phase, scope, lines) for a in n.args]
            text = self.combine(n, args, [a.shape[0] != 1 for a in n.args])
        lines.append(f"{name} = {text}")
        if n in self.kept and not kept:
            lines.append(f"set_line({self.tiles[n]}, j, {name})")
        scope[n] = name
        return name

    # -- values of a row

    def _row_value(self, n: Node, scope: dict[Node, str], lines: list[str]) -> None:
        if n in scope:
            return
        if n.op == "input":
            text, name = self.context.call("load_rows", n.value, "f(0.0)", n.value, "i", "n"), f"{n.value}_i"
        elif n.op == "gather":
            text, name = self._at(n.args[0], self.operand(n.args[1], scope), scope), self.fresh(n)
        else:
            args = [self.operand(a, scope) for a in n.args]
            text, name = self.combine(n, args, [a.shape[0] != 1 for a in n.args]), self.fresh(n)
        lines.append(f"{name} = {text}")
        scope[n] = name

    def _at(self, n: Node, column: str, scope: dict[Node, str]) -> str:
        """A full value at one column of each row, computed from the inputs there."""
        if n.shape[1] == 1:
            return self.operand(n, scope)
        columns = self.context.extent(n.shape[1])
        if n.op == "columns":
            return column
        if n in self.tiles and n.op == "input":
            return f"pick_line({self.tiles[n]}, {column}, {columns})"
        if n.op == "input":
            return self.context.call("pick", n.value, f"{n.value}_row", column, columns)
        if n.op == "column_sum":
            return f"pick({self.table(n)}_row, {column}, {columns})"
        args = [self._at(a, column, scope) for a in n.args]
        return self.combine(n, args, [a.shape != (1, 1) for a in n.args])
