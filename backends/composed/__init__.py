"""The composed backend: a formula run as it stands, by any array-API library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import array_api_compat
import numpy as np

from xpnn.backends import special
from xpnn.backends.arrays import dtype_name
from xpnn.backends.declare import evaluate
from xpnn.backends.kinds import Full, Index
from xpnn.backends.task import HALF, BackendError, Executable, OutOfRange, Task


class Shim:
    """A library's namespace, with the few functions that formulas know and the standard lacks or leaves open."""

    def __init__(self, xp: Any, device: Any) -> None:
        self._xp, self._device = xp, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    @property
    def _integer(self) -> Any:
        """The library's usual integers: 64 bits, or 32 for JAX where it was not told otherwise."""
        return self._xp.asarray(0, device=self._device).dtype

    def arange(self, stop: int) -> Any:
        return self._xp.arange(stop, device=self._device)

    def erf(self, x: Any) -> Any:
        return special.erf(self._xp, x)

    def erfc(self, x: Any) -> Any:
        return special.erfc(self._xp, x)

    def argmax(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The first column that holds the row's maximum, or NaN, in every library."""
        xp = self._xp
        found = (x == xp.max(x, axis=axis, keepdims=keepdims)) | xp.isnan(x)
        return xp.argmax(xp.astype(found, self._integer), axis=axis, keepdims=keepdims)

    def take_along_axis(self, x: Any, index: Any, *, axis: int = -1) -> Any:
        """One value of each row, `x[i, index[i, 0]]`; NaN where the index lies outside."""
        xp = self._xp
        rows, columns = x.shape
        return self._gather(x, index, columns, columns * xp.arange(rows, dtype=self._integer, device=self._device))

    def take(self, x: Any, index: Any, *, axis: int = -1) -> Any:
        """A column's value for each row, `x[0, index[i, 0]]`; NaN where the index lies outside."""
        return self._gather(x, index, x.shape[1], 0)

    def _gather(self, x: Any, index: Any, columns: int, starts: Any) -> Any:
        """The elements of `x` that lie `index` after `starts`, or NaN."""
        xp = self._xp
        index = xp.astype(index, self._integer)
        inside = (index >= 0) & (index < columns)
        safe = xp.where(inside, index, xp.zeros_like(index))[:, 0]
        taken = xp.reshape(xp.take(xp.reshape(x, (-1,)), safe + starts, axis=0), (-1, 1))
        return xp.where(inside, taken, xp.asarray(xp.nan, dtype=x.dtype, device=self._device))


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
            if may_look(job, next(iter(arrays.values()))):
                check_indices(job, xp, arrays, numbers)
            device = array_api_compat.device(next(iter(arrays.values())))
            with np.errstate(all="ignore"):
                if job.dtype in HALF:
                    return _in_single(job, xp, arrays, numbers, device)
                results = evaluate(job.declaration, Shim(xp, device), arrays, {**job.static, **numbers}, job.wanted)
            own = {id(a) for a in arrays.values()}  # a formula may return an input as it is: a result has memory of its own
            return {n: xp.asarray(v, copy=True) if id(v) in own else v for n, v in results.items()}

        return execute


def _in_single(job: Task, xp: Any, arrays: Mapping[str, Any], numbers: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Half precision, computed in single and rounded at the end, as on every backend; losses stay single."""
    d = job.declaration
    half = next((a.dtype for a in arrays.values() if dtype_name(a.dtype) == job.dtype), None)
    wide = {n: xp.astype(a, xp.float32) if job.given[n][1] == "float" else a for n, a in arrays.items()}
    results = evaluate(d, Shim(xp, device), wide, {**job.static, **numbers}, job.wanted)
    for n, v in results.items():
        if half is not None and v is not None and not d.is_wide(n, np.shape(v)[1:] in ((), (1,))):
            results[n] = xp.astype(v, half)
    return results


def may_look(job: Task, array: Any) -> bool:
    """Whether reading values neither waits for a device nor forces a lazy array, or was asked for."""
    device = array_api_compat.device(array)
    if job.library in {"numpy", "array_api_strict"} or (job.library == "torch" and device.type == "cpu"):
        return True
    return os.environ.get("XPNN_CHECK") == "1" and device is not None  # a traced array, which has no values, has none


def check_indices(job: Task, xp: Any, arrays: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    """Raise OutOfRange for the first column number that is outside [0, columns) and not the exempt one."""
    exempt = {**job.static, **numbers}.get("ignore_index")
    for name in (n for n, (kind, _) in job.given.items() if kind is Index):
        index, columns = arrays[name], next(arrays[n].shape[1] for n, (kind, _) in job.given.items() if kind is Full)
        check_index(name, xp, index[:, 0], columns, exempt)


def check_index(name: str, xp: Any, index: Any, columns: int, exempt: int | None) -> None:
    """The same for one array of column numbers, a row each."""
    outside = (index < 0) | (index >= columns)
    if exempt is not None:
        outside = outside & (index != exempt)
    if xp.any(outside):
        row = int(xp.argmax(xp.astype(outside, xp.int64)))
        raise OutOfRange(name, row, int(index[row]), columns)
