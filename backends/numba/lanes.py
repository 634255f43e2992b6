"""The vocabulary of emitted Numba loops: 64 bytes of a row as one value.

LLVM's auto-vectoriser decides by itself how wide a loop runs and in which order a sum is added; both may change from one
loop to the next. Here the vector is spelt out, so that a row's result depends on its length and dtype alone, bit for bit,
wherever the loop stands. `Lanes(float32)` is `<16 x float>`, `Lanes(float64)` is `<8 x double>`; LLVM splits them on CPUs
with narrower registers. Everything works on scalars as well, by the same instructions.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, register_model

from xpnn.backends.numba import elementary, error_function
from xpnn.backends.numba.elementary import splat

LANE_BYTES = 64
_I1, _I32 = ir.IntType(1), ir.IntType(32)


class Lanes(types.Type):  # type: ignore[misc]
    """`count` neighbouring elements of one row."""

    def __init__(self, element: types.Type, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(name=f"Lanes({element} x {count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Lanes) -> None:
        element = _I1 if fe_type.element == types.boolean else manager[fe_type.element].get_value_type()
        super().__init__(manager, fe_type, ir.VectorType(element, fe_type.count))


def width(dtype: types.Type) -> int:
    """How many elements of a dtype make one `Lanes`."""
    return LANE_BYTES * 8 // int(dtype.bitwidth)


def _lanes(element: types.Type) -> Lanes:
    return Lanes(element, width(element))


def _common(*args: types.Type) -> Lanes | None:
    return next((a for a in args if isinstance(a, Lanes)), None)


def _widened(builder: Any, sig: Any, args: Any) -> list[ir.Value]:
    """The arguments, scalars among them repeated over the lanes of the others."""
    lanes = _common(*sig.args)
    if lanes is None:
        return list(args)
    return [a if isinstance(t, Lanes) else splat(builder, a, lanes.count) for a, t in zip(args, sig.args, strict=True)]


def _call(builder: Any, name: str, args: list[ir.Value], flags: tuple[str, ...] = ()) -> ir.Value:
    kind = args[0].type
    function = ir.FunctionType(kind, [kind] * len(args))
    return builder.call(
        cgutils.get_or_insert_function(builder.module, function, f"{name}.{suffix(kind)}"), args, fastmath=flags
    )


def suffix(kind: ir.Type) -> str:
    """How an intrinsic's name spells a type."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{suffix(kind.element)}"
    if isinstance(kind, ir.IntType):
        return f"i{kind.width}"
    return "f32" if isinstance(kind, ir.FloatType) else "f64"


# --- operators -------------------------------------------------------------------------------------------------------

_ARITHMETIC = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
_COMPARISON = {
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=",
}  # fmt: skip


def _define_operator(op: Any, boolean_result: bool) -> None:
    @infer_global(op)
    class _Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            lanes = _common(*args)
            if lanes is None or len(args) != 2:
                return None
            result = Lanes(types.boolean, lanes.count) if boolean_result else lanes
            return signature(result, *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        lanes = _common(*sig.args)
        assert lanes is not None
        whole = isinstance(lanes.element, types.Integer)
        if whole and lanes.element.bitwidth == 32:  # column numbers against a wider scalar, both below 2**31
            args = [a if a.type.__class__ is ir.VectorType else builder.trunc(a, _I32) for a in args]
        a, b = _widened(builder, sig, args)
        if not boolean_result:
            return getattr(builder, _ARITHMETIC[op][1:] if whole else _ARITHMETIC[op])(a, b)
        if whole:
            return builder.icmp_signed(_COMPARISON[op], a, b)
        compare = builder.fcmp_unordered if op is operator.ne else builder.fcmp_ordered
        return compare(_COMPARISON[op], a, b)

    for pair in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(op, *pair)(lower)


for _op in _ARITHMETIC:
    _define_operator(_op, boolean_result=False)
for _op in _COMPARISON:
    _define_operator(_op, boolean_result=True)


# --- functions of lanes or scalars ------------------------------------------------------------------------------------


def _elementwise(name: str, build: Any) -> Any:
    """An intrinsic whose result has the type of its widest argument."""

    def typed(typingctx: Any, *values: Any) -> Any:
        result = _common(*values) or values[0]
        return result(*values), lambda context, builder, sig, args: build(builder, *_widened(builder, sig, args))

    arity = build.__code__.co_argcount - 1
    parameters = ", ".join("abc"[:arity])
    wrapper = eval(f"lambda typed: lambda typingctx, {parameters}: typed(typingctx, {parameters})")(typed)
    wrapper.__name__ = wrapper.__qualname__ = name
    return intrinsic(wrapper)


def _exp(builder: Any, a: ir.Value) -> ir.Value:
    return elementary.exp(builder, a)


def _exp_nonpositive(builder: Any, a: ir.Value) -> ir.Value:
    return elementary.exp_nonpositive(builder, a)


def _expm1(builder: Any, a: ir.Value) -> ir.Value:
    return elementary.expm1(builder, a)


def _log(builder: Any, a: ir.Value) -> ir.Value:
    return elementary.log(builder, a)


def _log1p(builder: Any, a: ir.Value) -> ir.Value:
    return elementary.log1p(builder, a)


def _tanh(builder: Any, a: ir.Value) -> ir.Value:
    return elementary.tanh(builder, a)


def _erf(builder: Any, a: ir.Value) -> ir.Value:
    return error_function.erf(builder, a)


def _erfc(builder: Any, a: ir.Value) -> ir.Value:
    return error_function.erfc(builder, a)


def _sqrt(builder: Any, a: ir.Value) -> ir.Value:
    return _call(builder, "llvm.sqrt", [a])


def _floor(builder: Any, a: ir.Value) -> ir.Value:
    return _call(builder, "llvm.floor", [a])


def _absolute(builder: Any, a: ir.Value) -> ir.Value:
    return _call(builder, "llvm.fabs", [a])


def _negative(builder: Any, a: ir.Value) -> ir.Value:
    return builder.fneg(a)


def largest(builder: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    # nsz alone lets it become one vector maximum and a blend for NaN
    return _call(builder, "llvm.maximum", [a, b], ("nsz",))


def _minimum(builder: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    return _call(builder, "llvm.minimum", [a, b], ("nsz",))


def _logical_and(builder: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.and_(a, b)


def _logical_or(builder: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.or_(a, b)


def _logical_not(builder: Any, a: ir.Value) -> ir.Value:
    return builder.not_(a)


exp = _elementwise("exp", _exp)
exp_nonpositive = _elementwise("exp_nonpositive", _exp_nonpositive)
expm1 = _elementwise("expm1", _expm1)
log = _elementwise("log", _log)
log1p = _elementwise("log1p", _log1p)
tanh = _elementwise("tanh", _tanh)
erf = _elementwise("erf", _erf)
erfc = _elementwise("erfc", _erfc)
sqrt = _elementwise("sqrt", _sqrt)
floor = _elementwise("floor", _floor)
absolute = _elementwise("absolute", _absolute)
negative = _elementwise("negative", _negative)
maximum = _elementwise("maximum", largest)
minimum = _elementwise("minimum", _minimum)
logical_and = _elementwise("logical_and", _logical_and)
logical_or = _elementwise("logical_or", _logical_or)
logical_not = _elementwise("logical_not", _logical_not)


@intrinsic
def where(typingctx: Any, condition: Any, a: Any, b: Any) -> Any:
    """`a` where the condition holds, else `b`."""
    lanes = _common(a, b)
    if lanes is None and isinstance(condition, Lanes):
        lanes = Lanes(a, condition.count)
    result = a if lanes is None else lanes

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        test, *values = args
        if lanes is not None:
            values = [
                v if isinstance(t, Lanes) else splat(builder, v, lanes.count) for v, t in zip(values, sig.args[1:], strict=True)
            ]
            if not isinstance(sig.args[0], Lanes):
                test = splat(builder, test, lanes.count)
        return builder.select(test, *values)

    return result(condition, a, b), lower


@intrinsic
def divide(typingctx: Any, a: Any, b: Any) -> Any:
    """Lanes over a number, or over one for each: a product with its reciprocal, unless that could overflow or lose bits."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        dividend, divisor = args
        kind, many = divisor.type, isinstance(b, Lanes)

        def constant(value: float) -> ir.Constant:
            return ir.Constant(kind, [value] * kind.count if many else value)

        def spread(value: ir.Value) -> ir.Value:
            return value if many else splat(builder, value, a.count)

        size = _call(builder, "llvm.fabs", [divisor])
        safe = builder.and_(
            builder.fcmp_ordered(">", size, constant(2.0**-64)), builder.fcmp_ordered("<", size, constant(2.0**64))
        )
        product = builder.fmul(dividend, spread(builder.fdiv(constant(1.0), divisor)))
        before = builder.block
        all_safe = safe
        if many:
            bits = ir.IntType(kind.count)
            all_safe = builder.icmp_unsigned("==", builder.bitcast(safe, bits), bits(-1))
        with builder.if_then(builder.not_(all_safe), likely=False):
            quotient = builder.fdiv(dividend, spread(divisor))
            other = builder.select(safe, product, quotient) if many else quotient
            other_block = builder.block
        result = builder.phi(dividend.type)
        result.add_incoming(product, before)
        result.add_incoming(other, other_block)
        return result

    return a(a, b), lower


@intrinsic
def least(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller of two whole numbers; builtin `min` would be compiled anew for every module."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        return builder.select(builder.icmp_signed("<", *args), *args)

    return types.intp(types.intp, types.intp), lower


# --- columns, sums and maxima ---


def mask(builder: Any, n: ir.Value, count: int) -> ir.Value:
    """Which of `count` lanes are among the first `n`."""
    iota = ir.Constant(ir.VectorType(_I32, count), list(range(count)))
    return builder.icmp_signed("<", iota, splat(builder, builder.trunc(n, _I32), count))


@intrinsic
def columns(typingctx: Any, like: Any, j: Any) -> Any:
    """The column numbers j, j+1, ... beside lanes of the dtype of `like`."""
    count = width(like)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        iota = ir.Constant(ir.VectorType(_I32, count), list(range(count)))
        return builder.add(iota, splat(builder, builder.trunc(args[1], _I32), count))

    return Lanes(types.int32, count)(like, types.intp), lower


@intrinsic
def to_float(typingctx: Any, like: Any, value: Any) -> Any:
    """Integer lanes as floats of the dtype of `like`."""
    lanes = _lanes(like)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        return builder.sitofp(args[1], context.get_value_type(lanes))

    return lanes(like, value), lower


@intrinsic
def to_int(typingctx: Any, value: Any) -> Any:
    """Floats as whole numbers, of lanes or of a scalar."""
    result = Lanes(types.int64, value.count) if isinstance(value, Lanes) else types.int64

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        return builder.fptosi(args[0], context.get_value_type(result))

    return result(value), lower


@intrinsic
def spread(typingctx: Any, value: Any) -> Any:
    """A scalar repeated in every lane."""
    lanes = _lanes(value)
    return lanes(value), lambda context, builder, sig, args: splat(builder, args[0], lanes.count)


@intrinsic
def keep(typingctx: Any, value: Any, n: Any, rest: Any) -> Any:
    """The first `n` lanes of a value, the scalar `rest` in the others."""
    lanes = value if isinstance(value, Lanes) else _lanes(value)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        content = args[0] if isinstance(value, Lanes) else splat(builder, args[0], lanes.count)
        return builder.select(mask(builder, args[1], lanes.count), content, splat(builder, args[2], lanes.count))

    return lanes(value, types.intp, rest), lower


def _fold(builder: Any, vector: ir.Value, combine: Any) -> ir.Value:
    count = vector.type.count
    while count > 1:
        count //= 2
        lower = ir.Constant(ir.VectorType(_I32, count), list(range(count)))
        upper = ir.Constant(ir.VectorType(_I32, count), list(range(count, 2 * count)))
        empty = ir.Constant(vector.type, ir.Undefined)
        vector = combine(builder.shuffle_vector(vector, empty, lower), builder.shuffle_vector(vector, empty, upper))
    return builder.extract_element(vector, _I32(0))


@intrinsic
def total(typingctx: Any, value: Any) -> Any:
    """The sum of the lanes, added in halves."""
    return value.element(value), lambda context, builder, sig, args: _fold(builder, args[0], builder.fadd)


@intrinsic
def doubled(typingctx: Any, value: Any) -> Any:
    """Lanes, or a number, in double precision."""
    result = Lanes(types.float64, value.count) if isinstance(value, Lanes) else types.float64

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        return args[0] if value == result else builder.fpext(args[0], context.get_value_type(result))

    return result(value), lower


@intrinsic
def peak(typingctx: Any, value: Any) -> Any:
    """The largest lane; NaN if one is."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> ir.Value:
        return _fold(builder, args[0], lambda a, b: largest(builder, a, b))

    return value.element(value), lower
