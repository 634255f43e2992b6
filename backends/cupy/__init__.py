"""The CuPy backend: CuPy arrays, fused CUDA kernels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from xpnn.backends.composed import check_indices
from xpnn.backends.cupy import machine
from xpnn.backends.cupy.emit import DTYPES, Emitted, emit, settle
from xpnn.backends.cupy.inspect import spilling
from xpnn.backends.cupy.regime import Device
from xpnn.backends.kinds import Index
from xpnn.backends.program import Loop as LoopStep
from xpnn.backends.program import Program, steps
from xpnn.backends.task import Executable, Task


class CuPy:
    """Compiles a task's program into CUDA kernels; products go to cuBLAS."""

    name = "cupy"

    def prepare(self, job: Task) -> Executable:
        program = job.fusible(self.name, "cupy", "CuPy", DTYPES)
        from xpnn.backends.cupy.loop import Loop, overlap
        from xpnn.backends.steps import executable

        wide = job.wide(program)

        def matmul(left: Any, right: Any, out: Any = None) -> Any:
            return machine.current.matmul(left, right, out)

        run = executable(program, lambda loop: Loop(loop, job.dtype, wide), matmul, overlap)
        return _OnDevice(job, run)

    def emitted(
        self, program: Program, dtype: str, wide: Iterable[str], shape: tuple[int, int], device: Device
    ) -> list[Emitted | str]:
        """The kernels of a program for arrays of a shape that start on 16-byte borders; products in words."""
        rows, columns = shape
        staged = columns * (8 if dtype == "float64" else 4 if dtype == "float32" else 2) % 16 != 0 and rows != 1
        result: list[Emitted | str] = []
        kernels = 0
        for step in steps(program):
            if isinstance(step, LoopStep):
                p = step.program
                nodes = (*p.inputs.values(), *p.outputs.values())
                sizes = {str(s): rows if s == "R" else columns for n in nodes for s in n.shape if s != 1}
                integers = {n: "int64" for n, node in p.inputs.items() if node.dtype == "int"}

                def write(
                    limits: Mapping[str, int],
                    p: Program = p,
                    integers: dict[str, str] = integers,
                    sizes: dict[str, int] = sizes,
                    number: int = kernels,
                ) -> Emitted:
                    return emit(p, dtype, integers, set(wide), sizes, staged, device, number, limits)

                made = settle(write, lambda e: spilling(e.text, device.capability))
                kernels += len(made.launches)
                result.append(made)
            else:
                left, right = (f"{n}.T" if t else n for n, t in zip((step.left, step.right), step.transpose, strict=True))
                result.append(f"{step.result} = matmul({left}, {right}), by cuBLAS")
        return result


class _OnDevice:
    """Runs a program on its arrays' device.

    Column numbers are looked at beforehand only where XPNN_CHECK=1 asks for it, since that waits for the device.
    """

    def __init__(self, job: Task, run: Executable) -> None:
        self.job, self.run = job, run
        self.compiled = getattr(run, "compiled", None)

    def __call__(
        self, xp: Any, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]
    ) -> dict[str, Any]:
        if os.environ.get("XPNN_CHECK") == "1":
            indices = {n: machine.current.fetch(arrays[n]) for n, (kind, _) in self.job.given.items() if kind is Index}
            check_indices(self.job, np, {**arrays, **indices}, numbers)
        with machine.current.on(next(iter(arrays.values()))):
            return self.run(xp, arrays, numbers, out)
