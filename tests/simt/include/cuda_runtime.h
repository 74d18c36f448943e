// What the kernels use of CUDA's header of this name, on the host (see simt.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "../simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// Aligned as on the device, so that the undefined-behaviour sanitizer sees a misaligned access.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Accesses with a hint for the caches.
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}
template <typename T>
void __stcg(T* to, T value) {
  *to = value;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}

using cudaStream_t = struct SimtStream*;
inline cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
    default:
      return "invalid argument";
  }
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(std::size(simt::devices)))
    return cudaErrorInvalidDevice;
  simt::current_device = device;
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (number < 0 || number >= static_cast<int>(std::size(simt::devices)))
    return cudaErrorInvalidDevice;
  const simt::Device& device = simt::devices[number];
  *value = attribute == cudaDevAttrMultiProcessorCount            ? device.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.shared_bytes
                                                                  : device.major;
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  simt::Limits& limits = simt::limits_of(reinterpret_cast<const void*>(kernel));
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    limits.large_clusters = value != 0;
  } else {
    limits.shared_bytes = static_cast<size_t>(value);
  }
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int maxDynamicSharedSizeBytes;
};

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(simt::limits_of(kernel).shared_bytes);
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeCooperative,
};

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                                 int threads, size_t shared_bytes) {
  ++simt::devices[simt::current_device].occupancy_calls;
  if (shared_bytes > simt::limits_of(kernel).shared_bytes) return cudaErrorInvalidValue;
  *blocks = static_cast<int>(simt::resident_blocks(static_cast<size_t>(threads), shared_bytes));
  return cudaSuccess;
}

inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                                  const cudaLaunchConfig_t* config) {
  simt::Device& device = simt::devices[simt::current_device];
  ++device.occupancy_calls;
  const simt::Limits& limits = simt::limits_of(kernel);
  const int blocks = static_cast<int>(config->attrs[0].val.clusterDim.x);
  if (config->dynamicSmemBytes > limits.shared_bytes) return cudaErrorInvalidValue;
  if (blocks > (limits.large_clusters ? 16 : 8)) return cudaErrorInvalidClusterSize;
  // They lie in groups of multiprocessors, each of so many.
  const int together = device.largest_cluster;
  *clusters = device.multiprocessors / together * (together / blocks);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  simt::Shape shape{config->gridDim, config->blockDim, config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = config->attrs[i].val;
    if (config->attrs[i].id == cudaLaunchAttributeCooperative) {
      shape.cooperative = value.cooperative != 0;
    } else {
      shape.cluster = dim3(value.clusterDim.x, value.clusterDim.y, value.clusterDim.z);
    }
  }
  simt::make_launch(kernel, shape)(arguments...);
  return simt::last_error;
}

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
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

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline void __nanosleep(unsigned, simt::Place place = simt::here()) { simt::poll(place); }
inline void __threadfence() { simt::yield(); }
inline void __threadfence_block() { simt::yield(); }

// Atomics. One that changes nothing is a poll.
template <typename T, typename Update>
__attribute__((noinline, no_sanitize("thread"))) T simt_atomic(T* at, simt::Place place,
                                                               Update update) {
  simt::order_atomic(at);
  const T before = *at;
  const T after = update(before);
  *at = after;
  if (std::memcmp(&before, &after, sizeof(T)) == 0) {
    simt::poll(place);
  } else {
    simt::written();
  }
  return before;
}

template <typename T>
T atomicAdd(T* at, T value, simt::Place place = simt::here()) {
  return simt_atomic(at, place, [&](T before) { return static_cast<T>(before + value); });
}
template <typename T>
T atomicMax(T* at, T value, simt::Place place = simt::here()) {
  return simt_atomic(at, place, [&](T before) { return before < value ? value : before; });
}
template <typename T>
T atomicMin(T* at, T value, simt::Place place = simt::here()) {
  return simt_atomic(at, place, [&](T before) { return value < before ? value : before; });
}
template <typename T>
T atomicExch(T* at, T value, simt::Place place = simt::here()) {
  return simt_atomic(at, place, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* at, T expected, T value, simt::Place place = simt::here()) {
  return simt_atomic(at, place, [&](T before) { return before == expected ? value : before; });
}

inline void __syncthreads(simt::Place place = simt::here()) { simt::sync_block(place); }

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Place place = simt::here()) {
  simt::sync_warp(mask, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Place place = simt::here()) {
  return simt::ballot(mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate, simt::Place place = simt::here()) {
  return simt::ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Place place = simt::here()) {
  return simt::ballot(mask, predicate == 0, place) == 0;
}

template <typename T>
T simt_shuffle(unsigned mask, T value, int source_lane, simt::Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt::exchange(mask, bits, source_lane, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// width, a power of two, divides the warp: lanes read inside their part. One with no lane to read
// from keeps its value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source_lane, int width = simt::kWarp,
              simt::Place place = simt::here()) {
  const int begin = simt::lane() & -width;
  return simt_shuffle(mask, value, begin + (source_lane & (width - 1)), place);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = simt::kWarp,
                  simt::Place place = simt::here()) {
  const int source = simt::lane() ^ lane_mask;
  const bool beyond = source >= (simt::lane() & -width) + width;
  return simt_shuffle(mask, value, beyond ? simt::lane() : source, place);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = simt::kWarp,
                   simt::Place place = simt::here()) {
  const int source = simt::lane() + delta;
  const bool beyond = source >= (simt::lane() & -width) + width;
  return simt_shuffle(mask, value, beyond ? simt::lane() : source, place);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = simt::kWarp,
                 simt::Place place = simt::here()) {
  const int source = simt::lane() - delta;
  const bool beyond = source < (simt::lane() & -width);
  return simt_shuffle(mask, value, beyond ? simt::lane() : source, place);
}
