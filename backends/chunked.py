"""A linear layer under a loss, run by chunks of rows, so that its logits never exist as a whole.

For each chunk: the logits, one product; the loss and its gradient over the logits, one fused pass; then
dx = dlogits W, and dW += dlogitsᵀ x, two more products. Where a backward is asked for alone, the logits are made again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np

from xpnn.backends import products
from xpnn.backends.arrays import WRITABLE, memory, wide_dtype
from xpnn.backends.composed import Shim, check_index, may_look
from xpnn.backends.kinds import Index
from xpnn.backends.task import HALF, Executable, Task

if TYPE_CHECKING:
    from xpnn.backends.kernel import Kernel

BUDGET = 48 * 2**20  # bytes of logits that a chunk may have in any case,
SHARE = 20  # and otherwise this fraction of all
ROWS = 16  # chunks are multiples of this, where they have so many: BLAS works in such groups


def chunk_rows(rows: int, columns: int, itemsize: int) -> int:
    """How many rows of logits a chunk has unless the caller says.

    >>> chunk_rows(2048, 64_000, 4), chunk_rows(100, 1000, 4)
    (192, 100)
    """
    budget = max(BUDGET, rows * columns * itemsize // SHARE)
    most = max(1, budget // (columns * itemsize))
    return min(rows, most // ROWS * ROWS or most)


@dataclass(frozen=True)
class ByChunks:
    """How a kernel whose inputs are x, linear_weight, target, linear_bias and weight is run.

    `layer` makes the logits, `loss` is their loss, and `mass(xp, like, target, weight, options)` what its mean divides by.
    """

    layer: Kernel
    loss: Kernel
    mass: Callable[..., Any]

    @property
    def stages(self) -> tuple[Kernel, ...]:
        return self.layer, self.loss

    def __call__(self, job: Task) -> Executable:
        chunks = {"numpy": _NumPy, "cupy": _CuPy, "dask": _Dask}.get(job.library, _Functional)

        def execute(xp: Any, arrays: Mapping[str, Any], numbers: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
            with np.errstate(all="ignore"):
                return chunks(self, job, xp, arrays, {**job.static, **numbers}, out).run()

        return execute


class _Functional:
    """The chunks of one call, for arrays that are never written."""

    def __init__(
        self,
        how: ByChunks,
        job: Task,
        xp: Any,
        arrays: Mapping[str, Any],
        options: dict[str, Any],
        out: Mapping[str, Any],
    ) -> None:
        self.how, self.job, self.xp, self.out = how, job, xp, out
        self.chunk_size = options.pop("chunk_size")
        self.options = options
        self.x, self.linear_weight, self.dloss = arrays["x"], arrays["linear_weight"], arrays.get("dloss")
        self.index = job.given["target"][0] is Index
        self.target = xp.reshape(arrays["target"], (-1,)) if self.index else arrays["target"]
        self.bias, self.weight = (xp.reshape(arrays[n], (-1,)) if n in arrays else None for n in ("linear_bias", "weight"))
        self.wide = wide_dtype(xp, self.x.dtype)
        self.rows, self.columns = self.x.shape[0], self.linear_weight.shape[0]
        self.parts: list[Any] = []  # of the loss, one for each chunk
        self.totals: dict[str, Any] = {}
        self.begin()

    # -- what libraries do differently

    def begin(self) -> None:
        """Whatever is to be known beforehand."""

    def look(self) -> Any:
        """The target's values, where looking at them neither waits for a device nor forces a lazy array."""
        return self.target if may_look(self.job, self.target) else None

    def logits(self, chunk: slice) -> Any:
        return self.how.layer(self.x[chunk, :], self.linear_weight, bias=self.bias)

    def composed(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """A function of a namespace and arrays, run as it stands."""
        return function(Shim(self.xp, array_api_compat.device(self.x)), *arrays)

    def put(self, name: str, chunk: slice, values: Any) -> None:
        """The values of some rows of a result."""
        self.totals.setdefault(name, []).append(values)

    def multiply(self, name: str, chunk: slice, left: Any, right: Any) -> None:
        """Some rows of a result, a product."""
        self.put(name, chunk, self.xp.matmul(left, right))

    def add(self, name: str, left: Any, right: Any) -> None:
        """Add a product to a result, in float32 for half precision."""
        more = self.xp.matmul(self.xp.astype(left, self.wide), self.xp.astype(right, self.wide))
        self.totals[name] = self.totals[name] + more if name in self.totals else more

    def whole(self, name: str) -> Any:
        """A result of all chunks."""
        total = self.totals[name]
        return self.composed(lambda xp, *parts: xp.concat(parts, axis=0), *total) if isinstance(total, list) else total

    def settled(self, name: str, value: Any) -> Any:
        """A result where the caller wants it, if it can be written there."""
        return value

    # -- the same for all

    def run(self) -> dict[str, Any]:
        """The results that the task wants, in canonical shapes."""
        if self.index and (values := self.look()) is not None:
            xp = np if isinstance(values, np.ndarray) else self.xp
            check_index("target", xp, values, self.columns, self.options["ignore_index"])
        gradients = [n for n in self.job.wanted if n in ("dx", "dlinear_weight", "dtarget", "dlinear_bias")]
        mean = self.options["reduction"] == "mean"
        divisor = self.composed(self._mass, self.x, self.target, self.weight) if mean else None
        scale = None if self.dloss is None else self.composed(self._scale, self.dloss, self.x)
        for chunk in self._chunks():
            logits = self.logits(chunk)
            if gradients:
                self._gradients(chunk, logits, gradients, divisor, scale)
            else:
                options = self.options | {"reduction": "none"}
                losses = self.how.loss(logits, self.target[chunk, ...], weight=self.weight, **options)
                self.put("loss", chunk, self.xp.reshape(losses, (-1, 1)))
        results = {n: self.whole(n) for n in gradients}
        if "loss" in self.job.wanted:
            results["loss"] = self._loss(divisor)
        return {n: self.settled(n, v) for n, v in results.items()}

    def _chunks(self) -> list[slice]:
        name = "float32" if self.job.library == "numpy" and self.job.dtype in HALF else self.job.dtype  # of logits
        itemsize = 2 if name in HALF else 4 if name == "float32" else 8
        size = self.chunk_size or chunk_rows(self.rows, self.columns, itemsize)
        return [slice(start, min(start + size, self.rows)) for start in range(0, self.rows, size)]

    def _gradients(self, chunk: slice, logits: Any, wanted: list[str], divisor: Any, scale: Any) -> None:
        """One chunk's part of the loss and of its gradients."""
        wrt = ("logits", "target") if "dtarget" in wanted else ("logits",)
        over = (logits, None)[: len(wrt)] if self.job.library in WRITABLE else None
        options = self.options | {"reduction": "sum" if divisor is None else "mean"}
        part, (dlogits, *dtarget) = self.how.loss.value_and_grad(
            logits, self.target[chunk, ...], weight=self.weight, divisor=divisor,
            row_scale=None if scale is None else scale[chunk], wrt=wrt, out=over, **options,
        )  # fmt: skip
        self.parts.append(part)
        x = self.x[chunk, :]
        if "dlinear_weight" in wanted:
            self.add("dlinear_weight", dlogits.T, x)
        if "dlinear_bias" in wanted:
            self.add("dlinear_bias", self.composed(lambda xp, x: xp.ones_like(x[:, :1]).T, x), dlogits)
        if dtarget:  # these two last: they may be written over the rows of x and target
            self.put("dtarget", chunk, dtarget[0])
        if "dx" in wanted:
            self.multiply("dx", chunk, dlogits, self.linear_weight)

    def _loss(self, divisor: Any) -> Any:
        """The loss of all rows, from those of the chunks or of the rows."""
        if self.parts:
            return self.composed(lambda xp, *parts: xp.reshape(xp.sum(xp.stack(parts)), (1, 1)), *self.parts)
        rows = self.whole("loss")
        if self.options["reduction"] == "none":
            return rows
        total = self.composed(lambda xp, rows: xp.sum(rows, axis=0, keepdims=True), rows)
        return total if divisor is None else self.composed(lambda xp, a, b: a / b, total, divisor)

    def _mass(self, xp: Any, x: Any, target: Any, weight: Any = None) -> Any:
        like = xp.astype(x[:, :1], self.wide)
        target = xp.reshape(target, (-1, 1)) if self.index else like  # of probabilities, that they are floats
        weight = None if weight is None else xp.reshape(xp.astype(weight, self.wide), (1, -1))
        return self.how.mass(xp, like, target, weight, self.options) * xp.ones_like(like[:1, :])

    def _scale(self, xp: Any, dloss: Any, x: Any) -> Any:
        """The cotangent of each row's loss."""
        return xp.reshape(dloss + xp.zeros_like(x[:, :1], dtype=self.wide), (-1,))


class _Dask(_Functional):
    """Dask arrays: their blocks are the chunks, unless the caller says; products by the backend, which knows half precision."""

    def multiply(self, name: str, chunk: slice, left: Any, right: Any) -> None:
        from xpnn.backends.dask import matmul

        self.put(name, chunk, matmul(left, right))

    def _chunks(self) -> list[slice]:
        return [slice(0, self.rows)] if self.chunk_size is None else super()._chunks()


class _InPlace(_Functional, ABC):
    """Arrays that are written: results have a place from the start, and sums are added to it."""

    def begin(self) -> None:
        self.read = [a for a in (self.linear_weight, self.bias, self.weight) if a is not None]  # by every chunk

    def place(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """The array that a result goes to: the caller's where it fits and nothing lies there that is still to be read.

        What is written row by row may lie over the rows of x and target, which are read by then.
        """
        if name not in self.totals:
            target = self.out.get(name)
            read = self.read if name in ("loss", "dx", "dtarget") else [*self.read, self.x, self.target]
            free = target is not None and target.dtype == dtype and target.shape == shape
            free = free and not any(np.may_share_memory(memory(target), memory(a)) for a in read)
            self.totals[name] = target if free else self.xp.empty(shape, dtype=dtype)
        return self.totals[name]

    @abstractmethod
    def copy(self, to: Any, values: Any) -> None:
        """Copy values into an array of another floating dtype."""

    @abstractmethod
    def product(self, out: Any, left: Any, right: Any, add: bool) -> None:
        """out = left @ right, or out += left @ right."""

    def put(self, name: str, chunk: slice, values: Any) -> None:
        self.copy(self.place(name, (self.rows, values.shape[1]), values.dtype)[chunk], values)

    def multiply(self, name: str, chunk: slice, left: Any, right: Any) -> None:
        self.product(self.place(name, (self.rows, right.shape[1]), self.x.dtype)[chunk], left, right, False)

    def add(self, name: str, left: Any, right: Any) -> None:
        again = name in self.totals
        self.product(self.place(name, (left.shape[0], right.shape[1]), self.wide), left, right, again)

    def settled(self, name: str, value: Any) -> Any:
        target = self.out.get(name)
        if target is None and name != "loss" and value.dtype != self.x.dtype:
            target = self.xp.empty(value.shape, dtype=self.x.dtype)
        if target is None or target is value:
            return value
        self.copy(target, value)
        return target


class _NumPy(_InPlace):
    """NumPy arrays: one buffer for the logits of every chunk, in float32 for half precision."""

    def begin(self) -> None:
        super().begin()
        self.buffer = np.empty((max(c.stop - c.start for c in self._chunks()), self.columns), self.wide)
        self.convert: products.Convert = products.copy
        if self.job.dtype in HALF and self.how.loss.explain(self.buffer[:1], self.target[:1]) == "numba":
            from xpnn.backends.numba.products import convert

            self.convert = convert
        self.weight = None if self.weight is None else self.weight.astype(self.wide, copy=False)

    def logits(self, chunk: slice) -> Any:
        result = self.buffer[: chunk.stop - chunk.start]
        self.product(result, self.x[chunk], self.linear_weight.T, False)
        if self.bias is not None:
            result += self.bias.astype(self.wide, copy=False)
        return result

    def copy(self, to: Any, values: Any) -> None:
        half = sorted(a.dtype.name in HALF for a in (to, values)) == [False, True]
        (self.convert if half else products.copy)(to, values)

    def product(self, out: Any, left: Any, right: Any, add: bool) -> None:
        products.into(out, left, right, add, self.convert)


class _CuPy(_InPlace):
    """CuPy arrays: products by cuBLAS, which adds those of half precision to float32 itself."""

    def run(self) -> dict[str, Any]:
        with self.machine.on(self.x):
            return super().run()

    @property
    def machine(self) -> Any:
        from xpnn.backends.cupy import machine

        return machine.current

    def look(self) -> Any:
        return self.machine.fetch(self.target) if may_look(self.job, self.target) else None

    def composed(self, function: Callable[..., Any], *arrays: Any) -> Any:
        return self.machine.composed(function, *arrays)

    def copy(self, to: Any, values: Any) -> None:
        self.machine.copy(to, values)

    def product(self, out: Any, left: Any, right: Any, add: bool) -> None:
        if add or (out.dtype == self.wide and left.dtype != self.wide):
            self.machine.accumulate(out, left, right, add)
        else:
            self.machine.matmul(left, right, out)
