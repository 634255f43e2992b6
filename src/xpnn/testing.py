"""Parity: do backends compute the same, and as exactly as their precision allows?

The truth is the composed formula in a wider precision, on the same (rounded) inputs. An error is measured in ULP of the
larger of the true value and the terms it was made of (see `xpnn.backends.interpret`). A backend is in order where, element
by element, its error is at most that of the composed formula in the same precision plus a few ULP. Every check also proves
that it can fail: it is repeated on results with one element zeroed, one column or one row read in another's place.

This compares a formula with itself. Whether the formula is right is for a gradient check, which is part of the table, and
for independent references, which the test-suite holds for the kernels of this library.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from xpnn.backends import choice
from xpnn.backends.arguments import collect
from xpnn.backends.arrays import Frame, numpy_dtype
from xpnn.backends.bind import bind
from xpnn.backends.call import made_by
from xpnn.backends.declare import trace
from xpnn.backends.interpret import FORMATS, Sized, interpret
from xpnn.backends.kernel import Kernel
from xpnn.backends.kinds import Matrix
from xpnn.backends.prepare import Given, default_given, kind_of, prepare_shapes
from xpnn.backends.program import Program
from xpnn.backends.recording import SubsetError
from xpnn.samples import DTYPES, HALF, Array, Variant, is_float, place, sample, variants

TOLERANCE = 4.0  # ULP beyond the composed formula's own error: exp, log and a quotient may each be off by one
GRADIENT_TOLERANCE = 2.0**27  # ULP of float64, about 3e-8: what central differences can see
SHAPES = ((1, 1), (4, 7), (3, 37), (40, 10), (3, 5000))
STEP = 1e-6  # of central differences in float64
_WIDER = {"float16": np.float64, "bfloat16": np.float64, "float32": np.float64, "float64": np.longdouble}


# --- one comparison ------------------------------------------------------------------------------------------------------


def _compute(
    kernel: Kernel, direction: str, arrays: dict[str, Array], options: dict[str, Any], backend: str
) -> dict[str, Array]:
    """A direction's results by name, on a backend."""
    d = kernel.declaration
    with place(backend) as at:
        given = {n: at.there(a) for n, a in arrays.items()}
        if direction == "forward":
            found = _named(_outputs(kernel, arrays, options), kernel(**given, **options))
        elif direction == "value_and_grad":
            names = _floats(kernel, arrays)
            values, gradients = kernel.value_and_grad(**given, **options, wrt=names)
            found = _named(_outputs(kernel, arrays, options), values)
            found |= {"d" + n: g for n, g in zip(names, gradients, strict=True)}
        else:
            gradients = kernel.backward(**given, **options)
            names = tuple(n for n, i in d.inputs.items() if n in arrays or not i.optional)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            found = {"d" + n: g for n, g in zip(names, gradients, strict=True)}
        return {n: at.back(v) for n, v in found.items() if v is not None}


def _outputs(kernel: Kernel, arrays: dict[str, Array], options: dict[str, Any]) -> tuple[str, ...]:
    """The names of what a call returns."""
    with choice.use_backend("numpy"):
        bound = bind(kernel, kernel.__name__, tuple(kernel.declaration.inputs), (), {**arrays, **options})
        return made_by(collect(kernel, kernel.__name__, bound, {}))


def _named(names: tuple[str, ...], values: Any) -> dict[str, Any]:
    return dict(zip(names, values if isinstance(values, tuple) else (values,), strict=True))


def _floats(kernel: Kernel, arrays: dict[str, Array]) -> tuple[str, ...]:
    """The inputs that have a gradient."""
    d = kernel.declaration
    return tuple(n for n in d.default_wrt or d.inputs if n in arrays and is_float(arrays[n]))


def _with(arrays: dict[str, Array], dtype: Any) -> dict[str, Array]:
    return {n: a.astype(dtype) if is_float(a) else a for n, a in arrays.items()}


def given_for_backward(kernel: Kernel, arrays: dict[str, Array], options: dict[str, Any], seed: int) -> dict[str, Array]:
    """What backward is given: inputs, outputs and saved values rounded to the dtype, and a random cotangent."""
    d = kernel.declaration
    with choice.use_backend("numpy"):
        bound = bind(kernel, kernel.__name__, tuple(d.inputs), (), {**arrays, **options})
        made = collect(kernel, kernel.__name__, bound, {}).run((*d.outputs, *d.saved), {})
    rng = np.random.default_rng(seed + 1)
    given = arrays | {n: np.asarray(v) for n, v in made.items()}
    cotangents = [n for n in d.differentiable if n in made]
    given |= {"d" + n: rng.standard_normal(np.shape(made[n])).astype(made[n].dtype) for n in cotangents}
    read = {*d.backward_parameters, *(n for n, i in d.inputs.items() if i.optional)}
    return {n: a for n, a in given.items() if n in read}


class Recorded(NamedTuple):
    """A direction's program, and the canonical arrays, options and frame of one call of it."""

    program: Program
    arrays: dict[str, Array]
    options: dict[str, Any]
    frame: Frame

    def results(self, program: Program, rounded: str = "float64") -> dict[str, Sized]:
        """What a program (this one, or a changed one) gives for the arrays, in the caller's shapes.

        `rounded` is the dtype that the sizes are for.
        """

        def shaped(values: Array, name: str) -> Array:
            return np.asarray(self.frame.restore(np, np.asarray(values), program.outputs[name].shape))

        found = interpret(program, self.arrays, self.options, rounded)
        return {n: Sized(shaped(v.value, n), shaped(v.size, n)) for n, v in found.items()}


def record(kernel: Kernel, arrays: dict[str, Array], options: dict[str, Any], names: tuple[str, ...]) -> Recorded:
    """Trace what makes some results from a caller's arrays; `options` may hold `axis`.

    Raises
    ------
    SubsetError
        Where the kernel leaves the subset that can be traced.
    """
    d = kernel.declaration
    given: Given = {
        n: (i.kind("int" if arrays[n].dtype.kind in "iu" else "float"), "float") for n, i in d.inputs.items() if n in arrays
    }
    bound = bind(kernel, kernel.__name__, tuple(arrays), (), {**arrays, **options})
    shapes = prepare_shapes(kernel, default_given(d) | given, bound.options)
    roles = {n: kind_of(s) for n, s in shapes.items()}
    roles |= {"d" + n: roles[n] for n in d.differentiable if n in roles}
    call = collect(kernel, kernel.__name__, bound, roles)
    kinds, dtypes = ({n: g[k] for n, g in call.given.items()} for k in (0, 1))
    program = trace(d, kinds, dtypes, bound.options, names)  # type: ignore[arg-type]
    return Recorded(program, call.arrays(), bound.options, call.frame)


def ulps(ours: Array, truth: Array, size: Array, dtype: str, computed: str = "") -> Array:
    """The error of each element in ULP of the larger of the true value and its terms; NaN for NaN counts as right.

    `dtype` is the name of that of `ours`, `computed` that of the terms where it differs.

    A whole number is right or infinitely wrong. Results below the smallest normal number may be flushed, so no unit is
    smaller than that.

    Examples
    --------
    >>> import numpy as np
    >>> ulps(np.float32([1.0]), np.array([1 + 2.0**-23]), np.array([0.0]), "float32")
    array([1.])
    """
    if truth.dtype.kind in "iu":
        return np.where(ours == truth, 0.0, np.inf)
    with np.errstate(all="ignore"):
        unit = np.maximum(_unit(np.abs(truth), dtype), _unit(size, computed or dtype))
        error = np.abs(ours.astype(truth.dtype) - truth) / unit
        rounded = truth.astype(numpy_dtype(dtype))
        same = (ours == rounded) | (np.isnan(ours) & np.isnan(rounded))
        error = np.where(same & ~np.isfinite(ours), 0.0, np.where(np.isnan(error), np.inf, error))
        return np.asarray(error.astype(np.float64))


def _unit(scale: Array, dtype: str) -> Array:
    """The distance between neighbours at some numbers; at least the smallest normal one."""
    digits, least, most = FORMATS[dtype]
    scale = np.clip(scale, least, most)
    return np.asarray(np.maximum(np.ldexp(np.ones_like(scale), np.frexp(scale)[1] - digits), least))


@dataclass
class Truth:
    """What a direction should give, and what the composed formula gives in the same precision.

    `sizes` are those of the terms behind each result, none for a kernel that cannot be traced; `reads` names the arrays
    that the results depend on.
    """

    exact: dict[str, Array]
    composed: dict[str, Array]
    sizes: dict[str, Array]
    reads: set[str]
    computed: str

    def excess(self, results: dict[str, Array]) -> tuple[float, float, float]:
        """The worst error, the bound where the error exceeds it by most, and that excess, in ULP."""
        worst, bound, excess = 0.0, TOLERANCE, -np.inf
        for name, truth in self.exact.items():
            size = np.asarray(self.sizes.get(name, np.zeros(truth.shape)), np.result_type(truth.dtype, np.float64))
            dtype = self.composed[name].dtype.name
            ours = ulps(results[name], truth, size, dtype, self.computed)
            allowed = ulps(self.composed[name], truth, size, dtype, self.computed) + TOLERANCE
            if ours.size:
                worst = max(worst, float(ours.max()))
                over = np.where(np.isinf(allowed), -np.inf, ours - allowed)
                at = np.unravel_index(np.argmax(over), over.shape)
                if over[at] > excess:
                    excess, bound = float(over[at]), float(allowed[at])
        return worst, bound, excess


def truth_of(kernel: Kernel, direction: str, arrays: dict[str, Array], options: dict[str, Any], dtype: str) -> Truth:
    """The truth for given (already rounded) arrays."""
    exact = _compute(kernel, direction, _with(arrays, _WIDER[dtype]), options, "numpy")
    composed = _compute(kernel, direction, arrays, options, "numpy")
    names = tuple(exact)
    stored = any(Matrix in i.kinds for i in kernel.declaration.inputs.values())  # products are, in the arrays' dtype
    computed = "float32" if dtype in HALF and not stored else dtype
    try:
        recorded = record(kernel, _with(arrays, _WIDER[dtype]), options, names)
    except SubsetError:
        return Truth(exact, composed, {}, set(arrays), computed)
    sizes = {n: v.size for n, v in recorded.results(recorded.program, computed).items()}
    return Truth(exact, composed, sizes, recorded.program.reads(), computed)


def _blind(
    truth: Truth,
    kernel: Kernel,
    direction: str,
    arrays: dict[str, Array],
    options: dict[str, Any],
    results: dict[str, Array],
) -> str:
    """What a check failed to notice: "" if it notices everything it should."""
    for name, value in results.items():
        if value.size > 1 and np.any(value):
            spoilt = value.copy()
            order = np.argsort(np.abs(np.where(np.isfinite(spoilt), spoilt, 0)).astype(np.float64), axis=None)
            order = order[np.flatnonzero(spoilt.flat[order])]
            spoilt.flat[order[len(order) // 2]] = 0
            if truth.excess(results | {name: spoilt})[2] <= 0:
                return f"{name} with its median element zeroed"
    first = next((n for n, a in arrays.items() if a.ndim == 2 and is_float(a) and n in truth.reads), None)
    if first is None or min(arrays[first].shape) < 2:
        return ""
    for what, at in (("column", np.s_[..., 0]), ("row", np.s_[0])):
        spoilt = arrays[first].copy()
        spoilt[at] = spoilt[..., 1] if what == "column" else spoilt[1]
        if truth.excess(_compute(kernel, direction, arrays | {first: spoilt}, options, "numpy"))[2] <= 0:
            return f"a {what} read in its neighbour's place"
    return ""


# --- the table --------------------------------------------------------------------------------------------------------------


def parity_rows(
    kernels: Iterable[Kernel],
    backends: Iterable[str],
    dtypes: Iterable[str] | None = None,
    chosen: Callable[[Kernel], Iterable[Variant]] = variants,
) -> Iterator[dict[str, Any]]:
    """One row for each kernel, variant, backend, dtype and direction: worst error, bound, verdict.

    Parameters
    ----------
    backends
        Names as `use_backend` takes them.
    dtypes
        By default all four.
    chosen
        The variants of a kernel that are gone through.

    Yields
    ------
    dict
        kernel, variant, backend, place ("CPU", "GPU", or "CPU for a GPU" for CUDA kernels run on the CPU), dtype,
        direction, error_ulp, bound_ulp, verdict ("ok", "breach", or "blind" where the check would not have noticed a
        spoilt result), truth.
    """
    kernels, backends = tuple(kernels), tuple(backends)
    for kernel, dtype in itertools.product(kernels, tuple(dtypes) if dtypes is not None else (*HALF, *DTYPES)):
        for variant in chosen(kernel):
            for direction in _directions(kernel, variant):
                for backend in backends:
                    row = {"kernel": kernel.__name__, "variant": str(variant), "backend": backend, "dtype": dtype}
                    yield row | {"direction": direction} | _row(kernel, variant, direction, backend, dtype)
    for kernel, backend in itertools.product(kernels, backends):
        if kernel.declaration.backward is not None:
            for variant in chosen(kernel):
                row = {"kernel": kernel.__name__, "variant": str(variant), "backend": backend, "dtype": "float64"}
                yield row | {"direction": "gradient check"} | _gradient_row(kernel, variant, backend)


def _directions(kernel: Kernel, variant: Variant) -> Iterator[str]:
    yield "forward"
    if kernel.declaration.backward is not None:
        yield "backward"
        with choice.use_backend("numpy"):
            values = kernel(**sample(kernel, variant, (4, 7), "float64", 0), **dict(variant.options))
        if np.shape(values[0] if isinstance(values, tuple) else values) == ():
            yield "value_and_grad"


@functools.lru_cache(maxsize=256)
def _prepared(kernel: Kernel, variant: Variant, direction: str, dtype: str, shape: tuple[int, int], seed: int) -> Any:
    options = dict(variant.options)
    arrays = sample(kernel, variant, shape, dtype, seed)
    if direction == "backward":
        arrays = given_for_backward(kernel, arrays, options, seed)
    return arrays, options, truth_of(kernel, direction, arrays, options, dtype)


def _row(kernel: Kernel, variant: Variant, direction: str, backend: str, dtype: str) -> dict[str, Any]:
    worst, bound, excess, verdict = 0.0, TOLERANCE, -np.inf, "ok"
    for seed, shape in enumerate(SHAPES):
        arrays, options, truth = _prepared(kernel, variant, direction, dtype, shape, seed)
        results = _compute(kernel, direction, arrays, options, backend)
        error, allowed, over = truth.excess(results)
        worst = max(worst, error)
        if over > excess:
            excess, bound = over, allowed
        if over > 0:
            verdict = "breach"
        elif verdict == "ok" and shape == SHAPES[1] and _blind(truth, kernel, direction, arrays, options, results):
            verdict = "blind"
    with place(backend) as at:
        where = at.name
    return {
        "place": where,
        "error_ulp": worst,
        "bound_ulp": bound,
        "verdict": verdict,
        "truth": f"composed in {_WIDER[dtype].__name__}",
    }


def _gradient_row(kernel: Kernel, variant: Variant, backend: str) -> dict[str, Any]:
    worst = 0.0
    for seed in (2, 4):
        worst = max(worst, gradient_error(kernel, variant, backend, seed))
    verdict = "ok" if worst <= GRADIENT_TOLERANCE else "breach"
    with place(backend) as at:
        row = {"place": at.name, "error_ulp": worst, "bound_ulp": GRADIENT_TOLERANCE}
    return row | {"verdict": verdict, "truth": "central differences"}


def gradient_error(kernel: Kernel, variant: Variant, backend: str, seed: int) -> float:
    """How far the gradients are from central differences along random directions, in ULP of float64."""
    options = dict(variant.options)
    arrays = sample(kernel, variant, (4, 7), "float64", seed)
    rng = np.random.default_rng(seed)
    worst = 0.0
    with place(backend) as at:
        made = _outputs(kernel, arrays, options)
        smooth = [n for n in kernel.declaration.differentiable if n in made]

        def forward(given: dict[str, Array]) -> list[Array]:
            found = _named(made, kernel(**{n: at.there(a) for n, a in given.items()}, **options))
            return [at.back(found[n]) for n in smooth]

        values, pullback = kernel.vjp(**{n: at.there(a) for n, a in arrays.items()}, **options)
        dy = [np.asarray(rng.standard_normal(np.shape(_named(made, values)[n]))) for n in smooth]
        gradients = pullback(*map(at.there, dy))
        names = [n for n in kernel.declaration.inputs if n in arrays]
        for name, gradient in zip(names, gradients if isinstance(gradients, tuple) else (gradients,), strict=True):
            if gradient is None:
                continue
            gradient = at.back(gradient)
            scale = arrays[name] if kernel.declaration.domain.get(name, "real") != "real" else 1.0
            errors = []
            for step in (scale * rng.standard_normal(arrays[name].shape) for _ in range(3)):
                ahead, behind = (forward(arrays | {name: arrays[name] + h * step}) for h in (STEP, -STEP))
                parts = [d * (a - b) / (2 * STEP) for d, a, b in zip(dy, ahead, behind, strict=True)]
                difference = np.concatenate([np.ravel(p) for p in parts])
                size = np.sum(np.abs(difference)) + np.sum(np.abs(gradient * step))
                errors.append(float(abs(np.sum(difference) - np.sum(gradient * step)) / (np.spacing(size) or 1.0)))
            worst = max(worst, float(np.median(errors)))  # a step across a kink, as relu's, spoils one direction
    return worst


def assert_parity(kernel: Kernel, backends: Iterable[str] = ("numba",), dtypes: Iterable[str] | None = None) -> None:
    """Raise AssertionError unless a kernel computes the same on all backends, forward and backward.

    Parameters
    ----------
    kernel
        Any kernel, your own included.
    backends
        Names as `xpnn.use_backend` takes them.

    Raises
    ------
    AssertionError
        With the rows of the parity table that breach their bound.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.testing.assert_parity(xpnn.relu)
    """
    bad = [row for row in parity_rows([kernel], backends, dtypes) if row["verdict"] != "ok"]
    if bad:
        raise AssertionError("\n".join(", ".join(f"{k}={v}" for k, v in row.items()) for row in bad))


__all__ = ["assert_parity", "gradient_error", "parity_rows", "sample", "truth_of", "ulps", "variants"]
