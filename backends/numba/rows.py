"""How emitted Numba loops read and write the rows of matrices, whatever the row stride.

Rows of half precision are rows of 16-bit integers here; their functions carry the name of the type, such as
`load_bfloat16`, and give and take float32.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from xpnn.backends.numba import half
from xpnn.backends.numba.elementary import splat
from xpnn.backends.numba.lanes import Lanes, mask, suffix, width

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def row(typingctx: Any, array: Any, i: Any) -> Any:
    """Row `i` of a matrix whose columns are known to be adjacent, whatever its row stride."""
    result = types.Array(array.dtype, 1, "C", readonly=not array.mutable)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source = context.make_array(sig.args[0])(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, source.strides)
        shape = cgutils.unpack_tuple(builder, source.shape)
        target = context.make_array(result)(context, builder)
        context.populate_array(
            target,
            data=cgutils.pointer_add(builder, source.data, builder.mul(args[1], strides[0]), source.data.type),
            shape=[shape[1]],
            strides=[source.itemsize],
            itemsize=source.itemsize,
            meminfo=None,
            parent=None,
        )
        return target._getvalue()

    return result(array, types.intp), lower


@intrinsic
def column(typingctx: Any, vector: Any) -> Any:
    """A vector as a matrix of one column."""
    result = types.Array(vector.dtype, 2, "A", readonly=not vector.mutable)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source = context.make_array(sig.args[0])(context, builder, args[0])
        target = context.make_array(result)(context, builder)
        context.populate_array(
            target,
            data=source.data,
            shape=[*cgutils.unpack_tuple(builder, source.shape), _I64(1)],
            strides=[*cgutils.unpack_tuple(builder, source.strides), source.itemsize],
            itemsize=source.itemsize,
            meminfo=None,
            parent=None,
        )
        return target._getvalue()

    return result(vector), lower


class _Extent:
    """Where a matrix lies."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: ir.Value) -> None:
        array = context.make_array(kind)(context, builder, value)
        self.rows, self.columns = cgutils.unpack_tuple(builder, array.shape)
        self.down, self.across = cgutils.unpack_tuple(builder, array.strides)
        self.start, self.size = builder.ptrtoint(array.data, _I64), array.itemsize
        last = builder.mul(builder.sub(self.rows, _I64(1)), self.down)
        upwards = builder.icmp_signed("<", last, _I64(0))
        self.width = builder.mul(self.columns, self.size)
        self.low = builder.add(self.start, builder.select(upwards, last, _I64(0)))
        self.high = builder.add(builder.add(self.start, builder.select(upwards, _I64(0), last)), self.width)


@intrinsic
def fits(typingctx: Any, written: Any, read: Any, shapes: Any, same: Any) -> Any:
    """Whether loops may run over matrices, some of which they write.

    They have the given numbers of rows and columns, none of them 0, and lie where their elements may. Columns are adjacent,
    rows that are written apart. What is written lies nowhere in what else is written, and in what is read only where it is the
    same matrix and the pair's bit is set in `same`.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        extents = [
            [_Extent(context, builder, kind, builder.extract_value(value, k)) for k, kind in enumerate(group.types)]
            for group, value in zip(sig.args, args[:2], strict=False)
        ]
        numbers = iter(cgutils.unpack_tuple(builder, args[2]))
        tests = []
        for e in (*extents[0], *extents[1]):
            for have, want in ((e.rows, next(numbers)), (e.columns, next(numbers))):
                tests += [builder.icmp_signed("==", have, want), builder.icmp_signed("!=", have, _I64(0))]
            places = builder.or_(e.start, e.down)  # both are multiples of an element's size
            tests.append(builder.icmp_signed("==", builder.and_(places, builder.sub(e.size, _I64(1))), _I64(0)))
            one = builder.icmp_signed("==", e.columns, _I64(1))
            tests.append(builder.or_(builder.icmp_signed("==", e.across, e.size), one))
        tests += [builder.icmp_signed(">=", e.down, e.width) for e in extents[0]]

        def apart_from(a: _Extent, b: _Extent) -> Any:
            return builder.or_(builder.icmp_unsigned("<=", a.high, b.low), builder.icmp_unsigned("<=", b.high, a.low))

        tests += [apart_from(a, b) for a, b in itertools.combinations(extents[0], 2)]
        for k, (out, x) in enumerate(itertools.product(*extents)):
            apart = apart_from(out, x)
            over = builder.and_(builder.icmp_signed("==", out.start, x.start), builder.icmp_signed("==", out.down, x.down))
            allowed = builder.trunc(builder.lshr(args[3], _I64(k)), ir.IntType(1))
            tests.append(builder.or_(apart, builder.and_(over, allowed)))
        return functools.reduce(builder.and_, tests)

    return types.boolean(written, read, shapes, types.intp), lower


def masked(builder: Any, name: str, result: ir.Type, args: list[ir.Value], vector: ir.VectorType) -> ir.Value:
    """A load or a store of some lanes."""
    function = ir.FunctionType(result, [a.type for a in args])
    full_name = f"llvm.masked.{name}.{suffix(vector)}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, full_name), args)


def place(context: Any, builder: Any, sig: Any, args: Any, count: int) -> tuple[ir.Value, ir.VectorType, int]:
    """The address of lanes in a row, their type in memory, and its alignment."""
    array, j = args[0], args[1]
    element = context.get_data_type(sig.args[0].dtype)
    data = context.make_array(sig.args[0])(context, builder, array).data
    vector = ir.VectorType(element, count)
    return builder.bitcast(builder.gep(data, [j]), vector.as_pointer()), vector, int(sig.args[0].dtype.bitwidth) // 8


def _loader(name: str) -> Any:
    def typed(typingctx: Any, values: Any, j: Any, n: Any) -> Any:
        element = types.float32 if name else values.dtype
        lanes = Lanes(element, width(element))

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
            address, vector, align = place(context, builder, sig, args, lanes.count)
            full = builder.icmp_signed(">=", args[2], _I64(lanes.count))
            with builder.if_else(full, likely=True) as (whole, part):
                with whole:
                    plain = builder.load(address, align=align)
                    whole_block = builder.block
                with part:
                    ones = ir.Constant(vector, [half.ONE[name] if name else 1.0] * lanes.count)
                    first = mask(builder, args[2], lanes.count)
                    tail = masked(builder, "load", vector, [address, _I32(align), first, ones], vector)
                    part_block = builder.block
            result = builder.phi(vector)
            result.add_incoming(plain, whole_block)
            result.add_incoming(tail, part_block)
            return half.widen(builder, name, result) if name else result

        return lanes(values, types.intp, types.intp), lower

    typed.__doc__ = "Columns j, j+1, ... of a row; beyond the first `n` nothing is read and the lanes hold 1."
    return intrinsic(typed)


def _storer(name: str) -> Any:
    def typed(typingctx: Any, values: Any, j: Any, n: Any, value: Any) -> Any:
        count = width(types.float32 if name else values.dtype)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address, vector, align = place(context, builder, sig, args, count)
            content = args[3] if isinstance(value, Lanes) else splat(builder, args[3], count)
            if name:
                content = half.narrow(builder, name, content)
            full = builder.icmp_signed(">=", args[2], _I64(count))
            with builder.if_else(full, likely=True) as (whole, part):
                with whole:
                    builder.store(content, address, align=align)
                with part:
                    first = mask(builder, args[2], count)
                    masked(builder, "store", ir.VoidType(), [content, address, _I32(align), first], vector)
            return context.get_dummy_value()

        return types.void(values, types.intp, types.intp, value), lower

    typed.__doc__ = "Write the first `n` lanes to columns j, j+1, ... of a row."
    return intrinsic(typed)


def _picker(name: str) -> Any:
    def typed(typingctx: Any, values: Any, j: Any) -> Any:
        element = types.float32 if name else values.dtype

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            array = context.make_array(sig.args[0])(context, builder, args[0])
            (length,) = cgutils.unpack_tuple(builder, array.shape)
            inside = builder.icmp_unsigned("<", args[1], length)
            with builder.if_else(inside, likely=True) as (yes, no):
                with yes:
                    value = builder.load(builder.gep(array.data, [args[1]]))
                    if name:
                        value = half.widen(builder, name, value)
                    yes_block = builder.block
                with no:
                    no_block = builder.block
            result = builder.phi(value.type)
            result.add_incoming(value, yes_block)
            result.add_incoming(ir.Constant(value.type, float("nan")), no_block)
            return result

        return element(values, types.intp), lower

    typed.__doc__ = "Element `j` of a row, or NaN outside it."
    return intrinsic(typed)


def _putter(name: str) -> Any:
    def typed(typingctx: Any, values: Any, j: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            builder.store(half.narrow(builder, name, args[2]), builder.gep(data, [args[1]]), align=2)
            return context.get_dummy_value()

        return types.void(values, types.intp, types.float32), lower

    typed.__doc__ = "Write element `j` of a row, and nothing beside it, which may be another thread's."
    return intrinsic(typed)


load, load_float16, load_bfloat16 = map(_loader, ("", "float16", "bfloat16"))
store, store_float16, store_bfloat16 = map(_storer, ("", "float16", "bfloat16"))
at, at_float16, at_bfloat16 = map(_picker, ("", "float16", "bfloat16"))
put_float16, put_bfloat16 = map(_putter, ("float16", "bfloat16"))
