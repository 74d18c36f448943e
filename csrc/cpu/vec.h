// SIMD vectors for the CPU kernels, by the compilers' vector extensions (GCC and Clang).
//
// A kernel file is compiled once for every instruction set in a namespace of that name
// (FASTSEQ_ISA, set by the build) and chosen at run time, so that one wheel runs on any x86-64 and
// on aarch64. These files include nothing with inline code of its own (no standard containers, no
// torch): the linker could otherwise keep the AVX-512 copy of a shared inline function for
// everybody.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTSEQ_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTSEQ_VECTOR_BYTES 32
#else
#define FASTSEQ_VECTOR_BYTES 16
#endif

namespace fastseq::FASTSEQ_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

typedef float F32x __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
typedef double F64x __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
typedef uint32_t U32x __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
typedef int32_t I32x __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
typedef int64_t I64x __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
typedef uint16_t U16x __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2)));

// The vector, its lane masks and its width for a compute type (float or double).
template <class T>
struct Simd;
template <>
struct Simd<float> {
  using V = F32x;
  using Mask = I32x;
  static constexpr int lanes = FASTSEQ_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  using V = F64x;
  using Mask = I64x;
  static constexpr int lanes = FASTSEQ_VECTOR_BYTES / 8;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
inline typename Simd<T>::V splat(T x) {
  return x - typename Simd<T>::V{};
}

// The sum of all lanes by halving: the order is fixed and the error small.
template <class T, int Bytes>
struct Halving {
  typedef T Whole __attribute__((vector_size(Bytes)));
  typedef T Half __attribute__((vector_size(Bytes / 2)));
  static T sum(Whole v) {
    Half half[2];
    std::memcpy(half, &v, sizeof(v));
    return Halving<T, Bytes / 2>::sum(half[0] + half[1]);
  }
};
template <class T>
struct Halving<T, 16> {
  typedef T Whole __attribute__((vector_size(16)));
  static T sum(Whole v) {
    if constexpr (sizeof(T) == 8)
      return v[0] + v[1];
    else
      return (v[0] + v[2]) + (v[1] + v[3]);
  }
};

template <class T>
inline T horizontal_sum(typename Simd<T>::V v) {
  return Halving<T, FASTSEQ_VECTOR_BYTES>::sum(v);
}

// a * b + c, rounded once where the hardware can. Written out, because a compiler left to fuse what
// it likes does so for some rows of a loop and not for others.
inline F32x fma(F32x a, F32x b, F32x c) {
#if defined(__AVX512F__)
  return bit_cast<F32x>(
      _mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__AVX2__)
  return bit_cast<F32x>(
      _mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline F64x fma(F64x a, F64x b, F64x c) {
#if defined(__AVX512F__)
  return bit_cast<F64x>(
      _mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
#elif defined(__AVX2__)
  return bit_cast<F64x>(
      _mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
#else
  return a * b + c;
#endif
}

// ---- single values ------------------------------------------------------------------------------

inline float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest << 13));  // Inf, NaN
  // Scaling by 2^112 turns the half's exponent bias into the float's, subnormals included.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
}

inline bf16 to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline f16 to_f16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to Inf
  if (rest < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa, and the addition rounds to nearest even.
    const float aligned = bit_cast<float>(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

// ---- loads: memory type -> compute vector
// --------------------------------------------------------

inline F64x load(const double* p) {
  F64x v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline F32x load(const float* p) {
  F32x v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline F32x load(const bf16* p) {
  // GCC widens __builtin_convertvector in two halves and joins them: five instructions for one.
#if defined(__AVX512F__)
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast<F32x>(bit_cast<U32x>(_mm512_cvtepu16_epi32(v)) << 16);
#elif defined(__AVX2__)
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<F32x>(bit_cast<U32x>(_mm256_cvtepu16_epi32(v)) << 16);
#else
  U16x v;
  std::memcpy(&v, p, sizeof(v));
  return bit_cast<F32x>(__builtin_convertvector(v, U32x) << 16);
#endif
}

inline F32x load(const f16* p) {
#if defined(__AVX512F__)
  return bit_cast<F32x>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<F32x>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  F32x v;
  for (int i = 0; i < Simd<float>::lanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// The next two vectors in any order of their elements, for sums.
template <class V, class M>
inline void load_two(const M* p, V& first, V& second) {
  first = load(p);
  second = load(p + sizeof(V) / sizeof(first[0]));
}

inline void load_two(const bf16* p, F32x& first, F32x& second) {
  U32x pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  first = bit_cast<F32x>(pairs << 16);
  second = bit_cast<F32x>(pairs & 0xffff0000u);
}

// ---- stores: compute vector -> memory type, rounding to nearest even
// ------------------------------

inline void store(double* p, F64x v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(float* p, F32x v) { std::memcpy(p, &v, sizeof(v)); }

inline void store(bf16* p, F32x v) {
#if defined(__AVX512BF16__)
  // One instruction for nine; it flushes what is below the smallest normal number, 1.2e-38.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(v))));
#else
  const U32x bits = bit_cast<U32x>(v);
  const U32x rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32x quiet = (bits >> 16) | 0x40u;
  const U16x narrow = __builtin_convertvector(v == v ? rounded : quiet, U16x);
  std::memcpy(p, &narrow, sizeof(narrow));
#endif
}

inline void store(f16* p, F32x v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Simd<float>::lanes; ++i) p[i] = to_f16(v[i]);
#endif
}

// ---- stores past the cache
// ------------------------------------------------------------------------

// As store, without reading the line first and without keeping it: for outputs larger than the
// cache. p must be aligned to sizeof(M) * lanes; fence() before others read.
template <class M, class V>
inline void stream(M* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(M) == 2) {
    M narrow[sizeof(V) / 4];
    store(narrow, v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(narrow));
  } else {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(M) == 2) {
    M narrow[sizeof(V) / 4];
    store(narrow, v);
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(narrow));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
  }
#else
  store(p, v);
#endif
}

inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// ---- rows whose length is no multiple of the width
// ------------------------------------------------

#if defined(__AVX512F__)
// Only the first count lanes reach memory; masked instructions do not fault on the others.
inline F32x load_masked(const float* p, uint32_t mask) {
  return bit_cast<F32x>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
}
inline F64x load_masked(const double* p, uint32_t mask) {
  return bit_cast<F64x>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
}
template <class M>
inline F32x load_masked(const M* p, uint32_t mask) {
  M narrow[16];
  const __m256i v = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p);
  std::memcpy(narrow, &v, sizeof(v));
  return load(narrow);
}
inline void store_masked(float* p, F32x v, uint32_t mask) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), bit_cast<__m512>(v));
}
inline void store_masked(double* p, F64x v, uint32_t mask) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), bit_cast<__m512d>(v));
}
template <class M>
inline void store_masked(M* p, F32x v, uint32_t mask) {
  M narrow[16];
  store(narrow, v);
  __m256i bits;
  std::memcpy(&bits, narrow, sizeof(bits));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), bits);
}
#endif

// The first count lanes from memory, zero in the others.
template <class T, class M>
inline typename Simd<T>::V load_some(const M* p, int64_t count) {
  if (count >= Simd<T>::lanes) return load(p);
#if defined(__AVX512F__)
  return load_masked(p, (1u << count) - 1);
#else
  M buffer[Simd<T>::lanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(M));
  return load(buffer);
#endif
}

template <class T, class M>
inline void store_some(M* p, typename Simd<T>::V v, int64_t count) {
  if (count >= Simd<T>::lanes) return store(p, v);
#if defined(__AVX512F__)
  store_masked(p, v, (1u << count) - 1);
#else
  M buffer[Simd<T>::lanes];
  store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(M));
#endif
}

// v in the first count lanes, zero in the others (whatever v holds there, NaN included).
template <class T>
inline typename Simd<T>::V keep_first(typename Simd<T>::V v, int64_t count) {
  using Mask = typename Simd<T>::Mask;
  Mask lane;
  for (int i = 0; i < Simd<T>::lanes; ++i) lane[i] = i;
  using Lane = decltype(lane[0] + 0);
  return lane < static_cast<Lane>(count) ? v : typename Simd<T>::V{};
}

}  // namespace fastseq::FASTSEQ_ISA
