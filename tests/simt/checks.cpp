// Kernels that test the emulation itself: one that is right, and one for each fault it must report.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../csrc/cuda/launch.cuh"
#include "checks.h"

namespace simt {
namespace {

// Reverses each block's part of an array through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(const float* from, float* to) {
  FASTSEQ_SHARED(float[64], values);
  const int thread = static_cast<int>(threadIdx.x);
  const int base = static_cast<int>(blockIdx.x) * 64;
  values[thread] = from[base + thread];
  if constexpr (kBarrier) __syncthreads();
  to[base + thread] = values[63 - thread];
}

// Each warp's sum, with the exchanges of a butterfly.
__global__ void warp_sum_kernel(const float* from, float* to) {
  float value = from[threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  __syncwarp();
  to[threadIdx.x] = value;
}

__global__ void dynamic_shared_kernel(float* to, int index) {
  FASTSEQ_DYNAMIC_SHARED(float, values);
  if (threadIdx.x == 0) values[index] = 1.0f;
  __syncthreads();
  to[threadIdx.x] = values[0];
}

__global__ void static_shared_kernel(float* to, int index) {
  FASTSEQ_SHARED(float[32], values);
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  to[threadIdx.x] = values[threadIdx.x + index];
}

__global__ void global_kernel(float* to, int index) {
  to[static_cast<int>(threadIdx.x) + index] = 1;
}

__global__ void misaligned_kernel(float* to, int index) {
  *reinterpret_cast<uint4*>(to + index) = make_uint4(0, 0, 0, 0);
}

__global__ void same_element_kernel(float* to) { to[threadIdx.x / 2] = 1; }

__global__ void missed_barrier_kernel(float* to) {
  if (threadIdx.x < 16) __syncthreads();
  to[threadIdx.x] = 1;
}

__global__ void divergent_barrier_kernel(float* to) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  to[threadIdx.x] = 1;
}

__global__ void missing_lane_kernel(float* to) {
  if (threadIdx.x == 7) return;
  to[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void masked_lane_kernel(float* to) {
  if (threadIdx.x < 16) to[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

float* floats(Request& request) { return static_cast<float*>(request.pointer()); }

template <typename Kernel>
Function on_one_warp(Kernel kernel) {
  return [kernel](Request& request) -> const char* {
    FASTSEQ_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr)(floats(request));
    return nullptr;
  };
}

template <typename Kernel>
Function with_index(Kernel kernel) {
  return [kernel](Request& request) -> const char* {
    float* to = floats(request);
    const int index = static_cast<int>(request.integer());
    FASTSEQ_LAUNCH(kernel, dim3(1), dim3(32), 32 * sizeof(float), nullptr)(to, index);
    return nullptr;
  };
}

template <typename Kernel>
Function from_to(Kernel kernel, unsigned blocks) {
  return [kernel, blocks](Request& request) -> const char* {
    const float* from = floats(request);
    float* to = floats(request);
    FASTSEQ_LAUNCH(kernel, dim3(blocks), dim3(64), 0, nullptr)(from, to);
    return nullptr;
  };
}

// Every float16 and bfloat16 to float, and given floats to both.
const char* conversions(Request& request) {
  float* half_floats = floats(request);
  float* bfloat16_floats = floats(request);
  for (unsigned bits = 0; bits < 65536; ++bits) {
    half_floats[bits] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    bfloat16_floats[bits] =
        __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
  }
  const float* from = floats(request);
  auto* halves = static_cast<unsigned short*>(request.pointer());
  auto* bfloat16s = static_cast<unsigned short*>(request.pointer());
  const int64_t count = request.integer();
  for (int64_t i = 0; i < count; ++i) {
    halves[i] = __half_as_ushort(__float2half_rn(from[i]));
    bfloat16s[i] = __bfloat16_as_ushort(__float2bfloat16_rn(from[i]));
  }
  return nullptr;
}

}  // namespace

void add_functions(Functions& functions) {
  functions["reverse"] = from_to(&reverse_kernel<true>, 3);
  functions["reverse_without_barrier"] = from_to(&reverse_kernel<false>, 3);
  functions["warp_sum"] = from_to(&warp_sum_kernel, 1);
  functions["dynamic_shared"] = with_index(&dynamic_shared_kernel);
  functions["static_shared"] = with_index(&static_shared_kernel);
  functions["global"] = with_index(&global_kernel);
  functions["misaligned"] = with_index(&misaligned_kernel);
  functions["same_element"] = on_one_warp(&same_element_kernel);
  functions["missed_barrier"] = on_one_warp(&missed_barrier_kernel);
  functions["divergent_barrier"] = on_one_warp(&divergent_barrier_kernel);
  functions["missing_lane"] = on_one_warp(&missing_lane_kernel);
  functions["masked_lane"] = on_one_warp(&masked_lane_kernel);
  functions["conversions"] = conversions;
  add_group_checks(functions);
  add_warp_checks(functions);
}

}  // namespace simt
