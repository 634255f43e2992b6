"""One loop program on CuPy arrays: emitted and compiled once for each size, then launched."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xpnn.backends.cupy import machine
from xpnn.backends.cupy.emit import Emitted, emit
from xpnn.backends.cupy.kernel import Launch
from xpnn.backends.cupy.machine import Function
from xpnn.backends.cupy.passes import plan
from xpnn.backends.program import Program

ALIGNED = 256  # bytes: where scratch arrays start
REMEMBERED = 512  # sizes


@dataclass
class Starter:
    """One launch, with its arguments packed as the driver wants them."""

    launch: Launch
    function: Function
    local: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.format = struct.Struct("@" + "".join(p.code for p in self.launch.parameters))
        self.offsets, at = [], 0
        for p in self.launch.parameters:
            size = struct.calcsize(p.code)
            at = -(-at // size) * size
            self.offsets.append(at)
            at += size
        self.template: list[Any] = [self.launch.sizes.get(p.name, 0) for p in self.launch.parameters]
        self.slots = [
            (k, (p.what, p.name)) for k, p in enumerate(self.launch.parameters) if p.what != "size"
        ]  # what changes from call to call

    def __call__(self, values: Mapping[tuple[str, str], Any]) -> None:
        arguments = self.template.copy()
        for k, key in self.slots:
            arguments[k] = values[key]
        try:
            buffer, pointers = self.local.room
        except AttributeError:
            buffer = ctypes.create_string_buffer(self.format.size)
            start = ctypes.addressof(buffer)
            addresses = (ctypes.c_void_p * len(self.offsets))(*(start + o for o in self.offsets))
            pointers = (ctypes.addressof(addresses), addresses)
            self.local.room = buffer, pointers
        self.format.pack_into(buffer, 0, *arguments)
        launch = self.launch
        self.function(launch.blocks, launch.threads, launch.shared, pointers[0])


@dataclass
class Ready:
    """Everything that a call needs for one set of sizes."""

    emitted: Emitted
    starters: list[Starter]
    scratch: dict[str, int]  # where each scratch array starts
    total: int


class Loop:
    """A loop program for CuPy arrays of one dtype; `wide` names the arrays that are of what is computed in."""

    def __init__(self, program: Program, dtype: str, wide: set[str]) -> None:
        self.program, self.dtype = program, dtype
        self.real = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self.wide = {n for n in wide if n in program.inputs or n in program.outputs}
        self.unsafe = plan(program).unsafe()
        self._ready: dict[Any, Ready] = {}

    def __call__(self, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        import cupy

        program = self.program
        narrow = next((a.dtype for n, a in arrays.items() if n not in self.wide and a.dtype.name == self.dtype), self.real)
        inputs = {n: self._readable(cupy, n, arrays[n], narrow) for n in program.inputs}
        sizes: dict[str, int] = {}
        for n, node in program.inputs.items():
            sizes |= {str(s): size for s, size in zip(node.shape, inputs[n].shape, strict=True) if s != 1}
        results: dict[str, Any] = {}
        for n, node in program.outputs.items():
            shape = tuple(1 if s == 1 else sizes[str(s)] for s in node.shape)
            dtype = self.real if n in self.wide else narrow
            target = out.get(n)
            fits = target is not None and target.shape == shape and target.dtype == dtype and _adjacent(target)
            results[n] = target if fits else cupy.empty(shape, dtype)
        staged = not all(_aligned(a) for a in (*inputs.values(), *results.values()) if a.shape[1] != 1)
        integers = {n: inputs[n].dtype.name for n, node in program.inputs.items() if node.dtype == "int"}
        number, device = machine.current.device()
        key = (tuple(sizes.values()), staged, tuple(integers.values()), number)
        ready = self._ready.get(key)
        if ready is None:
            ready = self._prepare(integers, sizes, staged, device)
            if len(self._ready) >= REMEMBERED:
                self._ready.clear()
            self._ready[key] = ready
        copies: dict[str, Any] = {}
        for output, source in ready.emitted.unsafe:
            if output not in copies and output in out and overlap(results[output], inputs[source]):
                copies[output], results[output] = results[output], cupy.empty_like(results[output])
        values: dict[tuple[str, str], Any] = {("number", n): numbers[n] for n in program.options}
        for n, a in (inputs | results).items():
            values["array", n] = a.data.ptr
            values["rows", n] = a.strides[0] // a.itemsize if a.shape[0] != 1 else 0
        if ready.total:
            scratch = cupy.empty(ready.total, np.uint8)
            base = scratch.data.ptr
            for n, start in ready.scratch.items():
                values["array", n] = base + start
                values["rows", n] = 1
        for start in ready.starters:
            start(values)
        for n, target in copies.items():
            target[...] = results[n]
            results[n] = target
        return results

    def emitted(self, sizes: dict[str, int], integers: dict[str, str], staged: bool, device: Any) -> Emitted:
        return emit(self.program, self.dtype, integers, self.wide, sizes, staged, device)

    def _prepare(self, integers: dict[str, str], sizes: dict[str, int], staged: bool, device: Any) -> Ready:
        emitted = self.emitted(sizes, integers, staged, device)
        functions = machine.current.functions(emitted.text, emitted.launches)
        starts, total = {}, 0
        for n, size in emitted.scratch.items():
            starts[n] = total
            total += -(-size // ALIGNED) * ALIGNED
        starters = [Starter(launch, f) for launch, f in zip(emitted.launches, functions, strict=True)]
        return Ready(emitted, starters, starts, total)

    def _readable(self, cupy: Any, name: str, a: Any, narrow: Any) -> Any:
        """An array as a kernel takes it; a copy only where its dtype or its layout demands one."""
        if self.program.inputs[name].dtype == "float":
            dtype = self.real if name in self.wide else narrow
            if a.dtype != dtype:
                a = a.astype(dtype)
        return a if _adjacent(a) else cupy.ascontiguousarray(a)


def _adjacent(a: Any) -> bool:
    """Whether the values of a row lie side by side, and rows apart by whole elements, forwards."""
    columns, rows = a.strides[1], a.strides[0]
    return (columns == a.itemsize or a.shape[1] == 1) and (a.shape[0] == 1 or (rows >= 0 and rows % a.itemsize == 0))


def _aligned(a: Any) -> bool:
    return a.data.ptr % 16 == 0 and (a.shape[0] == 1 or a.strides[0] % 16 == 0)


def overlap(a: Any, b: Any) -> bool:
    """Whether the memory of two CuPy arrays may overlap, by their bounds."""
    (a0, a1), (b0, b1) = _bounds(a), _bounds(b)
    return a0 < b1 and b0 < a1


def _bounds(a: Any) -> tuple[int, int]:
    steps = [(n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)]
    start = a.data.ptr
    return start + sum(s for s in steps if s < 0), start + sum(s for s in steps if s > 0) + a.itemsize
