"""Which backend runs: a context variable over a process-wide choice over the environment."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from xpnn.backends.composed import Composed
from xpnn.backends.task import Backend, BackendError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "xpnn.backends"  # entry points of other packages' backends
AUTO = {"numpy": "numba", "cupy": "cupy", "dask": "dask"}  # by the arrays' library; "array-api" for any other
NAMES = ("auto", "numpy", "numba", "cupy", "dask", "array-api")
_loaded: dict[str, Backend] = {}
context: ContextVar[str | None] = ContextVar("xpnn_backend", default=None)
process: str = os.environ.get("XPNN_BACKEND") or "auto"


@functools.cache
def installed() -> dict[str, EntryPoint]:
    """The backends that other packages bring, by name; ours come first."""
    from importlib.metadata import entry_points

    return {e.name: e for e in entry_points(group=GROUP) if e.name not in NAMES}


def _known(name: object) -> str:
    if name not in NAMES and name not in installed():  # also reached by a bad XPNN_BACKEND
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join([*NAMES, *installed()])}")
    return str(name)


def _load(entry: EntryPoint) -> Backend:
    """Another package's backend.

    Raises
    ------
    BackendError
        Where it cannot be imported, or is none.
    """
    try:
        made = entry.load()()
    except Exception as error:
        raise BackendError(f"backend {entry.name!r} ({entry.value}) cannot be loaded: {error}") from error
    if getattr(made, "name", None) != entry.name or not callable(getattr(made, "prepare", None)):
        raise BackendError(
            f"backend {entry.name!r} ({entry.value}): got {made!r}, expected an object of that name with prepare(job)"
        )
    return made  # type: ignore[no-any-return]


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
        "auto" picks by the arrays' type: NumPy arrays go to Numba, CuPy arrays to CUDA kernels, Dask arrays to Numba block by
        block, all others run composed in their own library. "numpy" runs formulas composed on NumPy, "array-api" composed
        on any library, "numba" fused on NumPy arrays, "cupy" fused on CuPy arrays, "dask" fused on blocks of Dask arrays.
        Other packages may bring more (entry points of the group "xpnn.backends").

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
        elif name == "dask":
            from xpnn.backends.dask import Dask

            _loaded[name] = Dask()
        elif name in installed():
            _loaded[name] = _load(installed()[name])
        else:
            _loaded[name] = Composed(name)
    return _loaded[name]


def for_library(library: str) -> Any:
    """What "auto" means for arrays of a library."""
    return backend(AUTO.get(library, "array-api"))
