"""The Dask backend: lazy arrays of NumPy blocks, each block of rows computed by the fused Numba loop.

A loop over all rows becomes one task for each block of rows. What is summed over rows is known only when every block is
done, so there the loop is cut: blocks leave their parts of the sum, Dask adds those up, and the tasks of the next pass get
the total. So the mean loss of a hundred blocks divides by what there is in all of them. Products are Dask's.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np

from xpnn.backends.arrays import numpy_dtype
from xpnn.backends.composed import Composed
from xpnn.backends.interpret import interpret
from xpnn.backends.numba import DTYPES, compile_program
from xpnn.backends.program import Node, Program, stages, substitute, walk
from xpnn.backends.steps import executable
from xpnn.backends.task import HALF, Executable, OutOfRange, Task


class Dask:
    """Cuts a task's program into passes over blocks of rows."""

    name = "dask"

    def prepare(self, job: Task) -> Executable:
        program = job.fusible(self.name, "dask", "Dask", DTYPES)
        wide = job.wide(program)
        run = executable(program, lambda loop: Loop(loop, job.dtype, wide), matmul, lambda a, b: False)
        composed = Composed("array-api").prepare(job)

        def execute(xp: Any, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
            fused = all(isinstance(a._meta, np.ndarray) for a in arrays.values())  # a GPU's blocks are not
            return (run if fused else composed)(xp, arrays, numbers, {})

        return execute

    @staticmethod
    def there(a: np.ndarray[Any, Any]) -> Any:
        """A NumPy array as checks pass it: in blocks of three rows."""
        return da.from_array(a, chunks=(3, *a.shape[1:])[: a.ndim])

    @staticmethod
    def back(a: Any) -> np.ndarray[Any, Any]:
        return np.asarray(a.compute(scheduler="synchronous"))


def matmul(left: Any, right: Any, out: Any = None) -> Any:
    """Dask's product; of half precision, which BLAS does not know, in float32."""
    if left.dtype.name not in HALF:
        return da.matmul(left, right)
    return da.matmul(left.astype(np.float32), right.astype(np.float32)).astype(left.dtype)


class Loop:
    """A fused loop, as passes over the blocks of Dask arrays."""

    unsafe: Collection[tuple[str, str]] = ()  # nothing is ever written in place

    def __init__(self, program: Program, dtype: str, wide: Collection[str]) -> None:
        self.program = program
        nodes = walk(program.outputs.values())
        self.any_columns = _any_columns(program, nodes)
        taken = {*program.inputs, *program.outputs, *program.options}
        fresh = (n for k in itertools.count() if (n := f"part{k}") not in taken)
        self.extents = {n.value: next(fresh) for n in nodes if n.op == "extent"}
        plan = stages(program)
        sums = {s: next(fresh) for stage in plan for s in stage.sums}
        names = {node: name for name, node in program.outputs.items()}
        # what a pass takes as given: extents, since a block has fewer rows, and the sums of passes before
        known = {n: Node("option", (), (1, 1), "int", self.extents[n.value]) for n in nodes if n.op == "extent"}
        self.passes: list[Pass] = []

        def add(stores: Mapping[str, Node], summed: Mapping[str, Node]) -> None:
            outputs = {**stores, **summed}
            made = dict(zip(outputs, substitute(outputs.values(), known), strict=True))
            self.passes.append(Pass(program, made, {*summed}, dtype, {*wide, *sums.values()}, self.any_columns))
            known.update((s, Node("input", (), s.shape, s.dtype, name)) for name, s in summed.items())

        for stage in plan:
            add({names[n]: n for n in stage.stores}, {sums[n]: n for n in stage.sums})
        self.totals = {names[s]: name for s, name in sums.items() if s in names}
        if last := {name: n for name, n in program.outputs.items() if n.shape == (1, 1) and n not in sums}:
            add(last, {})

    def __call__(self, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        inputs = self.program.inputs
        sizes = {s: n for name, node in inputs.items() for s, n in zip(node.shape, arrays[name].shape, strict=True)}
        known = {n: a if self.any_columns or a.numblocks[1] == 1 else _whole_rows(a, inputs[n]) for n, a in arrays.items()}
        numbers = {**numbers, **{name: sizes[s] for s, name in self.extents.items()}}
        for one in self.passes:
            known |= one(known, sizes, numbers)
        return {n: known[self.totals.get(n, n)] for n in self.program.outputs}


def _any_columns(program: Program, nodes: Collection[Node]) -> bool:
    """Whether a row may lie in several blocks: all that is made of rows is a sum of everything."""
    arrays = (*program.inputs.values(), *program.outputs.values())
    if not {n.shape for n in arrays} <= {("R", "C"), (1, 1)}:
        return False
    if any(n.op in {"row_max", "gather", "columns", "column_sum"} for n in nodes):
        return False
    rows = {n for n in nodes if n.op == "row_sum"}
    return {n.args[0] for n in nodes if n.op == "sum_rows"} == rows and not any(
        n.op != "sum_rows" and rows & {*n.args} for n in nodes
    )


def _whole_rows(array: Any, node: Node) -> Any:
    """An array in blocks of whole rows, of about Dask's usual size."""
    return array.rechunk({0: "auto" if node.shape[0] == "R" else -1, 1: -1})


class Pass:
    """One task for each block, and what is put together of their results."""

    def __init__(
        self,
        whole: Program,
        outputs: dict[str, Node],
        summed: set[str],
        dtype: str,
        wide: set[str],
        any_columns: bool,
    ) -> None:
        nodes = walk(outputs.values())
        leaves = {n.value: n for n in nodes if n.op in ("input", "option")}
        inputs = {k: n for k, n in leaves.items() if n.op == "input"}
        for name, node in whole.inputs.items():  # an extent may be all that is needed of an array
            lacking = {s for n in nodes for s in n.shape} - {s for n in inputs.values() for s in n.shape} - {1}
            if lacking & {*node.shape}:
                inputs[name] = node
        columned = any(n.shape[1] != 1 for n in inputs.values())  # otherwise no column is looked up
        index = {n: exempt for n, exempt in whole.index.items() if n in inputs and columned}
        options = {k: n for k, n in leaves.items() if n.op == "option"}
        options |= {e: whole.options[e] for e in index.values() if e in whole.options}
        self.program = Program(whole.name, inputs, options, outputs, index)
        self.summed, self.any_columns = summed, any_columns
        self.dtypes = _dtypes(self.program, dtype, wide)
        self.block = Block(pickle.dumps((self.program, dtype, sorted(wide & {*inputs, *outputs}))))

    def __call__(self, arrays: Mapping[str, Any], sizes: Mapping[Any, int], numbers: Mapping[str, Any]) -> dict[str, Any]:
        """The pass on Dask arrays."""
        indices = itertools.count(2)  # 0 and 1 are those of the grid of blocks
        pairs: list[Any] = []
        for name, node in self.program.inputs.items():
            array, by_rows = arrays[name], node.shape[0] == "R"
            by_columns = self.any_columns and 1 not in node.shape
            if not by_rows and array.npartitions > 1:
                array = array.rechunk(-1)
            pairs += [array, (0 if by_rows else next(indices), 1 if by_columns else next(indices))]
        alone = {axis: 1 for axis in (0, 1) if not any(axis in at for at in pairs[1::2])}
        given = {n: numbers[n] for n in self.program.options}
        what = {"dtype": object, "meta": np.empty((0, 0), object), "token": self.program.name}
        check = os.environ.get("XPNN_CHECK") == "1"
        tasks = da.blockwise(self.block, (0, 1), *pairs, numbers=given, check=check, new_axes=alone, **what)
        results = {}
        for k, (name, node) in enumerate(self.program.outputs.items()):
            rows, columns = tasks.chunks
            if name in self.summed:
                rows = (1,) * len(rows)
            if node.shape[1] == 1:
                columns = (1,) * len(columns)
            elif not self.any_columns:
                columns = (sizes[node.shape[1]],)
            dtype = self.dtypes[name]
            what = {"dtype": dtype, "meta": np.empty((0, 0), dtype)}
            part = tasks.map_blocks(operator.itemgetter(k), chunks=(rows, columns), **what)
            if name in self.summed:
                part = part.sum(axis=0 if node.shape[1] != 1 else (0, 1), keepdims=True, dtype=dtype)
            results[name] = part
        return results


@dataclass(frozen=True)
class Block:
    """What a task calls: a pickled program, compiled once in each process.

    Where a column number is out of range the loop stops before it begins; the block is then gone through node by node, which
    makes the row's loss NaN and its gradient zero.
    """

    pickled: bytes

    def __call__(self, *blocks: Any, numbers: Mapping[str, Any], check: bool) -> tuple[Any, ...]:
        program, run, dtypes = _compiled(self.pickled)
        arrays = dict(zip(program.inputs, map(_block, blocks), strict=True))
        try:
            results = run(np, arrays, numbers, {})
        except OutOfRange as error:
            if check:
                raise IndexError(f"{program.name}: {error}, of one block") from None
            wide = {n: a.astype(np.float32) if a.dtype.name in HALF else a for n, a in arrays.items()}
            results = {n: v.value.astype(dtypes[n]) for n, v in interpret(program, wide, numbers).items()}
        return tuple(results[n] for n in program.outputs)


def _block(nested: Any) -> Any:
    """The one block in Dask's nested lists."""
    while isinstance(nested, list):
        (nested,) = nested
    return nested


def _dtypes(program: Program, dtype: str, wide: Collection[str]) -> dict[str, Any]:
    """The dtypes of a program's results."""
    single = {n: "float32" if n in wide and dtype in HALF else dtype for n in program.outputs}
    return {n: numpy_dtype(single[n] if node.dtype == "float" else "int64") for n, node in program.outputs.items()}


@functools.lru_cache(256)
def _compiled(pickled: bytes) -> tuple[Program, Executable, dict[str, Any]]:
    program, dtype, wide = pickle.loads(pickled)
    return program, compile_program(program, dtype, wide), _dtypes(program, dtype, wide)
