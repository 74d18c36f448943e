// A thread's part of a row: kChunks vectors of kVector consecutive elements, loaded and stored with
// accesses of up to 128 bits in whatever dtype the tensor has.
//
// The dtype is a run-time value, the same for a whole launch. Loading and converting are two steps:
// the load depends only on the element's width, so the loads of all tensors can be in flight before
// the first conversion waits; each step branches once for the whole fragment, so a mix of dtypes
// costs a few instructions a row instead of a template instance for each mix.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../layer_norm.h"
#include "launch.cuh"

namespace fastseq {

// Which columns of the row a thread owns: chunk c begins at (c * threads + lane) * kVector, so that
// neighbouring threads touch neighbouring vectors.
struct Columns {
  int threads, lane, row_length;

  template <int kVector>
  __device__ __forceinline__ int begin(int chunk) const {
    return (chunk * threads + lane) * kVector;
  }
};

// Elements as they lie in memory: 32-bit words; a 16-bit dtype fills the first half of each chunk.
template <int kVector, int kChunks>
struct Packed {
  uint32_t words[kChunks][kVector];
};

template <int kVector, int kChunks>
struct Fragment {
  float values[kChunks][kVector];
};

__device__ __forceinline__ bool is_wide(DType dtype) { return dtype == DType::f32; }

__device__ __forceinline__ const void* element(const void* data, DType dtype, int64_t offset) {
  return static_cast<const char*>(data) + (is_wide(dtype) ? offset * 4 : offset * 2);
}

__device__ __forceinline__ void* element(void* data, DType dtype, int64_t offset) {
  return static_cast<char*>(data) + (is_wide(dtype) ? offset * 4 : offset * 2);
}

// Where row begins. Almost every tensor has one stride only, and a 64-bit division is a subroutine.
__device__ __forceinline__ int64_t row_offset(const Rows& rows, int64_t row) {
  if (rows.inner == 1) return row * rows.stride_outer;
  if (((row | rows.inner) >> 32) == 0) {
    const uint32_t outer = static_cast<uint32_t>(row) / static_cast<uint32_t>(rows.inner);
    const uint32_t inner = static_cast<uint32_t>(row) % static_cast<uint32_t>(rows.inner);
    return outer * rows.stride_outer + inner * rows.stride_inner;
  }
  return row / rows.inner * rows.stride_outer + row % rows.inner * rows.stride_inner;
}

__device__ __forceinline__ float half_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ float bfloat16_to_float(uint32_t bits) {
  return __uint_as_float(bits << 16);
}

// Two at once: one instruction rounds both.
__device__ __forceinline__ uint32_t floats_to_halves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}

__device__ __forceinline__ uint32_t floats_to_bfloat16s(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}

template <int kVector>
__device__ __forceinline__ void load_wide(const void* from, uint32_t (&words)[kVector]) {
  if constexpr (kVector == 1) {
    words[0] = *static_cast<const uint32_t*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      const uint4 four = static_cast<const uint4*>(from)[i / 4];
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  }
}

template <int kVector>
__device__ __forceinline__ void load_narrow(const void* from, uint32_t (&words)[kVector]) {
  if constexpr (kVector == 1) {
    words[0] = *static_cast<const unsigned short*>(from);
  } else if constexpr (kVector == 4) {
    const uint2 two = *static_cast<const uint2*>(from);
    words[0] = two.x, words[1] = two.y;
  } else {
    const uint4 four = *static_cast<const uint4*>(from);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  }
}

// __stwb is a plain store, but one that stays whole: the compiler takes assignments of a vector
// apart and does not always find the parts again.
template <int kVector>
__device__ __forceinline__ void store_words(void* to, const uint32_t (&words)[kVector], bool wide) {
  if constexpr (kVector == 1) {
    if (wide) {
      *static_cast<uint32_t*>(to) = words[0];
    } else {
      *static_cast<unsigned short*>(to) = static_cast<unsigned short>(words[0]);
    }
  } else if (wide) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      __stwb(static_cast<uint4*>(to) + i / 4,
             make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    }
  } else if constexpr (kVector == 4) {
    __stwb(static_cast<uint2*>(to), make_uint2(words[0], words[1]));
  } else {
    __stwb(static_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// Loads the thread's columns of the row that begins at offset; columns past the end are zero bits.
template <int kVector, int kChunks>
__device__ __forceinline__ void load(Packed<kVector, kChunks>& packed, const void* data,
                                     DType dtype, int64_t offset, const Columns& columns,
                                     bool active = true) {
  const char* row = static_cast<const char*>(element(data, dtype, offset));
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) packed.words[c][i] = 0;
  }
  if (!active) return;
  if (is_wide(dtype)) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int begin = columns.begin<kVector>(c);
      if (begin < columns.row_length) load_wide<kVector>(row + begin * 4ll, packed.words[c]);
    }
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int begin = columns.begin<kVector>(c);
      if (begin < columns.row_length) load_narrow<kVector>(row + begin * 2ll, packed.words[c]);
    }
  }
}

// A vector of parameters, the same for every row; zeros where it is absent.
template <int kVector, int kChunks>
__device__ __forceinline__ void load(Packed<kVector, kChunks>& packed, const Vector& vector,
                                     int64_t offset, const Columns& columns) {
  load(packed, vector.data, vector.dtype, offset, columns, vector.data != nullptr);
}

template <int kVector, int kChunks>
__device__ __forceinline__ void unpack(Fragment<kVector, kChunks>& fragment,
                                       const Packed<kVector, kChunks>& packed, DType dtype) {
  const auto convert = [&](auto narrow_to_float) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if constexpr (kVector == 1) {
        fragment.values[c][0] = narrow_to_float(packed.words[c][0]);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; i += 2) {
          const uint32_t pair = packed.words[c][i / 2];
          fragment.values[c][i] = narrow_to_float(pair & 0xffffu);
          fragment.values[c][i + 1] = narrow_to_float(pair >> 16);
        }
      }
    }
  };
  if (dtype == DType::f32) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        fragment.values[c][i] = __uint_as_float(packed.words[c][i]);
      }
    }
  } else if (dtype == DType::f16) {
    convert([](uint32_t bits) { return half_to_float(bits); });
  } else {
    convert([](uint32_t bits) { return bfloat16_to_float(bits); });
  }
}

template <int kVector, int kChunks>
__device__ __forceinline__ void pack(Packed<kVector, kChunks>& packed,
                                     const Fragment<kVector, kChunks>& fragment, DType dtype) {
  const auto convert = [&](auto floats_to_pair) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if constexpr (kVector == 1) {
        packed.words[c][0] = floats_to_pair(fragment.values[c][0], 0.0f);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; i += 2) {
          packed.words[c][i / 2] = floats_to_pair(fragment.values[c][i], fragment.values[c][i + 1]);
        }
      }
    }
  };
  if (dtype == DType::f32) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        packed.words[c][i] = __float_as_uint(fragment.values[c][i]);
      }
    }
  } else if (dtype == DType::f16) {
    convert([](float low, float high) { return floats_to_halves(low, high); });
  } else {
    convert([](float low, float high) { return floats_to_bfloat16s(low, high); });
  }
}

template <int kVector, int kChunks>
__device__ __forceinline__ void store(void* data, DType dtype, int64_t offset,
                                      const Packed<kVector, kChunks>& packed,
                                      const Columns& columns) {
  char* row = static_cast<char*>(element(data, dtype, offset));
  const bool wide = is_wide(dtype);
  const int bytes = wide ? 4 : 2;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int begin = columns.begin<kVector>(c);
    if (begin >= columns.row_length) continue;
    store_words<kVector>(row + static_cast<int64_t>(begin) * bytes, packed.words[c], wide);
  }
}

template <int kVector, int kChunks>
__device__ __forceinline__ void store(void* data, DType dtype, int64_t offset,
                                      const Fragment<kVector, kChunks>& fragment,
                                      const Columns& columns) {
  Packed<kVector, kChunks> packed;
  pack(packed, fragment, dtype);
  store(data, dtype, offset, packed, columns);
}

__device__ __forceinline__ float load_float(const Vector& vector, int64_t index) {
  return static_cast<const float*>(vector.data)[index];
}

}  // namespace fastseq
