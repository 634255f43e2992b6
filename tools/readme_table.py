"""Write the tables of README.md and docs/ from recorded benchmarks.

    xpnn bench --peers --json benchmarks/results/NAME.json
    python tools/readme_table.py bench benchmarks/results/NAME.json
    python tools/readme_table.py --check                        # exit 1 if a table differs from its own source

What stands between a table's markers is replaced. Each table names the file it comes from.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from xpnn.benchmarks.report import amount, duration

ROOT = Path(__file__).resolve().parent.parent
README, SPEED, NUMERICS = ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "numerics.md"
OURS = "xpnn"
PLACES = {"bench": README, "large": README, "limits": SPEED, "half": SPEED, "losses": SPEED, "axis": SPEED, "gaps": SPEED}
PLACES |= {"network": SPEED, "accuracy": NUMERICS}
SHOWN = {  # a table's part of the cases; the files have all
    "bench": (
        "cross_entropy value_and_grad",
        "softmax forward",
        "sigmoid forward",
        "tanh forward",
        "relu forward",
        "linear+relu forward",
    ),
    "large": ("linear_cross_entropy value_and_grad",),
}
BOUND = {"arithmetic": "exp", "product": "BLAS", "products": "BLAS"}


def gaps(document: dict, source: str, link: str) -> str:
    """The table of what `tools/gaps.py` has measured."""
    columns = ("whole", "in place", "memory", "arithmetic", "loops")
    lines = [
        f"{_where(document)}; {_when(document)}: [{source}]({link}).",
        "",
        f"| case | size | {' | '.join(columns)} | reached |",
        "|---|" + "--:|" * (len(columns) + 2),
    ]
    for row in document["rows"]:
        cells = [duration(row[c]) if row.get(c) else "–" for c in columns]
        reached = max(row["memory"], row["arithmetic"]) / row["whole"]
        lines.append("| " + " | ".join([*_label(row["case"]), *cells, f"{reached:.0%}"]) + " |")
    return "\n".join(lines)


def accuracy(document: dict, source: str, link: str) -> str:
    """The table of what `tools/accuracy.py` has measured."""
    of = {"all": "all float32 inputs", "sample": "a sample of float32 inputs"}[document["inputs"]]
    lines = [
        f"{_where(document)}; {of}; {_when(document)}: [{source}]({link}).",
        "",
        "| function | forward, ULP | at x = | backward, ULP | at |",
        "|---|--:|--:|--:|--:|",
    ]
    for forward, backward in zip(document["rows"][::2], document["rows"][1::2], strict=True):
        name, of, at = forward["function"], backward["of"], backward["at"]
        lines.append(f"| {name} | {forward['ulp']:.2f} | {forward['at']:.6g} | {backward['ulp']:.2f} | {of} = {at:.6g} |")
    return "\n".join(lines)


def axis(document: dict, source: str, link: str) -> str:
    """The table of what `tools/axis.py` has measured."""
    lines = [
        f"{_where(document)}; float32; {_when(document)}: [{source}]({link}).",
        "",
        "| along the second axis | shape | copy | xpnn | in place | torch | × torch |",
        "|---|" + "--:|" * 6,
    ]
    for row in document["rows"]:
        cells = [duration(row[n]) if n in row else "–" for n in ("copy", "xpnn", "in place", "torch")]
        shape = "×".join(map(str, row["shape"]))
        lines.append(f"| {row['kernel']} | {shape} | {' | '.join(cells)} | {row['torch'] / row['xpnn']:.2f} |")
    return "\n".join(lines)


def _label(case: str) -> tuple[str, str]:
    """Kernel, direction and any unusual dtype; size."""
    group, size, dtype = case.rsplit(" ", 2)
    return group + ("" if dtype == "float32" else f" {dtype}"), size


def _where(document: dict) -> str:
    machine = document["machine"]
    versions = machine["versions"]
    named = ", ".join(f"{n} {versions[n]}" for n in ("numpy", "numba", "torch", "jax") if n in versions)
    return f"{machine['cpu']} ({machine['architecture']}), {machine['threads']} threads, {named}"


def _when(document: dict) -> str:
    commit, _, changes = (document["machine"]["commit"] or "unknown").partition("+")
    return f"{document['date'][:10]}, commit `{commit[:12]}`{' with changes' if changes else ''}"


def table(name: str, document: dict, source: str) -> str:
    """The Markdown between the markers."""
    link = Path(*[".."] * (len(PLACES[name].relative_to(ROOT).parts) - 1), source).as_posix()
    if name in (own := {"accuracy": accuracy, "axis": axis, "gaps": gaps}):
        return own[name](document, source, link)
    cases = document["cases"]
    rivals = list(dict.fromkeys(n for c in cases for n, t in c["timings"].items() if n != OURS and "extra_bytes" in t))
    rows = [c for c in cases if name not in SHOWN or c["case"].rsplit(" ", 2)[0] in SHOWN[name]]
    memory = (OURS, "torch", "torch chunked") if name == "large" else ()
    others = [] if name == "limits" else [n for n in rivals if any(n in c["timings"] for c in rows)]
    headings = ["case", "size", "bytes", "exp, ..."] if name == "limits" else ["case", "size"]
    headings += ["xpnn", "GB/s", "limit", "by", "reached"] if name == "limits" else ["xpnn", "GB/s", "of the limit"]
    headings += [*(f"× {n}" for n in others), *(f"memory, {n}" for n in memory)]
    dtypes = ", ".join(sorted({c["dtype"] for c in cases}))
    lines = [
        f"{_where(document)}; {dtypes}; {_when(document)}. All cases: [{source}]({link}).",
        "",
        f"| {' | '.join(headings)} |",
        "|---|" + "--:|" * (len(headings) - 1),
    ]
    for c in rows:
        group, size = _label(c["case"])
        seconds = c["timings"][OURS]["seconds"]
        # runs before 2026-11-28 took copies and products alone for limits
        limit = c["limit_seconds"] if "limit_seconds" in c else c["timings"][c["limit"]]["seconds"]
        cells = [group, size]
        if name == "limits":
            cells += [amount(c["bytes"]), ", ".join(f"{k} {amount(n)[:-1].strip()}" for k, n in c["operations"].items()) or "–"]
        cells += [duration(seconds), f"{c['bytes'] / seconds / 1e9:.3g}"]
        cells += [duration(limit), BOUND.get(c["limit"], "memory")] if name == "limits" else []
        cells += [f"{limit / seconds:.0%}"]
        cells += [f"{ratio:.2f}" if (ratio := _ratio(c, n)) is not None else "–" for n in others]
        cells += [amount(c["timings"].get(n, {}).get("extra_bytes")) for n in memory]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(_losses(cases, n) for n in rivals)] if others else []
    return "\n".join(lines)


def _ratio(case: dict, rival: str) -> float | None:
    timings = case["timings"]
    return timings[rival]["seconds"] / timings[OURS]["seconds"] if rival in timings else None


def _losses(cases: list[dict], rival: str) -> str:
    """How many cases of all are faster, and which are not."""
    ratios = {c["case"].removesuffix(" float32"): r for c in cases if (r := _ratio(c, rival)) is not None}
    lost = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio < 1]
    text = f"- Against {rival}, xpnn is faster in {len(ratios) - len(lost)} of {len(ratios)} cases"
    return text + (f"; slower in {', '.join(lost)}." if lost else ".")


def main() -> None:
    """Replace the tables, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=PLACES, help="default: all of them")
    parser.add_argument("results", nargs="?", type=Path, help="default: the file that the table names")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is not up to date")
    arguments = parser.parse_args()
    for name in [arguments.name] if arguments.name else PLACES:
        place = PLACES[name]
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, _, rest = place.read_text(encoding="utf-8").partition(begin)
        old, marker, tail = rest.partition(end)
        if not marker:
            sys.exit(f"{place} has no {begin} ... {end}")
        results = arguments.results
        if results is None:
            named = re.search(r"\[(benchmarks/results/[^\]]+)\]\(", old)
            if named is None:
                sys.exit(f"the table {name} names no recorded run yet; pass its file")
            results = ROOT / named[1]
        source = results.resolve().relative_to(ROOT).as_posix()
        new = f"\n{table(name, json.loads(results.read_text(encoding='utf-8')), source)}\n"
        if arguments.check and new != old:
            sys.exit(f"the table {name} differs from {source}: run tools/readme_table.py")
        if not arguments.check:
            place.write_text(head + begin + new + end + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
