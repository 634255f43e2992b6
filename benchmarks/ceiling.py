"""What a case could take at best, measured beside it with the same threads: memory, arithmetic, or a layer's products.

*Memory.* A copy reads half of a case's bytes and writes the other half, so that its working set is the case's. It is the
best of three: `np.copyto` on the calling thread; a plain copy; and one with non-temporal stores, which spare the read of
what is overwritten. Where hardly anything is written, as by a loss without its gradient, all bytes are read instead. These
are small Numba kernels of this module's, shared out over as many of Numba's threads as xpnn uses, in the threading layer
that xpnn has started.

*Arithmetic.* How long the case's exponentials, logarithms and their like take alone, on numbers that lie in the first cache:
the library's own, which are the fastest known here. Additions and multiplications are not counted.

The limit is the longer of the two.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from xpnn.backends.kinds import Matrix
from xpnn.backends.numba import pool
from xpnn.backends.task import HALF
from xpnn.benchmarks.cases import Array, Case
from xpnn.benchmarks.timing import Contender

LINE = 64  # bytes: one vector, one cache line
THREADED = 1 << 16  # bytes from which threads are tried
STREAMED = 1 << 20  # bytes from which non-temporal stores are tried


def contenders(case: Case, arrays: dict[str, Array]) -> dict[str, Contender]:
    """The candidates for a case's ceiling; the fastest is the ceiling."""
    if case.is_product:
        (weight,) = (n for n, i in case.kernel.declaration.inputs.items() if Matrix in i.kinds)
        x, w = (a.astype(np.float32) if a.dtype.name in HALF else a for a in (next(iter(arrays.values())), arrays[weight]))
        out = np.empty((x.shape[0], w.shape[0]), x.dtype)
        if case.direction == "forward":
            return {"product": Contender(functools.partial(np.matmul, x, w.T, out=out))}
        dx, dw = np.empty_like(x), np.empty_like(w)

        def products() -> None:
            np.matmul(x, w.T, out=out)
            np.matmul(out, w, out=dx)
            np.matmul(out.T, x, out=dw)

        return {"products": Contender(products)}
    if case.written < case.bytes / 8:
        whole = _lines(-(-case.bytes // LINE) * LINE)
        whole[:] = 1
        return {"read, threads": Contender(functools.partial(_kernels()[2], whole, pool.count()))}
    half = -(-case.bytes // (2 * LINE)) * LINE  # whole lines
    source, target = _lines(half), _lines(half)
    source[:] = 1
    target[:] = 0  # touched once, so that no page is missing while it is timed
    found = {"copy": Contender(functools.partial(np.copyto, target, source))}
    threads = pool.count()
    if case.bytes >= THREADED:
        plain, streaming, _ = _kernels()
        found["copy, threads"] = Contender(functools.partial(plain, target, source, threads))
        if case.bytes >= STREAMED:
            found["copy, threads, non-temporal"] = Contender(functools.partial(streaming, target, source, threads))
    return found


def _lines(size: int) -> Array:
    """Bytes that begin with a cache line."""
    raw = np.empty(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size]


@functools.cache
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The plain and the non-temporal copy, and the read, compiled."""
    pool.runner()  # has the threading layer chosen as for xpnn itself
    from llvmlite import ir
    from numba import njit, prange, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    def copy_lines(streaming: bool) -> Any:
        @intrinsic  # type: ignore[untyped-decorator]
        def copy(typingctx: Any, target: Any, source: Any, first: Any, last: Any) -> Any:
            def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                to, of = (context.make_array(t)(context, builder, a).data for t, a in zip(sig.args[:2], args[:2], strict=True))
                vector = ir.VectorType(ir.IntType(8), LINE).as_pointer()
                to, of = builder.bitcast(to, vector), builder.bitcast(of, vector)
                with cgutils.for_range_slice(builder, args[2], args[3], ir.Constant(args[2].type, 1)) as (i, _):
                    load = builder.load(builder.gep(of, [i]), align=LINE)
                    store = builder.store(load, builder.gep(to, [i]), align=LINE)
                    if streaming:
                        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
                        store.set_metadata("nontemporal", one)
                return context.get_dummy_value()

            return types.void(target, source, types.intp, types.intp), lower

        @njit(parallel=True, nogil=True)  # type: ignore[untyped-decorator]
        def shared(target: Any, source: Any, threads: int) -> None:
            lines = len(target) // LINE
            for k in prange(threads):
                copy(target, source, k * lines // threads, (k + 1) * lines // threads)

        return shared

    @intrinsic  # type: ignore[untyped-decorator]
    def added(typingctx: Any, source: Any, first: Any, last: Any) -> Any:
        """The sum of some lines, as whole numbers: so that they are read."""

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.VectorType(ir.IntType(64), LINE // 8)
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            data = builder.bitcast(data, kind.as_pointer())
            sums = [cgutils.alloca_once_value(builder, ir.Constant(kind, [0] * kind.count)) for _ in range(4)]
            with cgutils.for_range_slice(builder, args[1], args[2], ir.Constant(args[1].type, 4)) as (i, _):
                for k, slot in enumerate(sums):
                    line = builder.load(builder.gep(data, [builder.add(i, ir.Constant(i.type, k))]), align=LINE)
                    builder.store(builder.add(builder.load(slot), line), slot)
            total = functools.reduce(builder.add, map(builder.load, sums))
            return functools.reduce(builder.add, [builder.extract_element(total, ir.IntType(32)(k)) for k in range(kind.count)])

        return types.int64(source, types.intp, types.intp), lower

    @njit(parallel=True, nogil=True)  # type: ignore[untyped-decorator]
    def read(source: Any, threads: int) -> int:
        fours = len(source) // (4 * LINE)
        total = 0
        for k in prange(threads):
            total += added(source, k * fours // threads * 4, (k + 1) * fours // threads * 4)
        return total

    return copy_lines(False), copy_lines(True), read


# --- arithmetic -----------------------------------------------------------------------------------------------------

ELEMENTS, TURNS = 1024, 5000  # of each thread, in its first cache, and how often in one sample
CHAIN = 16  # multiply-adds of each element: enough for the loads and stores not to count


@functools.cache
def seconds_each(name: str, dtype: str) -> float:
    """What one operation takes where memory does not matter, all threads at work: a function's, or a "multiply-add"."""
    pool.runner()
    from numba import njit, prange

    from xpnn.backends.numba import elementary, lanes
    from xpnn.backends.numba.rows import load, row, store

    def fma(builder: Any, a: Any) -> Any:
        value = elementary._Value(builder, a)
        for _ in range(CHAIN):
            value = value.fma(0.999, 0.001)
        return value.raw

    operation = lanes._elementwise("fma", fma) if name == "multiply-add" else getattr(lanes, name)
    computed = np.dtype("float32" if dtype in HALF else dtype)
    width = lanes.LANE_BYTES // computed.itemsize

    @njit(parallel=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def compute(x: Any, y: Any, threads: int) -> None:
        for k in prange(threads):
            given, made = row(x, k), row(y, k)
            for _ in range(TURNS):
                for j in range(0, ELEMENTS, width):
                    store(made, j, width, operation(load(given, j, width)))

    threads = pool.count()
    x = -np.random.default_rng(0).random((threads, ELEMENTS), computed)  # what `exp_nonpositive` and `log1p` take
    x = -x if name == "log" else x
    y = np.empty_like(x)
    compute(x, y, threads)
    call = functools.partial(compute, x, y, threads)
    best = min(_once(call) for _ in range(20))
    return best / (x.size * TURNS * (CHAIN if name == "multiply-add" else 1))


def _once(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def arithmetic(case: Case) -> float:
    """The seconds that a case's operations take at least; none are counted of a layer, whose products are timed beside it."""
    if case.is_product:
        return 0.0
    usual = {"exp": "exp_nonpositive"}  # the shorter form, which the built-in kernels use
    return sum(n * seconds_each(usual.get(name, name), case.dtype) for name, n in case.operations.items())


def rates() -> dict[str, float]:
    """What the machine can do: operations and bytes a second, all threads at work."""
    functions = ("exp_nonpositive", "tanh", "log")
    found = {f"{name}, float32": 1 / seconds_each(name, "float32") for name in functions}
    found["multiply-add, float32"] = 1 / seconds_each("multiply-add", "float32")
    n = 1024
    a, b, out = (np.ones((n, n), np.float32) for _ in range(3))
    product = functools.partial(np.matmul, a, b, out=out)
    found["multiply-add, float32, BLAS"] = n**3 / min(_once(product) for _ in range(5))
    plain, streaming, read = _kernels()
    threads = pool.count()
    for size in (1 << 18, 1 << 22, 1 << 26, 1 << 28):
        source, target = _lines(size // 2), _lines(size // 2)
        source[:], target[:] = 1, 0
        copies = [functools.partial(kernel, target, source, threads) for kernel in (plain, streaming)]
        found[f"bytes, copy of {size >> 10} KiB"] = size / min(_once(copy) for copy in copies for _ in range(5))
        sums = functools.partial(read, source, threads)
        found[f"bytes, read of {size >> 11} KiB"] = size / 2 / min(_once(sums) for _ in range(5))
    return found
