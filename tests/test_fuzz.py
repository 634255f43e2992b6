"""Every public function, whatever Hypothesis thinks of: kernel, options, inputs, shape, axis, layout, dtype and direction.

Fused results against the composed formula, within the bounds that `xpnn parity` has. Some cases in the ordinary run, the same
ones each time; `make fuzz CASES=100000` goes through others, and writes down what it did.
"""

from __future__ import annotations

import collections
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from layouts import at_odd_address, frozen

import xpnn
from xpnn import testing
from xpnn.backends.kernel import Kernel, registry
from xpnn.backends.kinds import Full, Index, Matrix, Row
from xpnn.benchmarks import machine
from xpnn.samples import Array, Variant, sample, variants

CASES = int(os.environ.get("FUZZ_CASES", "150"))
RECORD = os.environ.get("FUZZ_RECORD", "")
KERNELS = [k for k in dict.fromkeys(registry.values()) if getattr(xpnn, k.__name__, None) is k]
VARIANTS = {k: tuple(variants(k)) for k in KERNELS}
DIRECTIONS = {k: ("forward", *(("backward",) if k.declaration.backward is not None else ())) for k in KERNELS}
SIZES = st.one_of(st.integers(1, 5), st.sampled_from([7, 8, 15, 16, 17, 31, 33, 40, 63, 64, 65]))
COLUMNS = st.one_of(SIZES, st.sampled_from([100, 127, 511, 512, 513, 1000, 1040, 2100]))
COPIES = {"Fortran": np.asfortranarray, "odd": at_odd_address, "read-only": frozen}
COUNTED: collections.Counter[str] = collections.Counter()


def laid_out(draw: st.DrawFn, a: Array) -> Array:
    """The same values with other strides, read-only or at an odd address."""
    how = draw(st.sampled_from(["plain", *COPIES, "gaps", "reverse"]))
    if how == "plain" or not a.ndim:
        return a
    if how in COPIES:
        return COPIES[how](a)
    if how == "gaps":
        wide = np.zeros([n + 3 for n in a.shape], a.dtype)
        inside = wide[tuple(slice(1, n + 1) for n in a.shape)]
    else:
        inside = np.zeros_like(a, order="C")[(slice(None, None, -1),) * a.ndim]
    inside[...] = a
    return inside


@st.composite
def calls(draw: st.DrawFn) -> tuple[Kernel, Variant, str, str, dict[str, Array], dict[str, Any]]:
    """A kernel, a variant of it, a dtype, a direction; and the arrays and options to call it with."""
    kernel = draw(st.sampled_from(KERNELS))
    d = kernel.declaration
    variant = draw(st.sampled_from(VARIANTS[kernel]))
    dtype = draw(st.sampled_from(["float32", "float32", "float64", "float16", "bfloat16"]))
    direction = draw(st.sampled_from(DIRECTIONS[kernel]))
    lead = tuple(draw(st.lists(SIZES, min_size=1, max_size=3).filter(lambda s: np.prod(s) <= 600)))
    columns = draw(COLUMNS if np.prod(lead) < 100 else SIZES)
    seed = draw(st.integers(0, 2**16))
    options = dict(variant.options)
    arrays = sample(kernel, variant, (int(np.prod(lead)), columns), dtype, seed)
    if not any(Matrix in i.kinds for i in d.inputs.values()):  # of a layer, rows are the first axis alone
        at = draw(st.integers(0, len(lead))) if kernel.has_axis else len(lead)
        for name, a in arrays.items():
            i = d.inputs[name]
            kind = i.kind("int" if a.dtype.kind == "i" else "float")
            if kind is Full:
                arrays[name] = np.moveaxis(a.reshape(*lead, columns), -1, at)
            elif kind in (Row, Index):
                arrays[name] = a.reshape(lead)
        if kernel.has_axis:
            options["axis"] = draw(st.sampled_from([at, at - len(lead) - 1]))
    if direction == "backward":
        arrays = testing.given_for_backward(kernel, arrays, options, seed)
    return kernel, variant, dtype, direction, {n: laid_out(draw, a) for n, a in arrays.items()}, options


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=not RECORD,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink) if RECORD else (Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(calls())
def drawn(call: tuple[Kernel, Variant, str, str, dict[str, Array], dict[str, Any]]) -> None:
    kernel, variant, dtype, direction, arrays, options = call
    note(
        f"{kernel.__name__} ({variant}) {direction} {dtype} {options} { {n: (a.shape, a.strides) for n, a in arrays.items()} }"
    )
    COUNTED[f"{kernel.__name__} {direction} {dtype}"] += 1
    before = {n: a.copy() for n, a in arrays.items()}
    truth = testing.truth_of(kernel, direction, arrays, options, dtype)
    found = testing._compute(kernel, direction, arrays, options, "numba")
    again = testing._compute(kernel, direction, arrays, options, "numba")
    error, bound, excess = truth.excess(found)
    assert excess <= 0, f"{error:.3g} ULP where {bound:.3g} are allowed"
    for name, value in found.items():
        assert value.dtype == truth.composed[name].dtype
        assert value.shape == truth.exact[name].shape
        assert np.array_equal(value, again[name], equal_nan=True)
    for name, a in arrays.items():
        assert np.array_equal(a, before[name], equal_nan=True), f"{name} was written"


def test_fuzz() -> None:
    """No case breaches its bound, changes its inputs, or gives other bits the second time."""
    start = time.perf_counter()
    drawn()
    seconds = time.perf_counter() - start
    assert sum(COUNTED.values()) >= CASES
    if RECORD:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        document = {"date": date, "machine": machine.describe(), "cases": sum(COUNTED.values()), "seconds": round(seconds)}
        document["counted"] = dict(sorted(COUNTED.items()))
        Path(RECORD).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
