"""The maximum of a row, many vectors at a time, which a loop of single maxima would wait for one after the other."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from xpnn.backends.numba import half
from xpnn.backends.numba.lanes import Lanes, largest, suffix, width

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _crest(name: str) -> Any:
    def typed(typingctx: Any, values: Any, count: Any) -> Any:
        element = types.float32 if name else values.dtype
        lanes = Lanes(element, width(element))

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            build = _largest_bits if name else _largest_floats
            return build(builder, data, args[1], lanes.count, name)

        return lanes(values, types.intp), lower

    typed.__doc__ = "The maxima of every `W`-th of the first `count` columns, a multiple of 4 W; NaN where one is."
    return intrinsic(typed)


def _along(
    builder: Any, data: ir.Value, count: ir.Value, kind: ir.VectorType, vectors: int, begin: list[ir.Value], step: Any
) -> Any:
    """What becomes of the values `begin` when `step` has met each few vectors of a row: the body of a loop."""
    slots = [cgutils.alloca_once_value(builder, value) for value in begin]
    align = (kind.element.width if isinstance(kind.element, ir.IntType) else 32) // 8
    with cgutils.for_range_slice(builder, _I64(0), count, _I64(vectors * kind.count), _I64) as (j, _):
        first = builder.bitcast(builder.gep(data, [j]), kind.as_pointer())
        found = [builder.load(builder.gep(first, [_I64(k)]), align=align) for k in range(vectors)]
        for slot, value in zip(slots, step([builder.load(slot) for slot in slots], found), strict=True):
            builder.store(value, slot)
    return [builder.load(slot) for slot in slots]


def _largest_floats(builder: Any, data: ir.Value, count: ir.Value, lanes: int, name: str) -> ir.Value:
    """Maxima without regard to NaN, of which two vectors at a time are asked for: fewer operations than one that keeps it."""
    kind = ir.VectorType(data.type.pointee, lanes)
    nowhere = ir.Constant(ir.VectorType(ir.IntType(1), lanes), [0] * lanes)
    lowest = ir.Constant(kind, [float("-inf")] * lanes)

    def greater(a: ir.Value, b: ir.Value) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    def step(before: list[ir.Value], found: list[ir.Value]) -> list[ir.Value]:
        nan = before[0]
        for k in (0, 2):
            nan = builder.or_(nan, builder.fcmp_unordered("uno", found[k], found[k + 1]))
        return [nan, *map(greater, found, before[1:])]

    nan, *tops = _along(builder, data, count, kind, 4, [nowhere, *[lowest] * 4], step)
    top = greater(greater(tops[0], tops[1]), greater(tops[2], tops[3]))
    return builder.select(nan, ir.Constant(kind, [float("nan")] * lanes), top)


def _largest_bits(builder: Any, data: ir.Value, count: ir.Value, lanes: int, name: str) -> ir.Value:
    """Maxima found among the bits, thirty-two at a time: as whole numbers, positive values are ordered as they should be.

    Of negative ones the lowest unsigned number is the largest value; a NaN with a sign is the highest of all.
    """
    kind = ir.VectorType(ir.IntType(16), 2 * lanes)
    infinity = 0xFC00 if name == "float16" else 0xFF80  # the bits of -inf
    ranks = {"smax": -(1 << 15), "umin": infinity, "umax": 0}

    def ranked(rank: str, a: ir.Value, b: ir.Value) -> ir.Value:
        function = ir.FunctionType(kind, [kind, kind])
        return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.{rank}.{suffix(kind)}"), [a, b])

    def constant(number: int) -> ir.Constant:
        return ir.Constant(kind, [number] * kind.count)

    def step(before: list[ir.Value], found: list[ir.Value]) -> list[ir.Value]:
        return [ranked(rank, value, ranked(rank, *found)) for rank, value in zip(ranks, before, strict=True)]

    signed, lowest, highest = _along(builder, data, count, kind, 2, [constant(n) for n in ranks.values()], step)
    top = builder.select(builder.icmp_signed(">=", signed, constant(0)), signed, lowest)
    top = builder.select(builder.icmp_unsigned(">", highest, constant(infinity)), highest, top)
    empty = ir.Constant(kind, ir.Undefined)
    parts = []
    for start in (0, lanes):
        part = ir.Constant(ir.VectorType(_I32, lanes), list(range(start, start + lanes)))
        parts.append(half.widen(builder, name, builder.shuffle_vector(top, empty, part)))
    return largest(builder, *parts)


crest, crest_float16, crest_bfloat16 = map(_crest, ("", "float16", "bfloat16"))
