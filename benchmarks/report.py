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
        seconds, limit = r.timings[OURS].seconds, r.limit_seconds
        ratios = [Text(text, style=style) for text, style in (_ratio(r.ratio(name)) for name in rivals)]
        speed = _three(r.case.bytes / seconds / 1e9)
        bound = {"arithmetic": "exp", "product": "BLAS", "products": "BLAS"}.get(r.limit, "memory")
        rows.append((r, [duration(seconds), speed, duration(limit), bound, f"{100 * limit / seconds:.0f} %", *ratios]))
    return _table(["time", "GB/s", "limit", "by", "% of\nlimit", *(f"×\n{name}" for name in rivals)], rows, CAPTION)


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


def line(result: Result) -> str:
    """A case in few words, while the others run."""
    if not result.timings:
        return f"{result.case.name}: not measured"
    seconds = result.timings[OURS].seconds
    rivals = {name: ratio for name in result.memory if name != OURS and (ratio := result.ratio(name)) is not None}
    best = min(rivals, key=lambda name: rivals[name], default="")
    told = f"{result.case.name}: {duration(seconds)}, {100 * result.limit_seconds / seconds:.0f} % of the limit"
    return told + (f", {best} × {_three(rivals[best])}" if best else "")


def label(case: Case) -> str:
    """Kernel, options and direction, and the dtype where it is not the usual one."""
    return case.group if case.dtype == "float32" else f"{case.group} {case.dtype}"


CAPTION = (
    "time: median of one call. GB/s: each array once. limit: what memory or exponentials and their like take alone, whichever\n"
    "is longer; for a layer its bare matrix products. × NAME: its time over ours, below 1 where we lose."
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


def changes(document: dict[str, Any], before: dict[str, Any]) -> Table:
    """The cases that an earlier run has too, those that became slower first.

    A change counts as one where it is more than a tenth and the quartiles of the two runs lie apart.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    old = {c["case"]: c["timings"][OURS] for c in before["cases"]}
    pairs = [(c["case"], c["timings"][OURS], old[c["case"]]) for c in document["cases"] if c["case"] in old]
    shown = Table(
        box=box.SIMPLE_HEAD, title=f"against {before['date'][:10]}, commit {(before['machine']['commit'] or '?')[:12]}"
    )
    for heading in ("case", "before", "now", "× as fast", ""):
        shown.add_column(heading, justify="left" if heading in ("case", "") else "right", no_wrap=True)
    for name, now, then in sorted(pairs, key=lambda pair: pair[2]["seconds"] / pair[1]["seconds"]):
        ratio = then["seconds"] / now["seconds"]
        slower = ratio < 1 / 1.1 and now["quartiles"][0] > then["quartiles"][1]
        faster = ratio > 1.1 and now["quartiles"][1] < then["quartiles"][0]
        verdict = Text("slower", "bold red") if slower else Text("faster", "green") if faster else Text("")
        shown.add_row(name, duration(then["seconds"]), duration(now["seconds"]), _three(ratio), verdict)
    if before["machine"]["cpu"] != document["machine"]["cpu"]:
        shown.caption = f"another processor then: {before['machine']['cpu']}"
    return shown


def document(
    results: Sequence[Result], load: float, rates: dict[str, float], scaling: dict[str, dict[int, float]]
) -> dict[str, Any]:
    """The run as JSON: where and when, under what load by others, what the machine can do, and every case's seconds."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": load,
        "machine": machine.describe(),
        "rates": rates,
        "scaling": scaling,
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
        "written": case.written,
        "operations": case.operations,
        "limit": result.limit,
        "limit_seconds": result.limit_seconds,
        "timings": {
            name: {
                "seconds": t.seconds,
                "quartiles": t.quartiles,
                "samples": t.samples,
                "calls_per_sample": t.calls_per_sample,
                **({"extra_bytes": result.memory[name]} if name in result.memory else {}),
                **({"first_call_seconds": result.first_calls[name]} if name in result.first_calls else {}),
            }
            for name, t in result.timings.items()
        },
    }
