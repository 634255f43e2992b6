"""What a fused pass over large rows takes, and what each part of it would take alone: docs/speed.md tells what it shows.

    python tools/gaps.py [ROWSxCOLUMNS]

All are medians, measured in turn: the whole pass; the same into its input's memory, which spares a stream of stores around
the caches; copies of the bytes; and the exponentials alone, on numbers in the first cache.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import xpnn
from xpnn.backends.arrays import numpy_dtype
from xpnn.backends.numba import pool
from xpnn.benchmarks import ceiling
from xpnn.benchmarks.report import duration

ROUNDS = 15


def parts(name: str, dtype: str, rows: int, columns: int) -> dict[str, Callable[[], Any]]:
    """Calls by name."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns), "float32").astype(numpy_dtype(dtype))
    target, out = rng.integers(0, columns, rows), np.empty_like(x)

    def run(logits: Any, result: Any) -> Callable[[], Any]:
        if name == "softmax":
            return functools.partial(xpnn.softmax, logits, out=result)
        return functools.partial(xpnn.cross_entropy.value_and_grad, logits, target, out=result)

    over = x.copy()
    found = {"whole": run(x, out), "in place": run(over, over)}
    plain, around, _ = ceiling._kernels()
    source, copied = (ceiling._lines(x.nbytes // 64 * 64) for _ in range(2))
    source[:], copied[:] = 1, 0
    found["copy"] = functools.partial(plain, copied, source, pool.count())
    found["copy around the caches"] = functools.partial(around, copied, source, pool.count())
    return found


def main() -> None:
    shape = sys.argv[1] if len(sys.argv) > 1 else "2048x32000"
    rows, columns = map(int, shape.split("x"))
    for name in ("cross_entropy", "softmax"):
        for dtype in ("float32", "bfloat16", "float16"):
            calls = parts(name, dtype, rows, columns)
            samples: dict[str, list[float]] = {part: [] for part in calls}
            for _ in range(ROUNDS):
                for part, call in calls.items():
                    call()
                    start = time.perf_counter()
                    call()
                    samples[part].append(time.perf_counter() - start)
            samples["exp alone"] = [rows * columns * ceiling.seconds_each("exp_nonpositive", dtype)]
            told = ", ".join(f"{part} {duration(statistics.median(values))}" for part, values in samples.items())
            print(f"{name} {shape} {dtype}: {told}", flush=True)


if __name__ == "__main__":
    main()
