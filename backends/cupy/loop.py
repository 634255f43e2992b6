"""One loop program on CuPy arrays: emitted and compiled once for each size, then launched."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xpnn.backends.arrays import FAST, numpy_dtype
from xpnn.backends.cupy import machine
from xpnn.backends.cupy.emit import Emitted, emit, settle
from xpnn.backends.cupy.kernel import Launch
from xpnn.backends.cupy.machine import Function
from xpnn.backends.cupy.passes import plan
from xpnn.backends.cupy.regime import Device
from xpnn.backends.program import Program
from xpnn.backends.task import BackendError

ALIGNED = 256  # bytes: where scratch arrays start
REMEMBERED = 512  # sizes


@dataclass
class Starter:
    """One launch, with its arguments packed as the driver wants them. `known` are those that never change."""

    launch: Launch
    function: Function
    known: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    local: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.format = struct.Struct("@" + "".join(p.code for p in self.launch.parameters))
        self.offsets, at = [], 0
        for p in self.launch.parameters:
            size = struct.calcsize(p.code)
            at = -(-at // size) * size
            self.offsets.append(at)
            at += size
        self.template: list[Any] = []
        self.slots: list[tuple[int, tuple[str, str]]] = []  # what changes from call to call
        for k, p in enumerate(self.launch.parameters):
            key = p.what, p.name
            if p.what != "size" and key not in self.known:
                self.slots.append((k, key))
            self.template.append(self.launch.sizes[p.name] if p.what == "size" else self.known.get(key, 0))

    def room(self) -> tuple[Any, int]:
        """This thread's memory for the arguments, and the address of their addresses."""
        try:
            return self.local.room  # type: ignore[no-any-return]
        except AttributeError:
            size = -(-self.format.size // 8) * 8
            buffer = (ctypes.c_uint64 * (size // 8))()
            start = ctypes.addressof(buffer)
            addresses = (ctypes.c_void_p * len(self.offsets))(*(start + o for o in self.offsets))
            self.format.pack_into(buffer, 0, *self.template)
            self.local.keep = addresses
            self.local.room = buffer, ctypes.addressof(addresses)
            return self.local.room  # type: ignore[no-any-return]

    def __call__(self, values: Mapping[tuple[str, str], Any]) -> None:
        arguments = self.template.copy()
        for k, key in self.slots:
            arguments[k] = values[key]
        buffer, pointers = self.room()
        self.format.pack_into(buffer, 0, *arguments)
        launch = self.launch
        self.function(launch.blocks, launch.threads, launch.shared, pointers)

    def short(self, places: Mapping[tuple[str, str], tuple[int, int]]) -> Callable[[list[int]], None]:
        """The launch as a function of addresses alone: each argument that is not known is one of them, plus an offset."""
        cells = [(self.offsets[k] // 8, *places[key]) for k, key in self.slots]
        function, room, launch = self.function, self.room, self.launch
        blocks, threads, shared = launch.blocks, launch.threads, launch.shared

        def start(addresses: list[int]) -> None:
            buffer, pointers = room()
            for cell, which, offset in cells:
                buffer[cell] = addresses[which] + offset
            function(blocks, threads, shared, pointers)

        return start


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
        whole = np.dtype(np.int64)
        self.results = {
            n: whole if node.dtype == "int" else self.real if n in wide else numpy_dtype(dtype)
            for n, node in program.outputs.items()
        }
        self.unsafe = plan(program).unsafe()
        self._ready: dict[Any, Ready] = {}

    def __call__(self, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        import cupy

        FAST.add(cupy.ndarray)
        program = self.program
        narrow = numpy_dtype(self.dtype)
        inputs = {n: self._readable(cupy, n, arrays[n], narrow) for n in program.inputs}
        sizes: dict[str, int] = {}
        for n, node in program.inputs.items():
            sizes |= {str(s): size for s, size in zip(node.shape, inputs[n].shape, strict=True) if s != 1}
        results: dict[str, Any] = {}
        for n, node in program.outputs.items():
            shape = tuple(1 if s == 1 else sizes[str(s)] for s in node.shape)
            dtype = self.results[n]
            target = out.get(n)
            fits = target is not None and target.shape == shape and target.dtype == dtype and _adjacent(target)
            results[n] = target if fits else cupy.empty(shape, dtype)
        staged = not all(_aligned(a) for a in (*inputs.values(), *results.values()) if a.shape[1] != 1)
        integers = {n: inputs[n].dtype.name for n, node in program.inputs.items() if node.dtype == "int"}
        ready = self.ready(integers, sizes, staged)
        copies: dict[str, Any] = {}
        for output, source in ready.emitted.unsafe:
            if output not in copies and output in out and overlap(results[output], inputs[source]):
                copies[output], results[output] = results[output], _aligned_empty(cupy, results[output])
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
        for starter in ready.starters:
            starter(values)
        for n, target in copies.items():
            machine.current.copy(target, results[n])
            results[n] = target
        return results

    def ready(self, integers: dict[str, str], sizes: dict[str, int], staged: bool) -> Ready:
        """What a call of some sizes needs, on the current device."""
        key = (machine.current, machine.current.number(), staged, *sizes.values(), *integers.values())
        found = self._ready.get(key)
        if found is None:
            found = self._prepare(integers, sizes, staged, machine.current.device())
            if len(self._ready) >= REMEMBERED:
                self._ready.clear()
            self._ready[key] = found
        return found

    def _prepare(self, integers: dict[str, str], sizes: dict[str, int], staged: bool, device: Device) -> Ready:
        functions: list[Function] = []

        def write(limits: Mapping[str, int]) -> Emitted:
            return emit(self.program, self.dtype, integers, self.wide, sizes, staged, device, limits=limits)

        def spilling(emitted: Emitted) -> set[str]:
            nonlocal functions
            try:
                functions, spilt = machine.current.functions(emitted.text, emitted.launches)
            except Exception as error:
                raise BackendError(
                    f"{self.program.name}: its CUDA kernel did not compile ({type(error).__name__}); backend 'array-api' runs "
                    f"it composed, and {self.program.name}.source(backend='cupy', ...) shows the code"
                ) from error
            return spilt

        emitted = settle(write, spilling)
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
    return bool((columns == a.itemsize or a.shape[1] == 1) and (a.shape[0] == 1 or (rows >= 0 and rows % a.itemsize == 0)))


def _aligned(a: Any) -> bool:
    return bool(a.data.ptr % 16 == 0 and (a.shape[0] == 1 or a.strides[0] % 16 == 0))


def _aligned_empty(cupy: Any, like: Any) -> Any:
    """New memory for an array, every row of which starts on a 16-byte border."""
    rows, columns = like.shape
    each = 16 // like.itemsize
    return cupy.empty((rows, -(-columns // each) * each), like.dtype)[:, :columns]


def overlap(a: Any, b: Any) -> bool:
    """Whether the memory of two CuPy arrays may overlap, by their bounds."""
    (a0, a1), (b0, b1) = _bounds(a), _bounds(b)
    return a0 < b1 and b0 < a1


def _bounds(a: Any) -> tuple[int, int]:
    steps = [(n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)]
    start = a.data.ptr
    return start + sum(s for s in steps if s < 0), start + sum(s for s in steps if s > 0) + a.itemsize
