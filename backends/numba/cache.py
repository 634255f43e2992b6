"""Emitted modules as files: readable, importable, and shared between processes.

A file's name holds a hash of its text and of everything else that its compiled form depends on and that Numba does not
check by itself (this library's code; Numba checks its own version and the CPU). Numba keeps the machine code beside it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pickle
import re
import sys
import threading
from pathlib import Path
from types import ModuleType

import numba
import numpy as np

from xpnn.backends import special
from xpnn.backends.folder import write

_LOCK = threading.RLock()


@functools.cache
def _library() -> str:
    """A hash of what emitted modules import."""
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(special.__file__)]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()


def load(name: str, text: str) -> ModuleType:
    """The module with this text, written to the cache folder if it is not there yet."""
    versions = f"{sys.version_info[:2]} {numba.__version__} {np.__version__} {_library()}"
    digest = hashlib.sha256(f"{versions}\n{text}".encode()).hexdigest()[:16]
    name = re.sub(r"\W", "_", name)  # a lambda's is not a file's
    module_name = f"xpnn_cache_{name}_{digest}"
    with _LOCK:
        if module_name in sys.modules:
            return sys.modules[module_name]
        path = write(f"{name}_{digest}.py", text)
        try:
            return _run(module_name, path)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # spoilt machine code, of a process that died
            for spoilt in path.parent.glob(f"__pycache__/{path.stem}.*.nb?"):
                spoilt.unlink(missing_ok=True)
            return _run(module_name, path)


def _run(module_name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
