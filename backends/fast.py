"""The fast path: positional, contiguous arrays of a kind seen before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xpnn.backends import choice
from xpnn.backends.arrays import FAST, rectangle
from xpnn.backends.kinds import Full, Index, Row
from xpnn.backends.program import Shape
from xpnn.backends.task import HALF

if TYPE_CHECKING:
    from xpnn.backends.call import Call


def _as_bits(dtype: Any) -> str:
    """How an array of half precision enters emitted code."""
    return ".view(uint16)" if dtype.name in HALF else ""


_EXTENTS: dict[Shape, str] = {("R", "C"): "(rows, columns)", ("R", 1): "(rows, 1)", (1, 1): "(1, 1)"}


def remember(call: Call, direction: str, args: tuple[Any, ...], wanted: tuple[str, ...], given_out: tuple[str, ...]) -> None:
    """Store a short way for calls like this one, where there is one.

    It is a function of the arrays, written for their number, kinds and dimensions; it returns None where anything is not
    as it was when it was made, and the call then takes the long way, which also words the errors.
    """
    ready, fr, store = call.prepared(wanted), call.frame, call.kernel._fast
    compiled = getattr(ready.execute, "compiled", None)
    kinds = {n: kind for n, (kind, _) in call.given.items()}
    if compiled is None or len(args) != len(call.given) or type(args[0]) not in FAST or not args[0].ndim:
        return
    key = (direction, len(args), type(args[0]), *choice.state(), args[0].dtype, args[0].ndim)
    if call.lib == "cupy":
        from xpnn.backends.cupy.fast import short_way

        if key not in store and (found := short_way(call, args, wanted, given_out)) is not None:
            store[key] = found
        return
    e = compiled.emitted
    dtypes = {n: np.dtype(np.int64) if kind is Index else compiled.dtypes[n] for n, kind in kinds.items() if n in e.inputs}
    known = all(
        type(a) is np.ndarray and kinds[n] in (Full, Row, Index) and a.dtype == dtypes.get(n)
        for n, a in zip(kinds, args, strict=True)
    )
    results = {n: ready.shapes[n] for n in e.outputs}
    plain = set(results.values()) <= _EXTENTS.keys() and (fr.reach != "row" or fr.axis == len(fr.shape) - 1)
    ambiguous = Index in kinds.values() and len(fr.shape) > 2
    if Full not in kinds.values():
        return
    if not known or not plain or ambiguous or tuple(e.inputs) != tuple(kinds) or set(wanted) != set(results):
        return
    if call.kernel.declaration.check is not None:
        if len(call.kernel._checked) > 1000:
            call.kernel._checked.clear()
        call.kernel._checked.add(tuple(a.shape for a in args))
    if key in store:  # it exists, but this call was not one for it
        return

    # arrays, results and numbers go by names of our own, which no user's can meet
    arrays = {n: f"a{k}" for k, n in enumerate(kinds)}
    made = {n: f"r{k}" for k, n in enumerate(results)}
    first = next(arrays[n] for n, kind in kinds.items() if kind is Full)
    as_it_is = len(fr.shape) == 2 and fr.axis is not None
    # what an argument is comes first: only then has it a shape; all but the first may be anything
    given = dict(zip(arrays.values(), args, strict=True))
    lines = [f"def fast({', '.join(arrays.values())}, out=None):"]
    for a, array in given.items():
        kind = "" if array is args[0] else f"type({a}) is not ndarray or "
        dimensions = f" or {a}.ndim != {array.ndim}" if a == first else ""
        lines.append(f"    if {kind}{a}.dtype is not {a}_dtype{dimensions}: return None")
    lines += [
        f"    shape, size = {first}.shape, {first}.size",
        f"    if not size or not {first}.flags.c_contiguous: return None",
    ]
    if call.kernel.declaration.check is not None:  # shapes that were never checked go the long way
        shapes_now = " ".join("shape," if a == first else f"{a}.shape," for a in arrays.values())
        lines.append(f"    if ({shapes_now}) not in checked: return None")
    if fr.reach != "row":
        lines.append(f"    rows, columns = {'1, size' if fr.reach == 'element' else 'rectangle(size)'}")
    elif len(fr.shape) == 2:
        lines.append("    rows, columns = shape")
    else:
        lines += ["    columns = shape[-1]", "    rows = size // columns"]
    passed = []
    for n, a in arrays.items():
        if a != first:
            fits = "shape" if kinds[n] is Full else "shape[:-1]"
            lines.append(f"    if {a}.shape != {fits} or not {a}.flags.c_contiguous: return None")
        view = f"{a}.reshape(rows, {'columns' if kinds[n] is Full else '1'})"
        passed.append((a if kinds[n] is Full and as_it_is else view) + _as_bits(dtypes[n]))
    shapes = {("R", "C"): "shape", ("R", 1): "shape[:-1]", (1, 1): "()"}
    target = given_out[0] if len(given_out) == 1 else None
    for n, r in made.items():
        extents = _EXTENTS[results[n]]
        if n != target:
            lines.append(f"    {r} = empty({extents}, {r}_dtype)")
        else:
            full_name = next(k for k, a in arrays.items() if a == first)
            alias = f"{first} is out" if (n, full_name) not in e.unsafe else "False"
            # two arrays that own their memory share none
            own = "not (out.flags.owndata and {a}.flags.owndata) and may_share_memory(out, {a})"
            shared = " or ".join(f"out is {a} or {own.format(a=a)}" for a in arrays.values())
            lines += [
                f"    if out is None: {r} = empty({extents}, {r}_dtype)",
                "    else:",
                f"        if type(out) is not ndarray or out.dtype is not {r}_dtype: return None",
                f"        if out.shape != {shapes[results[n]]} or not out.flags.c_contiguous: return None",
                f"        if not out.flags.writeable or ({shared}) and not ({alias}): return None",
                f"        {r} = {'out' if as_it_is and results[n] == ('R', 'C') else f'out.reshape({extents})'}",
            ]
        passed.append(r + _as_bits(compiled.dtypes[n]))
    if target is None:
        lines.insert(1, "    if out is not None: return None")
    values = {f"v{k}": call.options[n] for k, n in enumerate(e.numbers)}
    passed += values
    lines.append(f"    if size < limit: outside = (forms[columns > most_short] or form(columns))(0, 1, {', '.join(passed)})")
    lines.append(f"    else: outside = run(size, columns, {', '.join(passed)})")
    lines.append("    if outside >= 0: return None")
    back = {("R", "C"): "" if as_it_is else ".reshape(shape)", ("R", 1): ".reshape(shape[:-1])[()]", (1, 1): "[0, 0]"}
    returned = {n: made[n] + back[results[n]] for n in wanted}
    if target is not None:
        lines.append(f"    if out is not None: return {', '.join((returned | {target: 'out'}).values())}")
    lines.append(f"    return {', '.join(returned.values())}")
    scope = {f"{a}_dtype": array.dtype for a, array in given.items()} | values
    scope |= {f"{r}_dtype": compiled.dtypes[n] for n, r in made.items()}
    scope |= {"ndarray": np.ndarray, "empty": np.empty, "may_share_memory": np.may_share_memory, "uint16": np.uint16}
    scope |= {"forms": compiled.forms, "form": compiled.form, "most_short": compiled.most_short}
    scope |= {"run": compiled.direct, "limit": compiled.serial_below}
    scope |= {"rectangle": rectangle}
    scope["checked"] = call.kernel._checked
    exec("\n".join(lines), scope)
    store[key] = scope["fast"]
