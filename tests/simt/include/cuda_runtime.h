// What the kernels use of CUDA's header of this name, on the host (see simt.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx ::simt::thread_index
#define blockIdx ::simt::block_index
#define blockDim ::simt::block_size
#define gridDim ::simt::grid_size

// Aligned as on the device, so that the undefined-behaviour sanitizer sees a misaligned access.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

using cudaStream_t = struct SimtStream*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The default arguments are those of the line that calls, which tells one barrier from another.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::sync_block({file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  simt::exchange(mask, 0, simt::lane(), {file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source_lane, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt::exchange(mask, bits, source_lane, {file, line});
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, simt::lane() ^ lane_mask, file, line);
}

// A lane with no lane to read from keeps its value.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const int source = simt::lane() + delta;
  return __shfl_sync(mask, value, source < simt::kWarp ? source : simt::lane(), file, line);
}
