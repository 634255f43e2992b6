// CUDA C++ for a CPU: what emitted kernels use of CUDA, as plain C++. The scheduler behind it is runtime.cpp.
// A barrier knows the line it stands in, so that one reached by a part of the threads only is found.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define XPNN_HOST 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)

struct Int3 { unsigned x, y, z; };
struct HostPlace { Int3 thread, block; unsigned rank; };

extern "C" {
extern HostPlace* host_place;
unsigned char* host_memory();
void host_barrier(int line);
const uint64_t* host_exchange(unsigned mask, uint64_t value, int line);
void host_cluster_arrive(int line);
void host_cluster_wait(int line);
void* host_remote(const void* p, unsigned rank, size_t size);
}

#define threadIdx (host_place->thread)
#define blockIdx (host_place->block)
#define __syncthreads() host_barrier(__LINE__)
#define __syncwarp() ((void)host_exchange(0xffffffffu, 0, __LINE__))
#define __shfl_xor_sync(mask, value, distance, ...) host_shuffle(mask, value, distance, __LINE__, ##__VA_ARGS__)

// the value of the lane whose number differs in the bits of `distance`; the own one where that is in a later group of `width`
template <class T> inline T host_shuffle(unsigned mask, T value, int distance, int line, int width = 32) {
  static_assert(sizeof(T) <= 8, "a shuffle moves one number");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = host_exchange(mask, bits, line);
  T result;
  const unsigned lane = threadIdx.x % 32, other = lane ^ (distance & 31);
  std::memcpy(&result, &all[other / width > lane / width ? lane : other], sizeof(T));
  return result;
}

inline float __int_as_float(int v) { float r; std::memcpy(&r, &v, 4); return r; }
inline unsigned host_bits(float v) { unsigned r; std::memcpy(&r, &v, 4); return r; }
inline double __longlong_as_double(long long v) { double r; std::memcpy(&r, &v, 8); return r; }
using std::exp; using std::expm1; using std::log; using std::log1p; using std::tanh; using std::erf; using std::erfc; using std::sqrt; using std::floor; using std::fabs;

// --- half precision, rounded to nearest even

struct __half { unsigned short bits; };
struct __nv_bfloat16 { unsigned short bits; };

inline float __bfloat162float(__nv_bfloat16 v) { return __int_as_float(int(unsigned(v.bits) << 16)); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const unsigned u = host_bits(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {(unsigned short)((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) {
  const unsigned sign = unsigned(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  if (exponent == 31) return __int_as_float(int(sign | 0x7f800000u | fraction << 13));
  if (exponent) return __int_as_float(int(sign | (exponent + 112) << 23 | fraction << 13));
  const float small = float(fraction) * 0x1p-24f;
  return sign ? -small : small;
}
inline __half __float2half_rn(float v) {
  const unsigned u = host_bits(v), sign = u >> 16 & 0x8000, size = u & 0x7fffffffu;
  if (size > 0x7f800000u) return {0x7fff};
  if (size >= 0x477ff000u) return {(unsigned short)(sign | 0x7c00)};  // 65520 and more
  if (size < 0x38800000u) {  // below the smallest normal half: the sum with 0.5 rounds at its last bit
    const float shifted = __int_as_float(int(size)) + 0.5f;
    return {(unsigned short)(sign | (host_bits(shifted) - 0x3f000000u))};
  }
  return {(unsigned short)(sign | ((size + 0xfffu + (size >> 13 & 1)) - 0x38000000u) >> 13)};
}

// --- clusters

inline unsigned cluster_rank() { return host_place->rank; }
#define cluster_arrive() host_cluster_arrive(__LINE__)
#define cluster_wait() host_cluster_wait(__LINE__)
template <class T> inline void put(T* p, unsigned rank, T v) { std::memcpy(host_remote(p, rank, sizeof(T)), &v, sizeof(T)); }

// --- how a kernel is called: its arguments by address, as the driver takes them

template <class... A, size_t... I> void host_apply(void (*kernel)(A...), void** a, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(a[I])...);
}
template <class... A> void host_apply(void (*kernel)(A...), void** a) { host_apply(kernel, a, std::index_sequence_for<A...>()); }
#define HOST_EXPORT(name) extern "C" void host_call_##name(void** a) { host_apply(&name, a); }
