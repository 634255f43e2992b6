"""What a case could take at best: a copy of the same bytes, or for a layer its bare matrix products.

A copy reads half of a case's bytes and writes the other half, so that its working set is the case's. It is the best
of three: `np.copyto` on the calling thread; a plain copy; and one with non-temporal stores, which spare the read of
what is overwritten. The latter two are small Numba kernels of this module's, shared out over as many of Numba's threads
as xpnn uses, in the threading layer that xpnn has started. For rows of a few values a copy is far out of reach: there
arithmetic and the call itself are the limit, not memory.
"""

from __future__ import annotations

import functools
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
    half = -(-case.bytes // (2 * LINE)) * LINE  # whole lines
    source, target = _lines(half), _lines(half)
    source[:] = 1
    target[:] = 0  # touched once, so that no page is missing while it is timed
    found = {"copy": Contender(functools.partial(np.copyto, target, source))}
    threads = pool.count()
    if case.bytes >= THREADED:
        plain, streaming = _kernels()
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
def _kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """The plain and the non-temporal copy, compiled."""
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

    return copy_lines(False), copy_lines(True)
