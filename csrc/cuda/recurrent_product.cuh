// The product of a step: a warp's tile of the resident weights by the state that all units made.
//
// Weights lie in the order of the fragments of a tensor core's product, so that each lane finds
// what it multiplies as 16 consecutive bytes. Which of the inner dimension's elements a fragment
// has is free, as long as both factors agree: lane quad takes the quad's 16 bytes of every 64 (a
// chunk) of a column of the state, words 2s and 2s + 1 of which go into the chunk's step s. So one
// 128-bit load serves two fragments, and the state lies in memory as it is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mma.cuh"
#include "recurrent_plan.h"

namespace fastseq::recurrent {

// An element in memory, and as it goes into the product.
template <Arithmetic kArithmetic>
struct Element {
  using Type = float;
  static __device__ __forceinline__ float to_float(float x) { return x; }
  static __device__ __forceinline__ float from_float(float x) { return x; }
  static __device__ __forceinline__ float operand(float x) {
    return kArithmetic == Arithmetic::tf32 ? __uint_as_float(to_tf32(x)) : x;
  }
};

template <>
struct Element<Arithmetic::bf16> {
  using Type = uint16_t;
  static __device__ __forceinline__ float to_float(uint16_t x) {
    return __uint_as_float(static_cast<uint32_t>(x) << 16);
  }
  static __device__ __forceinline__ uint16_t from_float(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
  static __device__ __forceinline__ uint16_t operand(uint16_t x) { return x; }
};

template <>
struct Element<Arithmetic::f16> {
  using Type = uint16_t;
  static __device__ __forceinline__ float to_float(uint16_t x) {
    return __half2float(__ushort_as_half(x));
  }
  static __device__ __forceinline__ uint16_t from_float(float x) {
    return __half_as_ushort(__float2half_rn(x));
  }
  static __device__ __forceinline__ uint16_t operand(uint16_t x) { return x; }
};

// A chunk's weights: for each matrix two fragments of four words; word r is of half r % 2 of the
// matrix's rows.
template <int kMatrices>
struct Chunk {
  uint32_t words[kMatrices][2][4];
};

// What a warp adds up, in the layout of a product's result: of each matrix row group in the first
// two, row group + 8 in the others; columns 2 quad and 2 quad + 1.
template <Arithmetic kArithmetic, int kMatrices>
struct Accumulators {
  float values[kMatrices][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[m][i] = 0;
  }

  // state: this lane's 16 bytes of the chunk in column group.
  __device__ __forceinline__ void add(const Chunk<kMatrices>& weights, const char* state, int) {
    const uint4 b = *reinterpret_cast<const uint4*>(state);
    const uint32_t halves[2][2] = {{b.x, b.y}, {b.z, b.w}};
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        if constexpr (kArithmetic == Arithmetic::bf16) {
          mma_m16n8k16(values[m], weights.words[m][s], halves[s], Bf16{});
        } else if constexpr (kArithmetic == Arithmetic::f16) {
          mma_m16n8k16(values[m], weights.words[m][s], halves[s], F16{});
        } else {
          mma_m16n8k8_tf32(values[m], weights.words[m][s], halves[s]);
        }
      }
  }

  __device__ __forceinline__ void finish(int) {}

  static __device__ __forceinline__ int state_row(int group) { return group; }
};

// fp32 without tensor cores: a lane multiplies the same weights with its words of all eight
// columns, which lie a pitch apart; in the end the four lanes of a group add up, and each keeps the
// two columns it would have had.
template <int kMatrices>
struct Accumulators<Arithmetic::f32, kMatrices> {
  float values[kMatrices][4];
  float sums[kMatrices][2][8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n) sums[m][0][n] = sums[m][1][n] = 0;
  }

  __device__ __forceinline__ void add(const Chunk<kMatrices>& weights, const char* state,
                                      int pitch) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint4 b = *reinterpret_cast<const uint4*>(state + n * pitch);
      const float words[4] = {__uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z),
                              __uint_as_float(b.w)};
#pragma unroll
      for (int m = 0; m < kMatrices; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int w = 0; w < 4; ++w)
            sums[m][half][n] = fmaf(__uint_as_float(weights.words[m][w / 2][w % 2 * 2 + half]),
                                    words[w], sums[m][half][n]);
    }
  }

  __device__ __forceinline__ void finish(int quad) {
    const bool right = (quad & 2) != 0, odd = (quad & 1) != 0;
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&sum)[8] = sums[m][half];
        float four[4];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          four[n] = (right ? sum[4 + n] : sum[n]) +
                    __shfl_xor_sync(0xffffffffu, right ? sum[n] : sum[4 + n], 2);
#pragma unroll
        for (int n = 0; n < 2; ++n)
          values[m][2 * half + n] = (odd ? four[2 + n] : four[n]) +
                                    __shfl_xor_sync(0xffffffffu, odd ? four[n] : four[2 + n], 1);
      }
  }

  static __device__ __forceinline__ int state_row(int) { return 0; }
};

// Sixteen bytes of elements that lie `stride` apart; zeros after the first `left`.
template <class Type>
__device__ __forceinline__ uint4 gather(const Type* from, int64_t stride, int left) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(Type));
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (i >= left) continue;
    if constexpr (sizeof(Type) == 2) {
      words[i / 2] |= static_cast<uint32_t>(from[i * stride]) << (i % 2 * 16);
    } else {
      words[i] = __float_as_uint(from[i * stride]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A warp's share of the weights: the first kHeld chunks of its split in registers, the others in
// shared memory at `loose`.
template <Arithmetic kArithmetic, int kMatrices, int kHeld>
struct Weights {
  using Type = typename Element<kArithmetic>::Type;
  Chunk<kMatrices> held[kHeld > 0 ? kHeld : 1];
  uint4* loose;      // of this lane: [chunk][matrix][2], a warp apart
  int first, count;  // chunks of the split

  // at(half, k): 16 bytes of weights from column k on, of row group of half % 2 of matrix half / 2.
  template <class At>
  __device__ __forceinline__ void load(const Plan& plan, char* shared, int warp, int lane,
                                       const At& at) {
    const int split = warp / plan.tiles;
    first = split * plan.split_chunks;
    count = min(plan.split_chunks, plan.chunks - first);
    loose = reinterpret_cast<uint4*>(shared + plan.layout.weights +
                                     warp * max(0, plan.split_chunks - kHeld) * kMatrices * 2 *
                                         kFragmentBytes) +
            lane;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i < count) fill(held[i], first + i, lane, at);
    for (int i = kHeld; i < count; ++i) {
      Chunk<kMatrices> chunk;
      fill(chunk, first + i, lane, at);
#pragma unroll
      for (int m = 0; m < kMatrices; ++m)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const uint32_t (&w)[4] = chunk.words[m][s];
          loose[((i - kHeld) * kMatrices * 2 + m * 2 + s) * 32] =
              make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
  }

  template <class At>
  static __device__ __forceinline__ void fill(Chunk<kMatrices>& chunk, int index, int lane,
                                              const At& at) {
    const int k = (index * kChunkBytes + lane % 4 * 16) / static_cast<int>(sizeof(Type));
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 piece = at(2 * m + half, k);
        const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t& word = chunk.words[m][w / 2][w % 2 * 2 + half];
          word = words[w];
          if constexpr (kArithmetic == Arithmetic::tf32) word = to_tf32(__uint_as_float(word));
        }
      }
  }

  // state: column 0 of the state, of row group's column already where the arithmetic wants it.
  __device__ __forceinline__ void multiply(Accumulators<kArithmetic, kMatrices>& sums,
                                           const char* state, int pitch, int lane) const {
    const char* from =
        state + sums.state_row(lane / 4) * pitch + first * kChunkBytes + lane % 4 * 16;
    sums.clear();
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i < count) sums.add(held[i], from + i * kChunkBytes, pitch);
    const uint4* next = loose;
    for (int i = kHeld; i < count; ++i) {
      Chunk<kMatrices> chunk;
#pragma unroll
      for (int m = 0; m < kMatrices; ++m)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const uint4 w = next[(m * 2 + s) * 32];
          chunk.words[m][s][0] = w.x, chunk.words[m][s][1] = w.y;
          chunk.words[m][s][2] = w.z, chunk.words[m][s][3] = w.w;
        }
      next += kMatrices * 2 * 32;
      sums.add(chunk, from + i * kChunkBytes, pitch);
    }
    sums.finish(lane % 4);
  }
};

}  // namespace fastseq::recurrent
