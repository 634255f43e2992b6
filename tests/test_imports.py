"""What an import brings along, and in what order modules may be imported."""

from __future__ import annotations

from collections.abc import Callable

import pytest

HEAVY = [
    "numba", "llvmlite", "cupy", "torch", "jax", "scipy", "matplotlib", "click", "rich", "platformdirs", "pytest",
    "array_api_strict", "dask", "distributed", "hypothesis", "numpy.testing", "array_api_compat.numpy",
    "array_api_compat.torch",
]  # fmt: skip


def loaded(python: Callable[..., str], code: str) -> list[str]:
    """Which of the heavy modules code leaves loaded."""
    return python(f"{code}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])").split()


@pytest.mark.parametrize(
    "name", ["xpnn", "xpnn.kernels", "xpnn.backends.kernel", "xpnn.kernels.losses", "xpnn.testing", "xpnn.plot"]
)
def test_import_is_light(python: Callable[..., str], name: str) -> None:
    """Each may be the first import of a process, too."""
    assert loaded(python, f"import {name}") == []


def test_declaring_is_light(python: Callable[..., str]) -> None:
    code = "import xpnn\n@xpnn.kernel\ndef k(xp, x, *, a=1.0): return x * a\nrepr(k); k.__doc__; xpnn.set_backend('numba')"
    assert loaded(python, code) == []


def test_composed_needs_no_numba(python: Callable[..., str]) -> None:
    code = "import xpnn\nwith xpnn.use_backend('numpy'): xpnn.softmax.vjp([1.0, 2.0])[1]([1.0, 0.0])"
    assert loaded(python, code) == []


def test_fused_needs_only_numba(python: Callable[..., str]) -> None:
    code = "import numpy as np, xpnn\nxpnn.softmax(np.ones(3))"
    found = loaded(python, code)
    assert "numba" in found
    assert set(found) & {"torch", "jax", "cupy", "matplotlib", "click", "rich", "pytest", "array_api_strict"} == set()


def test_kernels_are_the_same_objects(python: Callable[..., str]) -> None:
    code = "import xpnn.kernels, xpnn; print(all(getattr(xpnn, n) is getattr(xpnn.kernels, n) for n in xpnn.kernels.__all__))"
    assert python(code) == "True\n"
