"""What checks run on: ways to call a kernel, random arrays for them, and where a backend's arrays lie."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from xpnn.backends import choice
from xpnn.backends.arrays import numpy_dtype
from xpnn.backends.kernel import Kernel
from xpnn.backends.kinds import Column, Full, Index, Matrix, Row, Scalar, Wide

Array = np.ndarray[Any, Any]

HALF = ("float16", "bfloat16")
DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Variant:
    """One way to call a kernel: options, which optional inputs are passed, and what an input of two kinds is."""

    options: tuple[tuple[str, Any], ...]
    optional: tuple[str, ...]
    full: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{n}={getattr(v, '__name__', v)}" for n, v in self.options]
        return ", ".join([*parts, *self.optional, *(f"{n} as probabilities" for n in self.full)]) or "-"


def variants(kernel: Kernel) -> Iterator[Variant]:
    """The variants that a check goes through: every set of options with two of the ways to pass the inputs, in turn."""
    d = kernel.declaration
    optional = tuple(n for n, i in d.inputs.items() if i.optional)
    two = tuple(n for n, i in d.inputs.items() if Index in i.kinds and len(i.kinds) > 1)
    ways = list(dict.fromkeys(itertools.product(((), optional), ((), two))))
    for k, options in enumerate(d.variants):
        for present, full in dict.fromkeys((ways[k % len(ways)], ways[(k + 1) % len(ways)])):
            yield Variant(tuple(options.items()), present, full)


def sample(kernel: Kernel, variant: Variant, shape: tuple[int, int], dtype: str, seed: int) -> dict[str, Array]:
    """Random inputs; rows of every second sample lie near ±1e4, or over many magnitudes for element-wise kernels."""
    d, rng = kernel.declaration, np.random.default_rng(seed)
    rows, columns = shape
    matrices = any(Matrix in i.kinds for i in d.inputs.values())
    units = 11 if matrices else columns  # of a layer, or without one
    arrays: dict[str, Array] = {}
    for name, i in d.inputs.items():
        if i.optional and name not in variant.optional:
            continue
        kind = i.kind("float") if name in variant.full else i.kinds[0]
        if kind is Index:
            arrays[name] = rng.integers(0, units, rows)
            arrays[name][0] = 0  # a result made of one column of each row reads the first, which checks spoil
            if "ignore_index" in d.options and rows > 2:
                arrays[name][rows // 2] = d.options["ignore_index"]
            continue
        extent = {
            Full: shape, Wide: (rows, units), Row: (rows,), Scalar: (), Matrix: (units, columns), Column: (units,),
        }[kind]  # fmt: skip
        value = 3 * rng.standard_normal(extent)
        if kind is Matrix:
            value /= 3 * np.sqrt(columns)  # a layer's outputs are of its inputs' size, or a softmax of them is saturated
        domain = d.domain.get(name, "real")
        if domain == "positive":
            value = np.exp(np.minimum(value, 10.0))  # half precision ends at 65504
        elif domain == "unit":
            value = 1 / (1 + np.exp(-value))
        elif domain in ("simplex", "log_simplex"):
            value = np.exp(value) / np.sum(np.exp(value), axis=-1, keepdims=True)
            value = np.log(value) if domain == "log_simplex" else value
        elif kind is Full and seed % 2:
            if kernel.has_axis:
                far = 16.0 if dtype in HALF else 1e4  # where neighbours are still told apart
                far = dict(variant.options).get("softcap", 4 * far) / 4  # where its slope still lets a row be seen
                value += rng.choice([-far, 0.0, far], (rows, 1))
            elif not matrices:
                value *= 10.0 ** rng.uniform(-4, 1.5, extent)
        narrow = dtype in HALF and d.is_wide(name, kind in (Row, Scalar))  # single, as a loss is: so they are computed with
        arrays[name] = np.asarray(value, numpy_dtype("float32" if narrow else dtype))
    return arrays


def is_float(a: Array) -> bool:
    return bool(a.dtype.kind == "f" or a.dtype.name == "bfloat16")


class Place(NamedTuple):
    """Where a backend's arrays lie: how they get there and back, and what that is called."""

    name: str
    there: Callable[[Array], Any]
    back: Callable[[Any], Array]


@contextlib.contextmanager
def place(backend: str) -> Iterator[Place]:
    """Within a `with` block, the backend in force, and the place of its arrays.

    "cupy" runs on the GPU; where there is none, on the CPU through a C++ compiler (`xpnn.backends.cupy.host`). A backend that
    takes other arrays than NumPy's says how they are made (`there`) and read (`back`).
    """
    with choice.use_backend(backend), contextlib.ExitStack() as stack:
        if backend != "cupy":
            chosen = choice.backend(choice.current())
            yield Place("CPU", getattr(chosen, "there", lambda a: a), getattr(chosen, "back", np.asarray))
            return
        from xpnn.backends.cupy import host, machine

        if machine.present() and machine.current.name == "GPU":
            import cupy

            yield Place("GPU", cupy.asarray, cupy.asnumpy)
        else:
            if machine.current.name == "GPU":
                stack.enter_context(host.running())
            yield Place("CPU for a GPU", host.as_cupy, lambda a: host.as_numpy(a).copy())
