"""What only a GPU can tell: whether the CUDA kernels are right there, and how fast they are. One call, one JSON.

    python -m xpnn.benchmarks.gpu_check [--out FILE] [--budget SECONDS] [--section NAME ...]
    python benchmarks/gpu_check.py                      # the same, from a checkout that is not installed

It needs Python, NumPy, array-api-compat and CuPy, and takes what else is there: ml_dtypes, PyTorch, Triton, Liger-Kernel,
QuACK, compute-sanitizer. Pure-Python wheels in a folder `wheels` beside this file count as installed. Nothing is fetched.

Each section runs in processes of its own with a limit of its own, so that neither a crash nor a lost CUDA context costs the
others anything; what it has found until then is kept. The file is rewritten after every section, and now and then within
one. The exit status is 1 if a section failed or was cut off. Without a GPU everything that needs one is skipped, with 0.

This module imports nothing but the standard library, so that it can say what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]

HERE = Path(__file__).resolve().parent
BUDGET = 450.0  # seconds for all sections
POLL, SAVE = 0.1, 5.0  # seconds between looks at a running section, and between writings of the file
PACKAGES = (
    "xpnn", "numpy", "array-api-compat", "ml_dtypes", "platformdirs", "click", "rich", "numba", "pytest", "torch", "triton",
    "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl",
)  # fmt: skip
NEEDED = {"array-api-compat": "xpnn cannot be imported", "numpy": "xpnn cannot be imported"}
WANTED = {"ml_dtypes": "bfloat16 is not checked", "torch": "nothing is compared with PyTorch"}
PEERS = {"torch.compile": "torch.compile", "Liger-Kernel": "liger", "QuACK": "quack"}
OF_COPY, HOST_MICROSECONDS = 90.0, 10.0  # the goals


@dataclass(frozen=True)
class Section:
    """A part of the check: a function that yields rows, run in `parts` processes at once, with a share of the budget.

    `where` is MODULE:FUNCTION, or a function of this module.
    """

    name: str
    where: str
    share: float
    parts: int = 1
    gpu: bool = True


def _several() -> int:
    """Processes for a section that mostly compiles."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


SECTIONS = (  # what one leaves of its share is for those after it
    Section("environment", "environment", 45, gpu=False),
    Section("regimes", "xpnn.benchmarks.gpu_sections:regimes", 60, _several()),
    Section("parity", "xpnn.benchmarks.gpu_sections:parity", 70, _several()),
    Section("launches", "xpnn.benchmarks.gpu_launches:launches", 45),
    Section("sanitizer", "xpnn.benchmarks.gpu_launches:sanitizer", 40, 4),
    Section("host", "xpnn.benchmarks.gpu_timing:host", 10),
    Section("timings", "xpnn.benchmarks.gpu_timing:timings", 110),
    Section("peers", "xpnn.benchmarks.gpu_timing:peers", 100),
)


@dataclass
class Run:
    """What a section's function is given: how long it has, and which part of it this process is."""

    end: float = math.inf
    part: int = 0
    parts: int = 1

    def left(self) -> float:
        """Seconds until it had better stop by itself."""
        return self.end - time.monotonic()

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of some work."""
        return items[self.part :: self.parts]


# --- a section's own process --------------------------------------------------------------------------------------------


def importable() -> None:
    """Make xpnn importable as it lies in this checkout, whatever is installed, and the wheels beside this file."""
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]  # its modules have names that others may have
    for wheel in sorted(HERE.glob("wheels/*-none-any.whl")):
        sys.path.append(str(wheel))
    root = HERE.parent
    init = root / "src" / "xpnn" / "__init__.py"
    if "xpnn" in sys.modules or not init.exists():
        return
    # kernels, backends and benchmarks lie beside src: they are found through the package's second folder
    spec = importlib.util.spec_from_file_location("xpnn", init, submodule_search_locations=[str(init.parent), str(root)])
    assert spec is not None and spec.loader is not None
    module = sys.modules["xpnn"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["xpnn"]
        raise


def work(where: str, into: Path, limit: float, part: int, parts: int) -> int:
    """Run one part of a section: a line of JSON for each row, and one for how it ended."""
    if hasattr(signal, "alarm"):
        signal.alarm(math.ceil(limit) + 20)  # should nobody be left to stop it
    run = Run(time.monotonic() + limit - min(8.0, limit / 5), part, parts)
    with into.open("w", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(plain(row)) + "\n")
            file.flush()

        try:
            if where == "environment":
                rows = environment()
            else:
                importable()
                module, _, name = where.partition(":")
                rows = getattr(importlib.import_module(module), name)(run)
            for row in rows:
                write(row)
                print(line(row), flush=True)
            write({"ended": "whole"})
        except BaseException as error:
            traceback.print_exc()
            write({"ended": f"{type(error).__name__}: {error}"[:2000]})
            return 1
    return 0


def plain(value: Any) -> Any:
    """A value as JSON has it: other numbers than finite ones as text, what is unknown as text too."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return plain(value.item()) if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else str(value)


def line(row: Row) -> str:
    """A row as people read it."""
    verdict = row.get("verdict", "")
    text = "; ".join(str(row[n]) for n in ("shown", "why") if row.get(n))
    return f"  {'' if verdict == 'ok' else str(verdict).upper():>11}  {row.get('check', ''):<48} {text}".rstrip()


# --- the environment ----------------------------------------------------------------------------------------------------


def environment() -> Iterator[Row]:
    """Device, driver, versions, commit; and what is missing."""
    versions: dict[str, str] = {"python": sys.version.split()[0]}
    found: Row = {"versions": versions, "commit": None, "gpu": None, "driver": None, "cores": os.cpu_count()}
    rows: list[Row] = []
    try:
        importable()
        xpnn = importlib.import_module("xpnn")
        found["commit"] = importlib.import_module("xpnn.benchmarks.machine").commit()
        found["cpu"] = importlib.import_module("xpnn.benchmarks.machine").cpu()
        versions["xpnn"] = xpnn.__version__
        rows.append({"check": "xpnn", "verdict": "ok", "shown": f"{xpnn.__version__} from {Path(str(xpnn.__file__)).parent}"})
    except Exception as error:
        rows.append({"check": "xpnn", "verdict": "failed", "why": f"cannot be imported: {error}"})
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.setdefault(name, importlib.metadata.version(name))
    for name, why in NEEDED.items():
        if name not in versions:
            rows.append({"check": name, "verdict": "failed", "why": f"not installed: {why}"})
    for name, why in WANTED.items():
        if name not in versions:
            rows.append({"check": name, "verdict": "skipped", "why": f"not installed: {why}"})
    reason = _gpu(found)
    if reason:
        rows.append({"check": "GPU", "verdict": "skipped", "why": reason})
    shown = ", ".join(f"{n} {v}" for n, v in versions.items())
    yield {"check": "versions", "verdict": "ok", "shown": shown, "machine": found, "no_gpu": reason}
    if not reason:
        shown = f"{found['gpu']['name']}, driver {found['driver']}, CUDA {found['cuda_driver']}"
        yield {"check": "GPU", "verdict": "ok", "shown": shown}
    yield from rows


def _gpu(found: Row) -> str:
    """Fill in what is known of the GPU; why there is none."""
    try:
        cupy: Any = importlib.import_module("cupy")
    except Exception as error:
        return f"CuPy cannot be imported: {error}"
    found["versions"]["cupy"] = cupy.__version__
    try:
        if not cupy.cuda.is_available():
            return "CuPy finds no GPU"
    except Exception as error:
        return f"CuPy fails: {error}"
    runtime = cupy.cuda.runtime
    p = runtime.getDeviceProperties(runtime.getDevice())
    names = ("major", "minor", "multiProcessorCount", "totalGlobalMem", "l2CacheSize", "sharedMemPerBlockOptin", "clockRate",
             "memoryClockRate", "memoryBusWidth")  # fmt: skip
    found["gpu"] = {"name": p["name"].decode(), **{n: p[n] for n in names if n in p}}
    found["cuda_driver"], found["cuda_runtime"] = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    with contextlib.suppress(Exception):
        found["nvrtc"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = "driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,compute_mode"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        found["nvidia_smi"] = dict(zip(query.split(","), done.stdout.splitlines()[0].split(", "), strict=False))
        found["driver"] = found["nvidia_smi"]["driver_version"]
    return ""


# --- the run ------------------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """Runs sections one after another, and keeps the file up to date."""

    out: Path | None = None
    budget: float = BUDGET
    clock: Callable[[], float] = time.monotonic
    found: dict[str, Row] = field(default_factory=dict)
    machine: Row = field(default_factory=dict)
    no_gpu: str = "its environment is unknown"

    def __post_init__(self) -> None:
        self.start = self.clock()
        self.date = datetime.datetime.now(datetime.UTC)
        self.folder = Path(tempfile.mkdtemp(prefix="xpnn-gpu-check-"))

    def __call__(self, sections: Sequence[Section]) -> int:
        """Run them; returns the exit status."""
        for s in sections:
            self.found[s.name] = {"state": "not reached", "rows": []}
        try:
            for k, s in enumerate(sections):
                left = self.budget - (self.clock() - self.start)
                limit = max(1.0, left * s.share / sum(other.share for other in sections[k:]))
                self.section(s, limit)
                self.save()
        finally:
            self.save()
            shutil.rmtree(self.folder, ignore_errors=True)
        self.report()
        return int(any(r["state"] in ("failed", "cut off") for r in self.found.values()))

    def section(self, s: Section, limit: float) -> None:
        """Run one, and keep what it finds."""
        entry = self.found[s.name]
        if s.gpu and self.no_gpu and not os.environ.get("XPNN_GPU_CHECK_HOST"):
            entry |= {"state": "skipped", "why": f"no GPU: {self.no_gpu}"}
            print(f"\n{s.name}: SKIPPED, no GPU: {self.no_gpu}", flush=True)
            return
        print(f"\n{s.name}, at most {limit:.0f} s", flush=True)
        began = self.clock()
        files = [self.folder / f"{s.name}.{k}" for k in range(s.parts)]
        running = [self.begin(s, limit, k, file) for k, file in enumerate(files)]
        entry |= {"state": "running", "limit": limit}
        cut = None
        try:
            cut = self.watch(running, files, entry, began + limit)
        finally:
            for p in running:
                stop(p)
            entry["rows"], ends = self.rows(files)
            entry |= self.verdict(entry["rows"], ends, [p.returncode for p in running], cut)
            entry["seconds"] = round(self.clock() - began, 1)
        if s.name == "environment":
            self.know(entry["rows"])
        print(f"{s.name}: {entry['state'].upper()}, {entry['seconds']} s{': ' + entry['why'] if entry.get('why') else ''}")

    def watch(self, running: Sequence[subprocess.Popen[bytes]], files: Sequence[Path], entry: Row, end: float) -> bool:
        """Wait for a section's processes, keeping the file up to date; whether time was over before."""
        saved = self.clock()
        while any(p.poll() is None for p in running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(p for p in running if p.returncode is None).wait(POLL)
            now = self.clock()
            if now > end:
                return True
            if now > saved + SAVE:
                saved = now
                entry["rows"], _ = self.rows(files)
                self.save()
        return False

    def begin(self, s: Section, limit: float, part: int, file: Path) -> subprocess.Popen[bytes]:
        """One process of a section."""
        command = [sys.executable, str(Path(__file__).resolve()), "--section", s.where, "--into", str(file)]
        command += ["--limit", str(limit), "--part", f"{part}/{s.parts}"]
        kept = {n: v for n, v in os.environ.items() if n not in ("XPNN_BACKEND", "XPNN_CHECK")}
        return subprocess.Popen(command, env=kept, stdin=subprocess.DEVNULL, start_new_session=True)

    @staticmethod
    def rows(files: Iterable[Path]) -> tuple[list[Row], list[str | None]]:
        """What the processes have written until now, and how each has ended."""
        rows: list[Row] = []
        ends: list[str | None] = []
        for file in files:
            ends.append(None)
            for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
                try:
                    row = json.loads(text)
                except ValueError:  # a line cut in two
                    continue
                if "ended" in row:
                    ends[-1] = row["ended"]
                else:
                    rows.append(row)
        return rows, ends

    @staticmethod
    def verdict(rows: list[Row], ends: Sequence[str | None], statuses: Sequence[int | None], cut: bool | None) -> Row:
        """How a section went. `cut`: whether at its limit; None where the whole run was interrupted."""
        failed = [r["check"] for r in rows if r.get("verdict") == "failed"]
        broken = [end or f"it ended with status {status}" for end, status in zip(ends, statuses, strict=True) if end != "whole"]
        if cut is None:
            return {"state": "cut off", "why": "the run was interrupted", "failed": failed}
        if cut:
            return {"state": "cut off", "why": f"at its limit, after {len(rows)} rows", "failed": failed}
        if broken:
            return {"state": "failed", "why": "; ".join(dict.fromkeys(broken)), "failed": failed}
        if failed:
            return {"state": "failed", "why": f"{len(failed)} of {len(rows)} checks failed", "failed": failed}
        return {"state": "ok"}

    def know(self, rows: Iterable[Row]) -> None:
        """Take over what the environment is."""
        for row in rows:
            if "machine" in row:
                self.machine, self.no_gpu = row["machine"], row["no_gpu"]

    def path(self) -> Path:
        """The file: as asked for, or named after date and device."""
        if self.out is None:
            name = ((self.machine.get("gpu") or {}).get("name")) or "no-gpu"
            slug = re.sub(r"[^a-z0-9]+", "-", f"{self.date:%Y-%m-%d}-{name}".lower()).strip("-")
            folder = HERE / "results" if (HERE / "results").is_dir() else Path()
            if name == "no-gpu":  # nothing that is worth keeping
                folder = Path(tempfile.gettempdir())
            names = (folder / f"{slug}{end}.json" for end in ("", *(f"-{k}" for k in range(2, 1000))))
            self.out = next(p for p in names if not p.exists())
        return self.out

    def document(self) -> Row:
        """All of it."""
        return {
            "check": "gpu-check",
            "date": self.date.isoformat(timespec="seconds"),
            "seconds": round(self.clock() - self.start, 1),
            "budget": self.budget,
            **{n: self.machine.get(n) for n in ("gpu", "driver", "versions", "commit")},
            "machine": self.machine,
            "no_gpu": self.no_gpu,
            "goals": goals(self.found),
            "worst_errors": worst_errors(self.found.get("parity", {}).get("rows", [])),
            "sections": self.found,
        }

    def save(self) -> None:
        """Write the file whole, so that it is valid at any time."""
        if not self.machine and self.out is None:
            return  # its name is not known yet
        path = self.path()
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(plain(self.document()), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    def report(self) -> None:
        """Say in the end how it went, losses first of all."""
        print("\nworst error of each kernel, in ULP (of the bound):" if self.found.get("parity", {}).get("rows") else "")
        for kernel, errors in worst_errors(self.found.get("parity", {}).get("rows", [])).items():
            print(f"  {kernel}: " + ", ".join(f"{d} {e['error_ulp']:.3g} ({e['bound_ulp']:.3g})" for d, e in errors.items()))
        print("goals:")
        for goal in goals(self.found):
            verdict = {True: "met", False: "MISSED", None: "NOT MEASURED"}[goal["met"]]
            print(f"  {verdict}: {goal['goal']} ({goal['measured']} cases)")
            for text in goal["missed"]:
                print(f"    missed: {text}")
            for why, count in goal["not_measured"].items():
                print(f"    not measured, {count} times: {why}")
        print("sections:")
        for name, entry in self.found.items():
            print(f"  {entry['state'].upper() if entry['state'] != 'ok' else 'ok'}: {name} {entry.get('why', '')}")
            for row in entry["rows"]:
                if row.get("verdict") not in ("ok", None):
                    print(line(row))
        print(f"written to {self.path()}", flush=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a section's process, and what it has started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


# --- what it comes to -----------------------------------------------------------------------------------------------------


def worst_errors(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """By kernel and dtype, the worst error that `parity` has found, with the bound it was held to."""
    worst: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("truth") != "central differences" and isinstance(row.get("error_ulp"), int | float | str):
            known = worst.setdefault(row["kernel"], {}).get(row["dtype"])
            if known is None or float(row["error_ulp"]) > known["error_ulp"]:
                entry = {n: row[n] for n in ("variant", "direction", "verdict")}
                numbers = {n: float(row[n]) for n in ("error_ulp", "bound_ulp")}
                worst[row["kernel"]][row["dtype"]] = entry | numbers
    return worst


def goals(found: Mapping[str, Row]) -> list[Row]:
    """Which goals are met, with every case that misses one. None: nothing was missed, but something not measured."""
    timed = [r for r in found.get("timings", {}).get("rows", []) if r.get("goal")]
    raced = [r for r in found.get("peers", {}).get("rows", []) if r.get("goal")]
    host = [r for r in found.get("host", {}).get("rows", []) if r.get("goal")]
    of_copy = [(r, r.get("percent_of_copy"), r.get("why") or "it was not reached") for r in timed]
    result = [
        _goal(
            f"at least {OF_COPY:.0f} % of a copy: softmax and cross_entropy, float32 and bfloat16, rows from 1024 columns",
            [
                (r["check"], v, why, v is not None and v < OF_COPY, f"{v:.1f} %" if v is not None else "")
                for r, v, why in of_copy
            ],
        )
    ]
    for shown, peer in PEERS.items():
        cases = []
        for r in (r for r in raced if peer not in r.get("not_offered", {})):
            ratio = min((v for n, v in r.get("ratios", {}).items() if n == peer or n.startswith(f"{peer},")), default=None)
            why = r.get("not_measured", {}).get(peer) or r.get("why") or "it was not reached"
            cases.append((r["check"], ratio, why, ratio is not None and ratio < 1, f"{ratio:.2f} of our time" if ratio else ""))
        result.append(_goal(f"faster than {shown}", cases))
    times = [(r["check"], r.get("microseconds"), r.get("why", "")) for r in host]
    result.append(
        _goal(
            f"at most {HOST_MICROSECONDS:.0f} µs of the host's time for a call",
            [(c, v, why, v is not None and v > HOST_MICROSECONDS, f"{v:.1f} µs" if v else "") for c, v, why in times],
        )
    )
    return result


def _goal(text: str, cases: Sequence[tuple[str, float | None, str, bool, str]]) -> Row:
    missed = [f"{check}: {shown}" for check, _, _, miss, shown in cases if miss]
    absent: dict[str, int] = {}
    for _, value, why, _, _ in cases:
        if value is None:
            absent[why] = absent.get(why, 0) + 1
    measured = sum(value is not None for _, value, *_ in cases)
    if not cases:
        absent = {"the section was not run": 1}
    met = False if missed else None if absent else True
    return {"goal": text, "met": met, "measured": measured, "missed": missed, "not_measured": absent}


# --- the command line -----------------------------------------------------------------------------------------------------


def chosen(names: Sequence[str]) -> list[Section]:
    """The sections asked for, the environment first; MODULE:FUNCTION stands for one of your own, which needs no GPU."""
    known = {s.name: s for s in SECTIONS}
    found = [known["environment"]]
    for name in names or list(known):
        if name not in known and ":" not in name:
            raise SystemExit(f"--section {name}: expected one of {', '.join(known)}")
        found.append(known.get(name) or Section(name.partition(":")[2], name, 60, gpu=False))
    return list(dict.fromkeys(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gpu_check", description="Check and time the CUDA kernels on this machine's GPU.")
    where = "where the JSON goes; default: benchmarks/results/, without a GPU the temporary folder"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"for everything; default {BUDGET:.0f}")
    parser.add_argument("--section", action="append", default=[], metavar="NAME", help=", ".join(s.name for s in SECTIONS))
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=BUDGET, help=argparse.SUPPRESS)
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.into is not None:
        part, parts = map(int, given.part.split("/"))
        return work(given.section[0], given.into, given.limit, part, parts)
    if given.out is not None and not given.out.resolve().parent.is_dir():  # said now, not after minutes
        parser.error(f"--out {given.out}: there is no folder {given.out.parent}")
    return Runner(given.out, given.budget)(chosen(given.section))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that sections are stopped and the file is written
    sys.exit(main())
