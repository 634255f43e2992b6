"""Emitted modules as files: readable, importable, and shared between processes.

A file's name holds a hash of its text and of everything else that its compiled form depends on and that Numba does not
check by itself (this library's code; Numba checks its own version and the CPU). Numba keeps the machine code beside it.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import stat
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

import numba
import numpy as np

_LOCK = threading.RLock()


def folder() -> Path:
    """Where emitted modules are kept: XPNN_CACHE_DIR, or the platform's cache folder for users."""
    chosen = os.environ.get("XPNN_CACHE_DIR")
    if chosen:
        return _usable(chosen)
    import platformdirs

    return _usable(str(platformdirs.user_cache_path("xpnn", appauthor=False)))


@functools.cache
def _usable(chosen: str) -> Path:
    """The folder, made private; or one for this process alone where it cannot be written, or others could write to it."""
    path = Path(chosen)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid"):
            info = path.stat()
            if info.st_uid != os.getuid():
                raise PermissionError("it belongs to somebody else")
            if stat.S_IMODE(info.st_mode) & 0o022:
                path.chmod(0o700)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="xpnn-"))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def _library() -> str:
    """A hash of what emitted modules import."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
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
        try:
            path = _write(folder() / f"{name}_{digest}.py", text)
        except FileNotFoundError:  # the folder was removed while this process ran
            _usable.cache_clear()
            path = _write(folder() / f"{name}_{digest}.py", text)
        try:
            return _run(module_name, path)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # spoilt machine code, of a process that died
            for spoilt in path.parent.glob(f"__pycache__/{path.stem}.*.nb?"):
                spoilt.unlink(missing_ok=True)
            return _run(module_name, path)


def _write(path: Path, text: str) -> Path:
    """Put a file in place whole, so that no other process sees half of it."""
    if not (path.exists() and path.read_text(encoding="utf-8", errors="replace") == text):
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    return path


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
