"""What `gpu_check` itself runs on the GPU: kernels to fill, compare, copy and wait; arrays handed to PyTorch."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from xpnn.benchmarks.gpu_sections import require

_COMMON = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
struct alignas(16) Pack { int a, b, c, d; };
__device__ __forceinline__ float number(float v) { return v; }
__device__ __forceinline__ float number(__half v) { return __half2float(v); }
__device__ __forceinline__ float number(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void assign(float& to, float v) { to = v; }
__device__ __forceinline__ void assign(__half& to, float v) { to = __float2half_rn(v); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ unsigned long long mixed(unsigned long long z) {
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
extern "C" __global__ void copy(const Pack* from, Pack* to, long long n) {
  const long long i = (long long)blockIdx.x * 256 + threadIdx.x;
  if (i < n) to[i] = from[i];
}
"""
_EACH = r"""
extern "C" __global__ void noise_NAME(TYPE* to, long long n, long long threads, unsigned long long seed, float scale) {
  for (long long i = (long long)blockIdx.x * 256 + threadIdx.x; i < n; i += threads) {
    const unsigned long long z = mixed(i + (seed << 40));
    const float u = ((float)(z >> 40) + 0.5f) / 16777216.0f, v = (float)(z & 0xffffff) / 16777216.0f;
    assign(to[i], scale * sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v));
  }
}
extern "C" __global__ void differ_NAME(const TYPE* a, const TYPE* b, double* parts, long long n, long long threads) {
  const long long t = (long long)blockIdx.x * 256 + threadIdx.x;
  double apart = 0, total = 0, worst = 0, most = 0;
  for (long long i = t; i < n; i += threads) {
    const double x = number(a[i]), y = number(b[i]), size = x != x || x - x != 0 ? 0 : x < 0 ? -x : x;  // 0 for inf and NaN
    double gap = x < y ? y - x : x - y;
    if (x == y || (x != x && y != y)) gap = 0;
    else if (!(gap < 1e300)) gap = 1e300;
    apart += gap, total += size;
    worst = gap > worst ? gap : worst, most = size > most ? size : most;
  }
  parts[4 * t] = apart, parts[4 * t + 1] = total, parts[4 * t + 2] = worst, parts[4 * t + 3] = most;
}
"""
WAIT = r"""
extern "C" __global__ void wait(long long nanoseconds) {
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while ((long long)(now - start) < nanoseconds);
}
"""
_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
BLOCKS = 512  # of 256 threads, for `noise` and `differ`


def source() -> str:
    """The check's own kernels, but for `wait`: they take no part in what is checked."""
    return _COMMON + "".join(_EACH.replace("NAME", n).replace("TYPE", t) for n, t in _TYPES.items())


class Tools:
    """Kernels of the check's own, on the current stream. CuPy's functions would need libraries that may be missing."""

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        self._module = self.cupy.RawModule(code=source())
        self._wait = self.cupy.RawModule(code=WAIT).get_function("wait")
        self._copy = self._module.get_function("copy")
        runtime = self.cupy.cuda.runtime
        self.cache = max(1 << 20, runtime.getDeviceProperties(runtime.getDevice())["l2CacheSize"])
        self._flushed = self.cupy.cuda.alloc(4 * self.cache)

    def wait(self, nanoseconds: int) -> None:
        """Keep the GPU busy."""
        self._wait((1,), (1,), (np.int64(nanoseconds),))

    def flush(self) -> None:
        """Fill the L2 cache with something else."""
        self._flushed.memset_async(0, 4 * self.cache)

    def noise(self, a: Any, seed: int, scale: float = 1.0) -> Any:
        """Fill a contiguous array with normally distributed numbers."""
        function = self._module.get_function(f"noise_{a.dtype.name}")
        numbers = (np.int64(a.size), np.int64(256 * BLOCKS), np.uint64(seed), np.float32(scale))
        function((BLOCKS,), (256,), (a, *numbers))
        return a

    def copy(self, source: Any, target: Any, size: int) -> None:
        """Copy bytes, 16 in each thread."""
        n = size // 16
        self._copy((-(-n // 256),), (256,), (source, target, np.int64(n)))

    def differ(self, a: Any, b: Any) -> tuple[float, float]:
        """How far two arrays are apart: of the sum of magnitudes, and at worst of the largest. b may be another library's."""
        dtype = _name(a)
        require(tuple(a.shape) == tuple(b.shape) and dtype == _name(b), f"{dtype} {a.shape}, not {_name(b)} {tuple(b.shape)}")
        parts = self.cupy.empty((256 * BLOCKS, 4), np.float64)
        pointers = tuple(np.uint64(_pointer(x)) for x in (a, b))
        function = self._module.get_function(f"differ_{dtype}")
        function((BLOCKS,), (256,), (*pointers, parts, np.int64(a.size), np.int64(256 * BLOCKS)))
        return apart(self.cupy.asnumpy(parts))


def apart(parts: np.ndarray[Any, Any]) -> tuple[float, float]:
    """What `differ` has found, from its threads' parts."""
    sums, most = parts[:, :2].sum(axis=0), parts[:, 2:].max(axis=0)
    return float(sums[0] / (sums[1] or 1.0)), float(most[0] / (most[1] or 1.0))


@functools.cache
def tools() -> Tools:
    """They are compiled once."""
    return Tools()


def _name(a: Any) -> str:
    return str(getattr(a.dtype, "name", a.dtype)).removeprefix("torch.")


def _pointer(a: Any) -> int:
    return int(a.data_ptr() if hasattr(a, "data_ptr") else a.data.ptr)


def as_torch(a: Any) -> Any:
    """A CuPy array's memory as a PyTorch tensor."""
    torch: Any = importlib.import_module("torch")
    if _name(a) == "bfloat16":
        return torch.from_dlpack(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(a)
