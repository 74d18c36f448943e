// What the lanes of a warp do together: votes, shuffles in parts of a warp, products of matrices.
#include "../../csrc/cuda/mma.cuh"
#include "checks.h"

namespace simt {
namespace {

// Registers in memory as [matrix][lane][register].
template <int kCount, typename T>
__device__ void load_registers(T (&to)[kCount], const T* from) {
  const int offset = static_cast<int>(blockIdx.x * 32 + threadIdx.x) * kCount;
  for (int i = 0; i < kCount; ++i) to[i] = from[offset + i];
}

template <int kCount, typename T>
__device__ void store_registers(T* to, const T (&from)[kCount]) {
  const int offset = static_cast<int>(blockIdx.x * 32 + threadIdx.x) * kCount;
  for (int i = 0; i < kCount; ++i) to[offset + i] = from[i];
}

struct Tf32 {};

template <typename Kind>
__global__ void mma_kernel(float* d, const uint32_t* a, const uint32_t* b) {
  float accumulators[4];
  uint32_t left[4], right[2];
  load_registers(accumulators, d);
  load_registers(left, a);
  load_registers(right, b);
  if constexpr (std::is_same_v<Kind, Tf32>) {
    fastseq::mma_m16n8k8_tf32(accumulators, left, right);
  } else {
    fastseq::mma_m16n8k16(accumulators, left, right, Kind{});
  }
  store_registers(d, accumulators);
}

// From [matrices, 8, 8] elements; the lanes of unused matrices point nowhere.
template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_kernel(const unsigned short* from, uint32_t* to) {
  FASTSEQ_DYNAMIC_SHARED(unsigned short, elements);
  for (int i = static_cast<int>(threadIdx.x); i < kMatrices * 64; i += 32) elements[i] = from[i];
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x);
  const void* at = row < kMatrices * 8 ? elements + row * 8 : nullptr;
  uint32_t registers[kMatrices];
  if constexpr (kTransposed) {
    fastseq::ldmatrix_transposed(registers, at);
  } else {
    fastseq::ldmatrix(registers, at);
  }
  store_registers(to, registers);
}

__global__ void half_warp_mma_kernel(uint32_t* to) {
  if (threadIdx.x >= 16) return;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  fastseq::mma_m16n8k16(d, a, b, fastseq::F16{});
  to[threadIdx.x] = 0;
}

__global__ void ldmatrix_past_end_kernel(uint32_t* to) {
  FASTSEQ_DYNAMIC_SHARED(unsigned short, elements);
  uint32_t registers[2];
  fastseq::ldmatrix(registers, elements + (threadIdx.x + 1) * 8);
  to[threadIdx.x] = registers[0];
}

// Of all lanes by their index: a vote, and what each kind of shuffle brings in parts of 8.
__global__ void vote_kernel(unsigned* to) {
  const unsigned lane = threadIdx.x, all = 0xffffffffu;
  unsigned* out = to + 8 * lane;
  out[0] = __ballot_sync(all, lane % 3 == 0);
  out[1] = static_cast<unsigned>(__any_sync(all, lane == 31));
  out[2] = static_cast<unsigned>(__all_sync(all, lane < 31));
  out[3] = __shfl_sync(all, lane, 3, 8);
  out[4] = __shfl_up_sync(all, lane, 2, 8);
  out[5] = __shfl_down_sync(all, lane, 2, 8);
  out[6] = __shfl_xor_sync(all, lane, 4, 8);
  out[7] = __shfl_xor_sync(all, lane, 8, 8);
}

// A shuffle of half a warp that names the other half, which is at another.
__global__ void wrong_mask_kernel(unsigned* to) {
  const unsigned mask = threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u;
  to[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(mask, threadIdx.x, 1)
                                     : __shfl_xor_sync(mask, threadIdx.x, 1);
  __syncwarp();
}

// The ranks by which threads pass an atomic counter, their sum, and who was last.
__global__ void atomic_kernel(unsigned* to) {
  to[4 + blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(&to[0], 1u);
  atomicMax(&to[1], threadIdx.x);
  while (atomicCAS(&to[2], 0u, 1u) != 0u) __nanosleep(20);
  to[3] += 1;
  __threadfence();
  atomicExch(&to[2], 0u);
}

template <typename Kind>
const char* multiply(Request& request) {
  auto* d = static_cast<float*>(request.pointer());
  const auto* a = static_cast<const uint32_t*>(request.pointer());
  const auto* b = static_cast<const uint32_t*>(request.pointer());
  const fastseq::LaunchShape shape{dim3(static_cast<unsigned>(request.integer())), dim3(32)};
  return error_text(fastseq::launch(&mma_kernel<Kind>, shape, nullptr, d, a, b));
}

template <int kMatrices, bool kTransposed>
const char* load(Request& request) {
  const auto* from = static_cast<const unsigned short*>(request.pointer());
  auto* to = static_cast<uint32_t*>(request.pointer());
  fastseq::LaunchShape shape{dim3(1), dim3(32)};
  shape.shared_bytes = kMatrices * 128;
  return error_text(
      fastseq::launch(&ldmatrix_kernel<kMatrices, kTransposed>, shape, nullptr, from, to));
}

template <typename Kernel>
Function on_words(Kernel kernel, unsigned blocks) {
  return [kernel, blocks](Request& request) -> const char* {
    fastseq::LaunchShape shape{dim3(blocks), dim3(32)};
    shape.shared_bytes = 256;
    auto* to = static_cast<uint32_t*>(request.pointer());
    return error_text(fastseq::launch(kernel, shape, nullptr, to));
  };
}

// In place: floats to the bits of their nearest tf32.
const char* round_tf32(Request& request) {
  auto* values = static_cast<uint32_t*>(request.pointer());
  const int64_t count = request.integer();
  for (int64_t i = 0; i < count; ++i) values[i] = fastseq::to_tf32(__uint_as_float(values[i]));
  return nullptr;
}

}  // namespace

void add_warp_checks(Functions& functions) {
  functions["mma_bf16"] = multiply<fastseq::Bf16>;
  functions["mma_f16"] = multiply<fastseq::F16>;
  functions["mma_tf32"] = multiply<Tf32>;
  functions["ldmatrix_4"] = load<4, false>;
  functions["ldmatrix_2"] = load<2, false>;
  functions["ldmatrix_4_transposed"] = load<4, true>;
  functions["ldmatrix_2_transposed"] = load<2, true>;
  functions["ldmatrix_past_end"] = on_words(&ldmatrix_past_end_kernel, 1);
  functions["half_warp_mma"] = on_words(&half_warp_mma_kernel, 1);
  functions["votes"] = on_words(&vote_kernel, 1);
  functions["wrong_mask"] = on_words(&wrong_mask_kernel, 1);
  functions["atomics"] = on_words(&atomic_kernel, 3);
  functions["round_tf32"] = round_tf32;
}

}  // namespace simt
