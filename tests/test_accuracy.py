"""The worst errors of functions of one array, as `tools/accuracy.py` measures them on a dense sample."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xpnn
from xpnn.backends.numba import elementary

ROOT = Path(__file__).resolve().parents[1]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "tools" / "accuracy.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["accuracy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ACCURACY = load()
IDS = [f"{f.label} {f.direction}" for f in ACCURACY.FUNCTIONS]


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, str], float]:
    """The errors of the file that docs/numerics.md shows."""
    table = (ROOT / "docs" / "numerics.md").read_text("utf-8").partition("<!-- accuracy:begin -->")[2]
    found = re.search(r"\((?:\.\./)*(benchmarks/results/[^)]+)\)", table)
    assert found is not None
    document = json.loads((ROOT / found[1]).read_text("utf-8"))
    return {(row["function"], row["direction"]): row["ulp"] for row in document["rows"]}


@pytest.mark.parametrize("function", ACCURACY.FUNCTIONS, ids=IDS)
def test_worst_error(function: Any, recorded: dict[tuple[str, str], float]) -> None:
    """No more than recorded, on a processor like that; without AVX-512 there is another `exp`, up to 0.4 ULP worse."""
    error, at = ACCURACY.worst(function, ACCURACY.sample())
    assert error <= recorded[function.label, function.direction] + (0.25 if elementary._looks_up() else 1.0), at


@pytest.mark.parametrize("function", ACCURACY.FUNCTIONS, ids=IDS)
def test_truth(function: Any) -> None:
    """The composed formula in float64 is within a thousandth of a float32's ULP of mpmath."""
    assert ACCURACY.check_truth(function) <= 1e-3


def test_every_function_is_measured() -> None:
    """Every element-wise kernel of one array."""
    kernels = {n: k for n in xpnn.kernels.__all__ if isinstance(k := getattr(xpnn, n), xpnn.Kernel)}
    alone = {n for n, k in kernels.items() if len(k.declaration.inputs) == 1 and not k.has_axis}
    assert alone == {f.kernel.__name__ for f in ACCURACY.FUNCTIONS}


def test_an_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is off by four ULP in one place."""
    function = ACCURACY.FUNCTIONS[0]
    right = type(function).run

    def spoilt(self: Any, values: Any, backend: str) -> Any:
        found = right(self, values, backend)
        if backend == "numba":
            found = np.where(values == np.float32(0.25), found + 4 * np.spacing(found), found)
        return found

    monkeypatch.setattr(type(function), "run", spoilt)
    error, at = ACCURACY.worst(function, iter([np.linspace(0, 1, 33, dtype=np.float32)]))
    assert error > 3
    assert at == 0.25
