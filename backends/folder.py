"""Where emitted code is kept, as files that can be read and that processes share."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path


def folder() -> Path:
    """XPNN_CACHE_DIR, or the platform's cache folder for users."""
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


def write(name: str, text: str) -> Path:
    """A file of that name with that text; written now if it is not there yet."""
    try:
        return _write(folder() / name, text)
    except FileNotFoundError:  # the folder was removed while this process ran
        _usable.cache_clear()
        return _write(folder() / name, text)


def _write(path: Path, text: str) -> Path:
    """Put a file in place whole, so that no other process sees half of it."""
    if not (path.exists() and path.read_text(encoding="utf-8", errors="replace") == text):
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    return path
