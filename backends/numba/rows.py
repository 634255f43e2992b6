"""How emitted Numba loops read and write the rows of matrices, whatever the row stride.

Rows of half precision are rows of 16-bit integers here; their functions carry the name of the type, such as
`load_bfloat16`, and give and take float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import impl_ret_new_ref
from numba.extending import intrinsic

from xpnn.backends.numba import half
from xpnn.backends.numba.elementary import splat
from xpnn.backends.numba.lanes import Lanes, largest, mask, suffix, width

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


def _masked(builder: Any, name: str, result: ir.Type, args: list[ir.Value], vector: ir.VectorType) -> ir.Value:
    function = ir.FunctionType(result, [a.type for a in args])
    full_name = f"llvm.masked.{name}.{suffix(vector)}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, full_name), args)


def _place(context: Any, builder: Any, sig: Any, args: Any, count: int) -> tuple[ir.Value, ir.VectorType, int]:
    """The address of lanes in a row, their type in memory, and its alignment."""
    array, j = args[0], args[1]
    element = context.get_data_type(sig.args[0].dtype)
    data = context.make_array(sig.args[0])(context, builder, array).data
    vector = ir.VectorType(element, count)
    return builder.bitcast(builder.gep(data, [j]), vector.as_pointer()), vector, int(sig.args[0].dtype.bitwidth) // 8


def _fetcher(write: bool) -> Any:
    def typed(typingctx: Any, values: Any, j: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [address, _I32(int(write)), _I32(2), _I32(1)])  # into the second cache, as data
            return context.get_dummy_value()

        return types.void(values, types.intp), lower

    typed.__doc__ = f"Ask for the memory of column `j` of a row, so that it is there when it is {'written' if write else 'read'}."
    return intrinsic(typed)


def _loader(name: str) -> Any:
    def typed(typingctx: Any, values: Any, j: Any, n: Any) -> Any:
        element = types.float32 if name else values.dtype
        lanes = Lanes(element, width(element))

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
            address, vector, align = _place(context, builder, sig, args, lanes.count)
            full = builder.icmp_signed(">=", args[2], _I64(lanes.count))
            with builder.if_else(full, likely=True) as (whole, part):
                with whole:
                    plain = builder.load(address, align=align)
                    whole_block = builder.block
                with part:
                    ones = ir.Constant(vector, [half.ONE[name] if name else 1.0] * lanes.count)
                    some = mask(builder, args[2], lanes.count)
                    tail = _masked(builder, "load", vector, [address, _I32(align), some, ones], vector)
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
            address, vector, align = _place(context, builder, sig, args, count)
            content = args[3] if isinstance(value, Lanes) else splat(builder, args[3], count)
            if name:
                content = half.narrow(builder, name, content)
            full = builder.icmp_signed(">=", args[2], _I64(count))
            with builder.if_else(full, likely=True) as (whole, part):
                with whole:
                    builder.store(content, address, align=align)
                with part:
                    some = mask(builder, args[2], count)
                    _masked(builder, "store", ir.VoidType(), [content, address, _I32(align), some], vector)
            return context.get_dummy_value()

        return types.void(values, types.intp, types.intp, value), lower

    typed.__doc__ = "Write the first `n` lanes to columns j, j+1, ... of a row."
    return intrinsic(typed)


def _streamer(name: str) -> Any:
    def typed(typingctx: Any, values: Any, j: Any, n: Any, value: Any, around: Any) -> Any:
        count = width(types.float32 if name else values.dtype)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address, vector, align = _place(context, builder, sig, args, count)
            content = args[3] if isinstance(value, Lanes) else splat(builder, args[3], count)
            if name:
                content = half.narrow(builder, name, content)
            with builder.if_else(args[4]) as (yes, no):
                with yes:
                    store = builder.store(content, address, align=align * count)
                    store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
                with no:
                    builder.store(content, address, align=align)
            return context.get_dummy_value()

        return types.void(values, types.intp, types.intp, value, types.boolean), lower

    typed.__doc__ = """Write `n` = W lanes to columns j, j+1, ... of a row; if `around`, around the caches.

    What is overwritten is then not fetched first, as it is by a store through the caches. The address must be a multiple of
    the lanes' size: see `cut`.
    """
    return intrinsic(typed)


@intrinsic
def cut(typingctx: Any, values: Any, start: Any, stop: Any, around: Any) -> Any:
    """Columns `start` to `stop` of a row in three pieces, as four columns: ends, and between them a multiple of W columns.

    If they are written `around` the caches, the middle begins where a line of memory does, and so do pieces that touch.
    """
    size = int(values.dtype.bitwidth) // 8
    lanes = width(types.float32 if isinstance(values.dtype, types.Integer) else values.dtype)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = context.make_array(sig.args[0])(context, builder, args[0])
        (columns,) = cgutils.unpack_tuple(builder, array.shape)

        def past(column: ir.Value) -> ir.Value:
            """Columns since the last line began."""
            address = builder.ptrtoint(builder.gep(array.data, [column]), _I64)
            return builder.udiv(builder.and_(address, _I64(lanes * size - 1)), _I64(size))

        def back(column: ir.Value, inner: ir.Value) -> ir.Value:
            return builder.select(builder.and_(args[3], inner), builder.sub(column, past(column)), column)

        first = back(args[1], builder.icmp_signed(">", args[1], _I64(0)))
        last = back(args[2], builder.icmp_signed("<", args[2], columns))
        lead = builder.and_(builder.neg(past(first)), _I64(lanes - 1))
        whole = builder.add(first, builder.select(args[3], lead, _I64(0)))
        whole = builder.select(builder.icmp_signed("<", whole, last), whole, last)
        rest = builder.add(whole, builder.and_(builder.sub(last, whole), _I64(-lanes)))
        return context.make_tuple(builder, sig.return_type, [first, whole, rest, last])

    return types.UniTuple(types.intp, 4)(values, types.intp, types.intp, types.boolean), lower


@intrinsic
def room(typingctx: Any, like: Any, rows: Any, columns: Any) -> Any:
    """A matrix of numbers like a given one, not written yet. `np.empty` would be compiled anew for every module."""
    matrix = types.Array(like, 2, "C")
    size = int(like.bitwidth) // 8

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        line = builder.mul(args[2], _I64(size))
        meminfo = context.nrt.meminfo_alloc_aligned(builder, builder.mul(args[1], line), 64)
        with builder.if_then(cgutils.is_null(builder, meminfo), likely=False):
            context.call_conv.return_user_exc(builder, MemoryError, ("no memory for sums",))
        target = context.make_array(matrix)(context, builder)
        context.populate_array(
            target,
            data=builder.bitcast(context.nrt.meminfo_data(builder, meminfo), context.get_data_type(like).as_pointer()),
            shape=[args[1], args[2]],
            strides=[line, _I64(size)],
            itemsize=_I64(size),
            meminfo=meminfo,
        )
        return impl_ret_new_ref(context, builder, matrix, target._getvalue())

    return matrix(like, types.intp, types.intp), lower


@intrinsic
def hold(typingctx: Any, values: Any) -> Any:
    """Nothing; but a matrix of `room` is there until then. Its rows, which `row` gives, do not keep it."""
    return types.void(values), lambda context, builder, sig, args: context.get_dummy_value()


@intrinsic
def apart(typingctx: Any, a: Any, b: Any) -> Any:
    """Whether two arrays begin at different places."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = [context.make_array(t)(context, builder, v).data for t, v in zip(sig.args, args, strict=True)]
        return builder.icmp_unsigned("!=", *(builder.ptrtoint(place, _I64) for place in places))

    return types.boolean(a, b), lower


@intrinsic
def settle(typingctx: Any) -> Any:
    """Wait until what was written around the caches is in memory, where every thread sees it."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), lower


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


def _along(builder: Any, data: ir.Value, count: ir.Value, kind: ir.VectorType, vectors: int, begin: list[ir.Value], step: Any) -> Any:
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


fetch, fetch_to_write = map(_fetcher, (False, True))
load, load_float16, load_bfloat16 = map(_loader, ("", "float16", "bfloat16"))
store, store_float16, store_bfloat16 = map(_storer, ("", "float16", "bfloat16"))
stream, stream_float16, stream_bfloat16 = map(_streamer, ("", "float16", "bfloat16"))
crest, crest_float16, crest_bfloat16 = map(_crest, ("", "float16", "bfloat16"))
at, at_float16, at_bfloat16 = map(_picker, ("", "float16", "bfloat16"))
put_float16, put_bfloat16 = map(_putter, ("float16", "bfloat16"))
