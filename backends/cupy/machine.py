"""What kernels run on: a GPU through CuPy, unless a check puts something else in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from xpnn.backends.cupy.emit import OPTIONS
from xpnn.backends.cupy.kernel import Launch
from xpnn.backends.cupy.regime import STATIC, Device

# called with the grid (two numbers), the threads of a block, bytes of shared memory, and the address of the arguments'
# addresses, as the driver's cuLaunchKernel takes them
Function = Callable[[tuple[int, int], int, int, int], None]


_CUDA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType_t


class Machine(Protocol):
    """Compiles and launches; knows what the device can do."""

    name: str

    def number(self) -> int:
        """The current device's."""
        ...

    def device(self) -> Device:
        """The current device's properties."""
        ...

    def functions(self, text: str, launches: Iterable[Launch]) -> tuple[list[Function], set[str]]:
        """The compiled kernels of some launches, and the names of those that spill registers."""
        ...

    def matmul(self, left: Any, right: Any, out: Any = None) -> Any: ...

    def accumulate(self, total: Any, left: Any, right: Any, add: bool) -> None:
        """total = left @ right, or total += left @ right, with sums of float32 where the operands are of half precision."""
        ...

    def composed(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """A function of a namespace and arrays (or None), run as it stands."""
        ...

    def on(self, array: Any) -> contextlib.AbstractContextManager[Any]:
        """The array's device, current within a `with` block."""
        ...

    def fetch(self, array: Any) -> np.ndarray[Any, Any]:
        """An array's values; waits for them."""
        ...

    def copy(self, to: Any, array: Any) -> None:
        """Copy an array's values."""
        ...


class Gpu:
    """CuPy's current device."""

    name = "GPU"

    def __init__(self) -> None:
        self._devices: dict[int, Device] = {}

    def number(self) -> int:
        from cupy.cuda import runtime

        return int(runtime.getDevice())

    def device(self) -> Device:
        from cupy.cuda import runtime

        number = self.number()
        if number not in self._devices:
            p = runtime.getDeviceProperties(number)
            self._devices[number] = Device(
                10 * p["major"] + p["minor"], p["multiProcessorCount"], p.get("sharedMemPerBlockOptin", STATIC)
            )
        return self._devices[number]

    def functions(self, text: str, launches: Iterable[Launch]) -> tuple[list[Function], set[str]]:
        import cupy

        module = cupy.RawModule(code=text, options=OPTIONS)
        kernels = [(launch, module.get_function(launch.function)) for launch in launches]
        spilling = {launch.function for launch, kernel in kernels if kernel.local_size_bytes}
        return [self._function(module, launch, kernel) for launch, kernel in kernels], spilling

    def _function(self, module: Any, launch: Launch, kernel: Any) -> Function:
        from cupy.cuda import driver, get_current_stream

        if launch.shared > STATIC:
            kernel.max_dynamic_shared_size_bytes = launch.shared
        pointer = kernel.kernel.ptr

        def start(grid: tuple[int, int], threads: int, shared: int, arguments: int) -> None:
            stream = get_current_stream().ptr
            driver.launchKernel(pointer, grid[0], grid[1], 1, threads, 1, 1, shared, stream, arguments, 0)

        start.module = module  # type: ignore[attr-defined]  # lives as long as its kernel
        return start

    def matmul(self, left: Any, right: Any, out: Any = None) -> Any:
        import cupy

        return cupy.matmul(left, right, out=out)

    def accumulate(self, total: Any, left: Any, right: Any, add: bool) -> None:
        from cupy.cuda import cublas, device

        # cuBLAS thinks in columns: the transpose of the sum, from the transposes of the factors
        (m, k), n = left.shape, right.shape[1]
        right = right if right.flags.c_contiguous else right.copy()
        turned = left.flags.f_contiguous and not left.flags.c_contiguous
        left = left if turned or left.flags.c_contiguous else left.copy()
        real = np.float64 if total.dtype == np.float64 else np.float32
        one, also = np.ones(1, real), np.full(1, float(add), real)
        types = [_CUDA_TYPES[a.dtype.name] for a in (left, right, total)]
        cublas.gemmEx(
            device.get_cublas_handle(), cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T if turned else cublas.CUBLAS_OP_N, n, m, k,
            one.ctypes.data, right.data.ptr, types[1], n, left.data.ptr, types[0], m if turned else k, also.ctypes.data,
            total.data.ptr, types[2], n, cublas.CUBLAS_COMPUTE_64F if real is np.float64 else cublas.CUBLAS_COMPUTE_32F,
            cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip

    def composed(self, function: Callable[..., Any], *arrays: Any) -> Any:
        import array_api_compat.cupy as xp

        from xpnn.backends.composed import Shim

        return function(Shim(xp, None), *arrays)

    def on(self, array: Any) -> contextlib.AbstractContextManager[Any]:
        import cupy

        number = array.data.device_id
        return contextlib.nullcontext() if number == self.number() else cupy.cuda.Device(number)

    def fetch(self, array: Any) -> np.ndarray[Any, Any]:
        import cupy

        return np.asarray(cupy.asnumpy(array))

    def copy(self, to: Any, array: Any) -> None:
        to[...] = array


current: Machine = Gpu()


def present() -> bool:
    """Whether CuPy is installed and finds a GPU."""
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.cuda.is_available())


def assumed() -> Device:
    """The current GPU; where there is none, an H100."""
    return Gpu().device() if present() else Device()
