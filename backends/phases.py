"""A pass along rows, cut at its row reductions into phases.

phase 0   max over the columns
phase 1   e = exp(x - max), and its sum
phase 2   e / sum
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from xpnn.backends.program import GRID_REDUCTIONS, ROW_REDUCTIONS, Node, within_pass

DEAR = {"exp", "expm1", "log", "log1p", "tanh", "erf", "erfc"}  # worth keeping between two phases


class Phases:
    """What a pass evaluates for its stores and its sums over rows.

    `level` is the first phase in which a value is known: the number of row reductions that it waits for.
    """

    def __init__(self, roots: Iterable[Node]) -> None:
        self.roots = {root: within_pass(root) for root in roots}
        self.nodes = list(dict.fromkeys(n for nodes in self.roots.values() for n in nodes))
        self.level: dict[Node, int] = {}
        for n in self.nodes:
            inner = () if n.op in GRID_REDUCTIONS else n.args
            self.level[n] = max((self.level[a] for a in inner), default=0) + (n.op in ROW_REDUCTIONS)
        self.reductions = [n for n in self.nodes if n.op in ROW_REDUCTIONS]

    def target_level(self, root: Node) -> int:
        """The phase in which a store or a sum over rows is done."""
        return self.level[root.args[0] if root.op in GRID_REDUCTIONS else root]

    @property
    def last(self) -> int:
        return max(self.level.values(), default=0)

    def uses(self, kept: Container[Node] = ()) -> dict[Node, set[int]]:
        """The phases in whose column loops each full value is needed, if only those in `kept` outlast a phase."""
        needed: dict[Node, set[int]] = {}

        def visit(n: Node, phase: int) -> None:
            if n.shape[1] == 1 or phase in needed.setdefault(n, set()):
                return
            needed[n].add(phase)
            if n in kept and phase > min(needed[n]):
                return
            for a in () if n.op in GRID_REDUCTIONS else n.args:
                visit(a, phase)

        jobs = [(n.args[0], self.level[n] - 1) for n in self.reductions]
        jobs += [(r.args[0] if r.op in GRID_REDUCTIONS else r, self.target_level(r)) for r in self.roots]
        for node, phase in sorted(jobs, key=lambda job: job[1]):
            visit(node, phase)
        return needed
