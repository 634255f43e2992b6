"""A stage as loops along many rows at once, a lane for each: of short rows, and of what has one value a row."""

from __future__ import annotations

from xpnn.backends.numba.expression import Context
from xpnn.backends.numba.loops import CHUNK
from xpnn.backends.numba.stage import BLOCK, StageWriter
from xpnn.backends.phases import DEAR
from xpnn.backends.program import ROW_REDUCTIONS, Node, Stage

# columns of neighbouring tiles that are read and written together, a piece of memory for each column: a part of the first
# cache, or of the second where one tile is more than that
TOGETHER = 256, 4096


class TileWriter(StageWriter):
    """Tiles of W rows, turned so that a line holds a column of them: what is computed of a row is computed of W rows.

    All of a tile is read before any of it is written. Sums along `long` rows are added up in the order of `LoopWriter`, whose
    lanes are columns, so that they come out the same whichever way the rows lie.
    """

    def __init__(self, context: Context, stage: Stage, name: str, sums: dict[Node, str], long: bool) -> None:
        self.long = long
        self.added = 0  # row sums in the order of `LoopWriter`
        super().__init__(context, stage, name, sums)
        self.in_planes = context.planes and 1 not in stage.shape

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
        lines = [f"block = {block} // W * W + W"]
        if not self.in_planes:
            return [*lines, f"blocks = ({rows} + block - 1) // block"]
        # neighbouring tiles are read and written together: longer pieces of memory for each column
        first, second = TOGETHER[0] // max(1, len(self.tiles)), TOGETHER[1]
        lines += [f"many = least(16, ({first} if {columns} <= {first} else {second}) // {columns} + 1)"]
        lines += ["block = (block // W + many - 1) // many * many * W"]
        return [*lines, f"blocks = {rows} // plane * ((plane + block - 1) // block)"]

    def parameters(self) -> list[str]:
        return [*super().parameters(), *(["many"] if self.in_planes else [])]

    def body(self) -> list[str]:
        rows, columns = map(self.context.extent, self.stage.shape)
        steps = self._tile()
        head: list[str] = []
        if self.tiles:
            pitch = "pitch * many" if self.in_planes else "pitch"
            tables = [f"{len(self.tiles)} * {pitch}", *([f"{self.added} * W"] if self.added else [])]
            head = [f"pitch = ({columns} + W - 1) // W * W", f"tiles = desk(f(0.0), {' + '.join(tables)}, W)"]
            head += [f"{tile}{'s' * self.in_planes} = row(tiles, {k} * {pitch})" for k, tile in enumerate(self.tiles.values())]
            head += [f"added_{k}_part = row(tiles, {tables[0]} + {k} * W)" for k in range(self.added)]
        if self.added:
            head.append(f"added = desk(0.0, {self.added} * W, W)")
            head += [f"added_{k}_all = row(added, {k} * W)" for k in range(self.added)]
        head += [f"{name}_row = row({name}, 0)" for name, n in self.inputs.items() if n.shape[0] == 1 != n.shape[1]]
        head += [f"{self.table(t)}_row = row({self.table(t)}, 0)" for t in self.tables]
        before: list[str] = []
        after: list[str] = []
        for s in self.stage.sums:
            parts = f"{self.sums[s]}_parts"
            if s.op == "sum_rows":
                before += self.sum_begun(self.sums[s], "nothing(f(0.0))")
                after.append(f"{parts}[0, b] = total({self.sum_settled(self.sums[s])})")
            else:
                before += [f"for j in range({columns}):", f"    {parts}[b, j] = f(0.0)"]
        c = self.context
        read = [(n.value, tile) for n, tile in self.tiles.items() if n.op == "input"]
        written = [(name, self.tiles[s]) for s, name in self.output.items() if s in self.tiles]
        start, stop = "b * block", rows
        if self.in_planes:
            head.append("per = (plane + block - 1) // block")
            start, stop = "b // per * plane + b % per * block", "(b // per + 1) * plane"
            loop = ["for place in range(start, stop, W * many):", "    left = least(W * many, stop - place)"]
            loop += [f"    {c.call('cut_out', n, n, 'place', 'left', f'{tile}s', 'pitch')}" for n, tile in read]
            loop += ["    for which in range((left + W - 1) // W):"]
            loop += ["        i, n = place + which * W, least(W, left - which * W)"]
            for k, tile in enumerate(self.tiles.values()):
                loop.append(f"        {tile} = row(tiles, ({k} * many + which) * pitch)")
            loop += [f"        {line}" for line in steps]
            loop += [f"    {c.call('put_back', n, n, 'place', 'left', f'{tile}s', 'pitch')}" for n, tile in written]
        else:
            turned = [c.call("turn", name, name, "i", "n", tile) for name, tile in read]
            back = [c.call("turn_back", name, name, "i", "n", tile) for name, tile in written]
            loop = ["for i in range(start, stop, W):", "    n = least(W, stop - i)"]
            loop += [f"    {line}" for line in (*turned, *steps, *back)]
        inner = [*before, f"start = {start}", f"stop = least({stop}, start + block)", *loop, *after]
        tail = ["hold(tiles)"] * bool(self.tiles) + ["hold(added)"] * bool(self.added)
        return [*head, "for b in range(first, last):", *(f"    {line}" for line in inner), *tail]

    def _tile(self) -> list[str]:
        c = self.context
        lines: list[str] = []
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
                lines += self.sum_plus(self.sums[s], f"first_of({self.operand(s.args[0], scope)}, n, f(0.0))")
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
        added: dict[str, tuple[str, str]] = {}  # by name, where long sums are added up: a chunk of columns, and all of them
        for r, name in names.items():
            if r.op == "row_sum" and self.long:
                added[name] = f"added_{self.added}_part", f"added_{self.added}_all"
                self.added += 1
        body: list[str] = []
        inner = dict(scope)
        for r, name in names.items():
            value = self._lanes(r.args[0], phase, inner, body)
            if r.op == "row_max":
                body.append(f"{name} = maximum({value}, {name})")
            elif name in added:
                body.append(f"set_line({added[name][0]}, j % W, line({added[name][0]}, j % W) + {value})")
            elif r.args[0].op in DEAR:
                body.append(f"{name}_lanes = {name}_lanes + {value}")
            else:
                body += self.sum_plus(f"{name}_all", f"doubled({value})")
        for s in stores:
            body.append(f"set_line({self.tiles[s]}, j, {self.cast(s, self._lanes(s, phase, inner, body))})")
        for s in sums:
            value = self._lanes(s.args[0], phase, inner, body)
            body.append(f"{self.sums[s]}_parts[b, j] += total(keep({value}, n, f(0.0)))")
        if added:
            lines += self._long_sums(added, body)
        elif summed := [r for r in reductions if r.op == "row_sum"]:
            # rounded once, as it were; but of exponentials alone that would take a tenth of the time: there W columns at a time
            chunked = [names[r] for r in summed if r.args[0].op in DEAR]
            doubles = [names[r] for r in summed if names[r] not in chunked]
            for name in doubles:
                lines += self.sum_begun(f"{name}_all", f"doubled({name})")
            lines.append(f"for start in range(0, {columns}, W):")
            lines += [f"    {name}_lanes = spread(f(0.0))" for name in chunked]
            lines += [f"    for j in range(start, least({columns}, start + W)):", *(f"        {line}" for line in body)]
            lines += [f"    {name} = {name} + {name}_lanes" for name in chunked]
            lines += [f"{name} = rounded({self.sum_settled(f'{name}_all')}, f(0.0))" for name in doubles]
        else:
            lines += [f"for j in range({columns}):", *(f"    {line}" for line in body)]
        scope |= names

    def _long_sums(self, added: dict[str, tuple[str, str]], body: list[str]) -> list[str]:
        """A loop over columns that adds up as `LoopWriter` does: line k of a table stands for its lane k.

        Chunks of whole vectors, then the columns that are left; then the lanes in halves.
        """
        columns = self.context.extent(self.stage.shape[1])
        lines = ["for k in range(W * W):", *(f"    {whole}[k] = 0.0" for _, whole in added.values())]
        lines += [f"whole, piece = {columns} - {columns} % W, 0", f"while piece < {columns}:"]
        lines += [f"    end = least(whole, piece + {CHUNK}) if piece < whole else {columns}", "    for k in range(W):"]
        lines += [f"        set_line({part}, k, spread(f(0.0)))" for part, _ in added.values()]
        lines += ["    for j in range(piece, end):", *(f"        {line}" for line in body), "    for k in range(W):"]
        lines += [f"        gather({whole}, k, line({part}, k))" for part, whole in added.values()]
        lines += ["    piece = end"]
        lines += ["half = W // 2", "while half:", "    for k in range(half):"]
        lines += [f"        gather({whole}, k, gathered({whole}, k + half, f(0.0)))" for _, whole in added.values()]
        lines += ["    half //= 2"]
        return lines + [f"{name} = rounded(gathered({whole}, 0, f(0.0)), f(0.0))" for name, (_, whole) in added.items()]

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
