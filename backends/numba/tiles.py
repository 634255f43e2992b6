"""Sixteen rows at a time: how emitted loops read short rows so that a lane is a row.

A tile holds `W` rows of a matrix, turned: its line `j` has column `j` of them all. What is done for a row, such as the
logarithm of its sum, is then done for all of them at once, and a reduction along the row is a loop over lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from xpnn.backends.numba import half
from xpnn.backends.numba.elementary import splat
from xpnn.backends.numba.lanes import Lanes, mask, suffix, width
from xpnn.backends.numba.memory import ask_for
from xpnn.backends.numba.rows import masked

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _turned(builder: Any, vectors: list[ir.Value]) -> list[ir.Value]:
    """Some vectors with each 128 bits of all of them, which are a square, transposed.

    Interleaving within 128 bits is what every processor has instructions for.
    """
    size, count = len(vectors), vectors[0].type.count
    held, step = list(vectors), 1
    while step < size:
        for a in (k for k in range(size) if not k & step):
            pair = held[a], held[a + step]
            for start, target in ((0, a), (size // 2, a + step)):
                firsts = [square + start + u for square in range(0, count, size) for u in range(0, size // 2, step)]
                lanes = [side + first + t for first in firsts for side in (0, count) for t in range(step)]
                held[target] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_I32, count), lanes))
        step *= 2
    return [held[k] for k in ((0, 2, 1, 3) if size == 4 else (0, 1))]


def _joined(builder: Any, parts: list[ir.Value]) -> ir.Value:
    """Short vectors as one."""
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        both = ir.Constant(ir.VectorType(_I32, count), list(range(count)))
        parts = [builder.shuffle_vector(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _parts(builder: Any, vector: ir.Value, size: int) -> list[ir.Value]:
    """A vector as short ones."""
    empty = ir.Constant(vector.type, ir.Undefined)
    starts = range(0, vector.type.count, size)
    return [
        builder.shuffle_vector(vector, empty, ir.Constant(ir.VectorType(_I32, size), list(range(k, k + size)))) for k in starts
    ]


class _Square:
    """W rows of a matrix from row `i` on, of which the first `n` are there, and as many columns as 128 bits hold, from `j` on.

    Where some of that is not there, a scratch of whole rows is read or written in the matrix's place.
    """

    def __init__(self, context: Any, builder: Any, kind: Any, array: ir.Value, i: ir.Value, n: ir.Value, j: ir.Value) -> None:
        source = context.make_array(kind)(context, builder, array)
        self.own_stride, _ = cgutils.unpack_tuple(builder, source.strides)
        _, columns = cgutils.unpack_tuple(builder, source.shape)
        self.builder, self.n, self.left = builder, n, builder.sub(columns, j)
        self.count, self.size = _width(kind.dtype), _size_of_square(kind.dtype)
        element = context.get_data_type(kind.dtype)
        self.vector, self.align = ir.VectorType(element, self.size), _size(element)
        enough = builder.icmp_signed(">=", self.left, _I64(self.size))
        self.whole = builder.and_(enough, builder.icmp_signed(">=", n, _I64(self.count)))
        start = builder.gep(source.data, [j])
        self.own_start = cgutils.pointer_add(builder, start, builder.mul(i, self.own_stride), self.vector.as_pointer())
        self.scratch = cgutils.alloca_once(builder, self.vector, size=self.count)
        self.start = builder.select(self.whole, self.own_start, self.scratch)
        self.stride = builder.select(self.whole, self.own_stride, _I64(self.align * self.size))

    def load(self) -> list[ir.Value]:
        """As many vectors as there are columns; the k-th has the k-th row of each 128 bits."""
        b, zero = self.builder, ir.Constant(self.vector, None)
        with b.if_then(b.not_(self.whole), likely=False):
            for k in range(self.count):
                b.store(zero, b.gep(self.scratch, [_I64(k)]))
            rows = b.select(b.icmp_signed("<", self.n, _I64(self.count)), self.n, _I64(self.count))
            with cgutils.for_range(b, rows) as loop:
                b.store(self._masked("load", loop.index, self.vector, zero), b.gep(self.scratch, [loop.index]))
        rows = [b.load(self._row(k), align=self.align) for k in range(self.count)]
        return [_joined(b, rows[k :: self.size]) for k in range(self.size)]

    def store(self, vectors: list[ir.Value]) -> None:
        b = self.builder
        parts = [_parts(b, vector, self.size) for vector in vectors]
        for k in range(self.count):
            b.store(parts[k % self.size][k // self.size], self._row(k), align=self.align)
        with b.if_then(b.not_(self.whole), likely=False), cgutils.for_range(b, self.n) as loop:
            self._masked("store", loop.index, ir.VoidType(), b.load(b.gep(self.scratch, [loop.index])))

    def _row(self, k: int) -> ir.Value:
        return cgutils.pointer_add(self.builder, self.start, self.builder.mul(self.stride, _I64(k)), self.start.type)

    def _masked(self, name: str, k: ir.Value, result: ir.Type, content: ir.Value) -> ir.Value:
        """A load or a store of what is there of a row."""
        b = self.builder
        address = cgutils.pointer_add(b, self.own_start, b.mul(self.own_stride, k), self.start.type)
        args = [address, _I32(self.align), mask(b, self.left, self.size), content]
        if name == "store":
            args = [args.pop(), *args]
        return masked(b, name, result, args, self.vector)


def _width(element: Any) -> int:
    return width(types.float32 if element == types.uint16 else element)


def _size_of_square(element: Any) -> int:
    return _width(element) // 4


def _line(builder: Any, data: ir.Value, j: ir.Value, count: int) -> ir.Value:
    """The address of a tile's line."""
    start = builder.gep(data, [builder.mul(j, _I64(count))])
    return builder.bitcast(start, ir.VectorType(data.type.pointee, count).as_pointer())


def _turner(name: str, back: bool) -> Any:
    def typed(typingctx: Any, matrix: Any, i: Any, n: Any, tile: Any) -> Any:
        count, size = _width(matrix.dtype), _size_of_square(matrix.dtype)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, first, number, target = args
            array = context.make_array(sig.args[0])(context, builder, source)
            lines = context.make_array(sig.args[3])(context, builder, target).data
            _, columns = cgutils.unpack_tuple(builder, array.shape)
            with cgutils.for_range_slice(builder, _I64(0), columns, _I64(size), _I64) as (j, _):
                square = _Square(context, builder, sig.args[0], source, first, number, j)
                places = [_line(builder, lines, builder.add(j, _I64(k)), count) for k in range(size)]
                if back:
                    rows = _turned(builder, [builder.load(place, align=64) for place in places])
                    square.store([half.narrow(builder, name, row) if name else row for row in rows])
                else:
                    rows = [half.widen(builder, name, row) if name else row for row in square.load()]
                    for line, place in zip(_turned(builder, rows), places, strict=True):
                        builder.store(line, place, align=64)
            return context.get_dummy_value()

        return types.void(matrix, types.intp, types.intp, tile), lower

    typed.__doc__ = "Fill a tile with `n` rows of a matrix from row `i` on; lanes beyond hold zeros."
    if back:
        typed.__doc__ = "Write the first `n` lanes of a tile to the rows of a matrix from row `i` on."
    return intrinsic(typed)


@intrinsic
def line(typingctx: Any, tile: Any, j: Any) -> Any:
    """Column `j` of all rows of a tile."""
    lanes = Lanes(tile.dtype, width(tile.dtype))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.load(_line(builder, data, args[1], lanes.count), align=64)

    return lanes(tile, types.intp), lower


@intrinsic
def set_line(typingctx: Any, tile: Any, j: Any, value: Any) -> Any:
    """Write column `j` of all rows of a tile."""
    count = width(tile.dtype)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        content = args[2] if isinstance(value, Lanes) else splat(builder, args[2], count)
        builder.store(content, _line(builder, data, args[1], count), align=64)
        return context.get_dummy_value()

    return types.void(tile, types.intp, value), lower


@intrinsic
def gather(typingctx: Any, table: Any, k: Any, value: Any) -> Any:
    """Add lanes to line `k` of a table in double precision."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        place = _line(builder, data, args[1], value.count)
        wide = args[2] if value.element == types.float64 else builder.fpext(args[2], place.type.pointee)
        builder.store(builder.fadd(builder.load(place, align=64), wide), place, align=64)
        return context.get_dummy_value()

    return types.void(table, types.intp, value), lower


@intrinsic
def gathered(typingctx: Any, table: Any, k: Any, zero: Any) -> Any:
    """Line `k` of such a table; its lanes are as many as make one of `zero`'s dtype."""
    lanes = Lanes(types.float64, width(zero))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.load(_line(builder, data, args[1], lanes.count), align=64)

    return lanes(table, types.intp, zero), lower


@intrinsic
def rounded(typingctx: Any, value: Any, zero: Any) -> Any:
    """Lanes in double precision, rounded to `zero`'s dtype."""
    lanes = Lanes(zero, value.count)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(context.get_value_type(zero), value.count)
        return args[0] if value == lanes else builder.fptrunc(args[0], kind)

    return lanes(value, zero), lower


# --- one value a row ---------------------------------------------------------------------------------------------------


class _Spots:
    """An element for each lane: `offsets` bytes after an address, where there is one."""

    def __init__(self, builder: Any, data: ir.Value, offsets: ir.Value, there: ir.Value) -> None:
        element, count = data.type.pointee, offsets.type.count
        places = builder.add(splat(builder, builder.ptrtoint(data, _I64), count), offsets)
        self.addresses = builder.inttoptr(places, ir.VectorType(data.type, count))
        self.builder, self.there, self.vector = builder, there, ir.VectorType(element, count)
        self.align = _I32(_size(element))

    def load(self) -> ir.Value:
        """The elements, 0 where there is none."""
        zero = ir.Constant(self.vector, None)
        return self._call("gather", self.vector, [self.addresses, self.align, self.there, zero])

    def store(self, content: ir.Value) -> None:
        self._call("scatter", ir.VoidType(), [content, self.addresses, self.align, self.there])

    def _call(self, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(result, [a.type for a in args])
        full_name = f"llvm.masked.{name}.{suffix(self.vector)}.v{self.vector.count}p0"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, full_name), args)


def _size(element: ir.Type) -> int:
    return element.width // 8 if isinstance(element, ir.IntType) else 4 if isinstance(element, ir.FloatType) else 8


def _numbers(count: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I64, count), list(range(count)))


class _Column:
    """`n` elements `stride` bytes apart, a lane for each: side by side and all there, or the first ones there, or apart."""

    def __init__(self, builder: Any, start: ir.Value, stride: ir.Value, n: ir.Value, count: int) -> None:
        self.builder, self.vector = builder, ir.VectorType(start.type.pointee, count)
        self.align = _size(self.vector.element)
        self.dense = builder.icmp_signed("==", stride, _I64(self.align))
        self.whole = builder.and_(self.dense, builder.icmp_signed(">=", n, _I64(count)))
        self.there = mask(builder, n, count)
        offsets = builder.mul(splat(builder, stride, count), _numbers(count))
        self.spots = _Spots(builder, start, offsets, self.there)
        self.address = builder.bitcast(start, self.vector.as_pointer())

    def load(self) -> ir.Value:
        b = self.builder

        def some() -> ir.Value:
            args = [self.address, _I32(self.align), self.there, ir.Constant(self.vector, None)]
            return masked(b, "load", self.vector, args, self.vector)

        return self._either(
            self.whole, lambda: b.load(self.address, align=self.align), lambda: self._either(self.dense, some, self.spots.load)
        )

    def store(self, content: ir.Value) -> None:
        b = self.builder

        def some() -> None:
            masked(b, "store", ir.VoidType(), [content, self.address, _I32(self.align), self.there], self.vector)

        self._either(
            self.whole,
            lambda: b.store(content, self.address, align=self.align),
            lambda: self._either(self.dense, some, lambda: self.spots.store(content)),
        )

    def _either(self, condition: ir.Value, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """What one of two ways gives; the first one is likelier."""
        b, found = self.builder, []
        with b.if_else(condition, likely=True) as (yes, no):
            for branch, way in ((yes, one), (no, other)):
                with branch:
                    found.append((way(), b.block))
        if found[1][0] is None or found[1][0].type != self.vector:
            return None
        result = b.phi(self.vector)
        for value, block in found:
            result.add_incoming(value, block)
        return result


def _only_column(context: Any, builder: Any, kind: Any, matrix: ir.Value, i: ir.Value, n: ir.Value, count: int) -> _Column:
    """The only column of a matrix, `n` rows of it from row `i` on."""
    array = context.make_array(kind)(context, builder, matrix)
    stride, _ = cgutils.unpack_tuple(builder, array.strides)
    return _Column(builder, cgutils.pointer_add(builder, array.data, builder.mul(i, stride), array.data.type), stride, n, count)


class _Columns:
    """The columns of the rows from row `i` on, all of one plane."""

    def __init__(self, context: Any, builder: Any, kind: Any, planes: ir.Value, i: ir.Value) -> None:
        array = context.make_array(kind)(context, builder, planes)
        _, rows, self.number = cgutils.unpack_tuple(builder, array.shape)
        to_plane, self.to_row, self.to_column = cgutils.unpack_tuple(builder, array.strides)
        offset = builder.mul(builder.udiv(i, rows), to_plane)
        offset = builder.add(offset, builder.mul(builder.urem(i, rows), self.to_row))
        self.builder = builder
        self.start = cgutils.pointer_add(builder, array.data, offset, array.data.type)

    def at(self, j: ir.Value) -> ir.Value:
        """The address of one of them."""
        return cgutils.pointer_add(self.builder, self.start, self.builder.mul(j, self.to_column), self.start.type)


def _cutter(name: str, back: bool) -> Any:
    def typed(typingctx: Any, planes: Any, i: Any, n: Any, tiles: Any, pitch: Any) -> Any:
        count = _width(planes.dtype)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, first, number, target, apart = args
            lines = context.make_array(sig.args[3])(context, builder, target).data
            columns = _Columns(context, builder, sig.args[0], source, first)
            beyond = builder.mul(number, columns.to_row)
            with cgutils.for_range(builder, columns.number) as column:
                start = columns.at(column.index)
                steps = cgutils.for_range_slice(builder, _I64(0), number, _I64(count), _I64)
                with steps as (done, which):
                    place = _line(builder, lines, builder.add(builder.mul(which, apart), column.index), count)
                    address = cgutils.pointer_add(builder, start, builder.mul(done, columns.to_row), start.type)
                    # the rows after these are done next, and nothing foresees that by itself
                    ask_for(builder, cgutils.pointer_add(builder, address, beyond, start.type), back)
                    piece = _Column(builder, address, columns.to_row, builder.sub(number, done), count)
                    if back:
                        content = builder.load(place, align=64)
                        piece.store(half.narrow(builder, name, content) if name else content)
                    else:
                        found = piece.load()
                        builder.store(half.widen(builder, name, found) if name else found, place, align=64)
            return context.get_dummy_value()

        return types.void(planes, types.intp, types.intp, tiles, types.intp), lower

    typed.__doc__ = """Fill tiles, `pitch` lines each, with `n` rows of a plane from row `i` on; lanes beyond hold zeros."""
    if back:
        typed.__doc__ = "Write the first `n` lanes of tiles, `pitch` lines each, to the rows of a plane from row `i` on."
    return intrinsic(typed)


def _row_loader(name: str) -> Any:
    def typed(typingctx: Any, like: Any, matrix: Any, i: Any, n: Any) -> Any:
        lanes = Lanes(types.float32 if name else matrix.dtype, width(like))

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _, source, first, number = args
            found = _only_column(context, builder, sig.args[1], source, first, number, lanes.count).load()
            return half.widen(builder, name, found) if name else found

        return lanes(like, matrix, types.intp, types.intp), lower

    typed.__doc__ = """The values that `n` rows of a matrix of one column have, from row `i` on; 0 in the lanes beyond."""
    return intrinsic(typed)


def _row_storer(name: str) -> Any:
    def typed(typingctx: Any, like: Any, matrix: Any, i: Any, n: Any, value: Any) -> Any:
        count = width(like)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _, target, first, number, content = args
            content = content if isinstance(value, Lanes) else splat(builder, content, count)
            content = half.narrow(builder, name, content) if name else content
            _only_column(context, builder, sig.args[1], target, first, number, count).store(content)
            return context.get_dummy_value()

        return types.void(like, matrix, types.intp, types.intp, value), lower

    typed.__doc__ = """Write the first `n` lanes to a matrix of one column, from row `i` on."""
    return intrinsic(typed)


def _picker(name: str, turned: bool) -> Any:
    def typed(typingctx: Any, values: Any, columns: Any, length: Any) -> Any:
        lanes = Lanes(types.float32 if name else values.dtype, columns.count)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            place = args[1]
            inside = builder.icmp_unsigned("<", place, splat(builder, args[2], lanes.count))
            if turned:
                shift = ir.Constant(place.type, [lanes.count] * lanes.count)
                place = builder.add(builder.mul(place, shift), _numbers(lanes.count))
            size = ir.Constant(place.type, [_size(data.type.pointee)] * lanes.count)
            found = _Spots(builder, data, builder.mul(place, size), inside).load()
            found = half.widen(builder, name, found) if name else found
            return builder.select(inside, found, ir.Constant(found.type, [float("nan")] * lanes.count))

        return lanes(values, columns, types.intp), lower

    where = "a tile, one in each lane's row" if turned else "a row"
    typed.__doc__ = f"The elements at `columns` of {where}; NaN outside the first `length`."
    return intrinsic(typed)


@intrinsic
def first_of(typingctx: Any, value: Any, n: Any, like: Any) -> Any:
    """The first `n` lanes in double precision, or a number in as many lanes as there are of the dtype of `like`; then zeros."""
    lanes = Lanes(types.float64, width(like))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = context.get_value_type(lanes)
        content = args[0] if isinstance(value, Lanes) else splat(builder, args[0], lanes.count)
        if content.type != kind:
            content = builder.fpext(content, kind)
        return builder.select(mask(builder, args[1], lanes.count), content, ir.Constant(kind, None))

    return lanes(value, types.intp, like), lower


@intrinsic
def nothing(typingctx: Any, like: Any) -> Any:
    """float64 lanes of zeros, as many as there are of the dtype of `like`."""
    lanes = Lanes(types.float64, width(like))
    return lanes(like), lambda context, builder, sig, args: ir.Constant(context.get_value_type(lanes), None)


@intrinsic
def anywhere(typingctx: Any, condition: Any) -> Any:
    """Whether a condition holds in one of the lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.IntType(condition.count)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], kind), kind(0))

    return types.boolean(condition), lower


turn, turn_float16, turn_bfloat16 = (_turner(name, back=False) for name in ("", "float16", "bfloat16"))
turn_back, turn_back_float16, turn_back_bfloat16 = (_turner(name, back=True) for name in ("", "float16", "bfloat16"))
cut_out, cut_out_float16, cut_out_bfloat16 = (_cutter(name, back=False) for name in ("", "float16", "bfloat16"))
put_back, put_back_float16, put_back_bfloat16 = (_cutter(name, back=True) for name in ("", "float16", "bfloat16"))
load_rows, load_rows_float16, load_rows_bfloat16 = map(_row_loader, ("", "float16", "bfloat16"))
store_rows, store_rows_float16, store_rows_bfloat16 = map(_row_storer, ("", "float16", "bfloat16"))
pick, pick_float16, pick_bfloat16 = (_picker(name, turned=False) for name in ("", "float16", "bfloat16"))
pick_line = _picker("", turned=True)
