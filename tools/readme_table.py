"""Write the tables of the README from recorded benchmarks.

    xpnn bench --peers --json benchmarks/results/NAME.json
    python tools/readme_table.py bench benchmarks/results/NAME.json
    python tools/readme_table.py --check                        # exit 1 if the README differs from its own sources

What stands between a table's markers is replaced. Each table names the file it comes from.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from xpnn.benchmarks.report import amount, duration

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
OURS = "xpnn"
TABLES = {  # the README's part of the cases; the files have all
    "bench": (
        "cross_entropy value_and_grad",
        "softmax forward",
        "sigmoid forward",
        "tanh forward",
        "relu forward",
        "linear+relu forward",
    ),
    "large": ("linear_cross_entropy value_and_grad", "cross_entropy value_and_grad"),
}


def table(name: str, document: dict, source: str) -> str:
    """The Markdown between the markers."""
    machine, cases = document["machine"], document["cases"]
    rivals = list(dict.fromkeys(n for c in cases for n, t in c["timings"].items() if n != OURS and "extra_bytes" in t))
    versions = machine["versions"]
    named = ", ".join(f"{n} {versions[n]}" for n in ("numpy", "numba", "torch", "jax") if n in versions)
    where = f"{machine['cpu']} ({machine['architecture']}), {machine['threads']} threads, {named}"
    when = f"{document['date'][:10]}, commit `{(machine['commit'] or 'unknown')[:12]}`"
    memory = (OURS, "torch", "torch chunked") if name == "large" else ()
    headings = ["case", "size", "xpnn", "GB/s", "of the limit", *(f"× {n}" for n in rivals), *(f"memory, {n}" for n in memory)]
    lines = [
        f"{where}; {', '.join(sorted({c['dtype'] for c in cases}))}; {when}. All cases: [{source}]({source}).",
        "",
        f"| {' | '.join(headings)} |",
        "|---|" + "--:|" * (len(headings) - 1),
    ]
    for c in cases:
        group, size, dtype = c["case"].rsplit(" ", 2)
        if group not in TABLES[name]:
            continue
        group += "" if dtype == "float32" else f" {dtype}"
        seconds = c["timings"][OURS]["seconds"]
        share = c["timings"][c["limit"]]["seconds"] / seconds
        cells = [group, size, duration(seconds), f"{c['bytes'] / seconds / 1e9:.3g}", f"{share:.0%}"]
        cells += [f"{ratio:.2f}" if (ratio := _ratio(c, n)) is not None else "–" for n in rivals]
        cells += [amount(c["timings"].get(n, {}).get("extra_bytes")) for n in memory]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(_losses(cases, n) for n in rivals)]
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
    """Replace the table, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=TABLES, help="default: all of them")
    parser.add_argument("results", nargs="?", type=Path, help="default: the file that the table names")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is not up to date")
    arguments = parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    for name in [arguments.name] if arguments.name else TABLES:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, _, rest = readme.partition(begin)
        old, marker, tail = rest.partition(end)
        if not marker:
            sys.exit(f"{README} has no {begin} ... {end}")
        results = arguments.results
        if results is None:
            named = re.search(r"\]\((benchmarks/results/[^)]+)\)", old)
            if named is None:
                sys.exit(f"the table {name} names no recorded run yet; pass its file")
            results = ROOT / named[1]
        source = results.resolve().relative_to(ROOT).as_posix()
        new = f"\n{table(name, json.loads(results.read_text(encoding='utf-8')), source)}\n"
        if arguments.check and new != old:
            sys.exit(f"the table {name} differs from {source}: run tools/readme_table.py")
        readme = head + begin + new + end + tail
    if not arguments.check:
        README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
