"""float16 and bfloat16 as the 16 bits they have in memory: to float32, and back rounded to nearest even.

Everything is LLVM IR for a scalar or a vector alike. Where the processor converts itself, it is left to do so; a conversion
that it lacks would become a call into a library that is not linked, and crash.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils

from xpnn.backends.numba.elementary import held

ONE = {"float16": 0x3C00, "bfloat16": 0x3F80}  # the bits of 1


@functools.cache
def converts_float16() -> bool:
    """Whether the processor that code is compiled for converts between float16 and float32."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:  # not this one, perhaps
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    return bool(llvm.get_host_cpu_features().get("f16c"))


@functools.cache
def rounds_bfloat16() -> bool:
    """Whether the processor that code is compiled for rounds sixteen floats to bfloat16, all but subnormal ones."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return False
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512bf16") and features.get("avx512dq"))


class _BrainType(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


def _like(value: ir.Value, element: ir.Type) -> ir.Type:
    """A type of as many elements as a value has."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _shift(like: ir.Value, bits: int) -> ir.Constant:
    """How far every lane is shifted: part of the instruction, so nothing to hold."""
    return ir.Constant(like.type, [bits] * like.type.count if isinstance(like.type, ir.VectorType) else bits)


def _constants(builder: Any, like: ir.Value) -> Any:
    """A function from numbers to constants of the type of a value."""
    kind = like.type
    if isinstance(kind, ir.VectorType):
        return lambda number: held(builder, kind.element(number), kind.count)
    return lambda number: ir.Constant(kind, number)


def widen(builder: Any, name: str, bits: ir.Value) -> ir.Value:
    """16 bits of a half type as float32; exact."""
    floats, ints = _like(bits, ir.FloatType()), _like(bits, ir.IntType(32))
    if name == "float16" and converts_float16():
        return builder.fpext(builder.bitcast(bits, _like(bits, ir.HalfType())), floats)
    wide = builder.zext(bits, ints)
    constant = _constants(builder, wide)
    if name == "bfloat16":
        return builder.bitcast(builder.shl(wide, _shift(wide, 16)), floats)
    size = builder.shl(builder.and_(wide, constant(0x7FFF)), _shift(wide, 13))
    usual = builder.bitcast(builder.add(size, constant((127 - 15) << 23)), floats)
    # below 2**-14 there is no leading one: put it there, and subtract it
    led = builder.bitcast(builder.add(size, constant((127 - 14) << 23)), floats)
    small = builder.fsub(led, _constants(builder, led)(2.0**-14))
    special = builder.bitcast(builder.or_(size, constant(0xFF << 23)), floats)
    value = builder.select(builder.icmp_unsigned("<", size, constant(1 << 23)), small, usual)
    value = builder.select(builder.icmp_unsigned(">=", size, constant(0x1F << 23)), special, value)
    sign = builder.shl(builder.and_(wide, constant(0x8000)), _shift(wide, 16))
    return builder.bitcast(builder.or_(builder.bitcast(value, ints), sign), floats)


def narrow(builder: Any, name: str, value: ir.Value) -> ir.Value:
    """float32 as 16 bits of a half type, rounded to nearest even; NaN stays NaN."""
    if name == "bfloat16" and isinstance(value.type, ir.VectorType) and value.type.count == 16 and rounds_bfloat16():
        return _narrow_by_processor(builder, value)
    return _narrow(builder, name, value)


def _narrow_by_processor(builder: Any, value: ir.Value) -> ir.Value:
    """bfloat16 by the instruction for it, which takes subnormal numbers for zero: where there is one, by whole numbers."""
    kind = value.type
    truths = ir.VectorType(ir.IntType(1), kind.count)
    function = ir.FunctionType(truths, [kind, ir.IntType(32)])
    classify = cgutils.get_or_insert_function(builder.module, function, "llvm.x86.avx512.fpclass.ps.512")
    subnormal = builder.call(classify, [value, ir.IntType(32)(0x20)])
    some = builder.icmp_unsigned("!=", builder.bitcast(subnormal, ir.IntType(16)), ir.IntType(16)(0))
    with builder.if_else(some, likely=False) as (exactly, quickly):
        with exactly:
            exact = _narrow(builder, "bfloat16", value)
            exact_block = builder.block
        with quickly:
            brain = builder.fptrunc(value, ir.VectorType(_BrainType(), kind.count))
            quick = builder.bitcast(brain, exact.type)
            quick_block = builder.block
    result = builder.phi(exact.type)
    result.add_incoming(exact, exact_block)
    result.add_incoming(quick, quick_block)
    return result


def _narrow(builder: Any, name: str, value: ir.Value) -> ir.Value:
    shorts, ints, floats = (_like(value, kind) for kind in (ir.IntType(16), ir.IntType(32), ir.FloatType()))
    if name == "float16" and converts_float16():
        return builder.bitcast(builder.fptrunc(value, _like(value, ir.HalfType())), shorts)
    bits = builder.bitcast(value, ints)
    constant = _constants(builder, bits)

    def rounded(dropped: int) -> ir.Value:
        """The bits without the lowest, up where those are more than half, or half and the rest is odd."""
        odd = builder.and_(builder.lshr(bits, _shift(bits, dropped)), constant(1))
        more = builder.add(builder.add(bits, constant((1 << dropped - 1) - 1)), odd)
        return builder.lshr(more, _shift(bits, dropped))

    nan = builder.fcmp_unordered("uno", value, value)
    if name == "bfloat16":
        quiet = builder.or_(builder.lshr(bits, _shift(bits, 16)), constant(0x40))
        return builder.trunc(builder.select(nan, quiet, rounded(16)), shorts)
    sign = builder.lshr(builder.and_(bits, constant(1 << 31)), _shift(bits, 16))
    bits = builder.and_(bits, constant(0x7FFFFFFF))
    usual = builder.sub(rounded(13), constant((127 - 15) << 10))
    # neighbours of 1/2 differ by float16's smallest number: the sum rounds as it should and leaves the count of them
    count = builder.bitcast(builder.fadd(builder.bitcast(bits, floats), _constants(builder, value)(0.5)), ints)
    small = builder.sub(count, constant(126 << 23))
    result = builder.select(builder.icmp_unsigned("<", bits, constant((127 - 14) << 23)), small, usual)
    result = builder.select(builder.icmp_unsigned(">=", bits, constant((127 + 16) << 23)), constant(0x7C00), result)
    result = builder.select(nan, constant(0x7E00), result)
    return builder.trunc(builder.or_(result, sign), shorts)
