"""One case, measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from xpnn.backends.task import BackendError
from xpnn.backends.trace import SubsetError
from xpnn.benchmarks import ceiling, peers
from xpnn.benchmarks.cases import Case
from xpnn.benchmarks.timing import Timing, extra_memory, interleave

QUICK, FULL = 0.08, 0.3  # seconds of timing for each contender of a case


@dataclass
class Result:
    """What one case's run has found.

    Attributes
    ----------
    limit
        The name of the fastest ceiling, "" where the case could not run.
    timings
        By contender: the ceiling's candidates among them.
    memory
        By contender, peak bytes beyond inputs and results; None where its library does not say.
    notes
        Who was not measured, and why.
    """

    case: Case
    limit: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, contender: str) -> float | None:
        """How many times as long as fused xpnn a contender takes."""
        if contender not in self.timings:
            return None
        return self.timings[contender].seconds / self.timings[peers.OURS].seconds


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
        racing, result.notes = peers.contenders(case, arrays, others)
    except (BackendError, SubsetError) as error:
        result.notes.append(f"{case.group}: not measured: {error}")
        return result
    limits = ceiling.contenders(case, arrays)
    result.timings = interleave(racing | limits, seconds)
    result.limit = min(limits, key=lambda name: result.timings[name].seconds)
    result.memory = {name: extra_memory(contender) for name, contender in racing.items()}
    return result
