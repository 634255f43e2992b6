"""What each kernel's pass takes, and what its parts would take alone: docs/speed.md tells what it shows.

    python tools/gaps.py FILE.json
    python tools/readme_table.py gaps FILE.json

All are medians, measured in turn without rivals in the process:

- the whole pass, and the same into its input's memory where that is allowed;
- memory: the best copy, or read, of as many bytes;
- exponentials and their like, on numbers in the first cache;
- the loops: the same pass on one thread over so few rows that everything stays in the second cache, less what the call
  takes, scaled up to the case and shared out over the threads.
"""

import datetime
import functools
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xpnn
from xpnn.backends.choice import use_backend
from xpnn.backends.kernel import registry
from xpnn.backends.numba import pool
from xpnn.benchmarks import ceiling, machine, peers
from xpnn.benchmarks.cases import Case, cases
from xpnn.benchmarks.report import duration
from xpnn.benchmarks.timing import Contender, interleave

LARGE, SHORT, FLAT = (2048, 32000), (4096, 10), (1 << 24,)
CACHED = 1 << 16  # elements of an array of which three fit a second cache
SECONDS = 0.3


def chosen() -> list[Case]:
    """Every direction of every kernel over large arrays; some in half precision too, and over short rows."""
    kernels = [k for k in dict.fromkeys(registry.values()) if getattr(xpnn, k.__name__, None) is k]
    found = [c for c in cases(kernels) if c.shape in (LARGE, FLAT)]
    some = [xpnn.cross_entropy, xpnn.softmax]
    found += cases(some, dtypes=("bfloat16", "float16"), shape=LARGE)
    return found + cases([*some, xpnn.log_softmax, xpnn.logsumexp], shape=SHORT)


def smaller(case: Case, elements: int) -> Case:
    """The same on fewer elements: fewer rows, if it has rows."""
    shape = (elements,) if len(case.shape) == 1 else (max(1, elements // case.shape[1]), case.shape[1])
    return Case(case.kernel, case.direction, shape, case.dtype, case.source)


def one_thread(contender: Contender) -> Callable[[], Any]:
    """A call whose work stays on this thread."""

    def call() -> None:
        os.environ["XPNN_NUM_THREADS"] = "1"
        try:
            contender.call()
        finally:
            del os.environ["XPNN_NUM_THREADS"]

    return call


def in_place(case: Case, arrays: dict[str, Any]) -> dict[str, Contender]:
    """The pass over its first input's memory, where one result may lie there."""
    over = {n: a.copy() for n, a in arrays.items()}
    args = [over[n] for n in case.kernel.declaration.inputs if n in over]
    if case.direction == "backward" or args[0].shape != case.shape:
        return {}
    run = case.kernel if case.direction == "forward" else case.kernel.value_and_grad
    call = functools.partial(run, *args, out=args[0])
    try:
        with use_backend("numba"):
            call()
    except (TypeError, ValueError):  # the result is of another shape
        return {}
    return {"in place": Contender(call, functools.partial(use_backend, "numba"))}


def parts(case: Case) -> dict[str, float]:
    """Seconds by what is measured."""
    arrays = case.arrays()
    limits = ceiling.contenders(case, arrays)
    racing = {"whole": peers._own(case, arrays, "numba"), **in_place(case, arrays), **limits}
    few, least = smaller(case, CACHED), smaller(case, 16)
    for name, fewer in (("few", few), ("least", least)):
        own = peers._own(fewer, fewer.arrays(), "numba")
        racing[name] = Contender(one_thread(own), own.scope)
    seconds = {name: timing.seconds for name, timing in interleave(racing, SECONDS).items()}
    found = {name: seconds[name] for name in ("whole", "in place") if name in seconds}
    found["memory"] = min(seconds[name] for name in limits)
    found["arithmetic"] = ceiling.arithmetic(case)
    more = math.prod(few.shape) - math.prod(least.shape)
    found["loops"] = (seconds["few"] - seconds["least"]) / more * math.prod(case.shape) / pool.count()
    return found


def main() -> None:
    """Measure, print and write."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = []
    for case in chosen():
        found = parts(case)
        rows.append({"case": case.name, **found})
        print(case.name, ", ".join(f"{name} {duration(value)}" for name, value in found.items()), flush=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    document = {"date": date, "machine": machine.describe(), "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
