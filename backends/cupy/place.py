"""Where the rows of a pass lie while a kernel goes over them: pointers, shared memory, loads and stores."""

from __future__ import annotations

from dataclasses import dataclass, field

from xpnn.backends.cupy.expression import Context
from xpnn.backends.cupy.kernel import MEMORY, Sizes, Writing
from xpnn.backends.cupy.passes import Pass
from xpnn.backends.cupy.regime import PACK, Regime
from xpnn.backends.phases import DEAR, Phases
from xpnn.backends.program import Node

CROWDED = 3  # values of an element, held or computed on, for which threads are given twice the registers


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
    if result.live and sum(n.op in DEAR for n in full) > 1:  # two such functions side by side take as much again
        result.live = max(result.live, CROWDED)
    return result


class RowPlace(Writing):
    """A kernel's view of its rows."""

    def __init__(
        self, context: Context, p: Pass, name: str, sizes: Sizes, regime: Regime, staged: bool, only: int | None = None
    ) -> None:
        super().__init__(context, p, name, sizes)
        self.regime, self.staged, self.only = regime, staged, only
        self.phases = Phases(p.roots)
        t = regime.tree
        self.chunks = -(-sizes.columns // t.chunk)
        self.whole = sizes.columns % t.width == 0
        self.holds = regime.chunks >= 1 and only is None
        self.kept = held(p, self.phases).kept if self.holds else set()
        self.uses = self.phases.uses(self.kept)
        self.arrays_of: dict[Node, str] = {}  # values in registers, by node
        self.near: dict[Node, str] = {}
        self.wide_inputs = {n.value: n for n in self.phases.nodes if n.op == "input" and n.shape[1] != 1}
        self.order = {r: k for k, r in enumerate(self.phases.reductions)}

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
        here = [n for n in self.pass_.stores if self.only in (None, self.phase_of(n))]
        return read, sum(self.bytes_of(n, self.pass_.stores[n]) for n in here)

    # -- text

    def position(self) -> list[str]:
        """Which row, which chunk, where in shared memory."""
        r, t = self.regime, self.regime.tree
        lines = [f"constexpr int LANES = {t.lanes}, PACKS = {t.packs}, WARPS = {r.warps}, CHUNK = LANES * PACKS * WIDTH;"]
        lines += self._in_group() if self.grouped else self._in_block()
        if self.shared():
            lines.append(MEMORY)
        offset = "0"
        if self.parts_bytes():
            factors = ["WARPS", *["CLUSTER"] * (r.cluster > 1), *["2"] * (r.chunks > 1)] if r.chunks else ["chunks"]
            lines.append(f"const int slots = {' * '.join(factors)};")
            lines.append("real* parts = reinterpret_cast<real*>(memory);  // of each sum, by chunk")
            offset = f"({len(self.order)} * slots * (int)sizeof(real) + 15) / 16 * 16"
        if self.staged:
            lines.append(f"unsigned char* area = memory + {offset} + threadIdx.x / 32 * {self.area_bytes()};")
            offset += f" + WARPS * {self.area_bytes()}"
        lines += [f"const {self._row_pointer(n, node)}" for n, node in self.wide_inputs.items()]
        lines += [self._row_pointer(n, node) for n, node in self.pass_.stores.items() if node.shape[1] != 1]
        if r.cluster > 1:
            lines.append("const unsigned rank = cluster_rank();")
            if self.order:
                lines.append("cluster_arrive();  // awaited before the first write to another block")
        for n in self.shared_rows():
            own = self.context.name(n)
            lines += [
                f"{self.context.types[n]}* {own}_here = alike(memory + {offset}, {own}_row);",
                f"copy({own}_here, {own}_row, columns, threadIdx.x, 32 * WARPS);",
            ]
            offset += f" + {self.row_bytes(n)}"
        return [*lines, "__syncthreads();"] if self.shared_rows() else lines

    def _in_group(self) -> list[str]:
        lines = [
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
        return lines

    def _in_block(self) -> list[str]:
        r = self.regime
        lines = ["const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;"]
        if r.cluster > 1:
            lines.append(f"constexpr int CLUSTER = {r.cluster};")
        lines.append("const column_t width = columns;")
        if r.name == "split":
            return [
                *lines,
                "const int chunks = (columns + CHUNK - 1) / CHUNK, blocks = (chunks + WARPS - 1) / WARPS;",
                "const long long row = blockIdx.x / blocks;",
                "const int chunk = blockIdx.x % blocks * WARPS + warp;",
            ]
        return [
            *lines,
            "const int chunks = (columns + CHUNK - 1) / CHUNK;",
            f"const long long row = blockIdx.x{' / CLUSTER' if r.cluster > 1 else ''};",
        ]

    def _row_pointer(self, name: str, node: Node) -> str:
        own = self.context.name(name)
        offset = f" + row * {own}_rows" if node.shape[0] != 1 else ""
        return f"{self.context.types[name]}* {own}_row = {own}{offset};"

    def phase_of(self, name: str) -> int:
        """The phase in which a store is done."""
        return self.phases.target_level(self.pass_.stores[name])

    def leader(self) -> str:
        """Whether this thread writes what there is one of in a row."""
        if self.grouped:
            return "mine && lane == 0"
        if self.regime.name == "split":
            return "chunk == 0 && lane == 0"
        return "rank == 0 && threadIdx.x == 0" if self.regime.cluster > 1 else "threadIdx.x == 0"

    def load(self, n: Node, to: str) -> str:
        """A chunk of an array into registers."""
        own = self.context.name(n.value)
        if self.regime.name == "shared" and n.shape[0] != 1:
            load = "load_each<LANES>" if self.staged else f"load<LANES, {self._whole}>"
            return f"{load}({to}, {own}_here, first, width);"
        return self._transfer("load", own, to, n.shape[0] != 1)

    def store(self, name: str) -> str:
        """A chunk of a result out of registers."""
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
