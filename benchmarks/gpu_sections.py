"""The sections of `gpu_check` that ask whether results are right: in every regime, and held to parity's bounds.

Each is a generator of rows: what was checked, the verdict ("ok", "failed", "skipped", "not reached"), and why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import xpnn
from xpnn import samples, testing
from xpnn.backends.arrays import numpy_dtype
from xpnn.backends.choice import use_backend
from xpnn.backends.cupy import machine, regime
from xpnn.backends.kernel import Kernel, registry

if TYPE_CHECKING:
    from xpnn.benchmarks.gpu_check import Row, Run

Array = np.ndarray[Any, Any]

DTYPES = ("float32", "bfloat16", "float16", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DISTINCT = 6  # different rows of a sample, repeated as often as needed
FEW = (1, 3, 32, 33, 1000, 1001)  # columns
LONGEST = 400_000  # columns up to which borders are looked for
# what the choice of a regime is made to believe, so that one GPU shows them all; from few rows
FACES: dict[str, dict[str, int]] = {
    "as it is": {},
    "few processors": {"processors": 1},
    "no clusters": {"processors": 1, "capability": 80},
    "little shared memory": {"processors": 1, "capability": 80, "shared": 0},
}


class Skip(Exception):
    """What a check cannot be done with, and why."""


def dtypes() -> tuple[str, ...]:
    """Those that can be checked here: bfloat16 takes ml_dtypes."""
    return tuple(d for d in DTYPES if d != "bfloat16" or importlib.util.find_spec("ml_dtypes"))


def attempt(check: str, function: Callable[[], Row | None]) -> Row:
    """A check as a row: with what it returns; failed by what it raises.

    Raises
    ------
    RuntimeError
        Where the CUDA context was lost, and every further check with it.
    """
    row: Row = {"check": check, "verdict": "ok"}
    try:
        return row | (function() or {})
    except Skip as reason:
        return row | {"verdict": "skipped", "why": str(reason)}
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            return row | {"verdict": "skipped", "why": f"not enough memory: {error}"}
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error}"[:1000]
        row |= {"verdict": "failed", "why": why, "where": f"{where.filename}:{where.lineno}"}
    if machine.present():
        try:
            importlib.import_module("cupy").cuda.runtime.deviceSynchronize()
        except Exception as error:
            raise RuntimeError(f"the CUDA context was lost in {check} ({row['why']}): {error}") from None
    return row


def require(condition: object, complaint: str) -> None:
    """Raise unless a condition holds; unlike `assert` under -O too."""
    if not condition:
        raise AssertionError(complaint)


def attempts(run: Run, todo: Sequence[tuple[str, Callable[[], Row | None]]]) -> Iterator[Row]:
    """Checks one after another until the time is over."""
    for k, (name, function) in enumerate(todo):
        if run.left() < 1:
            yield from not_reached(name for name, _ in todo[k:])
            return
        yield attempt(name, function)


def not_reached(left: Iterable[str]) -> Iterator[Row]:
    """A row for each check that there was no time for."""
    yield from ({"check": name, "verdict": "not reached", "why": "the section's time was over"} for name in left)


# --- regimes ------------------------------------------------------------------------------------------------------------


class Watched:
    """A machine that notes the regimes that it launches, and may pass for another device."""

    def __init__(self, inner: Any, device: regime.Device) -> None:
        self.inner, self._device, self.name = inner, device, inner.name
        self.launched: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def device(self) -> regime.Device:
        return self._device

    def functions(self, text: str, launches: Iterable[Any]) -> Any:
        launches = list(launches)
        functions, spilling = self.inner.functions(text, launches)
        return [self._noting(f, x.regime.name) for f, x in zip(functions, launches, strict=True)], spilling

    def _noting(self, function: Any, name: str) -> Any:
        def start(grid: Any, threads: int, shared: int, arguments: int) -> None:
            self.launched.append(name)
            function(grid, threads, shared, arguments)

        return start


@functools.cache  # what was compiled for one is kept with it
def _watched(inner: Any, device: regime.Device) -> Watched:
    return Watched(inner, device)


@contextlib.contextmanager
def watching(**changes: int) -> Iterator[Watched]:
    """Note the regimes that are launched within a `with` block, on the device as it is or as if it were another."""
    before: Any = machine.current
    seen = _watched(before, dataclasses.replace(before.device(), **changes))
    seen.launched.clear()
    machine.current = seen
    try:
        yield seen
    finally:
        machine.current = before


@dataclass(frozen=True)
class Op:
    """A kernel in one direction, as rows that do not depend on one another."""

    kernel: Kernel
    direction: str
    options: tuple[tuple[str, Any], ...] = ()
    inputs: int = 1

    @property
    def name(self) -> str:
        return " ".join([self.kernel.__name__, self.direction, *(str(v) for _, v in self.options)])

    def sample(self, dtype: str, columns: int) -> dict[str, Array]:
        """Distinct rows: an ordinary one, then ±1e4, −inf, +inf, NaN, and nothing but −inf."""
        rng = np.random.default_rng(columns)
        x = 3 * rng.standard_normal((DISTINCT, columns))
        if self.direction == "backward":
            y = np.exp(x - x.max(axis=1, keepdims=True))
            dy = rng.standard_normal(x.shape)
            dy[3, columns // 2], dy[4, columns // 3] = np.inf, np.nan
            return {"dy": dy.astype(numpy_dtype(dtype)), "y": (y / y.sum(axis=1, keepdims=True)).astype(numpy_dtype(dtype))}
        x[1] += np.where(rng.random(columns) < 0.5, 1e4, -1e4)
        x[2, rng.random(columns) < 0.3] = -np.inf
        x[3, columns // 2], x[4, columns // 3], x[5] = np.inf, np.nan, -np.inf
        first = next(iter(self.kernel.declaration.inputs))
        found = {first: x.astype(numpy_dtype(dtype))}
        return (
            found if "target" not in self.kernel.declaration.inputs else found | {"target": rng.integers(0, columns, DISTINCT)}
        )

    def __call__(self, arrays: dict[str, Any], out: Any = None) -> Any:
        """One result for each row."""
        given, options = tuple(arrays.values()), dict(self.options)
        if self.direction == "forward":
            return self.kernel(*given, out=out, **options)
        if self.direction == "backward":
            return self.kernel.backward(*given, out=out, **options)
        return self.kernel.value_and_grad(*given, out=out, **options)[1]

    def right(self, arrays: dict[str, Array], result: Array, dtype: str) -> Row:
        """The worst error of a result, held to parity's bound."""
        with np.errstate(all="ignore"):
            truth = testing.truth_of(self.kernel, self.direction, arrays, dict(self.options), dtype)
            if self.direction == "value_and_grad":
                for values in (truth.exact, truth.composed, truth.sizes):
                    values.pop("loss", None)
            error, bound, excess = truth.excess(dict.fromkeys(truth.exact, result))
        require(excess <= 0, f"an error of {error:.3g} ULP, {excess:.3g} beyond its bound of {bound:.3g}")
        return {"error_ulp": error, "bound_ulp": bound}


OPS = (
    Op(xpnn.softmax, "forward"),
    Op(xpnn.cross_entropy, "value_and_grad", (("reduction", "sum"),)),
    Op(xpnn.softmax, "backward", inputs=2),
    Op(xpnn.cross_entropy, "forward", (("reduction", "none"),)),
)


def repeated(arrays: dict[str, Array], rows: int) -> dict[str, Array]:
    """The rows of a sample over and over."""
    return {n: a[np.arange(rows) % len(a)] for n, a in arrays.items()}


def same_bits(a: Array, b: Array) -> bool:
    """Whether two results are the same to the last bit; NaN is NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    equal = np.ascontiguousarray(a).view(bits) == np.ascontiguousarray(b).view(bits)
    return bool(np.all(equal | (np.isnan(a) & np.isnan(b))))


def shifted(at: samples.Place, a: Array) -> Any:
    """An array that lies one element off its memory's start."""
    flat = np.concatenate([np.zeros(1, a.dtype), a.reshape(-1)])
    return at.there(flat)[1:].reshape(a.shape)


def sliced(at: samples.Place, a: Array) -> Any:
    """An array that is some columns of a wider one."""
    if a.ndim < 2:
        return at.there(a)
    wide = np.zeros((a.shape[0], a.shape[1] + 5), a.dtype)
    wide[:, 3:-2] = a
    return at.there(wide)[:, 3:-2]


def row_check(at: samples.Place, op: Op, dtype: str, columns: int, rows: int = 2 * DISTINCT) -> Row:
    """Errors within their bounds; the same bits for the same row, whatever surrounds it, lies where, and serves it."""
    six = op.sample(dtype, columns)
    many = repeated(six, rows)
    seen: dict[str, list[str]] = {}
    given = {n: at.there(a) for n, a in many.items()}
    with watching() as watched:
        first, again = op(given), op(given)
        seen["as it is"] = sorted(set(watched.launched))
    result = at.back(first)
    found = op.right(six, result[:DISTINCT], dtype)
    require(same_bits(result, at.back(again)), "a second call gives other bits")
    require(same_bits(result, repeated({"": result[:DISTINCT]}, rows)[""]), "the same row gives other bits further down")
    for face, changes in list(FACES.items())[1:] if columns > 1024 else ():
        with watching(**changes) as watched:
            other = at.back(op(given))
            seen[face] = sorted(set(watched.launched))
        require(same_bits(result, other), f"other bits with {face}: {seen[face]}, {seen['as it is']} before")
    with watching() as watched:
        one = at.back(op({n: at.there(a[:1]) for n, a in six.items()}))
        seen["one row"] = sorted(set(watched.launched))
        require(same_bits(result[:1], one), "a row alone gives other bits")
        apart = op({n: shifted(at, a) for n, a in six.items()})
        require(same_bits(result[:DISTINCT], at.back(apart)), "other bits from arrays that are not aligned")
        source, *rest = six
        place = sliced(at, np.zeros_like(result[:DISTINCT]))
        op({n: sliced(at, a) for n, a in six.items()}, out=place)
        require(same_bits(result[:DISTINCT], at.back(place)), "other bits from and into slices of columns")
        if result[:DISTINCT].shape == six[source].shape and result.dtype == six[source].dtype:
            own = at.there(six[source])
            returned = op({source: own, **{n: at.there(six[n]) for n in rest}}, out=own)
            require(returned is own, "in place, another array is returned")
            require(same_bits(result[:DISTINCT], at.back(own)), "other bits in place")
    shown = ", ".join(dict.fromkeys(name for names in seen.values() for name in names))
    return found | {"regimes": seen, "shown": f"{found['error_ulp']:.3g} of {found['bound_ulp']:.3g} ULP; {shown}"}


def borders(op: Op, dtype: str, device: regime.Device) -> list[int]:
    """The numbers of columns on both sides of where the regime changes, for few rows, on all faces of the device."""
    size = numpy_dtype(dtype).itemsize
    found: set[int] = set()
    for changes in FACES.values():
        face = dataclasses.replace(device, **changes)

        def kind(columns: int, face: regime.Device = face) -> tuple[str, int]:
            r = regime.choose(2 * DISTINCT, columns, size, op.inputs, op.inputs, columns * size % 16 != 0, face)
            return r.name, r.chunks

        low = 80  # below it everything is thread or warp, by divisibility
        while low < LONGEST:
            high = low + low // 4
            while kind(low) != kind(high) and high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if kind(middle) == kind(low) else (low, middle)
            if kind(low) != kind(high):
                found |= {low, high}
            low = high
    return sorted(found)


def regimes(run: Run) -> Iterator[Row]:
    """Both sides of every border between regimes, odd sizes, special values, layouts, bad targets; to the last bit."""
    here = bool(os.environ.get("XPNN_GPU_CHECK_HOST"))  # on the CPU: a taste
    with samples.place("cupy") as at:
        device = machine.current.device()
        todo: list[tuple[str, Callable[[], Row | None]]] = []
        for dtype in run.mine(dtypes()[:1] if here else dtypes()):
            todo += [(f"bad targets {dtype}, {c} columns", functools.partial(bad_targets, at, dtype, c)) for c in (5, 3001)]
            todo.append((f"integer dtypes of targets {dtype}", functools.partial(integer_targets, at, dtype)))
            todo.append((f"element by element {dtype}, not aligned", functools.partial(elementwise, at, dtype)))
        pairs = [(op, dtype) for op in OPS for dtype in dtypes()]
        for op, dtype in run.mine(pairs[:: 7 if here else 1]):
            sizes = (33,) if here else sorted({*FEW, *borders(op, dtype, device)})
            todo += [(f"{op.name} {dtype}, {c} columns", functools.partial(row_check, at, op, dtype, c)) for c in sizes]
        yield from attempts(run, todo)


def bad_targets(at: samples.Place, dtype: str, columns: int) -> None:
    """A class that there is not gives NaN and no gradient in its row alone; an ignored one nothing; a check finds it."""
    op = OPS[1]
    sample = op.sample(dtype, columns)
    logits = repeated({"": sample["logits"][:1]}, 5)[""]
    target = np.array([columns - 1, columns, -1, -100, 0])
    given = at.there(logits), at.there(target)
    losses = at.back(xpnn.cross_entropy(*given, reduction="none")).astype(np.float64)
    require(list(np.isnan(losses)) == [False, True, True, False, False], f"losses {losses}")
    require(losses[3] == 0, f"an ignored row's loss is {losses[3]}")
    loss, gradient = xpnn.cross_entropy.value_and_grad(*given, reduction="sum")
    require(np.isnan(at.back(loss)), "the sum of losses is not NaN")
    rows = at.back(gradient).astype(np.float64)
    require(not rows[1:4].any(), "a gradient where there is no class")
    good = np.array([0, 4])
    op.right({"logits": logits[good], "target": target[good]}, at.back(gradient)[good], dtype)
    if at.name != "GPU":
        return  # what follows is CuPy's own arithmetic
    os.environ["XPNN_CHECK"] = "1"
    try:
        xpnn.cross_entropy(*given)
    except IndexError:
        return
    finally:
        del os.environ["XPNN_CHECK"]
    raise AssertionError("no IndexError with XPNN_CHECK=1")


def integer_targets(at: samples.Place, dtype: str) -> None:
    """Every integer dtype gives the same bits."""
    op = OPS[1]
    sample = op.sample(dtype, 100)
    expected = at.back(op({n: at.there(a) for n, a in sample.items()}))
    for name in INTEGERS:
        given = {"logits": at.there(sample["logits"]), "target": at.there(sample["target"].astype(name))}
        require(same_bits(expected, at.back(op(given))), f"other bits with {name}")


def elementwise(at: samples.Place, dtype: str) -> Row:
    """Activations, forward and backward, of sizes and places that do not fit 16 bytes, and in place."""
    worst = 0.0
    for kernel, size in ((xpnn.relu, 1), (xpnn.tanh, 1001), (xpnn.sigmoid, 8191)):
        x = (3 * np.random.default_rng(size).standard_normal(size)).astype(numpy_dtype(dtype))
        if size > 3:
            x[:3] = np.inf, -np.inf, np.nan
        y = at.back(kernel(shifted(at, x)))
        worst = max(worst, Op(kernel, "forward").right({"x": x}, y, dtype)["error_ulp"])
        own = shifted(at, x)
        kernel(own, out=own)
        require(same_bits(y, at.back(own)), f"{kernel.__name__}: other bits in place")
        dy = at.there(x[::-1].copy())
        aligned, apart = kernel.vjp(at.there(x))[1](dy), kernel.vjp(shifted(at, x))[1](dy)
        require(same_bits(at.back(aligned), at.back(apart)), f"{kernel.__name__}: other gradients where not aligned")
    return {"shown": f"{worst:.3g} ULP"}


# --- parity -------------------------------------------------------------------------------------------------------------


def parity(run: Run) -> Iterator[Row]:
    """`xpnn parity` on the GPU: every built-in kernel, in every variant and direction, in all dtypes."""
    kernels = [k for k in registry.values() if k.__module__.startswith("xpnn.")]
    if os.environ.get("XPNN_GPU_CHECK_HOST"):
        kernels = [xpnn.relu]
    heavy = sorted(kernels, key=lambda k: -len(list(testing.variants(k))))
    todo = run.mine([(kernel, dtype) for kernel in heavy for dtype in dtypes()])
    for k, (kernel, dtype) in enumerate(todo):
        rows = testing.parity_rows([kernel], ["cupy"], [dtype])
        while True:
            if run.left() < 1:
                yield from not_reached(f"parity of {kernel.__name__} {dtype}" for kernel, dtype in todo[k:])
                return
            with use_backend("numpy"):  # in force where no other one is: Numba may be missing
                row = attempt(f"{kernel.__name__} {dtype}", functools.partial(next, rows, None))
            if "kernel" in row and (dtype == "float64" or row["direction"] != "gradient check"):
                yield shown(row)
                continue
            if row["verdict"] != "ok":
                yield row
            break  # the end, or what is the same for all dtypes


def shown(row: Row) -> Row:
    """A row of the parity table as one of ours."""
    name = " ".join(str(row[n]) for n in ("kernel", "dtype", "direction", "variant"))
    text = f"{row['error_ulp']:.3g} of {row['bound_ulp']:.3g} ULP, {row['place']}"
    bad = {} if row["verdict"] == "ok" else {"verdict": "failed", "why": row["verdict"]}
    return {**row, "check": name, "shown": text, **bad}
