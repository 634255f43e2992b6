"""What kernels run on: a GPU through CuPy, unless a check puts something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from xpnn.backends.cupy.emit import OPTIONS
from xpnn.backends.cupy.kernel import Launch
from xpnn.backends.cupy.regime import STATIC, Device

# called with the grid (two numbers), the threads of a block, bytes of shared memory, and the address of the arguments'
# addresses, as the driver's cuLaunchKernel takes them
Function = Callable[[tuple[int, int], int, int, int], None]


class Machine(Protocol):
    """Compiles and launches; knows what the device can do."""

    name: str

    def device(self) -> tuple[int, Device]:
        """The current device's number and properties."""
        ...

    def functions(self, text: str, launches: Iterable[Launch]) -> list[Function]:
        """The compiled kernels of some launches."""
        ...

    def matmul(self, left: Any, right: Any, out: Any = None) -> Any: ...


class Gpu:
    """CuPy's current device."""

    name = "GPU"

    def __init__(self) -> None:
        self._devices: dict[int, Device] = {}

    def device(self) -> tuple[int, Device]:
        from cupy.cuda import runtime

        number = runtime.getDevice()
        if number not in self._devices:
            p = runtime.getDeviceProperties(number)
            self._devices[number] = Device(
                10 * p["major"] + p["minor"], p["multiProcessorCount"], p.get("sharedMemPerBlockOptin", STATIC)
            )
        return number, self._devices[number]

    def functions(self, text: str, launches: Iterable[Launch]) -> list[Function]:
        import cupy

        module = cupy.RawModule(code=text, options=OPTIONS)
        return [self._function(module, launch) for launch in launches]

    def _function(self, module: Any, launch: Launch) -> Function:
        from cupy.cuda import driver, get_current_stream

        kernel = module.get_function(launch.function)
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
    return Gpu().device()[1] if present() else Device()
