"""A pass along rows as CUDA kernels: one, or one for each phase where several blocks share a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from xpnn.backends.cupy.expression import Context, as_float
from xpnn.backends.cupy.kernel import MEMORY, Launch, Parameter, Sizes, Writing
from xpnn.backends.cupy.passes import Pass
from xpnn.backends.cupy.regime import PACK, Device, Regime, Tree, choose
from xpnn.backends.phases import DEAR, Phases
from xpnn.backends.program import Node

_OPS = {"row_sum": "Sum", "row_max": "Max"}


@dataclass
class Held:
    """What outlasts a phase, and by how much.

    `kept` are computed values worth keeping; `live` is how many values of each element are held at once; `inputs` how many
    arrays are read along the columns.
    """

    kept: set[Node] = field(default_factory=set)
    live: int = 0
    inputs: int = 0


def held(p: Pass, phases: Phases) -> Held:
    """Plan what a pass along rows holds."""
    full = {n for n in phases.nodes if n.shape == p.shape}
    result = Held()
    result.kept = {n for n, at in phases.uses().items() if n.op in DEAR and n in full and len(at) > 1}
    uses = phases.uses(result.kept)
    inputs = {n for n in full if n.op == "input"}
    result.inputs = len([n for n in phases.nodes if n.op == "input" and n.shape[1] != 1])
    for phase in range(phases.last):
        across = [n for n in inputs | result.kept if uses.get(n) and min(uses[n]) <= phase < max(uses[n])]
        result.live = max(result.live, len(across), min(phases.last, 1))
    return result


class RowKernel(Writing):
    """One kernel along rows: all phases, or one of them."""

    def __init__(
        self, context: Context, p: Pass, name: str, sizes: Sizes, regime: Regime, staged: bool, only: int | None = None
    ) -> None:
        super().__init__(context, p, name, sizes)
        self.regime, self.staged, self.only = regime, staged, only
        self.phases = Phases(p.roots)
        self.plan = held(p, self.phases)
        t = regime.tree
        self.chunks = -(-sizes.columns // t.chunk)
        self.whole = sizes.columns % t.width == 0
        self.holds = regime.chunks >= 1 and only is None
        self.kept = self.plan.kept if self.holds else set()
        self.uses = self.phases.uses(self.kept)
        self.arrays_of: dict[Node, str] = {}  # values in registers, by node
        self.near: dict[Node, str] = {}
        self.wide_inputs = {n.value: n for n in self.phases.nodes if n.op == "input" and n.shape[1] != 1}
        self.order = {r: k for k, r in enumerate(self.phases.reductions)}

    # -- shape

    @property
    def grouped(self) -> bool:
        """Whether a warp holds whole rows."""
        return self.regime.name in ("thread", "warp")

    def slots(self) -> int:
        """Room for the sums of a row's chunks."""
        r = self.regime
        return r.warps * r.chunks * r.cluster if r.chunks and not self.grouped else self.chunks

    def parts_bytes(self) -> int:
        if self.grouped or self.only is not None or not self.order:
            return 0
        return -(-len(self.order) * self.slots() * self.context.real // PACK) * PACK

    def area_bytes(self) -> int:
        """What one warp stages rows in."""
        t = self.regime.tree
        size = max([self.context.size(self.context.types[n]) for n in (*self.wide_inputs, *self.pass_.stores)], default=4)
        return (32 * t.packs * t.width * size + PACK) if self.staged else 0

    def row_bytes(self, name: str) -> int:
        """What a row in shared memory takes."""
        return -(-self.sizes.columns * self.context.size(self.context.types[name]) // PACK) * PACK + PACK

    def shared_rows(self) -> list[str]:
        return [n for n, node in self.wide_inputs.items() if node.shape[0] != 1] if self.regime.name == "shared" else []

    def shared(self) -> int:
        rows = sum(self.row_bytes(n) for n in self.shared_rows())
        return self.parts_bytes() + self.regime.warps * self.area_bytes() + rows

    def grid(self) -> int:
        r, rows = self.regime, self.sizes.rows
        if self.grouped:
            return -(-rows // r.rows)
        return rows * (r.cluster if r.name == "cluster" else -(-self.chunks // r.warps) if r.name == "split" else 1)

    def moves(self) -> tuple[int, int]:
        read = 0
        for n, node in self.pass_.inputs.items():
            phases = self.uses.get(node, {0}) if node.shape[1] != 1 else {0}
            again = len(phases) if self.regime.name == "passes" else 1
            read += (again if self.only is None else int(self.only in phases)) * self.bytes_of(n, node)
        here = [n for n in self.pass_.stores if self.only in (None, self._phase_of(n))]
        return read, sum(self.bytes_of(n, self.pass_.stores[n]) for n in here)

    # -- text

    def write(self) -> Launch:
        r = self.regime
        body = self._position() + self._phases()
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

    def _position(self) -> list[str]:
        r, t = self.regime, self.regime.tree
        lines = [f"constexpr int LANES = {t.lanes}, PACKS = {t.packs}, WARPS = {r.warps}, CHUNK = LANES * PACKS * WIDTH;"]
        if self.grouped:
            lines += [
                "const int lane = threadIdx.x % LANES;",
                "const long long wanted = ((long long)blockIdx.x * 32 * WARPS + threadIdx.x) / LANES;",
                "const bool mine = wanted < rows;",
                "const long long row = mine ? wanted : rows - 1;",
                "const column_t width = mine ? columns : 0, first = lane * WIDTH;",
            ]
            if self.staged:
                lines += [
                    "const long long top = wanted - threadIdx.x % 32 / LANES;  // the first row of this warp",
                    "const int together = top < rows ? (int)least<long long>(32 / LANES, rows - top) : 0;",
                ]
        else:
            lines.append("const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;")
            lines.append(f"constexpr int CLUSTER = {r.cluster};" if r.cluster > 1 else "")
            if r.name == "split":
                lines.append("const int chunks = (columns + CHUNK - 1) / CHUNK, blocks = (chunks + WARPS - 1) / WARPS;")
                lines.append("const long long row = blockIdx.x / blocks;")
                lines.append("const int chunk = blockIdx.x % blocks * WARPS + warp;")
            else:
                lines.append(f"const long long row = blockIdx.x{' / CLUSTER' if r.cluster > 1 else ''};")
                lines.append("const int chunks = (columns + CHUNK - 1) / CHUNK;")
            lines.append("const column_t width = columns;")
        if self.shared():
            lines.append(MEMORY)
        offset = "0"
        if self.parts_bytes():
            slots = (
                "chunks" if not r.chunks else f"WARPS{' * CLUSTER' if r.cluster > 1 else ''}{' * 2' if r.chunks > 1 else ''}"
            )
            lines += [f"const int slots = {slots};", "real* parts = reinterpret_cast<real*>(memory);  // of each sum, by chunk"]
            offset = f"({len(self.order)} * slots * (int)sizeof(real) + 15) / 16 * 16"
        if self.staged:
            lines.append(f"unsigned char* area = memory + {offset} + threadIdx.x / 32 * {self.area_bytes()};")
        for n, node in self.wide_inputs.items():
            own = self.context.name(n)
            lines.append(
                f"const {self.context.types[n]}* {own}_row = {own}{f' + row * {own}_rows' if node.shape[0] != 1 else ''};"
            )
        for n, node in self.pass_.stores.items():
            own = self.context.name(n)
            if node.shape[1] != 1:
                lines.append(
                    f"{self.context.types[n]}* {own}_row = {own}{f' + row * {own}_rows' if node.shape[0] != 1 else ''};"
                )
        if r.cluster > 1:
            lines.append("const unsigned rank = cluster_rank();")
            if self.order:
                lines.append("cluster_arrive();  // awaited before the first write to another block")
        start = f"{offset} + WARPS * {self.area_bytes()}" if self.staged else offset
        for n in self.shared_rows():
            own = self.context.name(n)
            kind = self.context.types[n]
            lines += [
                f"{kind}* {own}_here = alike(memory + {start}, {own}_row);",
                f"copy({own}_here, {own}_row, columns, threadIdx.x, 32 * WARPS);",
            ]
            start += f" + {self.row_bytes(n)}"
        if self.shared_rows():
            lines.append("__syncthreads();")
        return [line for line in lines if line]

    def _row_pointer(self, name: str, node: Node) -> str:
        own = self.context.name(name)
        offset = f" + row * {own}_rows" if node.shape[0] != 1 else ""
        return f"{self.context.types[name]}* {own}_row = {own}{offset};"

    def _phases(self) -> list[str]:
        scope: dict[Node, str] = {}
        lines: list[str] = []
        used = {a for n in self.phases.nodes if n.shape != (1, 1) for a in n.args}
        for n in self.phases.nodes:  # early, while registers are free
            if n.shape == (1, 1) and n in used:
                self.number(n, lines)
        last = self.phases.last if self.only is None else self.only
        waited = False
        for phase in range(last + 1):
            here = self.only is None or phase == self.only
            for n in self.phases.nodes:
                if here and n.op == "gather" and self.phases.level[n] == phase:  # before anything is written
                    self.row_value(n, scope, lines, self._gather)
            made = [n for n in self.phases.reductions if self.phases.level[n] == phase + 1]
            stores = [n for n in self.pass_.stores if self._phase_of(n) == phase]
            wide = [n for n in stores if self.pass_.stores[n].shape[1] != 1]
            if here and (made or wide):
                lines += self._loop(phase, scope, made, wide)
            if here:
                for n in stores:
                    node = self.pass_.stores[n]
                    if node.shape[1] == 1:
                        inner: list[str] = []
                        own, value = self.context.name(n), as_float(node, self._row(node, dict(scope), inner))
                        at = f"row * {own}_rows" if node.shape[0] != 1 else "0"
                        inner.append(f"from_real({own}[{at}], {value});")
                        lines += [f"if ({self._leader()}) {{", *(f"  {line}" for line in inner), "}"]
            if made and (self.only is None or phase < self.only):
                if self.regime.cluster > 1:
                    lines += ["cluster_arrive();", "cluster_wait();"]
                    waited = True
                elif not self.grouped and self.only is None:
                    lines.append("__syncthreads();")
                for r in made:
                    if r not in scope:
                        name = self.fresh(r)
                        parts = (
                            f"parts_{self.order[r]} + row * chunks"
                            if self.only is not None
                            else f"parts + {self.order[r]} * slots"
                        )
                        lines.append(f"const real {name} = over_chunks<{_OPS[r.op]}>({parts}, chunks);")
                        scope[r] = name
        assert waited or self.regime.cluster == 1 or not self.order
        return lines

    def _phase_of(self, name: str) -> int:
        return self.phases.target_level(self.pass_.stores[name])

    def _leader(self) -> str:
        if self.grouped:
            return "mine && lane == 0"
        if self.regime.name == "split":
            return "chunk == 0 && lane == 0"
        return "rank == 0 && threadIdx.x == 0" if self.regime.cluster > 1 else "threadIdx.x == 0"

    def _row(self, node: Node, scope: dict[Node, str], lines: list[str]) -> str:
        return self.row_value(node, scope, lines, self._gather)

    def _loop(self, phase: int, scope: dict[Node, str], made: list[Node], stores: list[str]) -> list[str]:
        """One phase: the elements of a thread, what they add up to, and what is stored."""
        r = self.regime
        lead: list[str] = []  # values of the row, before the loop
        several = self.holds and r.chunks > 1
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
                    loads.append(self._load(n, f"{own}_v{'[c]' if several else ''}"))
                    return f"{own}_v{at}"
                again = phase if min(self.uses[n]) < phase else ""
                loads.extend([f"real {own}_v{again}[PACKS][WIDTH];", self._load(n, f"{own}_v{again}")])
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
            inner.append(f"const {_type(n)} {name} = {text};")
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
            after += [*otherwise(f"{own}_v"), self._store(n)]
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
            head = ["UNROLL for (int c = 0; c < 2; ++c) {", f"  const int chunk = c * CLUSTER * WARPS + {own};", f"  {first}"]
            return [*wait, *head, *(f"  {line}" for line in body), "}"]
        if r.chunks == 1:
            if phase == self._first_loop():
                return [f"const int chunk = {own};", first, *body]
            return body
        if phase % 2 == 0:
            head = "for (int chunk = warp; chunk < chunks; chunk += WARPS) {"
        else:  # the end of the row is what was read last
            head = "for (int chunk = chunks - 1 - (chunks - 1 - warp) % WARPS; chunk >= 0; chunk -= WARPS) {"
        return [head, f"  {first}", *(f"  {line}" for line in body), "}"]

    def _first_loop(self) -> int:
        """The first phase that goes over the columns."""
        phases = [self.phases.level[n] - 1 for n in self.phases.reductions]
        phases += [self._phase_of(n) for n, node in self.pass_.stores.items() if node.shape[1] != 1]
        return min(phases, default=0)

    def _load(self, n: Node, to: str) -> str:
        own = self.context.name(n.value)
        if self.regime.name == "shared" and n.shape[0] != 1:
            load = "load_each<LANES>" if self.staged else f"load<LANES, {self._whole}>"
            return f"{load}({to}, {own}_here, first, width);"
        return self._transfer("load", own, to, n.shape[0] != 1)

    def _store(self, name: str) -> str:
        own = self.context.name(name)
        return self._transfer("store", own, f"{own}_v", self.pass_.stores[name].shape[0] != 1)

    @property
    def _whole(self) -> str:
        return "true" if self.whole else "false"

    def _transfer(self, verb: str, own: str, v: str, has_rows: bool) -> str:
        def call(function: str, pointer: str, rest: str) -> str:
            template = "LANES" if function != verb else f"LANES, {self._whole}"
            return f"{function}<{template}>({f'{v}, {pointer}' if verb == 'load' else f'{pointer}, {v}'}, {rest});"

        plain = "first, width"
        if not self.staged:
            return call(verb, f"{own}_row", plain)
        if self.grouped and self.regime.tree.lanes < 32:
            each = call(f"{verb}_each", f"{own}_row", plain)
            if not has_rows:
                return each
            span = f"{own} + top * columns"
            rest = "together * columns, (column_t)(wanted - top) * columns + first, width - first, area"
            return f"if ({own}_rows == columns) {call(f'{verb}_staged', span, rest)} else {each}"
        if self.grouped:
            return call(f"{verb}_staged", f"{own}_row", "width, first, width - first, area")
        start = "(column_t)chunk * CHUNK"
        length = f"least<column_t>(CHUNK, {start} < columns ? columns - {start} : 0)"
        return call(f"{verb}_staged", f"{own}_row + {start}", f"{length}, lane * WIDTH, width - first, area")

    # -- a value at one column

    def _gather(self, node: Node, column: str, scope: dict[Node, str], lines: list[str]) -> str:
        """A full value at one column, computed from the inputs there; NaN where there is no such column."""
        value = self._at(node.args[0], column, scope, lines)
        name = self.fresh(node)
        none = "NOT_A_NUMBER" if node.dtype == "float" else "0"
        lines.append(f"{_type(node)} {name} = {none};")
        lines.append(f"if ({column} >= 0 && {column} < width) {name} = {value};")
        return name

    def _at(self, n: Node, column: str, scope: dict[Node, str], lines: list[str]) -> str:
        if n.shape[1] == 1:
            return self._row(n, scope, lines)
        if n.op == "input":
            return f"to_real({self.context.name(n.value)}_row[{column}])"
        if n.op == "columns":
            return f"(long long)({column})"
        return self.combine(n, [self._at(a, column, scope, lines) for a in n.args])


def _type(node: Node) -> str:
    return {"float": "real", "int": "long long", "bool": "bool"}[node.dtype]


def row_launches(
    context: Context, p: Pass, name: str, sizes: Sizes, staged: bool, device: Device, limits: Mapping[str, int]
) -> list[Launch]:
    """The launches of a pass along rows."""
    phases = Phases(p.roots)
    plan = held(p, phases)
    itemsize = context.itemsize
    regime = choose(sizes.rows, sizes.columns, itemsize, plan.inputs, plan.live, device)
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
