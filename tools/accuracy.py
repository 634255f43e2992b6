"""The worst error of each function of one float32 array, and where it is.

    python tools/accuracy.py benchmarks/results/DATE-accuracy.json          a dense sample
    python tools/accuracy.py --all FILE.json [FUNCTION ...]                  all 2**32 inputs, an hour
    python tools/readme_table.py accuracy FILE.json

Forward, and backward for a cotangent of one and every value of what is cached: the input, or the output rounded to float32.
The truth is the formula in float64, composed (with `--all` fused, which is five times faster), and itself compared with
mpmath. The unit is that of `xpnn parity`: one ULP of the larger of the true value and the largest term behind it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
from mpmath import mp
from rich.progress import Progress

import xpnn
from xpnn.backends.kernel import Kernel
from xpnn.benchmarks import machine
from xpnn.testing import record, ulps

Array = np.ndarray[Any, Any]
CHUNK = 1 << 16  # float64 temporaries of it fit a second cache
EXPONENT = np.int64(0x7FF0000000000000)  # of a float64, whose other bits are the rest of its number
SELU = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


def _clip(x: Any, least: float, most: float) -> Any:
    return min(max(x, mp.mpf(least)), mp.mpf(most))


def _logistic(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


# each by its definition, for mpmath
DEFINITIONS: dict[str, Callable[[Any], Any]] = {
    "sigmoid": _logistic,
    "tanh": mp.tanh,
    "relu": lambda x: max(x, mp.mpf(0)),
    "log": mp.log,
    "leaky_relu": lambda x: x if x > 0 else mp.mpf(0.01) * x,
    "elu": lambda x: x if x > 0 else mp.expm1(x),
    "selu": lambda x: SELU[0] * (x if x > 0 else SELU[1] * mp.expm1(x)),
    "celu": lambda x: x if x > 0 else mp.expm1(x),
    "gelu": lambda x: x * mp.ncdf(x),
    "gelu, tanh": lambda x: x * _logistic(2 * mp.sqrt(2 / mp.pi) * (x + mp.mpf(0.044715) * x**3)),
    "silu": lambda x: x * _logistic(x),
    "mish": lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
    "softplus": lambda x: x if x > 20 else mp.log1p(mp.exp(x)),
    "hardtanh": lambda x: _clip(x, -1, 1),
    "hardsigmoid": lambda x: _clip(x + 3, 0, 6) / 6,
    "hardswish": lambda x: x * _clip(x + 3, 0, 6) / 6,
    "relu6": lambda x: _clip(x, 0, 6),
}


@dataclass(frozen=True)
class Function:
    """One function, forward or backward."""

    label: str
    direction: str

    @property
    def kernel(self) -> Kernel:
        found: Kernel = getattr(xpnn, self.label.partition(",")[0])
        return found

    @property
    def options(self) -> dict[str, Any]:
        return {"approximate": "tanh"} if self.label.endswith("tanh") and "," in self.label else {}

    @property
    def cache(self) -> str:
        """What it is a function of."""
        return "x" if self.direction == "forward" or "x" in self.kernel.declaration.backward_parameters else "y"

    @property
    def result(self) -> str:
        return "y" if self.direction == "forward" else "dx"

    def arrays(self, values: Array) -> dict[str, Array]:
        given = {self.cache: values}
        return given if self.direction == "forward" else {"dy": np.ones_like(values)} | given

    def run(self, values: Array, backend: str) -> Array:
        arrays = self.arrays(values)
        with xpnn.use_backend(backend):
            if self.direction == "forward":
                return np.asarray(self.kernel(**arrays, **self.options))
            return np.asarray(self.kernel.backward(**arrays, **self.options))

    def sizes(self, values: Array) -> tuple[Array, Array]:
        """The truth, and the size of the largest term behind it."""
        recorded = record(self.kernel, self.arrays(values.astype(np.float64)), self.options, (self.result,))
        found = recorded.results(recorded.program, "float32")[self.result]
        return found.value, found.size

    def within(self, values: Array) -> Array:
        """Those that the function is for, and that can be cached."""
        keep = np.isfinite(values)
        if self.label == "log":
            keep &= values > 0
        if self.cache == "y":
            least, most = {"sigmoid": (0, 1), "tanh": (-1, 1), "relu": (0, np.inf), "relu6": (0, 6)}[self.label]
            keep &= (values >= least) & (values <= most)
        return values[keep]


FUNCTIONS = [Function(label, direction) for label in DEFINITIONS for direction in ("forward", "backward")]


def worst(function: Function, chunks: Iterator[Array], truth_by: str = "numpy") -> tuple[float, float]:
    """The largest error, and the value it is found at; the truth comes from a backend."""
    error, at = 0.0, 0.0
    for chunk in chunks:
        values = function.within(chunk)
        if not values.size:
            continue
        ours = function.run(values, "numba").astype(np.float64)
        truth = function.run(values.astype(np.float64), truth_by)
        ours = np.where(np.isinf(ours) & (np.abs(truth) < 2.0**128), np.copysign(2.0**128, ours), ours)  # which inf stands for
        # beside larger terms an error counts for less, never for more
        powers = (truth.view(np.int64) & EXPONENT).view(np.float64)
        bad = ~(np.abs(ours - truth) <= error * np.maximum(powers * 2.0**-23, np.finfo(np.float32).tiny))
        if bad.any():
            exact, size = function.sizes(values[bad])
            errors = ulps(ours[bad], exact, size, "float32")
            i = int(np.argmax(errors))
            if errors[i] > error:
                error, at = float(errors[i]), float(values[bad][i])
    return error, at


def sample() -> Iterator[Array]:
    """Numbers of every magnitude, and lines of them where functions bend."""
    bits = np.arange(0, 2**32, 2**12 + 1, dtype=np.uint32).view(np.float32)
    lines = [np.linspace(-end, end, 1 << 18, dtype=np.float32) for end in (1.5, 12.0, 110.0)]
    values = np.concatenate([bits, *lines])
    for start in range(0, values.size, CHUNK):
        yield values[start : start + CHUNK]


def everything(step: Callable[[], Any]) -> Iterator[Array]:
    """All float32 numbers."""
    for start in range(0, 2**32, CHUNK):
        yield np.arange(start, start + CHUNK, dtype=np.uint32).view(np.float32)
        step()


def check_truth(function: Function, truth_by: str = "numpy") -> float:
    """How far the formula in float64 on a backend is from mpmath, in ULP of float32 and so far below one."""
    rng = np.random.default_rng(3)
    values = function.within(np.float32(np.concatenate([rng.uniform(-12, 12, 60), rng.standard_normal(60), rng.random(30)])))
    ours, (_, size) = function.run(values.astype(np.float64), truth_by), function.sizes(values)
    define = DEFINITIONS[function.label]
    exact = []
    with mpmath.workdps(60):
        for value in values.tolist():
            a = mp.mpf(value)
            if function.direction == "forward":
                exact.append(float(define(a)))
            elif function.cache == "x":
                exact.append(float(mpmath.diff(define, a, h=mp.mpf("1e-25"))))
            else:  # of the output
                slopes = {"sigmoid": a * (1 - a), "tanh": 1 - a * a, "relu": mp.mpf(a > 0), "relu6": mp.mpf(0 < a < 6)}
                exact.append(float(slopes[function.label]))
    unit = np.maximum(np.spacing(np.float32(np.maximum(np.abs(exact), size))), np.finfo(np.float32).tiny)
    return float(np.max(np.abs(ours - np.array(exact)) / unit))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("functions", nargs="*", help="default: all")
    parser.add_argument("--all", action="store_true", help="all 2**32 inputs")
    arguments = parser.parse_args()
    chosen = [f for f in FUNCTIONS if not arguments.functions or f.label in arguments.functions]
    truth_by = "numba" if arguments.all else "numpy"
    rows = []
    with Progress() as progress:
        task = progress.add_task("", total=len(chosen) * (2**32 // CHUNK if arguments.all else 1))
        for function in chosen:
            progress.update(task, description=f"{function.label} {function.direction}")
            off = check_truth(function, truth_by)
            if off > 1e-3:
                raise SystemExit(f"{function.label} {function.direction}: the truth is off by {off:.2g} ULP of float32")
            start = time.perf_counter()
            error, at = worst(function, everything(lambda: progress.advance(task)) if arguments.all else sample(), truth_by)
            seconds = time.perf_counter() - start
            if not arguments.all:
                progress.advance(task)
            row = {"function": function.label, "direction": function.direction, "of": function.cache}
            rows.append(row | {"ulp": round(error, 4), "at": at, "seconds": round(seconds, 1)})
            progress.print(f"{function.label} {function.direction}: {error:.3f} ULP at {function.cache} = {at:.9g}")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    document = {"date": date, "machine": machine.describe(), "inputs": "all" if arguments.all else "sample", "rows": rows}
    if arguments.functions and arguments.file.exists():  # those anew, the others kept
        kept = json.loads(arguments.file.read_text(encoding="utf-8"))
        if kept["inputs"] != document["inputs"]:
            raise SystemExit(f"{arguments.file} is of {kept['inputs']} inputs")
        found = {(r["function"], r["direction"]): r for r in (*kept["rows"], *rows)}
        document |= {"rows": [*found.values()]}
    arguments.file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
