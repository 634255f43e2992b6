"""The fast path: positional, contiguous arrays of a kind seen before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xpnn.backends import choice
from xpnn.backends.arrays import FAST, rectangle
from xpnn.backends.kinds import Column, Full, Index, Row
from xpnn.backends.program import Shape
from xpnn.backends.task import HALF

if TYPE_CHECKING:
    from xpnn.backends.arguments import Call


def _as_bits(dtype: Any) -> str:
    """How an array of half precision enters emitted code."""
    return ".view(uint16)" if dtype.name in HALF else ""


_EXTENTS: dict[Shape, str] = {("R", "C"): "(rows, columns)", ("R", 1): "rows", (1, "C"): "(1, columns)", (1, 1): "1"}


def remember(call: Call, direction: str, args: tuple[Any, ...], wanted: tuple[str, ...], given_out: tuple[str, ...]) -> None:
    """Store a short way for calls like this one, where there is one.

    It is a function of the arrays, written for their number, kinds and dimensions; it returns None where anything is not
    as it was when it was made, and the call then takes the long way, which also words the errors.
    """
    ready, fr, store = call.prepared(wanted), call.frame, call.kernel._fast
    count = len(args)
    spans = direction != "backward" and call.kernel.declaration.span is not None and count > 1
    if spans:  # what shape a row has comes second
        args = (args[0], *args[2:])
    compiled = getattr(ready.execute, "compiled", None)
    kinds = {n: kind for n, (kind, _) in call.given.items()}
    if compiled is None or len(args) != len(call.given) or type(args[0]) not in FAST or not args[0].ndim:
        return
    if call.kernel.declaration.check is not None and call.options != call.kernel.declaration.options:
        return  # replaced for these shapes alone
    key = (direction, count, type(args[0]), *choice.state(), args[0].dtype, args[0].ndim)
    if call.lib == "cupy":
        from xpnn.backends.cupy.fast import short_way

        if key not in store and not spans and (found := short_way(call, direction, args, wanted, given_out)) is not None:
            store[key] = found
        return
    e = compiled.emitted
    dtypes = {n: np.dtype(np.int64) if kind is Index else compiled.dtypes[n] for n, kind in kinds.items() if n in e.inputs}
    known = all(
        type(a) is np.ndarray and kinds[n] in (Full, Row, Column, Index) and a.dtype == dtypes.get(n)
        for n, a in zip(kinds, args, strict=True)
    )
    results = {n: ready.shapes[n] for n in e.outputs}
    plain = set(results.values()) <= _EXTENTS.keys() and (fr.reach != "row" or fr.axis == len(fr.shape) - 1)
    ambiguous = Index in kinds.values() and len(fr.shape) > 2
    if Full not in kinds.values():
        return
    columned = [n for n, kind in kinds.items() if kind is Column]
    if not known or not plain or ambiguous or tuple(e.inputs) != tuple(kinds) or set(wanted) != set(results):
        return
    if call.kernel.declaration.check is not None:
        if len(call.kernel._checked) > 1000:
            call.kernel._checked.clear()
        call.kernel._checked.add((direction, *(a.shape for a in args)))
    if key in store:  # it exists, but this call was not one for it
        return

    # arrays, results and numbers go by names of our own, which no user's can meet
    arrays = {n: f"a{k}" for k, n in enumerate(kinds)}
    made = {n: f"r{k}" for k, n in enumerate(results)}
    first = next(arrays[n] for n, kind in kinds.items() if kind is Full)
    as_it_is = len(fr.shape) == 2 and fr.axis is not None  # the loop then looks itself whether the arrays fit
    given = dict(zip(arrays.values(), args, strict=True))
    if as_it_is and any(given[a].ndim != (2 if kinds[n] is Full else 1) for n, a in arrays.items()):
        return  # one is broadcast
    named = [*arrays.values()]
    if spans:
        named.insert(1, "span")
    lines = [f"def fast({', '.join(named)}, out=None):"]
    for a, array in given.items():
        if a != "a0":  # the key of this way holds what the first argument is
            lines.append(
                f"    if type({a}) is not ndarray or {a}.dtype is not {a}_dtype or {a}.ndim != {array.ndim}: return None"
            )
    if call.kernel.declaration.check is not None:  # shapes that were never checked go the long way
        shapes = ", ".join(f"{a}.shape" for a in arrays.values())
        lines.append(f"    if ({direction!r}, {shapes}) not in checked: return None")
    if as_it_is:
        lines.append(f"    rows, columns = {first}.shape")
    else:
        lines += [
            f"    shape, size = {first}.shape, {first}.size",
            f"    if not size or not {first}.flags.c_contiguous: return None",
        ]
        if fr.reach != "row":
            lines.append(f"    rows, columns = {'1, size' if fr.reach == 'element' else 'rectangle(size)'}")
        else:
            lines += ["    columns = shape[-1]", "    rows = size // columns"]
    if spans:
        same = "type(span) is int and span == columns or type(span) is tuple and span == (columns,)"
        lines.append(f"    if span is not None and not ({same}): return None")
    lines += [f"    if {arrays[n]}.shape != (columns,) or not {arrays[n]}.flags.c_contiguous: return None" for n in columned]
    passed = []
    for n, a in arrays.items():
        if n in columned:
            view = f"{a}.reshape(1, columns)"
        elif as_it_is:
            view = a
        else:
            if a != first:
                fits = "shape" if kinds[n] is Full else "shape[:-1]"
                lines.append(f"    if {a}.shape != {fits} or not {a}.flags.c_contiguous: return None")
            view = f"{a}.reshape(rows, columns)" if kinds[n] is Full else f"{a}.reshape(rows)"
        passed.append(view + _as_bits(dtypes[n]))
    target = given_out[0] if len(given_out) == 1 else None
    for n, r in made.items():
        kind = results[n]
        new = f"empty({_EXTENTS[kind]}, {r}_dtype)"
        if n != target:
            lines.append(f"    {r} = {new}")
        else:
            dimensions = {("R", "C"): len(fr.shape), ("R", 1): len(fr.shape) - 1, (1, "C"): 1, (1, 1): 0}[kind]
            lines += [
                f"    if out is None: {r} = {new}",
                "    else:",
                f"        if type(out) is not ndarray or out.dtype is not {r}_dtype or out.ndim != {dimensions}: return None",
                "        if not out.flags.writeable: return None",
            ]
            if as_it_is and kind[0] != 1:
                lines.append(f"        {r} = out")
            else:
                shape = {("R", "C"): "shape", ("R", 1): "shape[:-1]", (1, "C"): "(columns,)", (1, 1): "()"}[kind]
                lines += [
                    f"        if out.shape != {shape} or not out.flags.c_contiguous: return None",
                    f"        {r} = out.reshape({_EXTENTS[kind]})",
                ]
        passed.append(r + _as_bits(compiled.dtypes[n]))
    if target is None:
        lines.insert(1, "    if out is not None: return None")
    numbers = compiled.program.numbers(call.options)
    values = {f"v{k}": numbers[n] for k, n in enumerate(e.numbers)}
    joined = ", ".join([*passed, *values])
    lines += [
        # Numba does not look at types here, a tenth of the time of a small call: they have all been looked at above
        f"    outside = (entries[columns > most_short] or entry(columns))(0, 0, {joined})",
        f"    if outside == -2: outside = run(rows * columns, columns, {joined})",
        "    if outside != -1: return None",
    ]
    back: dict[Any, str] = {("R", "C"): ".reshape(shape)", ("R", 1): ".reshape(shape[:-1])[()]"} if not as_it_is else {}
    returned = {n: made[n] + (back | {(1, "C"): "[0]", (1, 1): "[0]"}).get(results[n], "") for n in wanted}
    if target is not None:
        lines.append(f"    if out is not None: return {', '.join((returned | {target: 'out'}).values())}")
    lines.append(f"    return {', '.join(returned.values())}")
    scope = {f"{a}_dtype": array.dtype for a, array in given.items()} | values
    scope |= {f"{r}_dtype": compiled.dtypes[n] for n, r in made.items()}
    scope |= {"ndarray": np.ndarray, "empty": np.empty, "uint16": np.uint16}
    scope |= {"rectangle": rectangle, "run": compiled.direct}
    scope |= {"entries": compiled.entries, "entry": compiled.entry, "most_short": compiled.most_short}
    scope["checked"] = call.kernel._checked
    exec("\n".join(lines), scope)
    store[key] = scope["fast"]
