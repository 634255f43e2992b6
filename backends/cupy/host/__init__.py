"""Runs emitted CUDA kernels on the CPU, for checks on machines without a GPU.

The source is compiled by a C++ compiler behind a header that gives CUDA's words a meaning (`cuda_host.h`) and run by a
scheduler that looks for what goes wrong on a GPU (`runtime.cpp`). Arrays are CuPy's own, over host memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xpnn.backends.arrays import memory
from xpnn.backends.cupy import machine
from xpnn.backends.cupy.kernel import MEMORY, Launch
from xpnn.backends.cupy.machine import Function
from xpnn.backends.cupy.regime import Device
from xpnn.backends.folder import folder

HERE = Path(__file__).parent
CHECKED = (
    "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=float-divide-by-zero,float-cast-overflow,vptr",
)  # fmt: skip
PLAIN = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w")

_ONE_LAUNCH = threading.Lock()  # the scheduler has one state


class HostError(RuntimeError):
    """A kernel did what it must not; the message says what, and where."""


def compiler() -> str | None:
    """The C++ compiler: CXX, or g++."""
    return shutil.which(os.environ.get("CXX") or "g++")


def state() -> str:
    """ "GPU", "host" where kernels can be checked on the CPU, or why neither."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed (pip install xpnn[cuda13] or xpnn[cuda12])"
    if cupy.cuda.is_available():
        return "GPU"
    return "host" if compiler() else "there is no GPU, and no C++ compiler to check kernels on the CPU"


def build(text: str, flags: Iterable[str], suffix: str = ".so") -> Path:
    """A shared library, from the cache folder or compiled now."""
    cxx = compiler()
    if cxx is None:
        raise HostError("running CUDA kernels on the CPU takes a C++ compiler: install g++, or name one in CXX")
    command = [cxx, *PLAIN, *flags, f"-I{HERE}"]
    whole = "\n".join([text, *(p.read_text(encoding="utf-8") for p in sorted(HERE.glob("*.h"))), *command])
    target = folder() / f"cuda_host_{hashlib.sha256(whole.encode()).hexdigest()[:16]}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as place:
            source, made = Path(place, "kernel.cpp"), Path(place, "kernel.so")
            source.write_text(text, encoding="utf-8")
            done = subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise HostError(f"{' '.join(command)}\n{done.stderr[:4000]}")
            made.replace(target)
    return target


@functools.cache
def runtime() -> Any:
    """The scheduler."""
    library = ctypes.CDLL(str(build((HERE / "runtime.cpp").read_text(encoding="utf-8"), ["-O2"])), mode=ctypes.RTLD_GLOBAL)
    library.host_launch.restype = ctypes.c_char_p
    library.host_launch.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint,
        ctypes.c_uint, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    return library


class Host:
    """This CPU in a GPU's place.

    Parameters
    ----------
    device
        What the choice of a regime takes the device to be.
    seed
        The order in which warps and blocks run: 0 forward, 1 backward, others mixed.
    flags
        For the C++ compiler. The default traps undefined behaviour.
    guard
        Whether faults become errors; not under the address sanitizer, which reports them itself.
    """

    name = "host"

    def __init__(
        self, device: Device | None = None, seed: int = 0, flags: tuple[str, ...] = CHECKED, guard: bool = True
    ) -> None:
        self._device, self.seed, self.flags, self.guard = device or Device(), seed, flags, guard
        self.launched: list[str] = []  # the regimes, in order

    def number(self) -> int:
        return 0

    def device(self) -> Device:
        return self._device

    def functions(self, text: str, launches: Iterable[Launch]) -> tuple[list[Function], set[str]]:
        library = load(text, self.flags)
        return [self.function(library, text, launch.function, launch.regime.name) for launch in launches], set()

    def function(self, library: Any, text: str, name: str, regime: str = "") -> Function:
        """One kernel of a library that was built from `text`."""
        attributes = re.search(rf'extern "C" __global__ void([^{{;]*?)\b{name}\(', text)
        assert attributes is not None, name
        cluster = re.search(r"__cluster_dims__\((\d+)", attributes[1])
        most = re.search(r"__launch_bounds__\((\d+)", attributes[1])
        address = ctypes.cast(library[f"host_call_{name}"], ctypes.c_void_p)
        flush = "using real = float;" in text

        def start(grid: tuple[int, int], threads: int, shared: int, arguments: int) -> None:
            if most and threads > int(most[1]):
                raise HostError(f"{name}: launched with {threads} threads, bound to {most[1]}")
            if cluster and not self._device.clusters:
                raise HostError(f"{name}: a cluster of blocks, which a device of capability {self._device.capability} has not")
            if shared > self._device.shared:
                raise HostError(f"{name}: more shared memory than a block may have: {shared}, {self._device.shared}")
            self.launched.append(regime)
            blocks = int(cluster[1]) if cluster else 1
            with _ONE_LAUNCH:
                error = runtime().host_launch(
                    address, arguments, *grid, threads, shared, blocks, self.seed, flush, self.guard
                )  # fmt: skip
            if error is not None:
                raise HostError(f"{name}: {error.decode()}")

        return start

    def matmul(self, left: Any, right: Any, out: Any = None) -> Any:
        import cupy

        product = np.matmul(*(as_numpy(a).astype(np.result_type(a.dtype, np.float32)) for a in (left, right)))
        result = cupy.empty(product.shape, left.dtype) if out is None else out
        as_numpy(result)[...] = product
        return result

    def accumulate(self, total: Any, left: Any, right: Any, add: bool) -> None:
        product = np.matmul(*(as_numpy(a).astype(np.result_type(a.dtype, np.float32)) for a in (left, right)))
        as_numpy(total)[...] = product + as_numpy(total) if add else product

    def composed(self, function: Callable[..., Any], *arrays: Any) -> Any:
        from xpnn.backends.composed import Shim

        return as_cupy(np.asarray(function(Shim(np, "cpu"), *(None if a is None else as_numpy(a) for a in arrays))))

    def on(self, array: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def fetch(self, array: Any) -> np.ndarray[Any, Any]:
        return as_numpy(array)

    def copy(self, to: Any, array: Any) -> None:
        as_numpy(to)[...] = as_numpy(array)


@functools.cache
def load(text: str, flags: tuple[str, ...]) -> Any:
    """An emitted translation unit as a library of this process."""
    runtime()
    kernels = re.findall(r'extern "C" __global__ void (?:__\w+__\([^)]*\)\s*)*(\w+)\(', text)
    code = text.replace(MEMORY, "unsigned char* memory = host_memory();")
    exports = "\n".join(f"HOST_EXPORT({name})" for name in kernels)
    return ctypes.CDLL(str(build(f'#include "cuda_host.h"\n#line 1 "kernel.cu"\n{code}\n{exports}\n', flags)))


# --- CuPy arrays over host memory


def _allocate(size: int) -> Any:
    import cupy

    room = np.empty(size + 256, np.uint8)
    start = (room.ctypes.data + 255) // 256 * 256
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(start, size, room, device_id=0), 0)


def as_numpy(a: Any) -> np.ndarray[Any, Any]:
    """The memory of a CuPy array over host memory, as a NumPy array."""
    return memory(a).view(a.dtype) if a.size else np.empty(a.shape, a.dtype)


def as_cupy(a: np.ndarray[Any, Any]) -> Any:
    """A CuPy array over host memory with a NumPy array's values."""
    import cupy

    result = cupy.empty(a.shape, a.dtype)
    as_numpy(result)[...] = a
    return result


@contextlib.contextmanager
def running(host: Host | None = None) -> Iterator[Host]:
    """Run the backend "cupy" on this CPU within a `with` block, for the whole process.

    Kernels run, and so do products; what CuPy itself would compute does not: arithmetic, conversions of dtype, copies of
    strided arrays. Use `as_cupy` and `as_numpy` to get arrays there and back.

    Examples
    --------
    >>> import pytest; _ = pytest.importorskip("cupy")
    >>> import numpy as np, xpnn
    >>> from xpnn.backends.cupy import host
    >>> with host.running():
    ...     y = xpnn.relu(host.as_cupy(np.array([-1.0, 2.0])))
    ...     print(host.as_numpy(y))
    [0. 2.]
    """
    import cupy

    used = host or Host()
    before, allocator = machine.current, cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(_allocate)
    machine.current = used
    try:
        yield used
    finally:
        machine.current = before
        cupy.cuda.set_allocator(allocator)
