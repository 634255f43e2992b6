"""Timing contenders side by side, in turn and in turn again, so that whatever the machine does meets all of them alike.

The order changes from round to round: otherwise one contender would always find the caches, and the threads of another
library, as the same neighbour leaves them.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONG = 1.0  # seconds from which a call is not repeated more than it must
SAMPLE = 1e-3  # seconds that one sample lasts at least; shorter calls are repeated within it
PAUSE = 1.5e-2  # seconds between samples, in which the threads of the last contender's library stop spinning
ROUNDS = 3, 200  # at least, at most
NOISE = 1 << 23  # bytes by which resident memory may change for reasons of its own


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes
    ----------
    call
        Timed with its own overhead: a `functools.partial` for most, about 40 ns.
    scope
        Entered around each sample, outside its time.
    reports_memory
        Whether what it allocates is seen by tracemalloc; NumPy's arrays are, other libraries' are not.
    """

    call: Callable[[], Any]
    scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    reports_memory: bool = True


@dataclass(frozen=True)
class Timing:
    """A contender's median over samples, in seconds a call, with the quartiles around it."""

    seconds: float
    quartiles: tuple[float, float]
    samples: int
    calls_per_sample: int


def interleave(contenders: Mapping[str, Contender], seconds: float) -> dict[str, Timing]:
    """Time contenders in turn until the time is spent, but for three rounds at least.

    Before each sample of a short call as many calls go untimed: they wake its threads and warm what the others have driven from
    the caches.

    Parameters
    ----------
    seconds
        How long each contender may take, unless three rounds take longer.
    """
    loops: dict[str, int] = {}
    for name, contender in contenders.items():
        with contender.scope():
            once = _sample(contender.call, 1)
            if once < LONG:  # the first call warms
                once = min(_sample(contender.call, 1) for _ in range(3))
            if once < SAMPLE:  # one call's time may be mostly the clock's: ask again
                once = min(_sample(contender.call, 10) / 10 for _ in range(3))
        loops[name] = max(1, round(SAMPLE / max(once, 1e-9)))
    end = time.perf_counter() + seconds * len(contenders)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    least, most = ROUNDS
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            contender = contenders[name]
            _wait(PAUSE)
            with contender.scope():
                if not samples[name] or samples[name][-1] < 10 * SAMPLE:
                    _sample(contender.call, loops[name])
                samples[name].append(_sample(contender.call, loops[name]) / loops[name])
    return {n: _timing(s, loops[n]) for n, s in samples.items()}


def _resident(contender: Contender) -> int | None:
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    with contender.scope():
        gc.collect()
        before = _status("VmRSS")
        try:
            reset.write_text("5")  # has the peak start again from now
        except OSError:
            return None
        result = contender.call()
        peak, after = _status("VmHWM"), _status("VmRSS")
    del result
    extra = peak - max(before, after)
    return extra if extra > NOISE else None


def _status(what: str) -> int:
    """Bytes of this process's resident memory, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def _timing(samples: list[float], loops: int) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (low, high), len(samples), loops)


def _wait(seconds: float) -> None:
    """Without sleep, after which a processor is slow for as long as it slept."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _sample(call: Callable[[], Any], count: int) -> float:
    turns = range(count)
    start = time.perf_counter()
    for _ in turns:
        call()
    return time.perf_counter() - start


def extra_memory(contender: Contender) -> int | None:
    """Peak of the bytes that a call allocates beyond its inputs and its results; in a call of its own, untimed.

    For a library that does not report to tracemalloc, what the process's resident memory peaks at; None where the system
    does not tell, or where that is too little to tell from noise.
    """
    if not contender.reports_memory:
        return _resident(contender)
    with contender.scope():
        contender.call()
        tracemalloc.start()
        try:
            contender.call()  # tracemalloc's own first-time allocations
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            result = contender.call()
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    del result
    return max(0, peak - max(after, before))
