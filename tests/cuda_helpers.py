"""What tests of CUDA kernels on the CPU share: launches of hand-written kernels, memory whose bounds are found out."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

from xpnn.backends.cupy import host
from xpnn.backends.cupy.regime import Device

MANY = Device(processors=1)  # few rows are many for so small a device: rows are not split
A100 = Device(80, 1, 166912)


def on_host(array: np.ndarray) -> Any:
    """A CuPy array over host memory."""
    return host.as_cupy(array)


def back(array: Any) -> np.ndarray:
    """Its values."""
    return host.as_numpy(array).copy()


def launch(
    text: str,
    name: str,
    *arguments: Any,
    blocks: int | tuple[int, int] = 1,
    threads: int = 128,
    shared: int = 0,
    on: host.Host | None = None,
) -> None:
    """Run one kernel of a translation unit with NumPy arrays and ctypes numbers as its arguments."""
    machine = on or host.Host()
    held = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
    addresses = (ctypes.c_void_p * len(held))(*(ctypes.addressof(a) for a in held))
    start = machine.function(host.load(text, machine.flags), text, name)
    start((blocks, 1) if isinstance(blocks, int) else blocks, threads, shared, ctypes.addressof(addresses))


def fenced(a: np.ndarray, before: bool = False) -> np.ndarray:
    """A copy that ends where a page begins that may not be touched; with `before`, one that starts where such a page ends."""
    page = mmap.PAGESIZE
    room = -(-a.nbytes // page) * page
    area = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for at in (start, start + page + room):
        assert protect(at, page, 0) == 0, ctypes.get_errno()
    result = np.frombuffer(area, a.dtype, a.size, page if before else page + room - a.nbytes).reshape(a.shape)
    result[...] = a
    return result
