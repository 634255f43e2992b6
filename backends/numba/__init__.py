"""The Numba backend: NumPy arrays, fused loops on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from xpnn.backends.arrays import numpy_dtype
from xpnn.backends.program import Loop, Program, steps
from xpnn.backends.steps import executable
from xpnn.backends.task import HALF, Executable, OutOfRange, Task

DTYPES = (*HALF, "float32", "float64")


class Numba:
    """Compiles a task's program into loops; products go to NumPy's BLAS."""

    name = "numba"

    def prepare(self, job: Task) -> Executable:
        program = job.fusible(self.name, "numpy", "NumPy", DTYPES)
        return compile_program(program, job.dtype, job.wide(program))

    def source(self, program: Program, dtype: str, wide: Collection[str]) -> str:
        """The modules that a program becomes, as text."""
        parts = []
        for step in steps(program):
            if isinstance(step, Loop):
                parts.append(_emitted(step.program, dtype, wide).text)
            else:
                left, right = (f"{n}.T" if t else n for n, t in zip((step.left, step.right), step.transpose, strict=True))
                parts.append(f"# {step.result} = np.matmul({left}, {right}), by NumPy's BLAS\n")
        return "\n".join(parts)


def _emitted(program: Program, dtype: str, wide: Collection[str], short: bool = False, planes: bool = False) -> Any:
    from xpnn.backends.numba.emit import emit

    what = f"xpnn: {program.name} ({', '.join(program.outputs)}), {dtype}"
    form = f"{', short rows' if short else ''}{', planes' if planes else ''}"
    return emit(program, dtype, wide, f"{what}{form}. Emitted from this program:", short, planes)


class Compiled:
    """One loop, compiled when it is first called, in one form for short rows and one for others; and in two more for planes.

    `direct` takes canonical arrays with adjacent columns, in the emitted order: half precision as 16-bit integers, and vectors
    of what has one value a row.
    """

    def __init__(self, program: Program, dtype: str, wide: Collection[str]) -> None:
        self.program = program
        own, computed = numpy_dtype(dtype), np.dtype("float32" if dtype in HALF else dtype)
        kinds = {"float": own, "int": np.dtype(np.int64), "bool": np.dtype(bool)}
        arrays = program.inputs | program.outputs
        self.dtypes = {n: computed if n in wide else kinds[node.dtype] for n, node in arrays.items()}
        self.takes_planes = {node.shape for node in arrays.values()} <= {("R", "C"), ("R", 1), (1, "C"), (1, 1)}
        self.narrow = frozenset(n for n, node in arrays.items() if node.shape[1] == 1)
        self.halves = frozenset(n for n in arrays if self.dtypes[n].name in HALF)
        self.emitted = _emitted(program, dtype, wide)
        self.most_short = self.emitted.most_short
        self._emit = functools.partial(_emitted, program, dtype, wide)
        # for rows of at most `most_short` columns, and for longer ones; then the same for planes
        self.forms: list[Any] = [None] * 4
        self.entries: list[Any] = [None, None]
        self.serial_below = self.emitted.serial_below
        self.unsafe = self.emitted.unsafe

    def form(self, columns: int, planes: bool = False) -> Any:
        """The compiled function for rows of so many columns."""
        long = columns > self.most_short
        k = 2 * planes + long
        if self.forms[k] is None:
            from xpnn.backends.numba import cache

            emitted = self.emitted if k == 1 else self._emit(short=not long, planes=planes)
            self.forms[k] = cache.load(self.program.name, emitted.text).call
        return self.forms[k]

    def entry(self, columns: int) -> Any:
        """The same without looks at its arguments' types; other ones than the emitted code's would do harm."""
        long = columns > self.most_short
        if self.entries[long] is None:
            (compiled,) = self.form(columns).overloads.values()
            self.entries[long] = compiled.entry_point
        return self.entries[long]

    def warm(self) -> None:
        """Compile what was not needed yet."""
        for columns in {self.most_short, self.most_short + 1}:
            if columns:
                self.form(columns)

    def direct(self, size: int, columns: int, *arguments: Any, planes: bool = False) -> int:
        from xpnn.backends.numba import pool

        call = self.form(columns, planes)
        threads = pool.count() if size >= self.serial_below else 1
        if threads == 1:
            return int(call(0, 1, *arguments))
        address = pool.runner()
        with pool.guard():
            return int(call(address, threads, *arguments))

    def __call__(
        self, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]
    ) -> dict[str, np.ndarray[Any, Any]]:
        e = self.emitted
        inputs = {n: _readable(arrays[n], self.dtypes[n]) for n in e.inputs}
        plane = next((a.shape[:2] for a in inputs.values() if a.ndim == 3), None)
        sizes = _sizes(self.program, inputs)
        results: dict[str, np.ndarray[Any, Any]] = {}
        copies: dict[str, np.ndarray[Any, Any]] = {}
        for name in e.outputs:
            shape = tuple(1 if s == 1 else sizes[s] for s in self.program.outputs[name].shape)
            target = out.get(name)
            if target is not None and _canonical_shape(target) == shape and self._writable(name, target, inputs):
                results[name] = target
            else:
                full = 1 not in self.program.outputs[name].shape
                results[name] = _empty(shape, self.dtypes[name], plane if full else None)
                if target is not None:
                    copies[name] = target
        size = max((a.size for a in (*inputs.values(), *results.values())), default=1)
        values = [numbers[n] for n in e.numbers]
        across = inputs[e.across] if e.across in inputs else results[e.across] if e.across else None
        columns = 1 if across is None else across.shape[-1]
        given = (self._argument(name, a) for name, a in (*inputs.items(), *results.items()))
        outside = self.direct(size, columns, *given, *values, planes=plane is not None)
        if outside >= 0:
            name = e.index[outside % 8]
            row = outside // 8
            columns = next(n.shape[1] for n in self.program.inputs.values() if n.shape[1] != 1)
            raise OutOfRange(name, row, int(inputs[name][row, 0]), sizes[str(columns)])
        for name, target in copies.items():
            target[...] = results[name]
            results[name] = target
        return results

    def _argument(self, name: str, a: Any) -> Any:
        """An array as emitted code takes it: without a second axis where that is one."""
        a = a[:, 0] if name in self.narrow else a
        return a.view(np.uint16) if name in self.halves else a

    def _writable(self, name: str, target: Any, inputs: Mapping[str, Any]) -> bool:
        """Whether a loop may write straight into an array."""
        if target.dtype != self.dtypes[name] or not _adjacent(target) or not target.flags.aligned:
            return False
        return not any((name, n) in self.emitted.unsafe and np.may_share_memory(target, a) for n, a in inputs.items())


def _canonical_shape(a: Any) -> tuple[int, ...]:
    return a.shape if a.ndim == 2 else (a.shape[0] * a.shape[1], a.shape[2])


def _empty(shape: tuple[int, ...], dtype: Any, plane: tuple[int, int] | None) -> Any:
    """A new array of a canonical shape; as planes, given how many there are and their rows."""
    if plane is None:
        return np.empty(shape, dtype)
    return np.empty((plane[0], shape[1], plane[1]), dtype).transpose(0, 2, 1)


def _adjacent(a: Any) -> bool:
    """Whether the values of a row lie side by side, or it does not matter."""
    return bool(a.ndim == 3 or a.strides[1] == a.itemsize or a.shape[1] == 1)


def _readable(a: Any, wanted: Any) -> Any:
    """An array as emitted code can read it; a copy only where its layout or dtype demands one."""
    if a.dtype == np.uint64:  # what int64 cannot hold is out of any range
        a = np.minimum(a, np.iinfo(np.int64).max)
    if a.dtype != wanted:
        return np.ascontiguousarray(a, wanted)
    if not _adjacent(a) or not a.flags.aligned:
        return np.array(a, order="C")
    return a


def _sizes(program: Program, arrays: Mapping[str, Any]) -> dict[str, int]:
    return {
        s: size
        for name, node in program.inputs.items()
        for s, size in zip(node.shape, _canonical_shape(arrays[name]), strict=True)
        if s != 1
    }


def compile_program(program: Program, dtype: str, wide: Collection[str]) -> Executable:
    """A callable that runs a program's products and loops in order."""
    from xpnn.backends.numba import products

    loops: list[Compiled] = []

    def compile_loop(loop: Program) -> Compiled:
        loops.append(Compiled(loop, dtype, wide))
        return loops[-1]

    execute = executable(program, compile_loop, products.matmul, np.may_share_memory)

    def warm() -> None:
        for loop in loops:
            loop.warm()

    execute.warm = warm  # type: ignore[attr-defined]
    return execute
