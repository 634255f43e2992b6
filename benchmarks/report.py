"""What a run has found: as a table, as plain counts of wins and losses, and as JSON."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from xpnn.benchmarks import machine
from xpnn.benchmarks.cases import Case
from xpnn.benchmarks.peers import OURS
from xpnn.benchmarks.run import Result

if TYPE_CHECKING:
    from rich.table import Table


def duration(seconds: float) -> str:
    """Three significant digits, in the unit that suits.

    >>> duration(1.234e-6), duration(0.0123), duration(12.3)
    ('1.23 µs', '12.3 ms', '12.3 s')
    """
    for unit, scale in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if round(seconds * scale, 1) < 1000:
            return f"{_three(seconds * scale)} {unit}"
    return f"{_three(seconds)} s"


def amount(size: int | None) -> str:
    """Bytes, in the unit that suits; a dash where unknown.

    >>> amount(916), amount(69_744_147), amount(None)
    ('916 B', '69.7 MB', '–')
    """
    if size is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{_three(size / scale)} {unit}"
    return f"{size} B"


def _three(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def table(results: Sequence[Result]) -> Table:
    """Every measured case a row; a ratio above 1 is how many times faster fused xpnn is, below 1 it is slower."""
    from rich.text import Text

    measured = [r for r in results if r.timings]
    rivals = _rivals(measured)
    rows = []
    for r in measured:
        seconds, limit = r.timings[OURS].seconds, r.timings[r.limit].seconds
        ratios = [Text(text, style=style) for text, style in (_ratio(r.ratio(name)) for name in rivals)]
        speed = _three(r.case.bytes / seconds / 1e9)
        rows.append((r, [duration(seconds), speed, duration(limit), f"{100 * limit / seconds:.0f} %", *ratios]))
    return _table(["time", "GB/s", "limit", "% of\nlimit", *(f"×\n{name}" for name in rivals)], rows, CAPTION)


def memory(results: Sequence[Result]) -> Table:
    """What every case allocates at its peak beyond inputs and results, and what its rivals do."""
    measured = [r for r in results if r.timings]
    names = [OURS, *(name for name in _rivals(measured) if any(r.memory.get(name) for r in measured))]
    rows = [(r, [amount(r.memory.get(name)) for name in names]) for r in measured]
    return _table(names, rows, MEMORY)


def _table(headings: Sequence[str], rows: Iterable[tuple[Result, Sequence[Any]]], caption: str) -> Table:
    """A table of cases; each kernel, direction and dtype is named once."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", caption_style="dim")
    shown.add_column("case", no_wrap=True)
    for heading in ("size", *headings):
        shown.add_column(heading, justify="right", no_wrap=True)
    previous = ""
    for r, cells in rows:
        shown.add_row("" if label(r.case) == previous else label(r.case), r.case.size, *cells)
        previous = label(r.case)
    return shown


def label(case: Case) -> str:
    """Kernel, options and direction, and the dtype where it is not the usual one."""
    return case.group if case.dtype == "float32" else f"{case.group} {case.dtype}"


CAPTION = (
    "time: median of one call. GB/s: each array once. limit: a copy of as many bytes, measured beside it; for a layer its bare "
    "matrix products.\n× NAME: its time over ours, below 1 where we lose."
)
MEMORY = (
    "peak bytes beyond inputs and results; numpy is the formula composed on NumPy; other libraries by the process's resident "
    "memory, where that tells."
)


def _ratio(ratio: float | None) -> tuple[str, str]:
    if ratio is None:
        return "–", "dim"
    return f"{_three(ratio)}", "green" if ratio >= 1 else "bold red"


def _rivals(results: Iterable[Result]) -> list[str]:
    """Everybody but xpnn and the ceilings, in order of appearance."""
    return list(dict.fromkeys(name for r in results for name in r.memory if name != OURS))


def summary(results: Sequence[Result]) -> list[str]:
    """For each rival, wins counted and losses listed; then what was not measured."""
    lines = []
    for name in _rivals(results):
        ratios = {r.case: ratio for r in results if (ratio := r.ratio(name)) is not None}
        lost = [f"{label(c)} {c.size} ({_three(ratio)})" for c, ratio in ratios.items() if ratio < 1]
        lines.append(
            f"{name}: xpnn is faster in {len(ratios) - len(lost)} of {len(ratios)} cases"
            + (f", slower in: {', '.join(lost)}" if lost else "")
        )
    return lines + _notes(results)


def _notes(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(note for r in results for note in r.notes))


def document(results: Sequence[Result], load: float) -> dict[str, Any]:
    """The run as JSON: where and when, under what load by others, and every case's medians in seconds."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": load,
        "machine": machine.describe(),
        "cases": [_entry(r) for r in results if r.timings],
        "notes": _notes(results),
    }


def _entry(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "case": case.name,
        "kernel": case.kernel.__name__,
        "options": {n: getattr(v, "__name__", v) for n, v in case.options.items()},
        "direction": case.direction,
        "shape": case.shape,
        "dtype": case.dtype,
        "source": case.source,
        "bytes": case.bytes,
        "limit": result.limit,
        "timings": {
            name: {
                "seconds": t.seconds,
                "quartiles": t.quartiles,
                "samples": t.samples,
                "calls_per_sample": t.calls_per_sample,
                **({"extra_bytes": result.memory[name]} if name in result.memory else {}),
            }
            for name, t in result.timings.items()
        },
    }
