"""A pass along rows as CUDA kernels: one, or one for each phase where several blocks share a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from xpnn.backends.cupy.expression import TYPES, Context, as_float
from xpnn.backends.cupy.kernel import Launch, Parameter, Sizes
from xpnn.backends.cupy.passes import Pass
from xpnn.backends.cupy.place import RowPlace, held
from xpnn.backends.cupy.regime import Device, Regime, Tree, choose
from xpnn.backends.phases import Phases
from xpnn.backends.program import Node

_OPS = {"row_sum": "Sum", "row_max": "Max"}


class RowKernel(RowPlace):
    """One kernel along rows: all phases, or one of them."""

    def write(self) -> Launch:
        r = self.regime
        body = self.position() + self._phases()
        parameters = [*self.arrays(), *self.numbers(), Parameter("size", "rows", "long long rows", "q"), self.index]
        sizes: dict[str, int] = {}
        if self.only is not None:
            for red, k in self.order.items():
                if self.phases.level[red] <= self.only + 1:
                    made = self.phases.level[red] == self.only + 1
                    name = f"{self._scratch(k)}"
                    parameters.append(Parameter("array", name, f"{'' if made else 'const '}real* parts_{k}", "Q"))
                    if made:
                        sizes[name] = self.sizes.rows * self.chunks * self.context.real
        title = "" if self.order or r.name != "split" else "element by element"
        return self.launch(parameters, body, r, (self.grid(), 1), shared=self.shared(), scratch=sizes, title=title)

    def _scratch(self, k: int) -> str:
        return f"{self.name.rsplit('_', 1)[0]}.parts_{k}"

    def _phases(self) -> list[str]:
        scope: dict[Node, str] = {}
        lines: list[str] = []
        self.numbers_first(lines)
        for phase in range((self.phases.last if self.only is None else self.only) + 1):
            here = self.only in (None, phase)
            made = [n for n in self.phases.reductions if self.phases.level[n] == phase + 1]
            if here:
                for node in self.phases.nodes:
                    if node.op == "gather" and self.phases.level[node] == phase:  # before anything is written
                        self._row(node, scope, lines)
                stores = [n for n in self.pass_.stores if self.phase_of(n) == phase]
                wide = [n for n in stores if self.pass_.stores[n].shape[1] != 1]
                if made or wide:
                    lines += self._loop(phase, scope, made, wide)
                for n in stores:
                    if n not in wide:
                        lines += self._store_number(n, scope)
            if made and self.only != phase:
                lines += self._together(made, scope)
        return lines

    def _store_number(self, name: str, scope: dict[Node, str]) -> list[str]:
        """What there is one of in a row; one thread works it out and writes it."""
        node, own = self.pass_.stores[name], self.context.name(name)
        inner: list[str] = []
        value = self._row(node, dict(scope), inner)
        value = value if node.dtype == "int" else as_float(node, value)
        at = f"row * {own}_rows" if node.shape[0] != 1 else "0"
        inner.append(f"from_real({own}[{at}], {value});")
        return [f"if ({self.leader()}) {{", *(f"  {line}" for line in inner), "}"]

    def _together(self, made: list[Node], scope: dict[Node, str]) -> list[str]:
        """The sums of a row from those of its chunks."""
        lines: list[str] = []
        if self.grouped:
            return lines
        if self.regime.cluster > 1:
            lines += ["cluster_arrive();", "cluster_wait();"]
        elif self.only is None:
            lines.append("__syncthreads();")
        for r in made:
            k, name = self.order[r], self.fresh(r)
            parts = f"parts + {k} * slots" if self.only is None else f"parts_{k} + row * chunks"
            lines.append(f"const real {name} = over_chunks<{_OPS[r.op]}>({parts}, chunks);")
            scope[r] = name
        return lines

    def _row(self, node: Node, scope: dict[Node, str], lines: list[str]) -> str:
        return self.row_value(node, scope, lines, self._gather)

    def _loop(self, phase: int, scope: dict[Node, str], made: list[Node], stores: list[str]) -> list[str]:
        """One phase: the elements of a thread, what they add up to, and what is stored."""
        lead: list[str] = []  # values of the row, before the loop
        several = self.holds and self.regime.chunks > 1
        at = "[c][k][i]" if several else "[k][i]"
        bounds = "[2][PACKS][WIDTH]" if several else "[PACKS][WIDTH]"
        inner: list[str] = []
        loads: list[str] = []
        declared: list[str] = []
        scope_here = dict(scope)

        def outlasts(n: Node) -> bool:
            return self.holds and n.shape == self.pass_.shape and max(self.uses[n]) > phase

        def element(n: Node) -> str:
            if n.shape[1] == 1:
                return self._row(n, scope, lead)
            if n in scope_here:
                return scope_here[n]
            if n in self.arrays_of:
                return self.arrays_of[n] + at
            if n.op == "input":
                own = self.context.name(n.value)
                if outlasts(n):
                    self.arrays_of[n] = f"{own}_v"
                    declared.append(f"real {own}_v{bounds};")
                    loads.append(self.load(n, f"{own}_v{'[c]' if several else ''}"))
                    return f"{own}_v{at}"
                again = phase if min(self.uses[n]) < phase else ""
                loads.extend([f"real {own}_v{again}[PACKS][WIDTH];", self.load(n, f"{own}_v{again}")])
                scope_here[n] = f"{own}_v{again}[k][i]"
                return scope_here[n]
            if n.op == "columns":
                scope_here[n] = "(first + k * LANES * WIDTH + i)"
                return scope_here[n]
            args = [element(a) for a in n.args]
            if n.op in ("eq", "ne"):
                args = [self._near(a, t, n, lead) for a, t in zip(n.args, args, strict=True)]
            text = self.combine(n, args, by_row=n.op == "div" and n.args[0].shape[1] != 1 and n.args[1].shape[1] == 1)
            name = self.fresh(n)
            inner.append(f"const {TYPES[n.dtype]} {name} = {text};")
            scope_here[n] = name
            if n in self.kept and outlasts(n):
                self.arrays_of[n] = f"{name}_v"
                declared.append(f"real {name}_v{bounds};")
                inner.append(f"{name}_v{at} = {name};")
            return name

        after: list[str] = []
        fold: list[tuple[Node, str]] = []
        before: list[str] = []
        for red in made:
            name = self.fresh(red)
            value = as_float(red.args[0], element(red.args[0]))
            op = _OPS[red.op]
            before += [f"real {name}_lanes[WIDTH];", f"clear<{op}>({name}_lanes);"]
            inside = "first + k * LANES * WIDTH" + ("" if self.whole else " + i") + " < width"
            inner.append(f"if ({inside}) {name}_lanes[i] = {op}::of({name}_lanes[i], {value});")
            fold.append((red, name))
        for n in stores:
            own = self.context.name(n)
            node = self.pass_.stores[n]
            wide, otherwise = self._one_for_all(node, scope, lead)
            before.append(f"real {own}_v[PACKS][WIDTH];")
            inner.append(f"{own}_v[k][i] = {as_float(wide, element(wide))};")
            after += [*otherwise(f"{own}_v"), self.store(n)]
        for red, name in fold:
            op = _OPS[red.op]
            if self.grouped:
                after.append(f"const real {name} = over_group<{op}, LANES>({name}_lanes);")
                scope[red] = name
            else:
                after.append(f"const real {name}_part = over_group<{op}, LANES>({name}_lanes);")
                k = self.order[red]
                if self.regime.cluster > 1:
                    first_put = red is self.phases.reductions[0] and not several
                    after += ["cluster_wait();"] if first_put else []
                    after.append(f"if (lane < CLUSTER) put(parts + {k} * slots + chunk, lane, {name}_part);")
                elif self.only is not None:
                    after.append(f"if (lane == 0 && chunk < chunks) parts_{k}[row * chunks + chunk] = {name}_part;")
                else:
                    after.append(f"if (lane == 0) parts[{k} * slots + chunk] = {name}_part;")
        element_loop = [
            "UNROLL for (int k = 0; k < PACKS; ++k) {",
            "  UNROLL for (int i = 0; i < WIDTH; ++i) {",
            *(f"    {line}" for line in inner),
            "  }",
            "}",
        ]
        lead += self.before
        self.before = []
        chunk_body = [*loads, *before, *element_loop, *after]
        title = ", ".join([*(name for _, name in fold), *(self.context.name(n) for n in stores)])
        return [*lead, f"// phase {phase}: {title}", *declared, *self._over_chunks(chunk_body, phase, several)]

    def _one_for_all(self, node: Node, scope: dict[Node, str], lead: list[str]) -> tuple[Node, Callable[[str], list[str]]]:
        """What the elements of a store are, and what overrules them: `where` with a condition and one side of the row's."""
        if node.op == "where" and node.args[0].shape[1] == 1:
            condition, a, b = node.args
            wide, narrow, sign = (a, b, "!") if b.shape[1] == 1 else (b, a, "")
            if wide.shape == node.shape and narrow.shape[1] == 1:
                test, value = self._row(condition, scope, lead), as_float(narrow, self._row(narrow, scope, lead))
                return wide, lambda v: [f"if ({sign}{test}) fill({v}, {value});"]
        return node, lambda v: []

    def _near(self, node: Node, text: str, comparison: Node, lines: list[str]) -> str:
        """A row's integer as a column's number, to be compared with those: -1 where there is no such column."""
        other = comparison.args[0] if node is comparison.args[1] else comparison.args[1]
        if other.op != "columns" or node.shape[1] != 1 or node.dtype != "int":
            return text
        if node not in self.near:
            name = self.near[node] = f"near_{len(self.near)}"
            lines.append(f"const column_t {name} = {text} >= 0 && {text} < columns ? (column_t){text} : -1;")
        return self.near[node]

    def _over_chunks(self, body: list[str], phase: int, several: bool) -> list[str]:
        """The loop over the chunks that a warp goes through, where it has more than one."""
        r = self.regime
        first = "const column_t first = (column_t)chunk * CHUNK + lane * WIDTH;"
        if self.grouped:
            return body
        if r.name == "split":
            return [first, *body]
        own = "rank * WARPS + warp" if r.cluster > 1 else "warp"
        if several:
            wait = ["cluster_wait();"] if phase == self.phases.level[self.phases.reductions[0]] - 1 else []
            chunk = f"  const int chunk = c * CLUSTER * WARPS + {own};"
            loop = ["UNROLL for (int c = 0; c < 2; ++c) {", chunk, f"  {first}", *(f"  {line}" for line in body), "}"]
            return [*wait, *loop]
        if r.chunks == 1:
            if phase == self._first_loop():
                return [f"const int chunk = {own};", first, *body]
            return body
        # every other phase starts at the row's end, which was read last
        chunk = "  const int chunk = c;" if phase % 2 == 0 else "  const int chunk = chunks - 1 - c;"
        head = ["for (int c = warp; c < chunks; c += WARPS) {", chunk, f"  {first}"]
        return [*head, *(f"  {line}" for line in body), "}"]

    def _first_loop(self) -> int:
        """The first phase that goes over the columns."""
        phases = [self.phases.level[n] - 1 for n in self.phases.reductions]
        phases += [self.phase_of(n) for n, node in self.pass_.stores.items() if node.shape[1] != 1]
        return min(phases, default=0)

    # -- a value at one column

    def _gather(self, node: Node, column: str, scope: dict[Node, str], lines: list[str]) -> str:
        """A full value at one column, computed from the inputs there; NaN where there is no such column."""
        inner: list[str] = []
        known: dict[Node, str] = {}

        def at(n: Node) -> str:
            if n.shape[1] == 1:
                return self._row(n, scope, lines)
            if n not in known:
                if n.op == "input":
                    text = f"to_real({self.context.name(n.value)}_row[{column}])"
                elif n.op == "columns":
                    text = f"(long long)({column})"
                else:
                    text = self.combine(n, [at(a) for a in n.args])
                known[n] = self.fresh(n)
                inner.append(f"const {TYPES[n.dtype]} {known[n]} = {text};")
            return known[n]

        value = at(node.args[0])
        name = self.fresh(node)
        lines.append(f"{TYPES[node.dtype]} {name} = {'NOT_A_NUMBER' if node.dtype == 'float' else '0'};")
        lines.append(f"if ({column} >= 0 && {column} < width) {{")
        lines += [*(f"  {line}" for line in inner), f"  {name} = {value};", "}"]
        return name


def row_launches(
    context: Context, p: Pass, name: str, sizes: Sizes, staged: bool, device: Device, limits: Mapping[str, int]
) -> list[Launch]:
    """The launches of a pass along rows."""
    phases = Phases(p.roots)
    plan = held(p, phases)
    itemsize = context.itemsize
    regime = choose(sizes.rows, sizes.columns, itemsize, plan.inputs, plan.live, staged, device)
    if not phases.reductions and all(n.shape[1] == 1 for n in p.stores.values()):  # nothing runs along the columns
        regime = Regime("thread", Tree(1, 1, 16 // itemsize), 4)
    if regime.name != "split":
        return [RowKernel(context, p, name, sizes, _bounded(regime, name, limits), staged).write()]
    launches = []
    for k in range(phases.last + 1):
        part = f"{name}_{k}"
        launches.append(RowKernel(context, p, part, sizes, _bounded(regime, part, limits), staged, only=k).write())
    return launches


def _bounded(regime: Regime, name: str, limits: Mapping[str, int]) -> Regime:
    return replace(regime, resident=limits.get(name, regime.resident))
