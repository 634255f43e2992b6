"""How emitted code calls its own stages, on one thread or several, without a parallel build of each.

Every stage is a serial function over blocks [first, last). One runner, compiled once for all kernels, shares the blocks
out: it receives a function pointer and a pointer to the packed arguments. Serial and threaded calls thus run the same
machine code. `RUNNER` is the runner's source, kept in the cache folder like every emitted module.
"""

from __future__ import annotations

import weakref
from typing import Any

from llvmlite import ir
from numba.core import cgutils, compiler, types
from numba.extending import intrinsic

_I64 = ir.IntType(64)

RUNNER = '''"""Shares the blocks of any stage out over Numba's threads.

Each thread has blocks of its own, the same in every call, which its caches may still hold. One that is done takes from
the others' what they have not begun: a thread that wakes late, or was disturbed, is not waited for.
"""

from numba import njit, prange, types

from xpnn.backends.numba.launch import call_blocks, take
from xpnn.backends.numba.lanes import least
from xpnn.backends.numba.memory import room

SHARES = 8  # that each thread's blocks are taken in


@njit(types.void(types.intp, types.intp, types.intp, types.intp), parallel=True, nogil=True, error_model="numpy", cache=True)
def run(function, arguments, blocks, threads):
    share = blocks // (SHARES * threads) + 1
    begun = room(0, threads, 8)  # a line of memory each
    for k in range(threads):
        begun[k, 0] = k * blocks // threads
    for k in prange(threads):
        for other in range(threads):
            whose = (k + other) % threads
            end = (whose + 1) * blocks // threads
            first = take(begun, whose, share)
            while first < end:
                call_blocks(function, arguments, first, least(first + share, end))
                first = take(begun, whose, share)
'''


def signature(real: Any, codes: str) -> Any:
    """The Numba signature of `call`, from a code for each parameter.

    i and f are numbers, integer or of the floating type `real`; r2f, r2i and r2h matrices to read, w2f and w2h to write, h
    being half precision as 16-bit integers; with 1 for 2, vectors of one value a row, and with 3, planes of rows. Rows may be
    any stride apart: the layout is "A", and `rows.row` relies on adjacent columns, which the caller has checked.
    """
    kinds = {"i": types.intp, "f": real}
    element = {"f": real, "i": types.int64, "h": types.uint16}
    arguments = (
        kinds[code] if code in kinds else types.Array(element[code[2]], int(code[1]), "A", readonly=code[0] == "r")
        for code in codes.split()
    )
    return types.intp(*arguments)


@intrinsic
def call_blocks(typingctx: Any, function: Any, arguments: Any, first: Any, last: Any) -> Any:
    """Call a function pointer."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), lower


@intrinsic
def take(typingctx: Any, counts: Any, row: Any, many: Any) -> Any:
    """Add to the first number of a row, whoever else does so at the same time; what it was before."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = context.make_array(sig.args[0])(context, builder, args[0])
        stride, _ = cgutils.unpack_tuple(builder, array.strides)
        place = cgutils.pointer_add(builder, array.data, builder.mul(args[1], stride), array.data.type)
        return builder.atomic_rmw("add", place, args[2], "monotonic")

    return types.intp(counts, types.intp, types.intp), lower


@intrinsic
def invoke(typingctx: Any, function: Any, arguments: Any) -> Any:
    """Call `function(*arguments)` without a copy of it where it is called: it is compiled once, wherever it is called from."""
    wanted = tuple(arguments.types)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [builder.extract_value(args[1], k) for k in range(len(wanted))]
        _call(context, builder, function, wanted, values, attrs=("noinline",))
        return context.get_dummy_value()

    return types.void(function, arguments), lower


def _call(context: Any, builder: Any, function: Any, wanted: tuple[Any, ...], values: list[Any], **how: Any) -> None:
    """Call an emitted function, which is compiled as a part of the module that calls it.

    Left to itself Numba makes machine code of it first, then of the caller with all that it calls, and so on outwards.
    """
    library = context.active_code_library
    parts = _PARTS.setdefault(library, {})
    key = function.dispatcher, wanted
    if key not in parts:
        flags = compiler.Flags()
        flags.nrt = flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        flags.error_model = "numpy"
        pyfunc = function.dispatcher.py_func
        made = compiler.compile_internal(context.typing_context, context, library, pyfunc, wanted, types.void, flags, {})
        parts[key] = made.fndesc
    callee = context.declare_function(builder.module, parts[key])
    context.call_conv.call_function(builder, callee, types.void, wanted, values, **how)


_PARTS: Any = weakref.WeakKeyDictionary()  # by library, what was compiled into it


@intrinsic
def launch(typingctx: Any, runner: Any, stage: Any, arguments: Any, blocks: Any, threads: Any) -> Any:
    """Run `stage(*arguments, first, last)` over all blocks: here, or for several threads by the runner at an address."""
    wanted = (*arguments.types, types.intp, types.intp)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        slot = cgutils.alloca_once_value(builder, args[2])

        trampoline = ir.Function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [_I64] * 3),
            builder.module.get_unique_name("blocks_of_stage"),
        )
        trampoline.linkage = "internal"
        inner = ir.IRBuilder(trampoline.append_basic_block())
        packed = inner.load(inner.inttoptr(trampoline.args[0], slot.type))
        unpacked = [inner.extract_value(packed, k) for k in range(len(arguments))]
        _call(context, inner, stage, wanted, [*unpacked, *trampoline.args[1:]])
        inner.ret_void()

        where = builder.ptrtoint(slot, _I64)
        byte = ir.IntType(8).as_pointer()
        # Numba's calling convention: room for the result and for an exception come first
        runner_type = ir.FunctionType(ir.IntType(32), [byte.as_pointer(), byte.as_pointer(), _I64, _I64, _I64, _I64])
        result, exception = cgutils.alloca_once(builder, byte), cgutils.alloca_once(builder, byte)
        with builder.if_else(builder.icmp_signed("==", args[4], _I64(1))) as (serial, threaded):
            with serial:
                builder.call(trampoline, [where, _I64(0), args[3]])
            with threaded:
                runner_function = builder.inttoptr(args[0], runner_type.as_pointer())
                function = builder.ptrtoint(trampoline, _I64)
                builder.call(runner_function, [result, exception, function, where, args[3], args[4]])
        return context.get_dummy_value()

    return types.void(types.intp, stage, arguments, types.intp, types.intp), lower
