// Rows in memory and in vectors: what the CPU kernels of every family share. Included by files that
// are compiled once per instruction set; see vec.h for what that forbids.
#pragma once

#include "../math/random.h"
#include "../types.h"
#include "vec.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int64_t kAhead = 4096;  // elements to look ahead at least

template <class T>
using V = typename Simd<T>::V;
template <class T>
constexpr int lanes = Simd<T>::lanes;
// Summands of one partial sum, 256 for each lane: bounds the error of long rows.
template <class T>
constexpr int64_t block = 256 * lanes<T>;

inline int64_t element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

inline char* row_of(const Rows& rows, int64_t row) {
  int64_t element = row * rows.stride_inner;
  if (row >= rows.inner)  // two strides; a division is dear for a short row
    element = (row / rows.inner) * rows.stride_outer + (row % rows.inner) * rows.stride_inner;
  return static_cast<char*>(rows.data) + element * element_size(rows.dtype);
}

// The memory that comes next. A row is swept several times in cache while memory idles, and the
// hardware does not look past the row: the last sweep asks for what follows.
struct Ahead {
  const char* data = nullptr;
  int64_t size = 0;
  Ahead() = default;
  Ahead(const Rows& rows, int64_t row, int64_t distance)
      : data(row_of(rows, row) + distance * element_size(rows.dtype)),
        size(element_size(rows.dtype)) {}
  // Into L2: L1 is full of the row at hand.
  void prefetch(int64_t i) const { __builtin_prefetch(data + i * size, 0, 2); }
};

// Calls f with a null pointer of the memory type; only the types a compute type can meet.
template <class T, class F>
inline void with_type(DType dtype, F f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::f32:
        return f(static_cast<float*>(nullptr));
      case DType::f16:
        return f(static_cast<f16*>(nullptr));
      default:
        return f(static_cast<bf16*>(nullptr));
    }
  }
}

// The same for two of them.
template <class T, class F>
inline void with_types(DType one, DType other, F f) {
  with_type<T>(one, [&](auto* a) { with_type<T>(other, [&](auto* b) { f(a, b); }); });
}

template <class M>
constexpr DType memory_dtype = DType::f32;
template <>
constexpr DType memory_dtype<double> = DType::f64;
template <>
constexpr DType memory_dtype<f16> = DType::f16;
template <>
constexpr DType memory_dtype<bf16> = DType::bf16;

template <class T>
void convert_row(const void* source, DType dtype, T* target, int64_t n) {
  with_type<T>(dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(const_cast<void*>(source));
    for (int64_t i = 0; i < n; i += lanes<T>)
      store_some<T>(target + i, load_some<T>(p + i, n - i), n - i);
  });
}

// The row in the compute type: itself where it is that already, else converted into buffer.
template <class T>
const T* read_row(const Rows& rows, int64_t row, T* buffer, int64_t n) {
  const char* source = row_of(rows, row);
  if (rows.dtype == memory_dtype<T>) return reinterpret_cast<const T*>(source);
  convert_row(source, rows.dtype, buffer, n);
  return buffer;
}

template <class T>
void write_row(const Rows& rows, int64_t row, const T* source, int64_t n) {
  with_type<T>(rows.dtype, [&](auto* type) {
    auto* p = reinterpret_cast<decltype(type)>(row_of(rows, row));
    for (int64_t i = 0; i < n; i += lanes<T>)
      store_some<T>(p + i, load_some<T>(source + i, n - i), n - i);
  });
}

// Weight or bias in the compute type; fill where there is none.
template <class T>
const T* read_parameter(const Vector& parameter, T fill, T* buffer, int64_t n) {
  if (parameter.data != nullptr && parameter.dtype == memory_dtype<T>)
    return static_cast<const T*>(parameter.data);
  for (int64_t i = 0; i < n; ++i) {
    if (parameter.data == nullptr) {
      buffer[i] = fill;
      continue;
    }
    switch (parameter.dtype) {
      case DType::f64:
        buffer[i] = static_cast<T>(static_cast<double*>(parameter.data)[i]);
        break;
      case DType::f32:
        buffer[i] = static_cast<T>(static_cast<float*>(parameter.data)[i]);
        break;
      case DType::f16:
        buffer[i] = to_float(static_cast<f16*>(parameter.data)[i]);
        break;
      case DType::bf16:
        buffer[i] = to_float(static_cast<bf16*>(parameter.data)[i]);
        break;
    }
  }
  return buffer;
}

inline void write_parameter(const Vector& parameter, int64_t i, double value) {
  const float narrow = static_cast<float>(value);
  switch (parameter.dtype) {
    case DType::f64:
      static_cast<double*>(parameter.data)[i] = value;
      break;
    case DType::f32:
      static_cast<float*>(parameter.data)[i] = narrow;
      break;
    case DType::f16:
      static_cast<f16*>(parameter.data)[i] = to_f16(narrow);
      break;
    case DType::bf16:
      static_cast<bf16*>(parameter.data)[i] = to_bf16(narrow);
      break;
  }
}

template <class T>
void multiply_by_dropout(T* row, int64_t index, int64_t n, const Dropout& dropout) {
  const auto key =
      random::row_key(static_cast<uint64_t>(*dropout.seed), static_cast<uint64_t>(index));
  constexpr int width = lanes<float>;
  U32x lane;
  for (int i = 0; i < width; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int64_t i = 0; i < n; i += width) {
    U32x x = lane + (static_cast<uint32_t>(i) + key.first);
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= key.second;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    const int64_t count = n - i < width ? n - i : width;
    for (int64_t j = 0; j < count; ++j)
      row[i + j] = x[j] < dropout.threshold ? T(0) : row[i + j] * static_cast<T>(dropout.scale);
  }
}

// The sums over Count rows of what add(r, x_i, sum) adds to them. A row's result does not depend on
// Count.
template <class T, class M, int Count, class Add>
inline void row_sums(const M* const (&x)[Count], int64_t n, Add add, double (&total)[Count]) {
  constexpr int width = lanes<T>;
  for (int r = 0; r < Count; ++r) total[r] = 0;
  for (int64_t begin = 0; begin < n; begin += block<T>) {
    const int64_t end = begin + block<T> < n ? begin + block<T> : n;
    V<T> even[Count] = {}, odd[Count] = {};
    int64_t i = begin;
    for (; i + 2 * width <= end; i += 2 * width)
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        V<T> first, second;
        load_two(x[r] + i, first, second);
        even[r] = add(r, first, even[r]);
        odd[r] = add(r, second, odd[r]);
      }
    for (; i < end; i += width)
      for (int r = 0; r < Count; ++r) {
        const V<T> more = add(r, load_some<T>(x[r] + i, end - i), V<T>{});
        even[r] += keep_first<T>(more, end - i);
      }
    for (int r = 0; r < Count; ++r) total[r] += horizontal_sum<T>(even[r] + odd[r]);
  }
}

#if defined(__AVX512BF16__)
// The sums over Count rows of their elements and of their squares, two elements a lane at once. The
// instruction takes what is below the smallest normal number, 1.2e-38, for zero. A row's result
// does not depend on Count.
template <int Count>
inline void row_sums_of_pairs(const bf16* const (&x)[Count], int64_t n, double (&sum)[Count],
                              double (&squares)[Count]) {
  constexpr int width = 2 * lanes<float>;
  const auto add = [](F32x& total, __m512i a, __m512i b) {
    total = bit_cast<F32x>(
        _mm512_dpbf16_ps(bit_cast<__m512>(total), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  };
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  for (int r = 0; r < Count; ++r) sum[r] = squares[r] = 0;
  for (int64_t begin = 0; begin < n; begin += block<float>) {
    const int64_t end = begin + block<float> < n ? begin + block<float> : n;
    F32x sums[Count][2] = {}, products[Count][2] = {};
    int64_t i = begin;
    for (; i + 2 * width <= end; i += 2 * width)
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i v = _mm512_loadu_si512(x[r] + i + half * width);
          add(sums[r][half], v, ones);
          add(products[r][half], v, v);
        }
    for (; i < end; i += width) {
      const int64_t left = end - i;
      const __mmask32 mask = left < width ? (1u << left) - 1 : ~0u;
      for (int r = 0; r < Count; ++r) {
        const __m512i v = _mm512_maskz_loadu_epi16(mask, x[r] + i);
        add(sums[r][0], v, ones);
        add(products[r][0], v, v);
      }
    }
    for (int r = 0; r < Count; ++r) {
      sum[r] += horizontal_sum<float>(sums[r][0] + sums[r][1]);
      squares[r] += horizontal_sum<float>(products[r][0] + products[r][1]);
    }
  }
}
#endif

// Writes value(i, read) into a row, asking for the memory that follows on the way; read loads a
// vector at i, of which the last may be part. An aligned row can be streamed past the cache.
template <class T, class M, class Value, class Next>
inline void write_values(M* y, int64_t n, bool past_cache, Value value, Next next) {
  constexpr int width = lanes<T>;
  const auto whole = [](const auto* p) { return load(p); };
  int64_t i = 0;
  if (past_cache && reinterpret_cast<uintptr_t>(y) % (sizeof(M) * width) == 0) {
    for (; i + width <= n; i += width) {
      stream(y + i, value(i, whole));
      next(i);
    }
  } else {
    for (; i + width <= n; i += width) {
      store(y + i, value(i, whole));
      next(i);
    }
  }
  if (i < n)
    store_some<T>(y + i, value(i, [n, i](const auto* p) { return load_some<T>(p, n - i); }), n - i);
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
