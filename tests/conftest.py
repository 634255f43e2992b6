"""What the suite shares: backends, optional libraries, one sample call of every kernel, processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import xpnn
import xpnn.kernels
from xpnn import Column, Full, Index, Matrix, Row, Scalar
from xpnn.backends.kinds import Wide

OPTIONAL = {
    "torch": "torch.nn.functional's cross_entropy, kernels on torch tensors",
    "jax": "kernels on JAX arrays and under jax.jit",
    "array_api_strict": "that formulas use nothing outside the array-API standard",
    "dask": "lazy arrays, computed block by block",
    "distributed": "Dask arrays on several processes",
    "cupy": "CUDA kernels: compiled by NVRTC, run on the CPU",
    "scipy": "SciPy's softmax, log_softmax and logsumexp",
}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was not compared, and how many CUDA kernels were compiled and executed."""
    found: dict[str, list[list[str]]] = {"cuda compiled": [], "cuda executed": [], "cuda parity": []}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            found.setdefault(name, []).append(value.split())
    for name in ("cuda compiled", "cuda executed"):
        if found[name]:
            kernels, dtypes, regimes, places = ({v[k] for v in found[name]} for k in range(4))
            terminalreporter.write_line(
                f"{name}: {len(found[name])} kernels: {len(kernels)} definitions x {len(dtypes)} dtypes x {len(regimes)} "
                f"regimes ({', '.join(sorted(regimes))}) x {', '.join(sorted(places))}"
            )
    if found["cuda parity"]:
        rows, places = sum(int(v[2]) for v in found["cuda parity"]), {v[3] for v in found["cuda parity"]}
        terminalreporter.write_line(f"cuda parity: {rows} rows within their bounds, on {', '.join(places)}")
    for name, what in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            terminalreporter.write_line(f"not compared, {name} is not installed: {what}")


_STATES: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _same_numbers(request: pytest.FixtureRequest) -> None:
    """Each test draws from its module's generator as if it ran alone, whatever ran before it."""
    generator = getattr(request.module, "RNG", None)
    if generator is not None:
        state = _STATES.setdefault(request.module.__name__, generator.bit_generator.state)
        generator.bit_generator.state = state


# --- backends and libraries ---------------------------------------------------------------------------------------------


@pytest.fixture
def machine() -> Iterator[Any]:
    """The CPU in a GPU's place, for CUDA kernels of which few rows are many."""
    from cuda_helpers import MANY

    from xpnn.backends.cupy import host

    with host.running(host.Host(MANY)) as running:
        yield running


@pytest.fixture(params=["numpy", "numba"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that takes NumPy arrays, chosen by name."""
    with xpnn.use_backend(request.param):
        yield request.param


@pytest.fixture
def composed() -> Iterator[None]:
    """No compiling, for what is the same for all backends."""
    with xpnn.use_backend("numpy"):
        yield


@dataclass(frozen=True)
class Library:
    """An array library other than NumPy."""

    name: str
    xp: Any

    def array(self, values: Any) -> Any:
        return self.xp.asarray(np.array(values))  # a copy: torch and JAX would share NumPy's memory

    def numpy(self, array: Any) -> np.ndarray:
        """The values of one of the library's own arrays; anything else fails."""
        assert type(array) is type(self.xp.ones(1)) or "jax" in type(array).__module__, type(array)
        return np.from_dlpack(array) if self.name == "array_api_strict" else np.asarray(array)


@pytest.fixture(scope="session")
def load_library() -> Callable[[str], Library]:
    """A library by name; skips the test where it is not installed."""

    def load(name: str) -> Library:
        module = pytest.importorskip(name, reason=f"{name} is not installed: {OPTIONAL[name]} not compared")
        if name == "jax":
            module.config.update("jax_enable_x64", True)
            module = pytest.importorskip("jax.numpy")
        return Library(name, module)

    return load


@pytest.fixture(params=["array_api_strict", "torch", "jax"])
def library(request: pytest.FixtureRequest, load_library: Callable[[str], Library]) -> Library:
    """Each array library that is installed."""
    return load_library(request.param)


# --- one sample call of every kernel ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A kernel, options, and which optional inputs and which kind of target it is given."""

    name: str
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    optional: bool = False
    index: bool = True

    @property
    def kernel(self) -> Any:
        return getattr(xpnn, self.name)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.label}" if self.label else self.name

    def arrays(self, shape: tuple[int, ...] = (6, 7), dtype: Any = np.float64, seed: int = 1) -> dict[str, np.ndarray]:
        """Inputs by name, the columns being the last axis."""
        rng = np.random.default_rng(seed)
        d = self.kernel.declaration
        layer = any(Matrix in i.kinds for i in d.inputs.values())  # of four outputs
        return {
            n: _sample(rng, i.kinds, d.domain.get(n, "real"), shape, dtype, self.index, 4 if layer else shape[-1])
            for n, i in d.inputs.items()
            if self.optional or not i.optional
        }

    def given(self, arrays: dict[str, Any]) -> list[Any]:
        """Arrays as a call takes them by position: after the first, what shape a row has may come."""
        span = self.kernel.declaration.span
        first, *others = arrays.values()
        return [first, *([None] if span and others else []), *others]

    def cotangent(self, y: Any, seed: int = 2) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=np.shape(y)).astype(np.asarray(y).dtype)


def _sample(rng: Any, kinds: Any, domain: str, shape: tuple[int, ...], dtype: Any, index: bool, units: int) -> np.ndarray:
    if Index in kinds and index:
        return rng.integers(0, units, shape[:-1])
    kind = next(k for k in kinds if k is not Index)
    size = {
        Full: shape, Wide: (*shape[:-1], units), Column: (units,), Row: shape[:-1], Matrix: (units, shape[-1]), Scalar: (),
    }[kind]  # fmt: skip
    values = rng.normal(size=size) * 2
    if domain != "real":
        values = np.exp(values)
    if domain == "unit":
        values /= 1 + values
    if domain in ("simplex", "log_simplex"):
        values /= values.sum(-1, keepdims=True)
    if domain == "log_simplex":
        values = np.log(values)
    return np.asarray(values, dtype)


def _cases() -> list[Case]:
    found = []
    for name in xpnn.kernels.__all__:
        k = getattr(xpnn, name)
        if not isinstance(k, xpnn.Kernel) or k.__name__ != name:
            continue
        d = k.declaration
        either = any(Index in i.kinds and len(i.kinds) > 1 for i in d.inputs.values())
        labels = [("index", True), ("probabilities", False)] if either else [("", True)]
        for label, index in labels:
            found.append(Case(name, label, dict(d.variants[0]), False, index))
            if any(i.optional for i in d.inputs.values()):
                full = f"{label}-everything".strip("-")
                found.append(Case(name, full, dict(d.variants[-1]), True, index))
    return [*found, Case("linear", "relu", {"activation": xpnn.relu}, True), Case("linear", "tanh", {"activation": xpnn.tanh})]


CASES = _cases()


@pytest.fixture(params=CASES, ids=lambda c: c.id)
def any_case(request: pytest.FixtureRequest) -> Case:
    """A sample call of every kernel in the registry, so that none can be forgotten."""
    return request.param


@pytest.fixture(params=[c for c in CASES if c.kernel.declaration.backward is not None], ids=lambda c: c.id)
def case(request: pytest.FixtureRequest) -> Case:
    """The same for kernels that have a gradient: all but optimisers' steps, which have tests of their own."""
    return request.param


@pytest.fixture(params=[c for c in CASES if c.kernel.has_axis], ids=lambda c: c.id)
def axis_case(request: pytest.FixtureRequest) -> Case:
    """The same for kernels that have an axis."""
    return request.param


# --- comparing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Compare shape, dtype and values: to a few roundings of the largest value."""

    def compare(got: Any, want: Any, *, ulps: float = 64, dtype: Any = None, terms: float = 0.0) -> None:
        got, want = np.asarray(got), np.asarray(want, np.float64)
        assert got.shape == want.shape
        if dtype is not None:
            assert got.dtype == dtype
        tolerance = ulps * float(np.finfo(got.dtype).eps)
        scale = np.max(np.abs(want), initial=terms, where=np.isfinite(want))  # terms: what the result is a difference of
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=tolerance, atol=tolerance * scale)

    return compare


@pytest.fixture
def numpy_reference() -> Callable[..., Any]:
    """Run a function on the composed NumPy backend."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with xpnn.use_backend("numpy"):
            return function(*args, **kwargs)

    return run


# --- processes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def python(tmp_path: Any) -> Callable[..., str]:
    """Run code in a process of its own, warnings being errors; returns what it printed."""

    def run(code: str, fails: bool = False, **env: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("XPNN_", "NUMBA_"))}
        kept = {"XPNN_CACHE_DIR": os.environ["XPNN_CACHE_DIR"]} if "XPNN_CACHE_DIR" in os.environ else {}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            env=inherited | kept | env, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert (done.returncode != 0) is fails, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stderr if fails else done.stdout

    return run
