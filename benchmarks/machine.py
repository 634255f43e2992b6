"""Where numbers come from: processor, versions, threads, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("xpnn", "numpy", "numba", "llvmlite", "tbb", "array-api-compat", "scipy", "numexpr", "torch", "jax")


def cpu() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        if sys.platform == "darwin":
            return _output("sysctl", "-n", "machdep.cpu.brand_string")
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, where installed; none is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit that this library is run from, "+changes" where files differ; None for an installed copy."""
    here = Path(__file__).resolve()
    folder = str(here.parent)
    try:
        _output("git", "-C", folder, "ls-files", "--error-unmatch", here.name)  # some other project's checkout is not ours
        changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
        return _output("git", "-C", folder, "rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe() -> dict[str, Any]:
    """What a recorded run says of its machine, ready for JSON. Starts Numba's threads, to know which layer serves."""
    from xpnn.backends.numba import pool

    return {
        "cpu": cpu(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "cores": os.cpu_count(),
        "threads": pool.count(),
        "threading_layer": pool.layer(),
        "versions": versions(),
        "commit": commit(),
    }


def load() -> float:
    """How many processors other programs keep busy, averaged over the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
