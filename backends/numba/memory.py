"""How emitted Numba loops use memory: ahead of time, around the caches, and for what they put aside.

A store through the caches first fetches the line that it writes to. Of a result that is far larger than they are, each line
is so fetched for nothing and soon driven out again. Written around them it is written once. That asks for whole lines, so
`cut` finds where they begin.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import impl_ret_new_ref
from numba.extending import intrinsic

from xpnn.backends.numba import half
from xpnn.backends.numba.elementary import splat
from xpnn.backends.numba.lanes import Lanes, width
from xpnn.backends.numba.rows import place

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_ON_STACK = sys.platform != "win32"  # where more than a page of it asks for a function of the C compiler's


def ask_for(builder: Any, address: ir.Value, write: bool) -> None:
    """Have the second cache fetch what lies at an address, to be read or to be written; nothing need lie there."""
    address = builder.bitcast(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [address, _I32(int(write)), _I32(2), _I32(1)])


def _fetcher(write: bool) -> Any:
    def typed(typingctx: Any, values: Any, j: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            ask_for(builder, builder.gep(data, [args[1]]), write)
            return context.get_dummy_value()

        return types.void(values, types.intp), lower

    typed.__doc__ = (
        f"Ask for the memory of column `j` of a row, so that it is there when it is {'written' if write else 'read'}."
    )
    return intrinsic(typed)


def _streamer(name: str) -> Any:
    def typed(typingctx: Any, values: Any, j: Any, n: Any, value: Any, around: Any) -> Any:
        count = width(types.float32 if name else values.dtype)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address, _, align = place(context, builder, sig, args, count)
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


def _maker(small: int) -> Any:
    def typed(typingctx: Any, like: Any, rows: Any, columns: Any) -> Any:
        matrix = types.Array(like, 2, "C")
        size = int(like.bitwidth) // 8

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            line = builder.mul(args[2], _I64(size))
            whole = builder.mul(args[1], line)
            with builder.goto_entry_block():  # `alloca_once` would write zeros to all of it
                place = builder.alloca(ir.ArrayType(ir.IntType(8), small if _ON_STACK else 64))
                place.align = 64
            byte = ir.IntType(8).as_pointer()
            data = cgutils.alloca_once_value(builder, builder.bitcast(place, byte))
            owner = cgutils.alloca_once_value(builder, ir.Constant(byte, None))
            enough = _I64(small if _ON_STACK else 0)
            with builder.if_then(builder.icmp_unsigned(">", whole, enough)):
                meminfo = context.nrt.meminfo_alloc_aligned(builder, whole, 64)
                with builder.if_then(cgutils.is_null(builder, meminfo), likely=False):
                    context.call_conv.return_user_exc(builder, MemoryError, ("no memory for sums",))
                builder.store(context.nrt.meminfo_data(builder, meminfo), data)
                builder.store(meminfo, owner)
            target = context.make_array(matrix)(context, builder)
            context.populate_array(
                target,
                data=builder.bitcast(builder.load(data), context.get_data_type(like).as_pointer()),
                shape=[args[1], args[2]],
                strides=[line, _I64(size)],
                itemsize=_I64(size),
                meminfo=builder.load(owner),
            )
            return impl_ret_new_ref(context, builder, matrix, target._getvalue())

        return matrix(like, types.intp, types.intp), lower

    typed.__doc__ = f"""A matrix of numbers like a given one, not written yet; up to {small} bytes of it on the stack.

    To be called once, not in a loop. `np.empty` would be compiled anew for every module.
    """
    return intrinsic(typed)


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


room, desk = _maker(256), _maker(3072)
fetch, fetch_to_write = map(_fetcher, (False, True))
stream, stream_float16, stream_bfloat16 = map(_streamer, ("", "float16", "bfloat16"))
