"""The fast path for CuPy arrays: everything but their addresses is prepared beforehand."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xpnn.backends.arrays import rectangle
from xpnn.backends.cupy import machine
from xpnn.backends.cupy.loop import Starter
from xpnn.backends.fast import returned
from xpnn.backends.kinds import Full, Index, Row

if TYPE_CHECKING:
    from xpnn.backends.arguments import Call

_KINDS = {("R", "C"): "full", ("R", 1): "row", (1, 1): "number"}


@dataclass
class Prepared:
    """The launches for one set of sizes, each a function of the arrays' addresses; `total` bytes of scratch come last."""

    starts: list[Callable[[list[int]], None]]
    total: int
    unsafe: frozenset[tuple[str, str]]


def short_way(
    call: Call, direction: str, args: tuple[Any, ...], wanted: tuple[str, ...], given_out: tuple[str, ...]
) -> Callable[..., Any] | None:
    """A function for calls like this one, where there is a short way.

    It returns None where anything is not as it was when it was made, and the call then takes the long way, which also
    words the errors.
    """
    import cupy

    ready, fr = call.prepared(wanted), call.frame
    loop = getattr(ready.execute, "compiled", None)
    kinds = {n: kind for n, (kind, _) in call.given.items()}
    names = tuple(kinds)
    results = {n: _KINDS.get(ready.shapes[n]) for n in loop.program.outputs} if loop is not None else {}
    ambiguous = Index in kinds.values() and len(fr.shape) > 2
    plain = (fr.reach != "row" or fr.axis == len(fr.shape) - 1) and Full in kinds.values() and None not in results.values()
    if loop is None or not plain or ambiguous or set(wanted) != set(results) or set(loop.program.inputs) != set(names):
        return None
    dtypes = {n: a.dtype for n, a in zip(names, args, strict=True)}
    expected = {n: loop.real if n in loop.wide else call.dtype for n in names}
    if any(type(a) is not cupy.ndarray for a in args) or any(kinds[n] not in (Full, Row, Index) for n in names):
        return None
    if any(dtypes[n] != expected[n] for n in names if kinds[n] is not Index):
        return None
    first = next(k for k, n in enumerate(names) if kinds[n] is Full)
    integers = {n: dtypes[n].name for n in names if kinds[n] is Index}
    made = loop.results
    target = given_out[0] if len(given_out) == 1 else None
    symbols = loop.program.inputs[names[first]].shape
    values = loop.program.numbers(call.options)
    numbers = {("number", n): values[n] for n in loop.program.options}
    checked = call.kernel._checked if call.kernel.declaration.check is not None else None
    if checked is not None:
        checked.add((direction, *(a.shape for a in args)))

    def prepare(rows: int, columns: int, staged: bool) -> Prepared:
        sizes = {str(s): size for s, size in zip(symbols, (rows, columns), strict=True) if s != 1}
        found = loop.ready(integers, sizes, staged)
        known: dict[tuple[str, str], Any] = dict(numbers)
        for n, kind in {**{n: "full" if kinds[n] is Full else "row" for n in names}, **results}.items():
            known["rows", n] = 0 if rows == 1 else columns if kind == "full" else 1
        known |= {("rows", n): 1 for n in found.scratch}
        places = {("array", n): (k, 0) for k, n in enumerate((*names, *results))}
        places |= {("array", n): (len(places), at) for n, at in found.scratch.items()}
        starters = [Starter(s.launch, s.function, known) for s in found.starters]
        return Prepared([s.short(places) for s in starters], found.total, found.emitted.unsafe)

    # the function as text, for the arrays at hand: arrays and results go by names of our own
    arrays = [f"a{k}" for k in range(len(names))]
    head = arrays[first]
    lines = [
        f"def fast({', '.join(arrays)}, out=None):",
        f"    if {' or '.join(f'type({a}) is not ndarray' for a in arrays)}: return None",
        f"    shape, size, here = {head}.shape, {head}.size, device()",
        f"    if not size or {' or '.join(f'{a}.data.device_id != here' for a in arrays)}: return None",
    ]
    if integers:
        lines.append("    if environ.get('XPNN_CHECK') == '1': return None")
    if checked is not None:
        lines.append(f"    if ({direction!r}, {', '.join(f'{a}.shape' for a in arrays)}) not in checked: return None")
    for k, n in enumerate(names):
        a = arrays[k]
        lines.append(f"    if {a}.dtype != d{k} or not {a}.flags.c_contiguous: return None")
        if a != head:
            lines.append(f"    if {a}.shape != {'shape' if kinds[n] is Full else 'shape[:-1]'}: return None")
        lines.append(f"    p{k} = {a}.data.ptr")
    full = [f"p{k}" for k, n in enumerate(names) if kinds[n] is Full]
    extents = {"element": "1, size", "all": "rectangle(size)"}.get(fr.reach, "size // shape[-1], shape[-1]")
    lines.append(f"    rows, columns = {extents}")
    shapes = {"full": "shape", "row": "shape[:-1]", "number": "()"}
    for k, (n, kind) in enumerate(results.items()):
        if n != target:
            lines.append(f"    r{k} = empty({shapes[str(kind)]}, e{k})")
    if target is None:
        lines += ["    if out is not None: return None", f"    together = {' | '.join(full)}"]
    else:
        at = list(results).index(target)
        lines += [
            f"    if out is None: r{at} = empty({shapes[str(results[target])]}, e{at}); together = {' | '.join(full)}",
            "    else:",
            f"        if type(out) is not ndarray or out.dtype != e{at} or out.data.device_id != here: return None",
            "        if not out.flags.c_contiguous: return None",
            f"        if out.shape != {shapes[str(results[target])]}: return None",
            f"        r{at} = out; together = out.data.ptr | {' | '.join(full)}",
        ]
    lines += [
        f"    staged = together % 16 != 0 or (rows != 1 and columns * {call.dtype.itemsize} % 16 != 0)",
        "    plan = plans.get((machine.current, here, rows, columns, staged))",
        "    if plan is None:",
        "        if len(plans) >= 512: plans.clear()",
        "        plan = plans[machine.current, here, rows, columns, staged] = prepare(rows, columns, staged)",
    ]
    if target is not None:
        lines += ["    if out is not None:", "        start = out.data.ptr; end = start + out.nbytes"]
        for k, n in enumerate(names):
            apart = f"p{k} >= end or start >= p{k} + {arrays[k]}.nbytes"
            same = f"({arrays[k]} is out and ({target!r}, {n!r}) not in plan.unsafe)"
            lines.append(f"        if not ({same} or {apart}): return None")
    pointers = [*(f"p{k}" for k in range(len(names))), *(f"r{k}.data.ptr" for k in range(len(results)))]
    lines += [
        f"    pointers = [{', '.join(pointers)}]",
        "    if plan.total:",
        "        scratch = empty(plan.total, uint8)",
        "        pointers.append(scratch.data.ptr)",
        "    for start in plan.starts: start(pointers)",
        f"    return {returned(direction, wanted, given_out, {n: f'r{k}' for k, n in enumerate(results)})}",
    ]
    scope: dict[str, Any] = {f"d{k}": dtypes[n] for k, n in enumerate(names)}
    scope |= {f"e{k}": made[n] for k, n in enumerate(results)}
    scope |= {"ndarray": cupy.ndarray, "empty": cupy.empty, "uint8": np.dtype(np.uint8), "plans": {}, "prepare": prepare}
    scope |= {
        "rectangle": rectangle,
        "machine": machine,
        "environ": os.environ,
        "checked": checked,
        "device": lambda: machine.current.number(),
    }
    exec("\n".join(lines), scope)
    return scope["fast"]  # type: ignore[no-any-return]
