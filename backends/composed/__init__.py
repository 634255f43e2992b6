"""The composed backend: a formula run as it stands, by any array-API library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import array_api_compat
import numpy as np

from xpnn.backends.declare import evaluate
from xpnn.backends.kinds import Index
from xpnn.backends.task import HALF, BackendError, Executable, OutOfRange, Task


class Shim:
    """A library's namespace, with the few functions that formulas know and the standard lacks or leaves open."""

    def __init__(self, xp: Any, device: Any) -> None:
        self._xp, self._device = xp, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    def arange(self, stop: int) -> Any:
        return self._xp.arange(stop, device=self._device)

    def take_along_axis(self, x: Any, index: Any, *, axis: int = -1) -> Any:
        """One value of each row, `x[i, index[i, 0]]`; NaN where the index lies outside."""
        xp = self._xp
        rows, columns = x.shape
        index = xp.astype(index, xp.int64)
        inside = (index >= 0) & (index < columns)
        safe = xp.where(inside, index, xp.zeros_like(index))
        flat = safe[:, 0] + columns * xp.arange(rows, dtype=xp.int64, device=self._device)
        taken = xp.reshape(xp.take(xp.reshape(x, (-1,)), flat, axis=0), (-1, 1))
        return xp.where(inside, taken, xp.asarray(xp.nan, dtype=x.dtype, device=self._device))

    def take(self, x: Any, index: Any, *, axis: int = -1) -> Any:
        """A column's value for each row, `x[0, index[i, 0]]`; NaN where the index lies outside."""
        return self.take_along_axis(self._xp.broadcast_to(x, (index.shape[0], x.shape[1])), index, axis=axis)


class Composed:
    """Runs formulas on whatever arrays come; the one named "numpy" takes NumPy's alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, job: Task) -> Executable:
        if self.name == "numpy" and job.library != "numpy":
            raise BackendError(
                f"backend 'numpy' takes NumPy arrays, got {job.library} arrays; use backend 'array-api' or 'auto'"
            )

        def execute(xp: Any, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
            check_indices(job, xp, arrays, numbers)
            if job.dtype in HALF:  # computed in single precision, as everywhere
                arrays = {n: xp.astype(a, xp.float32) if job.given[n][1] == "float" else a for n, a in arrays.items()}
            device = array_api_compat.device(next(iter(arrays.values())))
            with np.errstate(all="ignore"):
                return evaluate(job.declaration, Shim(xp, device), arrays, {**job.static, **numbers}, job.wanted)

        return execute


def check_indices(job: Task, xp: Any, arrays: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    """Raise OutOfRange where a column number is, unless looking would wait for a device or force a lazy array."""
    for name, (kind, _) in job.given.items():
        if kind is Index:
            _check_index(job, xp, name, arrays, numbers)


def _check_index(job: Task, xp: Any, name: str, arrays: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    index = arrays[name]
    eager = job.library in {"numpy", "array_api_strict"} or (
        job.library == "torch" and array_api_compat.device(index).type == "cpu"
    )
    if not eager and os.environ.get("XPNN_CHECK") != "1":
        return
    columns = next(arrays[n].shape[1] for n, (kind, _) in job.given.items() if kind.__name__ == "Full")
    outside = (index < 0) | (index >= columns)
    options = {**job.static, **numbers}
    if options.get("ignore_index") is not None:
        outside = outside & (index != options["ignore_index"])
    if xp.any(outside):
        row = int(xp.argmax(xp.astype(outside[:, 0], xp.int64)))
        raise OutOfRange(name, row, int(index[row, 0]), columns)
