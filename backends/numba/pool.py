"""How many threads a call may use, and when it must not use any.

Numba's threading layers differ in what they survive: omp dies in a child forked after it was used; workqueue aborts the
process when two Python threads enter it at once; tbb cannot always join its threads before a fork, and says so. Hence one
lock around workqueue, and one thread in children that are forked from a process that had started any layer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from typing import Any

_LOCK = threading.RLock()
_NOTHING = contextlib.nullcontext()
_address = 0
_layer = ""
_serial = False


def count() -> int:
    """Threads to use: XPNN_NUM_THREADS, or as many as this process has processors."""
    if _serial:
        return 1
    chosen = os.environ.get("XPNN_NUM_THREADS")
    if chosen:
        if not chosen.isdecimal() or int(chosen) < 1:
            raise ValueError(f"XPNN_NUM_THREADS: got {chosen!r}, expected a whole number of at least 1")
        return int(chosen)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def runner() -> int:
    """The address of the compiled runner; the first call starts Numba's threads."""
    global _address, _layer
    if not _address:
        with _LOCK:
            if not _address:
                from xpnn.backends.numba import cache, launch

                _find_tbb()
                run = cache.load("runner", launch.RUNNER).run
                (compiled,) = run.overloads.values()
                run(0, 0, 0, 1)  # starts the threads, for no blocks
                import numba

                _layer = numba.threading_layer()
                _address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return _address


def _find_tbb() -> None:
    """Load the tbb package's library, which lies where Numba's own import does not look."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError, OSError):
        for file in metadata.files("tbb") or ():
            if file.name in ("libtbb.so.12", "tbb12.dll"):
                ctypes.CDLL(str(file.locate()))


def guard() -> Any:
    """What a threaded call must hold."""
    return _LOCK if _layer == "workqueue" else _NOTHING


def layer() -> str:
    """Numba's threading layer, started if it was not."""
    runner()
    return _layer


def _after_fork() -> None:
    global _serial, _LOCK
    _LOCK = threading.RLock()
    _serial = _serial or bool(_address)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
