"""How a row is shared out over threads: one rule for sums, and a choice of where the row lies meanwhile.

A row is cut into chunks of 32 threads x PACKS x 16 bytes. A chunk is summed by one group of threads, in an order that the
tree fixes; the chunks' sums are then added in an order that their number fixes. The tree depends on the length of the row
and its dtype alone. What holds the row between two phases (registers, shared memory, nothing), and whether one block, a
cluster or several launches go over it, changes which threads do the work, never the order of a sum: results are the same
to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PACK = 16  # bytes of one load or store
MOST_WARPS = 16  # of a block
REGISTERS = 65536  # of a multiprocessor
STAGING = 32 * 8 * PACK + PACK  # bytes of shared memory that a warp takes a chunk through
STATIC = 48 << 10  # bytes of shared memory that need no permission

Name = Literal["thread", "warp", "block", "cluster", "shared", "passes", "split", "columns", "values"]

WHAT: dict[Name, str] = {
    "thread": "a thread per row",
    "warp": "a group of at most 32 threads per row, the row in registers",
    "block": "a block per row, the row in registers",
    "cluster": "a cluster of blocks per row, the row in registers",
    "shared": "a block per row, the row in shared memory",
    "passes": "a block per row, read again in every phase, alternately from its ends",
    "split": "several blocks per row, a launch per phase",
    "columns": "sums over the rows, in two steps",
    "values": "a thread per row's value",
}


@dataclass(frozen=True)
class Device:
    """What the choice depends on. The default is an H100.

    `capability` is ten times the major version plus the minor one; `shared` is what one block may have, in bytes.
    """

    capability: int = 90
    processors: int = 132
    shared: int = 232448

    @property
    def threads(self) -> int:
        """What a multiprocessor holds."""
        return {75: 1024, 86: 1536, 87: 1536, 89: 1536, 120: 1536, 121: 1536}.get(self.capability, 2048)

    @property
    def clusters(self) -> bool:
        return self.capability >= 90


@dataclass(frozen=True)
class Tree:
    """The order of a row's sums: `lanes` threads, each with `packs` of `width` elements from every chunk."""

    lanes: int
    packs: int
    width: int

    @property
    def chunk(self) -> int:
        return self.lanes * self.packs * self.width


def tree(columns: int, itemsize: int) -> Tree:
    """The tree of a row, from its length and the size of its elements."""
    width = PACK // itemsize
    packs = _ceil(columns, width)
    if columns % width and columns <= (32 if itemsize <= 4 else 16):
        return Tree(1, packs, width)
    if packs <= 32:
        return Tree(_power(packs), 1, width)
    return Tree(32, min(_power(_ceil(packs, 32)), 4 if itemsize == 2 else 8), width)


@dataclass(frozen=True)
class Regime:
    """How one launch is shaped.

    `chunks` is how many of a row's one warp holds in registers; 0 where it goes over them in a loop. `resident` is how many
    blocks a multiprocessor is to hold at once, which bounds the registers of a thread.
    """

    name: Name
    tree: Tree
    warps: int
    chunks: int = 1
    cluster: int = 1
    resident: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def rows(self) -> int:
        """The rows of one block, where a block has several."""
        return self.warps * 32 // self.tree.lanes


def choose(rows: int, columns: int, itemsize: int, inputs: int, live: int, staged: bool, device: Device) -> Regime:
    """The regime for a grid of rows and columns.

    Parameters
    ----------
    itemsize
        Bytes of one element.
    inputs
        Arrays that are read along the columns.
    live
        Values of each element that must be held from one phase to the next; 0 where there is one phase only.
    staged
        Whether rows may start anywhere, which takes shared memory.
    """
    t = tree(columns, itemsize)
    count = _ceil(columns, t.chunk)
    values = max(live, inputs, 1)

    def resident(warps: int, chunks: int = 1) -> int:
        """How many blocks a multiprocessor holds, by a first guess of the registers; `roomier` mends it."""
        registers = t.packs * t.width * chunks * values * (2 if itemsize == 8 else 1) + (40 if itemsize == 8 else 28)
        return max(1, min(device.threads // (32 * warps), REGISTERS // (32 * warps * _up(registers, 8)), 16))

    if count == 1:
        return Regime("thread" if t.lanes == 1 else "warp", t, 4, resident=resident(4))
    if live == 0:  # nothing connects a row's chunks
        return Regime("split", t, 8, resident=resident(8))
    holds = values <= 3
    most = MOST_WARPS if values <= 2 else MOST_WARPS // 2  # so that a thread may have registers for all it holds
    if holds and count <= most and (not staged or _power(count) * STAGING + 4 * 8 * count <= device.shared):
        warps = _power(count)
        return Regime("block", t, warps, resident=resident(warps))
    together = _ceil(count, most)  # blocks that hold the row in their registers
    clustered = device.clusters and holds and together <= 8
    if 2 * rows * (together if clustered else 1) <= device.processors:  # half of them would have nothing to do
        return Regime("split", t, 8, resident=resident(8))
    if clustered:
        warps = max((w for w in (most, 8) if _ceil(count, w) <= 8), key=lambda w: w * resident(w))
        return Regime("cluster", t, warps, cluster=_power(_ceil(count, warps)), resident=resident(warps))
    if device.clusters and live == 1 and values == 1 and together <= 16:
        return Regime("cluster", t, most, chunks=2, cluster=8)
    warps = MOST_WARPS if values <= 2 and itemsize < 8 else MOST_WARPS // 2
    if shared_bytes(columns, itemsize, inputs, count, warps if staged else 0) <= device.shared:
        return Regime("shared", t, warps, chunks=0)
    while staged and warps > 1 and warps * STAGING + 4 * 8 * count > device.shared:
        warps //= 2
    return Regime("passes", t, warps, chunks=0, resident=resident(warps))


def roomier(regime: Regime) -> int | None:
    """A smaller `resident` that gives every thread at least 8 registers more; None where there is none."""

    def each(resident: int) -> int:
        return min(255, REGISTERS // (regime.threads * resident) // 8 * 8)

    fewer = [r for r in range(regime.resident - 1, 0, -1) if each(r) > each(regime.resident)]
    return fewer[0] if fewer else None


def shared_bytes(columns: int, itemsize: int, inputs: int, chunks: int, staging: int) -> int:
    """An upper bound on what the regime "shared" asks for: the rows, the chunks' sums, and what some warps stage rows in."""
    return inputs * (columns * itemsize + 2 * PACK) + 4 * 8 * chunks + staging * STAGING


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _up(n: int, step: int) -> int:
    return _ceil(n, step) * step


def _power(n: int) -> int:
    """The power of two at or above."""
    return 1 << (n - 1).bit_length()
