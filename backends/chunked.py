"""A linear layer under a loss, run by chunks of rows, so that its logits never exist as a whole.

For each chunk: the logits, one product; the loss and its gradient over the logits, one fused pass; then
dx = dlogits W, and dW += dlogitsᵀ x, two more products. Where a backward is asked for alone, the logits are made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np

from xpnn.backends import products
from xpnn.backends.arrays import WRITABLE, dtype_name, wide_dtype
from xpnn.backends.composed import Shim
from xpnn.backends.kinds import Index
from xpnn.backends.task import HALF, Executable, OutOfRange, Task

if TYPE_CHECKING:
    from xpnn.backends.kernel import Kernel

BUDGET = 32 * 2**20  # bytes of logits that a chunk may have in any case,
SHARE = 16  # and otherwise this fraction of all
ROWS = 16  # chunks are multiples of this, where they have so many: BLAS works in such groups

Mass = Callable[..., Any]


def chunk_rows(rows: int, columns: int, itemsize: int) -> int:
    """How many rows of logits a chunk has unless the caller says.

    >>> chunk_rows(2048, 64_000, 4), chunk_rows(100, 1000, 4)
    (128, 100)
    """
    budget = max(BUDGET, rows * columns * itemsize // SHARE)
    most = max(1, budget // (columns * itemsize))
    return min(rows, most // ROWS * ROWS or most)


def by_chunks(layer: Kernel, loss: Kernel, mass: Mass) -> Callable[[Task], Executable]:
    """How a kernel whose inputs are x, linear_weight, target, linear_bias and weight is run.

    `layer` makes the logits, `loss` is their loss, and `mass(xp, like, target, weight, options)` what its mean divides by.
    """

    def driver(job: Task) -> Executable:
        def execute(xp: Any, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
            kind = {"numpy": _NumPy, "cupy": _CuPy}.get(job.library, _Functional)
            return kind(job, xp, arrays, {**job.static, **numbers}, dict(out), layer, loss, mass).run()

        return execute

    return driver


class _Functional:
    """The chunks of one call, for arrays that are never written."""

    def __init__(
        self,
        job: Task,
        xp: Any,
        arrays: Mapping[str, Any],
        options: dict[str, Any],
        out: dict[str, Any],
        layer: Kernel,
        loss: Kernel,
        mass: Mass,
    ) -> None:
        self.job, self.xp, self.layer, self.loss, self.mass = job, xp, layer, loss, mass
        self.out = out
        self.chunk_size = options.pop("chunk_size")
        self.options = options
        self.x, self.linear_weight = arrays["x"], arrays["linear_weight"]
        self.index = job.given["target"][0] is Index
        self.target = xp.reshape(arrays["target"], (-1,)) if self.index else arrays["target"]
        self.bias, self.weight = (xp.reshape(arrays[n], (-1,)) if n in arrays else None for n in ("linear_bias", "weight"))
        self.dloss = arrays.get("dloss")
        self.wide = wide_dtype(xp, self.x.dtype)
        self.itemsize = {"float64": 8, "float32": 4}.get(dtype_name(self.x.dtype), 2)  # of logits
        self.rows, self.columns = self.x.shape[0], self.linear_weight.shape[0]
        self.totals: dict[str, Any] = {}
        self.begin()

    # -- what libraries do differently

    def begin(self) -> None:
        """Whatever is to be known beforehand."""

    def look(self) -> Any:
        """The target's values, where looking at them neither waits for a device nor forces a lazy array."""
        cheap = self.job.library == "array_api_strict" or (
            self.job.library == "torch" and array_api_compat.device(self.target).type == "cpu"
        )
        return self.target if cheap or os.environ.get("XPNN_CHECK") == "1" else None

    def logits(self, chunk: slice) -> Any:
        bias = {} if self.bias is None else {"bias": self.bias}
        return self.layer(self.x[chunk, :], self.linear_weight, **bias)

    def composed(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """A function of a namespace and arrays, run as it stands."""
        return function(Shim(self.xp, array_api_compat.device(self.x)), *arrays)

    def put(self, name: str, chunk: slice, values: Any) -> None:
        """The values of some rows of a result."""
        self.totals.setdefault(name, []).append(values)

    def rows_of(self, name: str) -> Any:
        """All rows of a result."""
        return self.composed(lambda xp, *parts: xp.concat(parts, axis=0), *self.totals[name])

    def multiply(self, name: str, chunk: slice, left: Any, right: Any) -> None:
        """Some rows of a result, a product."""
        self.put(name, chunk, self.xp.matmul(left, right))

    def add(self, name: str, left: Any, right: Any) -> None:
        """Add a product to a result, in float32 for half precision."""
        more = self.xp.matmul(self.xp.astype(left, self.wide), self.xp.astype(right, self.wide))
        self.totals[name] = self.totals[name] + more if name in self.totals else more

    def ones(self, rows: int) -> Any:
        return self.xp.ones((1, rows), dtype=self.wide, device=array_api_compat.device(self.x))

    # -- the same for all

    def run(self) -> dict[str, Any]:
        """The results that the task wants, in canonical shapes."""
        self._check_target()
        gradients = [n for n in self.job.wanted if n in ("dx", "dlinear_weight", "dtarget", "dlinear_bias")]
        mean = self.options["reduction"] == "mean"
        divisor = self.composed(self._mass, self.x, self.target, self.weight) if mean else None
        scale = None if self.dloss is None else self.composed(self._scale, self.dloss, self.x)
        size = self.chunk_size or chunk_rows(self.rows, self.columns, self.itemsize)
        for start in range(0, self.rows, size):
            chunk = slice(start, min(start + size, self.rows))
            logits = self.logits(chunk)
            if gradients:
                self._gradients(chunk, logits, gradients, divisor, scale)
            else:
                options = self.options | {"reduction": "none"}
                self.put("loss", chunk, self.loss(logits, self.target[chunk, ...], **self._optional(), **options))
        results = {n: self.rows_of(n) if isinstance(self.totals[n], list) else self.totals[n] for n in gradients}
        if "loss" in self.job.wanted:
            results["loss"] = self._loss(divisor, bool(gradients))
        return results

    def _optional(self) -> dict[str, Any]:
        return {} if self.weight is None else {"weight": self.weight}

    def _gradients(self, chunk: slice, logits: Any, wanted: list[str], divisor: Any, scale: Any) -> None:
        """One chunk's part of the loss and of its gradients."""
        more = self._optional()
        if divisor is not None:
            more["divisor"] = divisor
        if scale is not None:
            more["row_scale"] = scale[chunk]
        options = self.options | {"reduction": "sum" if divisor is None else "mean"}
        wrt = ("logits", *(["target"] if "dtarget" in wanted else []))
        out = {"out": (logits, *[None] * (len(wrt) - 1))} if self.job.library in WRITABLE else {}
        part, found = self.loss.value_and_grad(logits, self.target[chunk, ...], wrt=wrt, **more, **options, **out)
        dlogits = found[0]
        self.totals.setdefault("loss", []).append(part)
        if "dtarget" in wanted:
            self.put("dtarget", chunk, found[1])
        if "dlinear_weight" in wanted:
            self.add("dlinear_weight", dlogits.T, self.x[chunk, :])
        if "dlinear_bias" in wanted:
            self.add("dlinear_bias", self.ones(dlogits.shape[0]), dlogits)
        if "dx" in wanted:  # last: it may be written over x
            self.multiply("dx", chunk, dlogits, self.linear_weight)

    def _loss(self, divisor: Any, parts: bool) -> Any:
        """The loss of all rows, from those of the chunks or of the rows."""
        if parts:
            return self.composed(lambda xp, *values: xp.reshape(xp.sum(xp.stack(values)), (1, 1)), *self.totals["loss"])
        rows = self.xp.reshape(self.rows_of("loss"), (-1, 1))
        if self.options["reduction"] == "none":
            return rows
        total = (lambda xp, r: xp.sum(r, axis=0, keepdims=True)) if divisor is None else (
            lambda xp, r, d: xp.sum(r, axis=0, keepdims=True) / d
        )  # fmt: skip
        return self.composed(total, *((rows,) if divisor is None else (rows, divisor)))

    def _mass(self, xp: Any, x: Any, target: Any, weight: Any = None) -> Any:
        like = xp.astype(x[:, :1], self.wide)
        index = xp.reshape(target, (-1, 1)) if self.index else target
        w = None if weight is None else xp.reshape(xp.astype(weight, self.wide), (1, -1))
        return self.mass(xp, like, index, w, self.options)

    def _scale(self, xp: Any, dloss: Any, x: Any) -> Any:
        """The cotangent of each row's loss."""
        return xp.reshape(dloss + xp.zeros_like(x[:, :1], dtype=self.wide), (-1,))

    def _check_target(self) -> None:
        """Raise for the first class number that is outside, before anything is written."""
        values = self.look() if self.index else None
        if values is None:
            return
        xp = np if isinstance(values, np.ndarray) else self.xp
        outside = ((values < 0) | (values >= self.columns)) & (values != self.options["ignore_index"])
        if xp.any(outside):
            row = int(xp.argmax(xp.astype(outside, xp.int64)))
            raise OutOfRange("target", row, int(values[row]), self.columns)


class _NumPy(_Functional):
    """NumPy arrays: one buffer for the logits of every chunk, sums in place, products of half precision in float32."""

    def begin(self) -> None:
        self.itemsize = self.wide.itemsize if isinstance(self.wide, np.dtype) else np.dtype(self.wide).itemsize
        self.buffer = np.empty((0, self.columns), self.wide)
        self.convert: products.Convert = products.copy
        if dtype_name(self.x.dtype) in HALF and self.loss.explain(self.buffer[:1], self.target[:1]) == "numba":
            from xpnn.backends.numba.products import convert

            self.convert = convert
        self.weight = None if self.weight is None else self.weight.astype(self.wide, copy=False)

    def look(self) -> Any:
        return self.target

    def logits(self, chunk: slice) -> Any:
        rows = chunk.stop - chunk.start
        if len(self.buffer) < rows:
            self.buffer = np.empty((rows, self.columns), self.wide)
        result = self.buffer[:rows]
        products.into(result, self.x[chunk], self.linear_weight.T, convert=self.convert)
        if self.bias is not None:
            result += self.bias.astype(self.wide, copy=False)
        return result

    def _place(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """The array that a result goes to: the caller's where it is of the dtype and no input lies there."""
        if name not in self.totals:
            target = self.out.get(name)
            free = target is not None and target.dtype == dtype
            if free and not (name == "dx" and target is not None and np.shares_memory(target, self.x)):
                free = not any(np.may_share_memory(target, a) for a in (self.x, self.linear_weight, self.target))
            self.totals[name] = target if free else np.empty(shape, dtype)
        return self.totals[name]

    def put(self, name: str, chunk: slice, values: Any) -> None:
        shape = (self.rows,) if name == "loss" else (self.rows, self.columns)
        self._place(name, shape, values.dtype)[chunk] = values

    def rows_of(self, name: str) -> Any:
        return self.totals[name]

    def multiply(self, name: str, chunk: slice, left: Any, right: Any) -> None:
        result = self._place(name, self.x.shape, self.x.dtype)
        products.into(result[chunk], left, right, convert=self.convert)

    def add(self, name: str, left: Any, right: Any) -> None:
        again = name in self.totals
        total = self._place(name, (left.shape[0], right.shape[1]), self.wide)
        products.into(total, left, right, add=again, convert=self.convert)


class _CuPy(_Functional):
    """CuPy arrays: products by cuBLAS, which adds them to float32 itself."""

    def look(self) -> Any:
        from xpnn.backends.cupy import machine

        return machine.current.fetch(self.target) if os.environ.get("XPNN_CHECK") == "1" else None

    def composed(self, function: Callable[..., Any], *arrays: Any) -> Any:
        from xpnn.backends.cupy import machine

        return machine.current.composed(function, *arrays)

    def multiply(self, name: str, chunk: slice, left: Any, right: Any) -> None:
        import cupy

        from xpnn.backends.cupy import machine

        if name not in self.totals:
            self.totals[name] = cupy.empty((self.rows, right.shape[1]), self.x.dtype)
        machine.current.matmul(left, right, self.totals[name][chunk])

    def add(self, name: str, left: Any, right: Any) -> None:
        import cupy

        from xpnn.backends.cupy import machine

        again = name in self.totals
        if not again:
            self.totals[name] = cupy.empty((left.shape[0], right.shape[1]), self.wide)
        machine.current.accumulate(self.totals[name], left, right, again)

    def ones(self, rows: int) -> Any:
        return self.composed(lambda xp, x: xp.ones_like(x[:rows, :1]).T, self.x)
