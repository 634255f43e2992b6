"""Which backend runs: a context variable over a process-wide choice over the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from xpnn.backends.composed import Composed
from xpnn.backends.task import Backend

NAMES = ("auto", "numpy", "numba", "cupy", "array-api")
_loaded: dict[str, Backend] = {}
context: ContextVar[str | None] = ContextVar("xpnn_backend", default=None)
process: str = os.environ.get("XPNN_BACKEND") or "auto"


def _known(name: object) -> str:
    if name not in NAMES:  # also reached by a bad XPNN_BACKEND
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(NAMES)}")
    return str(name)


def current() -> str:
    """The name of the backend in force, "auto" among them."""
    return _known(context.get() or process)


def state() -> tuple[str | None, str]:
    """What `current` depends on, as a cheap key."""
    return context.get(), process


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run kernels on one backend within a `with` block, in this thread or task alone.

    Parameters
    ----------
    name
        "auto" picks by the arrays' type: NumPy arrays go to Numba, CuPy arrays to CUDA kernels, all others run composed in
        their own library. "numpy" runs formulas composed on NumPy, "array-api" composed on any library, "numba" fused on
        NumPy arrays, "cupy" fused on CuPy arrays.

    Raises
    ------
    ValueError
        For an unknown name.

    Examples
    --------
    >>> import xpnn
    >>> with xpnn.use_backend("numpy"):
    ...     xpnn.relu([-1.0, 2.0])
    array([0., 2.])
    """
    token = context.set(_known(name))
    try:
        yield
    finally:
        context.reset(token)


def set_backend(name: str) -> None:
    """Choose the backend for the whole process; `use_backend` overrules it, and it overrules XPNN_BACKEND.

    Raises
    ------
    ValueError
        For an unknown name.

    Examples
    --------
    >>> import xpnn
    >>> xpnn.set_backend("auto")
    """
    global process
    process = _known(name)


def backend(name: str) -> Backend:
    """The backend of a name, imported when first asked for."""
    if name not in _loaded:
        if name == "numba":
            from xpnn.backends.numba import Numba

            _loaded[name] = Numba()
        elif name == "cupy":
            from xpnn.backends.cupy import CuPy

            _loaded[name] = CuPy()
        else:
            _loaded[name] = Composed(name)
    return _loaded[name]


def for_library(library: str) -> Any:
    """What "auto" means for arrays of a library."""
    return backend({"numpy": "numba", "cupy": "cupy"}.get(library, "array-api"))
