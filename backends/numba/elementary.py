"""exp, expm1, log, log1p and tanh as straight-line LLVM IR, for a scalar float or double or a vector of them alike.

There are no branches, calls or fast-math flags, so a lane of a vector gets the bits that the scalar code gives.
Numba adds the fastmath flags of a caller to these operations too: `contract`, `nsz` and `arcp` do no harm, but with
`nnan` or `ninf` log(inf) is finite.
`tools/fit_elementary.py` finds the coefficients and measures the errors that the docstrings state (with fused
multiply-add).
"""

import functools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Union

import llvmlite.binding as llvm
import numba
from llvmlite import ir

LN2 = math.log(2)
Operand = Union["_Value", float]


@dataclass(frozen=True)
class _Format:
    """A floating-point format, and the constants fitted to it."""

    mantissa: int
    bias: int
    tanh_limit: float  # tanh rounds to 1 from here on
    ln2: tuple[float, float]  # the high part is short: its product with an exponent is exact, fused or not
    exp: tuple[float, ...]
    exp_short: tuple[float, ...]
    log1p: tuple[float, ...]
    tanh_near: tuple[float, ...]
    tanh_far: tuple[float, ...]

    @property
    def one_ulp(self) -> float:
        """The power of two from which on neighbouring numbers differ by one."""
        return 2.0**self.mantissa

    @property
    def smallest(self) -> float:
        """The smallest normal number."""
        return 2.0 ** (1 - self.bias)


# fmt: off
_FLOAT = _Format(
    mantissa=23,
    bias=127,
    tanh_limit=10.0,
    ln2=(0.69314575, 1.4286068e-06),
    exp=(1.0, 1.0, 0.49999994, 0.16666521, 0.04166839, 0.008368716, 0.0013814588),
    exp_short=(1.0, 0.50001615, 0.16666718),
    log1p=(
        -0.49999988, 0.33333325, -0.25001583, 0.20001975, -0.16609083, 0.14181824, -0.1324298, 0.1290443,
        -0.07621792,
    ),
    tanh_near=(-0.3333295, 0.13320813, -0.0526776, 0.016448956),
    tanh_far=(1.0, 1.9999992, 1.9999677, 1.3334452, 0.6702931, 0.26438877),
)
_DOUBLE = _Format(
    mantissa=52,
    bias=1023,
    tanh_limit=20.0,
    ln2=(0.6931471805598903, 5.497923018708371e-14),
    exp=(
        1.0, 1.0, 0.5000000000000011, 0.16666666666666413, 0.04166666666653017, 0.008333333333494479,
        0.0013888888943627828, 0.00019841269506549685, 2.4801493101244676e-05, 2.755758639539226e-06,
        2.7630247536115133e-07, 2.500005567101886e-08,
    ),
    exp_short=(),
    log1p=(
        0.6666666666666734, 0.3999999999941471, 0.28571428742379895, 0.22222198574033158, 0.18183564279449033,
        0.15314051808710707, 0.14795936525304262,
    ),
    tanh_near=(
        -0.3333333333333234, 0.13333333333172165, -0.05396825387778812, 0.021869486015964952,
        -0.008863195062139586, 0.0035917242468021643, -0.0014532395158005005, 0.0005792053849321523,
        -0.00021041553856513122, 5.110072247476985e-05,
    ),
    tanh_far=(
        1.0, 2.0, 2.0000000000000044, 1.3333333333332882, 0.6666666666644363, 0.26666666667526845,
        0.08888888924081878, 0.02539682475554674, 0.006349182248158097, 0.0014109544558150093,
        0.00028293281179280454, 5.1135964734197826e-05,
    ),
)
# fmt: on


def _operator(operation: str, *arguments: str) -> Callable[["_Value", Operand], "_Value"]:
    def apply(self: "_Value", other: Operand) -> "_Value":
        return _Value(self.builder, getattr(self.builder, operation)(*arguments, self.raw, self.operand(other)))

    return apply


def held(builder: ir.IRBuilder, constant: ir.Constant, lanes: int) -> ir.Value:
    """A constant in every lane, which LLVM is to hold in a register.

    It would rather fetch it from memory at each use; and with the addresses of a dozen constants in registers there are
    none left for the loop. So it is made a variable, of which LLVM knows that it does not change but not what it is.
    """
    module, element = builder.module, constant.type
    name = f"xpnn.{element}.{constant.constant}"
    variable = module.globals.get(name)
    if variable is None:
        variable = ir.GlobalVariable(module, element, name)
        variable.linkage = "linkonce_odr"
        variable.initializer = constant
    value = builder.load(variable)
    value.set_metadata("invariant.load", module.add_metadata([]))
    return splat(builder, value, lanes)


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar in every lane of a vector."""
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


class _Value:
    """An LLVM float, integer or truth value, or a vector of them, with operators; Python numbers become constants."""

    def __init__(self, builder: ir.IRBuilder, raw: ir.Value) -> None:
        self.builder = builder
        self.raw = raw
        self.kind = raw.type
        self.lanes = raw.type.count if isinstance(raw.type, ir.VectorType) else 0
        self.element = raw.type.element if self.lanes else raw.type
        self.format = _FLOAT if self.element in (ir.FloatType(), ir.IntType(32)) else _DOUBLE

    def operand(self, other: Operand) -> ir.Value:
        if isinstance(other, _Value):
            return other.raw
        if self.lanes and other != 0:
            return held(self.builder, self.element(other), self.lanes)
        return ir.Constant(self.kind, [other] * self.lanes if self.lanes else other)

    __add__ = _operator("fadd")
    __sub__ = _operator("fsub")
    __mul__ = _operator("fmul")
    __truediv__ = _operator("fdiv")
    __lt__ = _operator("fcmp_ordered", "<")
    __gt__ = _operator("fcmp_ordered", ">")
    equals = _operator("fcmp_ordered", "==")
    plus_bits = _operator("add")
    __and__ = _operator("and_")
    __or__ = _operator("or_")

    def __rsub__(self, other: float) -> "_Value":
        return _Value(self.builder, self.operand(other)) - self

    def __rtruediv__(self, other: float) -> "_Value":
        return _Value(self.builder, self.operand(other)) / self

    def __lshift__(self, bits: int) -> "_Value":
        return _Value(self.builder, self.builder.shl(self.raw, self._count(bits)))

    def __rshift__(self, bits: int) -> "_Value":
        return _Value(self.builder, self.builder.lshr(self.raw, self._count(bits)))

    def _count(self, bits: int) -> ir.Constant:
        """How far every lane is shifted: part of the instruction, so nothing to hold."""
        return ir.Constant(self.kind, [bits] * self.lanes if self.lanes else bits)

    def __neg__(self) -> "_Value":
        return _Value(self.builder, self.builder.fneg(self.raw))

    def __abs__(self) -> "_Value":
        return self._intrinsic("fabs")

    def replace(self, where: "_Value", by: Operand) -> "_Value":
        return _Value(self.builder, self.builder.select(where.raw, self.operand(by), self.raw))

    def choose(self, where: "_Value", yes: float, no: float) -> "_Value":
        """One of two constants of the type of this value."""
        return _Value(self.builder, self.builder.select(where.raw, self.operand(yes), self.operand(no)))

    def fma(self, factor: Operand, addend: Operand) -> "_Value":
        """self * factor + addend, fused where the processor can."""
        return self._intrinsic("fmuladd", factor, addend)

    def copysign(self, sign: "_Value") -> "_Value":
        return self._intrinsic("copysign", sign)

    def _intrinsic(self, name: str, *others: Operand) -> "_Value":
        # llvmlite's declare_intrinsic has no name for a vector type.
        element = self.element.intrinsic_name
        name = f"llvm.{name}.v{self.lanes}{element}" if self.lanes else f"llvm.{name}.{element}"
        operands = [self.raw, *map(self.operand, others)]
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(self.kind, [self.kind] * len(operands)), name)
        return _Value(self.builder, self.builder.call(function, operands))

    def _bitcast(self, element: ir.Type) -> "_Value":
        kind = ir.VectorType(element, self.lanes) if self.lanes else element
        return _Value(self.builder, self.builder.bitcast(self.raw, kind))

    def as_bits(self) -> "_Value":
        return self._bitcast(ir.IntType(32 if self.format is _FLOAT else 64))

    def as_float(self) -> "_Value":
        return self._bitcast(ir.FloatType() if self.format is _FLOAT else ir.DoubleType())


def _polynomial(x: _Value, coefficients: Sequence[float]) -> _Value:
    """The polynomial with these coefficients, lowest power first, by Horner's rule."""
    result = x.fma(coefficients[-1], coefficients[-2])
    for coefficient in coefficients[-3::-1]:
        result = result.fma(x, coefficient)
    return result


def _round(x: _Value, factor: float, bias: int) -> tuple[_Value, _Value]:
    """n = x * factor rounded to an integer, and n + bias in the low bits of a large number.

    Where neighbouring numbers differ by one, an addition rounds to an integer and leaves it in the low bits: no
    conversion between float and int is needed, and shifting those bits up into the exponent gives 2**n.
    """
    offset = 1.5 * x.format.one_ulp + bias
    shifted = x.fma(factor, offset)
    return shifted - offset, shifted


def _power_of_two(shifted: _Value) -> _Value:
    return (shifted.as_bits() << shifted.format.mantissa).as_float()


def _exp_reduced(x: _Value) -> tuple[_Value, _Value]:
    """exp(r) and, as `_round` gives it, n + bias, where x = n ln 2 + r and |r| <= ln 2 / 2."""
    form = x.format
    n, shifted = _round(x, 1 / LN2, form.bias)
    high, low = form.ln2
    r = n.fma(-low, n.fma(-high, x))
    return _polynomial(r, form.exp), shifted


def _flush_below_normal(x: _Value) -> _Value:
    """x, but where exp(x) would be subnormal a number whose n is -bias: 2**n then has zero bits, and exp(x) is 0."""
    form = x.format
    return x.replace(x < math.log(form.smallest), (0.25 - form.bias) * LN2)


def exp_nonpositive(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp of an argument that is <= 0 or NaN, without `exp`'s care for large arguments.

    The smallest argument whose n is -bias stands for all below it: 2**n then has zero bits, and exp(x) is 0.
    Worst error 0.91 ULP, by `_exp_by_table` 0.57 ULP (float32, over every input); 0.86 ULP (float64).
    """
    v = _Value(builder, x)
    if v.format is _FLOAT and _looks_up() and v.lanes in (0, STEPS):
        return _exp_by_table(v).raw
    least = -(v.format.bias - 0.05) * LN2
    mantissa, shifted = _exp_reduced(v.replace(v < least, least))
    return (mantissa * _power_of_two(shifted)).raw


STEPS = 16  # lanes of a register, and so the entries of a table in one


@functools.cache
def _looks_up() -> bool:
    """Whether the processor finds sixteen floats in a register by sixteen numbers at once, which AVX-512 does."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:  # code is not for this one, perhaps
        return False
    return bool(llvm.get_host_cpu_features().get("avx512f"))


def _exp_by_table(v: _Value) -> _Value:
    """exp(v) = 2**(n/16) exp(r) for v <= 0, where |r| <= ln 2 / 32: three coefficients instead of six.

    The table holds the bits of 2**(k/16) less k sixteenths of an exponent's unit. n, shifted to sixteenths and added, makes
    2**(n/16) of the entry k = n mod 16; what its rounding lost, a second table gives back. A lane costs 6 multiplications, and
    10 by `_exp_reduced`.
    """
    least = -(v.format.bias * LN2)
    v = v.replace(v < least, least)
    n, shifted = _round(v, STEPS / LN2, 0)
    high, low = (part / STEPS for part in v.format.ln2)
    r = n.fma(-low, n.fma(-high, v))
    bits = shifted.as_bits()
    powers = [_float_bits(2 ** (k / STEPS)) - (k << 19) for k in range(STEPS)]
    power = _entry(bits, "powers", powers).plus_bits(bits << v.format.mantissa - 4).as_float()
    lost = [_float_bits(2 ** (k / STEPS) / _single(2 ** (k / STEPS)) - 1) for k in range(STEPS)]
    return power.fma(_polynomial(r, v.format.exp_short).fma(r, _entry(bits, "powers.lost", lost).as_float()), power)


def _entry(n: _Value, name: str, values: Sequence[int]) -> _Value:
    """The entry n of a table of the bits of 16 or 32 floats, counted round and round."""
    module, integer = n.builder.module, ir.IntType(32)
    name = f"xpnn.{name}"
    table = module.globals.get(name)
    if table is None:
        kind = ir.ArrayType(integer, len(values))
        table = ir.GlobalVariable(module, kind, name)
        table.linkage = "linkonce_odr"
        table.global_constant = True
        table.initializer = ir.Constant(kind, values)
    if not n.lanes:
        place = n.builder.gep(table, [integer(0), (n & (len(values) - 1)).raw])
        return _Value(n.builder, n.builder.load(place))
    floats, ints = ir.VectorType(ir.FloatType(), STEPS), ir.VectorType(integer, STEPS)
    start = n.builder.bitcast(table, floats.as_pointer())
    parts = [n.builder.load(n.builder.gep(start, [integer(k)]), align=4) for k in range(len(values) // STEPS)]
    kinds, arguments, name = [floats, ints], [parts[0], n.raw], "llvm.x86.avx512.permvar.sf.512"
    if len(parts) == 2:
        kinds, arguments, name = [floats, ints, floats], [parts[0], n.raw, parts[1]], "llvm.x86.avx512.vpermi2var.ps.512"
    permute = module.globals.get(name) or ir.Function(module, ir.FunctionType(floats, kinds), name)
    return _Value(n.builder, n.builder.call(permute, arguments)).as_bits()


def _single(value: float) -> float:
    """The nearest float32."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def _float_bits(value: float) -> int:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return int(bits)


def exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) = 2**n exp(r); 0 where it would be subnormal; inf from the overflow on.

    Worst error 0.91 ULP (float32), 0.86 ULP (float64).
    """
    v = _flush_below_normal(_Value(builder, x))
    form = v.format
    # 2**128 (2**1024) is no number, but below the overflow it comes with exp(r) < 1: take half of it, and double.
    limit = (form.bias + 1.25) * LN2
    mantissa, shifted = _exp_reduced(v.replace(v > limit, limit))
    scale = _power_of_two(shifted)
    largest = 2.0**form.bias
    y = mantissa * scale.replace(scale > largest, largest)
    return y.replace(shifted > 1.5 * form.one_ulp + 2 * form.bias, y + y).raw


def expm1(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) - 1 = (2**n - 1 + 2**n r) + 2**n (exp(r) - 1 - r), as `exp` reduces x, with r's own rounding error.

    What the sum in parentheses lost, by far the smaller part, is given back.
    Worst error 1.08 ULP (float32, every 16th input), 1.13 ULP (float64).
    """
    v = _Value(builder, x)
    form = v.format
    least, most = -(form.mantissa + 4) * LN2, (form.bias + 1.25) * LN2  # -1 and, doubled as in `exp`, inf
    a = v.replace(v < least, least)
    a = a.replace(a > most, most)
    n, shifted = _round(a, 1 / LN2, form.bias)
    high, low = form.ln2
    exact = n.fma(-high, a)
    r = n.fma(-low, exact)
    lost = n.fma(-low, exact - r)
    scale = _power_of_two(shifted)
    largest = 2.0**form.bias
    scale = scale.replace(scale > largest, largest)
    rest = _polynomial(r, form.exp[2:]).fma(r * r, lost)
    whole = scale - 1.0
    near = r.fma(scale, whole)
    y = rest.fma(scale, r.fma(scale, whole - near)) + near
    y = y.replace(shifted > 1.5 * form.one_ulp + 2 * form.bias, y + y)
    return y.replace(v.equals(0.0), v).raw  # -0.0 keeps its sign


def log(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(x) = e ln 2 + log(1 + f) with x = 2**e (1 + f) and sqrt(1/2) <= 1 + f < sqrt(2).

    Worst error 0.89 ULP (float32), 0.80 ULP (float64).
    """
    return _log(_Value(builder, x)).raw


def log1p(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(1 + x) = log(u) + (x - (u - 1)) / u with u = 1 + x rounded: what the rounding lost comes back as a last term.

    It is added before the logarithm's own last addition, which alone rounds where x is small.
    Worst error 0.89 ULP (float32), 0.91 ULP (float64).
    """
    v = _Value(builder, x)
    u = v + 1.0
    return _log(u, (v - (u - 1.0)) / u).replace(v.equals(0.0), v).raw  # -0.0 keeps its sign


def _log(v: _Value, last: _Value | None = None) -> _Value:
    """log(v) + last, for a last term that is small beside v; the edges are those of log(v).

    log(1 + f) is f + f**2 q(f) for float32; for float64 the polynomial in s = f / (2 + f) is so much shorter that it
    pays for the division.
    """
    form = v.format
    unit = 1 << form.mantissa  # one in the exponent's place
    half = (form.bias - 1) * unit + int((math.sqrt(2) - 1) * unit)  # the bits of sqrt(1/2)
    subnormal = v < form.smallest
    bits = v.replace(subnormal, v * form.one_ulp).as_bits().plus_bits(form.bias * unit - half)
    f = (bits & (unit - 1)).plus_bits(half).as_float() - 1.0
    # The exponent goes into the low bits of one_ulp, where it counts ones.
    exponent = (bits >> form.mantissa | (form.bias + form.mantissa) * unit).as_float()
    offset = form.one_ulp + form.bias
    e = exponent - v.choose(subnormal, offset + form.mantissa, offset)
    high, low = form.ln2
    small = e * low if last is None else e.fma(low, last)
    if form is _FLOAT:
        rest = _polynomial(f, form.log1p).fma(f * f, small)
    else:
        s = f / (f + 2.0)
        rest = s.fma(_polynomial(s * s, form.log1p) * (s * s) - f, small)  # f - s f = 2 s, without its rounding
    y = e.fma(high, f + rest)
    y = v.choose(v.equals(0.0), -math.inf, math.nan).replace(v > 0.0, y)
    return v.replace(v < math.inf, y)


def tanh(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh(a) = a + a**3 q(a**2) where it is below 1/2, from there on 1 - 2 / (exp(2 a) + 1), for a = |x|.

    Worst error 1.96 ULP (float32), 1.54 ULP (float64).
    """
    v = _Value(builder, x)
    form = v.format
    a = abs(v)
    a = a.replace(a > form.tanh_limit, form.tanh_limit)
    square = a * a
    near = _polynomial(square, form.tanh_near).fma(a * square, a)
    # Here ln 2 needs no second part: 1 - tanh(a) falls faster than the error of n ln 2 grows.
    n, shifted = _round(a, 2 / LN2, form.bias - 1)
    exp_2r = _polynomial(n.fma(-LN2 / 2, a), form.tanh_far)
    far = 1.0 - 1.0 / _power_of_two(shifted).fma(exp_2r, 0.5)
    return far.replace(a < math.log(3) / 2, near).copysign(v).raw
