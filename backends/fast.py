"""The fast path: positional, contiguous arrays of a kind seen before, and options whose names have been seen together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from xpnn.backends import choice
from xpnn.backends.arrays import FAST, rectangle
from xpnn.backends.declare import is_dynamic
from xpnn.backends.kinds import Column, Full, Index, Row
from xpnn.backends.program import Shape
from xpnn.backends.task import HALF

if TYPE_CHECKING:
    from xpnn.backends.arguments import Call


def _as_bits(dtype: Any) -> str:
    """How an array of half precision enters emitted code."""
    return ".view(uint16)" if dtype.name in HALF else ""


_EXTENTS: dict[Shape, str] = {("R", "C"): "(rows, columns)", ("R", 1): "rows", (1, "C"): "(1, columns)", (1, 1): "1"}


def returned(direction: str, wanted: tuple[str, ...], gradients: tuple[str, ...], texts: Mapping[str, str]) -> str:
    """What a call returns, as an expression: results, or for the fused pass its values and its gradients."""
    if direction != "value_and_grad":
        return ", ".join(texts[n] for n in wanted)
    groups = tuple(n for n in wanted if n not in gradients), gradients
    parts = [", ".join(texts[n] for n in group) for group in groups]
    return ", ".join(f"({part})" if len(group) > 1 else part for part, group in zip(parts, groups, strict=True))


def _run_time_numbers(call: Call, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those among the options that a call was given; None where they or others are not used as they are."""
    d = call.kernel.declaration
    if not given.keys() <= d.options.keys():
        return None  # an array by its name, an axis
    used = call.options
    if any(type(used[n]) is not type(v) or used[n] != v for n, v in (d.options | dict(given)).items()):
        return None  # converted, or replaced by the kernel's `check`
    return {n: v for n, v in given.items() if is_dynamic(d, n, v)}


def remember(
    call: Call,
    direction: str,
    args: tuple[Any, ...],
    wanted: tuple[str, ...],
    given_out: tuple[str, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Store a short way for calls like this one, where there is one.

    It is a function of the arrays, written for their number, kinds and dimensions, and of options of the same names; it returns
    None where anything is not as it was when it was made, and the call then takes the long way, which also words the errors.
    """
    ready, fr, store = call.prepared(wanted), call.frame, call.kernel._fast
    count = len(args)
    spans = direction != "backward" and call.kernel.declaration.span is not None and count > 1
    if spans:  # what shape a row has comes second
        args = (args[0], *args[2:])
    options = {n: v for n, v in kwargs.items() if n != "out"}
    compiled = getattr(ready.execute, "compiled", None)
    kinds = {n: kind for n, (kind, _) in call.given.items()}
    if compiled is None or len(args) != len(call.given) or type(args[0]) not in FAST or not args[0].ndim:
        return
    check, numbers = call.kernel.declaration.check, _run_time_numbers(call, options)
    if numbers is None:
        return
    named = tuple(kwargs) if options else ()
    key = (direction, count, type(args[0]), *choice.state(), args[0].dtype, args[0].ndim, named)
    if call.lib == "cupy":
        from xpnn.backends.cupy.fast import short_way

        usual = not options and not spans and key not in store
        if usual and (found := short_way(call, direction, args, wanted, given_out)) is not None:
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
    seen = (direction, *options.items())
    if check is not None and not numbers:
        if len(call.kernel._checked) > 1000:
            call.kernel._checked.clear()
        call.kernel._checked.add((*seen, *(a.shape for a in args)))
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
    parameters = [*arrays.values()]
    if spans:
        parameters.insert(1, "span")
    lines = [f"def fast({', '.join(parameters)}, /, out=None{', **given' if options else ''}):"]
    spelt = {n: f"o{k}" for k, n in enumerate(options)}
    if options:
        lines.append(f"    {', '.join(spelt.values())}, = given.values()")
    for n, o in spelt.items():
        same = f"{o} != {o}_known" if n not in numbers else f"{o} == {o}_off" if n in call.kernel.declaration.off else ""
        bits = f"not -(1 << 63) <= {o} < 1 << 63" if type(numbers.get(n)) is int else ""
        tests = " or ".join(filter(None, (f"type({o}) is not {o}_type", same, bits)))
        lines.append(f"    if {tests}: return None")
    for a, array in given.items():
        if a != "a0":  # the key of this way holds what the first argument is
            lines.append(
                f"    if type({a}) is not ndarray or {a}.dtype is not {a}_dtype or {a}.ndim != {array.ndim}: return None"
            )
    if check is not None and not numbers:  # shapes that were never checked go the long way
        shapes = ", ".join(f"{a}.shape" for a in arrays.values())
        lines.append(f"    if ({'*seen' if options else repr(direction)}, {shapes}) not in checked: return None")
    elif numbers:
        lines.append("    options = known | given")
    if check is not None and numbers:
        shapes = ", ".join(f"{n!r}: {a}.shape" for n, a in arrays.items())
        lines += [f"    check(kinds, {{{shapes}}}, options)", "    if options != known | given: return None"]
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
    targets = {n: f"w{k}" for k, n in enumerate(given_out)}
    if len(targets) == 1:
        lines.append("    w0 = out")
    else:
        lines += [
            f"    if out is None: {' = '.join(targets.values())} = None",
            f"    elif type(out) is not tuple or len(out) != {len(targets)}: return None",
            f"    else: {', '.join(targets.values())} = out",
        ]
    for n, r in made.items():
        kind = results[n]
        new = f"empty({_EXTENTS[kind]}, {r}_dtype)"
        if n not in targets:
            lines.append(f"    {r} = {new}")
        else:
            w = targets[n]
            dimensions = {("R", "C"): len(fr.shape), ("R", 1): len(fr.shape) - 1, (1, "C"): 1, (1, 1): 0}[kind]
            lines += [
                f"    if {w} is None: {r} = {new}",
                "    else:",
                f"        if type({w}) is not ndarray or {w}.dtype is not {r}_dtype or {w}.ndim != {dimensions}: return None",
                f"        if not {w}.flags.writeable: return None",
            ]
            if as_it_is and kind[0] != 1:
                lines.append(f"        {r} = {w}")
            else:
                shape = {("R", "C"): "shape", ("R", 1): "shape[:-1]", (1, "C"): "(columns,)", (1, 1): "()"}[kind]
                lines += [
                    f"        if {w}.shape != {shape} or not {w}.flags.c_contiguous: return None",
                    f"        {r} = {w}.reshape({_EXTENTS[kind]})",
                ]
        passed.append(r + _as_bits(compiled.dtypes[n]))
    program = compiled.program
    fixed = {f"v{k}": v for k, v in enumerate(map(program.numbers(call.options).__getitem__, e.numbers))}
    values = [spelt[n] if n in numbers else f"v{k}" for k, n in enumerate(e.numbers)]
    if numbers and program.derived:
        values = [f"numbers[{n!r}]" if n in program.derived else v for n, v in zip(e.numbers, values, strict=True)]
        lines.append("    numbers = derive(options)")
    joined = ", ".join([*passed, *values])
    lines += [
        # Numba does not look at types here, a tenth of the time of a small call: they have all been looked at above
        f"    outside = (entries[columns > most_short] or entry(columns))(0, 0, {joined})",
        f"    if outside == -2: outside = run(rows * columns, columns, {joined})",
        "    if outside != -1: return None",
    ]
    back: dict[Any, str] = {("R", "C"): ".reshape(shape)", ("R", 1): ".reshape(shape[:-1])[()]"} if not as_it_is else {}
    texts = {n: made[n] + (back | {(1, "C"): "[0]", (1, 1): "[0]"}).get(results[n], "") for n in wanted}
    texts |= {n: f"({texts[n]} if {w} is None else {w})" for n, w in targets.items()}
    lines.append(f"    return {returned(direction, wanted, given_out, texts)}")
    scope = {f"{a}_dtype": array.dtype for a, array in given.items()} | fixed
    scope |= {f"{o}_type": type(options[n]) for n, o in spelt.items()} | {f"{o}_known": options[n] for n, o in spelt.items()}
    scope |= {f"{o}_off": call.kernel.declaration.off.get(n) for n, o in spelt.items()}
    scope |= {"seen": seen, "known": dict(call.options), "check": check, "kinds": kinds, "derive": program.numbers}
    scope |= {f"{r}_dtype": compiled.dtypes[n] for n, r in made.items()}
    scope |= {"ndarray": np.ndarray, "empty": np.empty, "uint16": np.uint16}
    scope |= {"rectangle": rectangle, "run": compiled.direct}
    scope |= {"entries": compiled.entries, "entry": compiled.entry, "most_short": compiled.most_short}
    scope["checked"] = call.kernel._checked
    exec("\n".join(lines), scope)
    store[key] = scope["fast"]
