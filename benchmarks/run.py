"""One case, measured."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from xpnn.backends.numba import pool
from xpnn.backends.recording import SubsetError
from xpnn.backends.task import BackendError
from xpnn.benchmarks import ceiling, peers
from xpnn.benchmarks.cases import Case
from xpnn.benchmarks.timing import Contender, Timing, extra_memory, interleave

QUICK, FULL = 0.08, 0.3  # seconds of timing for each contender of a case


@dataclass
class Result:
    """What one case's run has found.

    Attributes
    ----------
    limit
        The name of what bounds the case: the fastest way to move its bytes, or "arithmetic" where that takes longer; "" where
        the case could not run.
    limit_seconds
        How long that takes.
    first_calls
        By contender, the seconds of its very first call: compiling, or finding what was compiled before.
    timings
        By contender: the ceiling's candidates among them.
    memory
        By contender, peak bytes beyond inputs and results; None where its library does not say.
    notes
        Who was not measured, and why.
    """

    case: Case
    limit: str = ""
    limit_seconds: float = 0.0
    first_calls: dict[str, float] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, contender: str) -> float | None:
        """How many times as long as fused xpnn a contender takes."""
        if contender not in self.timings:
            return None
        return self.timings[contender].seconds / self.timings[peers.OURS].seconds


def is_scaled(case: Case) -> bool:
    """Whether a case is measured with fewer threads too: one that fits the caches and one that does not, of a few kernels."""
    chosen = {"cross_entropy value_and_grad", "softmax forward", "tanh forward"}
    return case.group in chosen and case.shape in ((4096, 1000), (2048, 32000), (2**20,), (2**24,))


def scaling(case: Case, seconds: float = FULL) -> dict[int, float]:
    """Seconds of fused xpnn by the number of threads."""
    arrays = case.arrays()
    racing, _, _ = peers.contenders(case, arrays)
    own = racing[peers.OURS]

    def scope(threads: int) -> AbstractContextManager[None]:
        @contextlib.contextmanager
        def limited() -> Iterator[None]:
            before = os.environ.get("XPNN_NUM_THREADS")
            os.environ["XPNN_NUM_THREADS"] = str(threads)
            try:
                with own.scope():
                    yield
            finally:
                os.environ.pop("XPNN_NUM_THREADS")
                if before is not None:
                    os.environ["XPNN_NUM_THREADS"] = before

        return limited()

    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < pool.count()] + [pool.count()]
    found = interleave({str(n): Contender(own.call, functools.partial(scope, n)) for n in counts}, seconds)
    return {int(n): timing.seconds for n, timing in found.items()}


def measure(case: Case, *, others: Iterable[str] = (), seconds: float = FULL) -> Result:
    """Check and time all contenders of a case; a kernel that cannot be fused gives a result with a note alone.

    Raises
    ------
    WrongResultError
        Where a contender computes something else.
    """
    result = Result(case)
    try:
        arrays = case.arrays()
        racing, result.first_calls, result.notes = peers.contenders(case, arrays, others)
    except (BackendError, SubsetError) as error:
        result.notes.append(f"{case.group}: not measured: {error}")
        return result
    limits = ceiling.contenders(case, arrays)
    result.timings = interleave(racing | limits, seconds)
    result.limit = min(limits, key=lambda name: result.timings[name].seconds)
    result.limit_seconds = result.timings[result.limit].seconds
    if (least := ceiling.arithmetic(case)) > result.limit_seconds:
        result.limit, result.limit_seconds = "arithmetic", least
    result.memory = {name: extra_memory(contender) for name, contender in racing.items()}
    return result
