"""The fast path: positional, contiguous NumPy arrays of a kind seen before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xpnn.backends import choice
from xpnn.backends.kinds import Full, Index, Row
from xpnn.backends.program import Shape

if TYPE_CHECKING:
    from xpnn.backends.call import Call


_EXTENTS: dict[Shape, str] = {("R", "C"): "(rows, columns)", ("R", 1): "(rows, 1)", (1, 1): "(1, 1)"}


def remember(call: Call, direction: str, args: tuple[Any, ...], wanted: tuple[str, ...], given_out: tuple[str, ...]) -> None:
    """Store a short way for calls like this one, where there is one.

    It is a function of the arrays, written for their number, kinds and dimensions; it returns None where anything is not
    as it was when it was made, and the call then takes the long way, which also words the errors.
    """
    ready, fr, store = call.prepared(wanted), call.frame, call.kernel._fast
    compiled = getattr(ready.execute, "compiled", None)
    kinds = {n: kind for n, (kind, _) in call.given.items()}
    if compiled is None or len(args) != len(call.given) or type(args[0]) is not np.ndarray or not args[0].ndim:
        return
    key = (direction, *choice.state(), args[0].dtype, args[0].ndim, len(args))
    e = compiled.emitted
    known = all(
        type(a) is np.ndarray and kinds[n] in (Full, Row, Index) and a.dtype == (np.int64 if kinds[n] is Index else call.dtype)
        for n, a in zip(kinds, args, strict=True)
    )
    results = {n: ready.shapes[n] for n in e.outputs}
    plain = set(results.values()) <= _EXTENTS.keys() and fr.axis in (None, len(fr.shape) - 1)
    ambiguous = Index in kinds.values() and len(fr.shape) > 2
    if Full not in kinds.values():
        return
    if not known or not plain or ambiguous or tuple(e.inputs) != tuple(kinds) or set(wanted) != set(results):
        return
    if key in store:  # it exists, but this call was not one for it
        return

    first = next(n for n, kind in kinds.items() if kind is Full)
    as_it_is = len(fr.shape) == 2 and fr.axis is not None
    lines = [f"def fast({', '.join(kinds)}, out=None):", f"    shape, size = {first}.shape, {first}.size"]
    lines.append(f"    if type({first}) is not ndarray or not size or not {first}.flags.c_contiguous: return None")
    if fr.axis is None:
        lines.append("    rows, columns = 1, size")
    else:
        lines += ["    columns = shape[-1]", "    rows = size // columns"]
    passed = []
    for n, (kind, a) in zip(kinds, zip(kinds.values(), args, strict=True), strict=True):
        if n == first:
            lines.append(f"    if {n}.dtype is not {n}_dtype or {n}.ndim != {a.ndim}: return None")
        else:
            fits = "shape" if kind is Full else "shape[:-1]"
            lines.append(f"    if type({n}) is not ndarray or {n}.dtype is not {n}_dtype: return None")
            lines.append(f"    if {n}.shape != {fits} or not {n}.flags.c_contiguous: return None")
        view = f"{n}.reshape(rows, {'columns' if kind is Full else '1'})"
        passed.append(n if kind is Full and as_it_is else view)
    shapes = {("R", "C"): "shape", ("R", 1): "shape[:-1]", (1, 1): "()"}
    target = given_out[0] if len(given_out) == 1 else None
    for n, shape in results.items():
        if n != target:
            lines.append(f"    {n} = empty({_EXTENTS[shape]}, dtype)")
        else:
            alias = f"{first} is out" if (n, first) not in e.unsafe else "False"
            lines += [
                f"    if out is None: {n} = empty({_EXTENTS[shape]}, dtype)",
                "    else:",
                f"        if type(out) is not ndarray or out.dtype is not dtype or out.shape != {shapes[shape]}: return None",
                "        if not out.flags.c_contiguous or not out.flags.writeable: return None",
                f"        if ({' or '.join(f'may_share_memory(out, {k})' for k in kinds)}) and not ({alias}): return None",
                f"        {n} = out.reshape({_EXTENTS[shape]})",
            ]
        passed.append(n)
    if target is None:
        lines.insert(1, "    if out is not None: return None")
    passed += [f"{n}_value" for n in e.numbers]
    lines.append(f"    if size < limit: outside = entry(0, 1, {', '.join(passed)})")
    lines.append(f"    else: outside = run(size, {', '.join(passed)})")
    lines.append("    if outside >= 0: return None")
    back = {("R", "C"): "" if as_it_is else ".reshape(shape)", ("R", 1): ".reshape(shape[:-1])[()]", (1, 1): "[0, 0]"}
    values = {n: n + back[results[n]] for n in wanted}
    if target is not None:
        lines.append(f"    if out is not None: return {', '.join((values | {target: 'out'}).values())}")
    lines.append(f"    return {', '.join(values.values())}")
    scope = {f"{n}_dtype": a.dtype for n, a in zip(kinds, args, strict=True)}
    scope |= {f"{n}_value": call.options[n] for n in e.numbers}
    scope |= {"ndarray": np.ndarray, "empty": np.empty, "may_share_memory": np.may_share_memory, "dtype": call.dtype}
    scope |= {"entry": compiled.call, "run": compiled.direct, "limit": compiled.serial_below}
    exec("\n".join(lines), scope)
    store[key] = scope["fast"]
