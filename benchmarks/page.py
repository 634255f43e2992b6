"""A run as one page that needs nothing else: limits, rivals, sizes, threads, memory.

Charts are SVG, bars are boxes; colours follow the reader's choice of light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from xpnn.benchmarks.peers import OURS
from xpnn.benchmarks.report import amount, duration

Point = tuple[float, float, str]  # x, y, what it says when pointed at
LIMIT = "limit"

STYLE = """
:root { color-scheme: light dark; --ink: #1a1c20; --soft: #666c78; --line: #d8dbe2; --paper: #fff; --card: #f6f7f9;
  --c0: #d1495b; --c1: #8d99ae; --c2: #2b7a78; --c3: #e0a100; --c4: #3a6ea5; --c5: #7b5ea7; --c6: #4f8a3c; --c7: #a0522d; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e8eaf0; --soft: #9aa1af; --line: #363b46; --paper: #14161a; --card: #1c1f25;
  --c0: #ff6b81; --c1: #9aa7bd; --c2: #4fb8b4; --c3: #f2c14e; --c4: #6fa8dc; --c5: #b39ddb; --c6: #8bc34a; --c7: #d08c60; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { margin: .3rem 0; color: var(--soft); max-width: 60rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .6rem 0; font-size: .85rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; margin-top: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; min-width: 0; }
.wide { overflow-x: auto; }
.wide svg { min-width: 40rem; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 2px .5rem; align-items: center;
  font-size: .8rem; }
.bars b { grid-column: 1 / -1; margin-top: .5rem; font-weight: 600; }
.bar { height: .75rem; border-radius: 2px; min-width: 1px; }
.bars span { white-space: nowrap; }
.bars .lost { color: var(--c0); font-weight: 600; }
.num { text-align: right; font-variant-numeric: tabular-nums; color: var(--soft); }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--line); stroke-width: 1; }
.roof { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; fill: none; }
.curve { fill: none; stroke-width: 2; }
"""
HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>xpnn benchmark</title>"""
ROOF = """Bytes a second beside how much arithmetic comes with each byte. The level lines are copies, in the caches and in
memory; the slope is where exponentials and their like alone take all the time. Point at a dot for its name."""
BARS = """Time of one call, shorter is better; in each case results were compared first. Behind the time: how many times ours;
red where we lose. <i>limit</i>: what memory, exponentials or matrix products take alone, and its share of our time."""
SIZES = "Bytes a second by bytes of the call; higher is better. Dashed: the limit."
THREADS = "How many times as fast as with one thread. Dashed: as many times as there are threads."
MEMORY = "Peak beyond arguments and results, where it is known and more than 1 kB."


def page_of(document: dict[str, Any]) -> str:
    """The page of a run that `report.document` describes, or that `xpnn bench --json` wrote."""
    machine, cases = document["machine"], document["cases"]
    names = dict.fromkeys(n for c in cases for n, t in c["timings"].items() if "first_call_seconds" in t)
    colours = {n: f"var(--c{k % 8})" for k, n in enumerate(names)}
    groups = _groups(cases)
    when = f"{document['date'][:10]}, commit {(machine['commit'] or 'unknown')[:12]}"
    versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
    where = f"{machine['cpu']}, {machine['threads']} threads; {when}. {versions}."
    threads = "".join(_threads(n, s) for n, s in document["scaling"].items())
    sections = [
        f"<h1>xpnn benchmark</h1><p>{escape(where)}</p>",
        _legend(colours),
        f'<h2>The roof</h2><p>{ROOF}</p><div class="card wide">{_roof(document)}</div>',
        _cards("Beside others", BARS, "".join(_bars(group, colours) for group in groups)),
        _cards("By size", SIZES, "".join(_sizes(group, colours) for group in groups if len(group) > 1)),
        _cards("By threads", THREADS, threads),
        _cards("Memory", MEMORY, "".join(_memory(group, colours) for group in groups)),
    ]
    body = "\n".join(sections)
    return f'<!doctype html>\n<html lang="en"><head>{HEAD}<style>{STYLE}</style></head>\n<body>{body}</body></html>\n'


def _cards(title: str, text: str, content: str) -> str:
    return f'<h2>{title}</h2><p>{text}</p><div class="cards">{content}</div>' if content else ""


def _groups(cases: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Cases of one kernel, direction and dtype together, smallest first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for c in cases:
        group, _, dtype = c["case"].rsplit(" ", 2)
        found.setdefault((group, dtype), []).append(c)
    return [sorted(group, key=lambda c: float(c["bytes"])) for group in found.values()]


def _title(group: Sequence[dict[str, Any]]) -> str:
    name, _, dtype = group[0]["case"].rsplit(" ", 2)
    return f"<h3>{escape(name)}, {escape(dtype)}</h3>"


def _legend(colours: dict[str, str]) -> str:
    entries = [f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items()]
    return f'<div class="legend">{"".join(entries)}</div>'


# --- bars -----------------------------------------------------------------------------------------------------------


def _bars(group: Sequence[dict[str, Any]], colours: dict[str, str]) -> str:
    rows = []
    for c in group:
        times = {n: c["timings"][n]["seconds"] for n in colours if n in c["timings"]}
        rows.append(f'<b title="{escape(c["source"])}">{escape(c["case"].rsplit(" ", 2)[1])}</b>')
        longest = max(times.values())
        for name, seconds in (LIMIT, c["limit_seconds"]), *times.items():
            ratio = seconds / times[OURS]
            note = duration(seconds)
            if name == LIMIT:
                note += f" · {ratio:.0%}"
            elif name != OURS:
                note += f' · <span class="{"lost" if ratio < 1 else ""}">{ratio:.3g}×</span>'
            rows.append(_bar(name, seconds / longest, note, colours.get(name, "var(--line)")))
    return f'<div class="card">{_title(group)}<div class="bars">{"".join(rows)}</div></div>'


def _bar(name: str, share: float, note: str, colour: str) -> str:
    box = f'<div class="bar" style="width:{max(share, 0.002):.2%};background:{colour}"></div>'
    return f'<span>{escape(name)}</span>{box}<span class="num">{note}</span>'


def _memory(group: Sequence[dict[str, Any]], colours: dict[str, str]) -> str:
    rows = []
    for c in group:
        sizes = {n: c["timings"][n].get("extra_bytes") for n in colours if n in c["timings"]}
        known = {n: size for n, size in sizes.items() if size is not None}
        if max(known.values(), default=0) < 1000:
            continue
        rows.append(f"<b>{escape(c['case'].rsplit(' ', 2)[1])}</b>")
        rows += [_bar(n, size / max(known.values()), amount(size), colours[n]) for n, size in known.items()]
    return f'<div class="card">{_title(group)}<div class="bars">{"".join(rows)}</div></div>' if rows else ""


# --- charts ---------------------------------------------------------------------------------------------------------


class Chart:
    """A drawing with two axes, logarithmic unless told otherwise."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], size: tuple[int, int] = (420, 240), log: bool = True):
        self.x, self.y, self.log = x, y, log
        self.width, self.height = size
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies."""

        def share(value: float, low: float, high: float) -> float:
            if self.log:
                value, low, high = math.log(max(value, low * 1e-3)), math.log(low), math.log(high)
            return (value - low) / ((high - low) or 1)

        return 48 + share(x, *self.x) * (self.width - 60), self.height - 34 - share(y, *self.y) * (self.height - 60)

    def ticks(self, xs: dict[float, str], ys: dict[float, str], x_title: str, y_title: str) -> None:
        for value, text in ys.items():
            left, level = self.at(self.x[0], value)
            self.parts.append(f'<line class="axis" x1="{left:.1f}" x2="{self.width - 12}" y1="{level:.1f}" y2="{level:.1f}"/>')
            self.parts.append(f'<text x="{left - 5:.1f}" y="{level + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        for value, text in xs.items():
            place, bottom = self.at(value, self.y[0])
            self.parts.append(f'<text x="{place:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{escape(text)}</text>')
        self.parts.append(f'<text x="{self.width - 12}" y="{self.height - 3}" text-anchor="end">{escape(x_title)}</text>')
        self.parts.append(f'<text x="4" y="11">{escape(y_title)}</text>')

    def curve(self, points: Sequence[Point], colour: str, style: str = "curve") -> None:
        places = [self.at(x, y) for x, y, _ in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        stroke = f' style="stroke:{colour}"' if colour else ""
        self.parts.append(f'<polyline class="{style}" points="{path}"{stroke}/>')

    def dots(self, points: Sequence[Point], colour: str, radius: float = 3.5) -> None:
        for x, y, text in points:
            place, level = self.at(x, y)
            dot = f'<circle cx="{place:.1f}" cy="{level:.1f}" r="{radius}" style="fill:{colour}">'
            self.parts.append(f"{dot}<title>{escape(text)}</title></circle>")

    def note(self, x: float, y: float, text: str, anchor: str = "end") -> None:
        place, level = self.at(x, y)
        self.parts.append(f'<text x="{place:.1f}" y="{level - 5:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def svg(self, label: str) -> str:
        box = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}"'
        return f"<svg {box}>{''.join(self.parts)}</svg>"


def _tens(low: float, high: float, text: Any) -> dict[float, str]:
    """The powers of ten in a range, every other one where they are many."""
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    if len(exponents) < 3:  # 1, 2, 5 of each
        values = [m * 10.0**e for e in range(exponents.start - 1, exponents.stop + 1) for m in (1, 2, 5)]
        return {v: text(v) for v in values if low <= v <= high}
    step = 2 if len(exponents) > 6 else 1
    return {10.0**e: text(10.0**e) for e in exponents if e % step == 0}


def _gigabytes(value: float) -> str:
    return f"{value:g}"


def _speed(c: dict[str, Any], seconds: float) -> float:
    return float(c["bytes"]) / seconds / 1e9


def _roof(document: dict[str, Any]) -> str:
    """Bytes a second by dear operations a byte; cases without any stand at the left."""
    rates = document["rates"]
    copies = {n: r / 1e9 for n, r in rates.items() if n.startswith("bytes, copy")}
    cases = [c for c in document["cases"] if c["limit"] not in ("product", "products") and c["bytes"] >= 1 << 16]
    if not cases or not copies:
        return "<p>No case is large enough.</p>"
    left = 0.02
    points: list[Point] = []
    for c in cases:
        seconds = c["timings"][OURS]["seconds"]
        text = f"{c['case']}: {_speed(c, seconds):.3g} GB/s, {c['limit_seconds'] / seconds:.0%} of its limit"
        points.append((max(sum(c["operations"].values()) / c["bytes"], left), _speed(c, seconds), text))
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    first, last, top, low = left / 1.3, 1.3 * max(0.3, *xs), 1.5 * max(*copies.values(), *ys), 0.5 * min(ys)
    chart = Chart((first, last), (low, top), (900, 360))
    marks = {left: "none", 0.05: "0.05", 0.1: "0.1", 0.2: "0.2"}
    chart.ticks(marks, _tens(low, top, _gigabytes), "exp and its like, each byte", "GB/s")
    for name in (min(copies, key=lambda n: copies[n]), max(copies, key=lambda n: copies[n])):
        chart.curve([(first, copies[name], ""), (last, copies[name], "")], "", "roof")
        chart.note(last, copies[name], name.removeprefix("bytes, "))
    exp = rates["exp_nonpositive, float32"] / 1e9
    chart.curve([(x, min(exp / x, top), "") for x in (max(first, exp / top), last)], "", "roof")
    chart.note(max(first, exp / top), top, "exp alone ")
    chart.dots(points, "var(--c0)")
    return chart.svg("bytes a second by operations a byte")


def _sizes(group: Sequence[dict[str, Any]], colours: dict[str, str]) -> str:
    """Bytes a second of every contender, and at most, by bytes."""
    curves: dict[str, list[Point]] = {LIMIT: [(c["bytes"], _speed(c, c["limit_seconds"]), "") for c in group]}
    for name in colours:
        found: list[Point] = []
        for c in group:
            if name in c["timings"]:
                seconds = c["timings"][name]["seconds"]
                text = f"{name}, {c['case']}: {duration(seconds)}, {_speed(c, seconds):.3g} GB/s"
                found.append((float(c["bytes"]), _speed(c, seconds), text))
        curves |= {name: found} if found else {}
    values = [y for points in curves.values() for _, y, _ in points]
    x = float(group[0]["bytes"]), float(group[-1]["bytes"])
    chart = Chart(x, (min(values) / 1.2, max(values) * 1.2))
    chart.ticks(_tens(*x, lambda v: amount(int(v)).replace(".00", "")), _tens(*chart.y, _gigabytes), "", "GB/s")
    chart.curve(curves.pop(LIMIT), "", "roof")
    for name in [*(n for n in curves if n != OURS), OURS]:
        chart.curve(curves[name], colours[name])
        chart.dots(curves[name], colours[name], 3)
    return f'<div class="card">{_title(group)}{chart.svg("bytes a second by size")}</div>'


def _threads(name: str, seconds: dict[Any, float]) -> str:
    """How many times as fast as one thread."""
    times = {int(n): value for n, value in seconds.items()}  # JSON has text for keys
    counts = sorted(times)
    first = times[counts[0]]
    points = [(float(n), first / times[n], f"{n} threads: {duration(times[n])}, {first / times[n]:.2f} times") for n in counts]
    most = float(max(counts[-1], 2))
    chart = Chart((1, most), (0, most), log=False)
    marks = {float(n): str(n) for n in counts}
    chart.ticks(marks, {float(n): str(n) for n in (0, *counts)}, "threads", "times as fast")
    chart.curve([(1, 1, ""), (most, most, "")], "", "roof")
    chart.curve(points, "var(--c0)")
    chart.dots(points, "var(--c0)")
    return f'<div class="card"><h3>{escape(name)}</h3>{chart.svg("speed by threads")}</div>'
