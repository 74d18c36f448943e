// Exponential, logarithm and maximum of vectors. Included by files that are compiled once per
// instruction set; see vec.h for what that forbids.
#pragma once

#include "vec.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// maskz with all lanes: GCC 12 warns of its own headers' plain forms.

// The larger of each lane; x where either is NaN.
inline F32x maximum(F32x bound, F32x x) {
#if defined(__AVX512F__)
  return bit_cast<F32x>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(bound), bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<F32x>(_mm256_max_ps(bit_cast<__m256>(bound), bit_cast<__m256>(x)));
#else
  return bound > x ? bound : x;
#endif
}
inline F64x maximum(F64x bound, F64x x) { return bound > x ? bound : x; }

// The smaller of each lane; x where either is NaN.
inline F32x minimum(F32x bound, F32x x) {
#if defined(__AVX512F__)
  return bit_cast<F32x>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(bound), bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<F32x>(_mm256_min_ps(bit_cast<__m256>(bound), bit_cast<__m256>(x)));
#else
  return bound < x ? bound : x;
#endif
}
inline F64x minimum(F64x bound, F64x x) { return bound < x ? bound : x; }

template <class T, int Bytes>
struct HalvingMaximum {
  typedef T Whole __attribute__((vector_size(Bytes)));
  typedef T Half __attribute__((vector_size(Bytes / 2)));
  static T of(Whole v) {
    Half half[2];
    std::memcpy(half, &v, sizeof(v));
    return HalvingMaximum<T, Bytes / 2>::of(half[0] > half[1] ? half[0] : half[1]);
  }
};
template <class T>
struct HalvingMaximum<T, sizeof(T)> {
  typedef T Whole __attribute__((vector_size(sizeof(T))));
  static T of(Whole v) { return v[0]; }
};

// The maximum of all lanes. With a NaN among them it is any of them.
template <class T>
inline T horizontal_maximum(typename Simd<T>::V v) {
  return HalvingMaximum<T, FASTSEQ_VECTOR_BYTES>::of(v);
}

// power * 2^n for e^x, where shifted has n in its low bits. Without AVX-512 it is 0 below e^-87.3.
inline F32x times_two_to([[maybe_unused]] F32x n, [[maybe_unused]] F32x shifted, F32x power,
                         [[maybe_unused]] F32x x) {
#if defined(__AVX512F__)
  return bit_cast<F32x>(
      _mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(power), bit_cast<__m512>(n)));
#else
  const F32x scale = bit_cast<F32x>((bit_cast<U32x>(shifted) << 23) + 0x3f800000u);
  return x < -87.3f ? F32x{} : power * scale;
#endif
}

// e^x by e^x = 2^n * e^r with n = round(x / ln 2) and |r| <= ln(2) / 2, where
// e^r = 1 + r + r^2 q(r). Adding 1.5 * 2^23 rounds x / ln 2 to n and leaves n in the low bits. ln 2
// is taken off in two parts, the first of so few digits that n times it is exact.
//
// Within 1 ulp, 1.25 without FMA (tests/test_softmax.py goes through most floats of a binade). -Inf
// gives 0, +Inf gives +Inf, NaN gives NaN. Without AVX-512 it is 0 below e^-87.3, near the smallest
// normal number, and Inf above e^88.37 already.
inline F32x exp(F32x x) {
  const F32x magic = splat(0x1.8p23f);
  // Past these bounds the result is 0 or Inf whatever x.
  x = minimum(splat(89.0f), maximum(splat(-104.0f), x));
  const F32x shifted = fma(x, splat(0x1.715476p0f), magic);
  const F32x n = shifted - magic;
  const F32x r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  // Chebyshev's fit of (e^r - 1 - r) / r^2: 7e-8 off at most, of a term that is below 0.12.
  F32x q = fma(r, splat(0x1.6d1606p-10f), splat(0x1.12106cp-7f));
  q = fma(q, r, splat(0x1.555516p-5f));
  q = fma(q, r, splat(0x1.5554d8p-3f));
  q = fma(q, r, splat(0.5f));
  const F32x power = fma(fma(q, r, splat(1.0f)), r, splat(1.0f));
  return times_two_to(n, shifted, power, x);
}

// 2^f for |f| <= 1/2: a fit that is 1 at 0 and 9.3e-8 off at most.
inline F32x two_to(F32x f) {
  F32x power = fma(f, splat(0x1.5bda4p-10f), splat(0x1.3ce8acp-7f));
  power = fma(power, f, splat(0x1.c6b6d8p-5f));
  power = fma(power, f, splat(0x1.ebf9c2p-3f));
  power = fma(power, f, splat(0x1.62e42ap-1f));
  return fma(power, f, splat(1.0f));
}

// As exp, for x <= 0 and a little above (to 88), within 2.25 ulp: e^x = 2^n * 2^f with
// n = round(x / ln 2) and |f| <= 1/2, a fifth of the operations fewer. x / ln 2 - n is exact but
// for what 1 / ln 2 has beyond a float, which is added.
inline F32x exp_nonpositive(F32x x) {
#if defined(__AVX2__)
  const F32x magic = splat(0x1.8p23f);
  x = maximum(splat(-104.0f), x);
  const F32x shifted = fma(x, splat(0x1.715476p0f), magic);
  const F32x n = shifted - magic;
  const F32x f = fma(x, splat(0x1.4ae0cp-26f), fma(x, splat(0x1.715476p0f), -n));
  return times_two_to(n, shifted, two_to(f), x);
#else
  return exp(x);  // without FMA x / ln 2 - n would not be exact
#endif
}

// 2^t within 2^-16 of the result, for -126 <= t < 128; below it is 0 or as small, above 2^127 at
// least. 2^floor(t) * 2^f, 0 <= f <= 1, and a fit of 2^f that is 1 at 0: half the operations where
// one instruction takes f out of t and another the floor.
inline F32x two_to_coarse(F32x t) {
#if defined(__AVX512DQ__)
  const F32x f = bit_cast<F32x>(_mm512_maskz_reduce_ps(0xffff, bit_cast<__m512>(t), 0x09));
  const F32x shifted = {};
#else
  const F32x magic = splat(0x1.8p23f);
  t = minimum(splat(127.0f), maximum(splat(-150.0f), t));
  const F32x shifted = (t - 0.5f) + magic;
  const F32x f = t - (shifted - magic);
#endif
  F32x power = fma(f, splat(0x1.b7f73ap-7f), splat(0x1.abf864p-5f));
  power = fma(power, f, splat(0x1.ee2452p-3f));
  power = fma(power, f, splat(0x1.62d6c6p-1f));
  power = fma(power, f, splat(1.0f));
  // The instruction takes the floor of t itself.
  return times_two_to(t, shifted, power, t * 0x1.62e43p-1f);
}

// As exp, within 2^-16 of the result, for -87 <= x <= 0 and results that are rounded to 16 bits.
inline F32x exp_coarse(F32x x) { return two_to_coarse(x * 0x1.715476p0f); }

// e^x / 2^n with a whole n, for |x| up to 1000 where the result is in reach (far below that it is
// 0, above 2^126 at least, whatever x), as near as exp_nonpositive and exp_coarse come. A softmax
// whose 2^n is of the order of its largest e^x needs no exact maximum, and no difference to it,
// which would be rounded.
#if defined(__AVX2__)
constexpr bool kScaled = true;

template <bool Coarse>
inline F32x exp_scaled(F32x x, F32x n) {
  if constexpr (Coarse) return two_to_coarse(fma(x, splat(0x1.715476p0f), -n));
  const F32x magic = splat(0x1.8p23f);
  // Beyond 2^128 the exponent would run into the sign, and what is not near n is no remainder.
  x = minimum((n + 127.0f) * 0x1.62e43p-1f, maximum((n - 150.0f) * 0x1.62e43p-1f, x));
  const F32x shifted = fma(x, splat(0x1.715476p0f), magic);
  const F32x whole = shifted - magic;
  const F32x f = fma(x, splat(0x1.4ae0cp-26f), fma(x, splat(0x1.715476p0f), -whole));
  const F32x left = whole - n;
  return times_two_to(left, shifted - n, two_to(f), left * 0x1.62e43p-1f);
}
#else
constexpr bool kScaled = false;  // without FMA x / ln 2 - n would not be exact

template <bool Coarse>
inline F32x exp_scaled(F32x x, F32x) {
  return x;
}
#endif

// As for floats, with the Taylor series to the 13th power: 4e-18 off at most. 0 below 1e-307.
inline F64x exp(F64x x) {
  typedef uint64_t U64x __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  const F64x magic = splat(0x1.8p52);
  x = minimum(splat(710.0), maximum(splat(-746.0), x));
  const F64x shifted = fma(x, splat(0x1.71547652b82fep0), magic);
  const F64x n = shifted - magic;
  const F64x r = fma(n, splat(-0x1.a39ef35793c76p-33), fma(n, splat(-0x1.62e42fee00000p-1), x));
  F64x power = splat(1.0 / 6227020800.0);
  const double coefficients[] = {1.0 / 479001600.0,
                                 1.0 / 39916800.0,
                                 1.0 / 3628800.0,
                                 1.0 / 362880.0,
                                 1.0 / 40320.0,
                                 1.0 / 5040.0,
                                 1.0 / 720.0,
                                 1.0 / 120.0,
                                 1.0 / 24.0,
                                 1.0 / 6.0,
                                 0.5,
                                 1.0,
                                 1.0};
  for (const double coefficient : coefficients) power = fma(power, r, splat(coefficient));
  const F64x scale = bit_cast<F64x>((bit_cast<U64x>(shifted) << 52) + 0x3ff0000000000000u);
  return x < -706.0 ? F64x{} : power * scale;
}

inline F64x exp_nonpositive(F64x x) { return exp(x); }

// log(x) of normal x > 0 (NaN of NaN), as e * ln 2 + log(m) with m between sqrt(1/2) and sqrt(2):
// log(m) = 2 (f + f^3/3 + f^5/5 + ...) with f = (m - 1) / (m + 1), |f| <= 0.172. Made for the sums
// of log_softmax, which are not below 1.
template <class T>
inline typename Simd<T>::V log(typename Simd<T>::V x) {
  using V = typename Simd<T>::V;
  using Integers = typename Simd<T>::Mask;
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;  // the next is below 1e-9, 1e-18 of the first
  using Integer = decltype(Integers{}[0] + 0);
  // sqrt(1/2): what is below it in the mantissa belongs to the exponent before.
  constexpr Integer root = sizeof(T) == 4 ? Integer(0x3f3504f3) : Integer(0x3fe6a09e667f3bcd);
  const Integers bits = bit_cast<Integers>(x) - root;
  const Integers exponent = bits >> mantissa;
  const V m = bit_cast<V>(bit_cast<Integers>(x) - (exponent << mantissa));
  const V e = __builtin_convertvector(exponent, V);
  const V f = (m - T(1)) / (m + T(1));
  const V square = f * f;
  V series = splat(T(1) / T(2 * terms - 1));
  for (int k = terms - 2; k >= 0; --k) series = fma(series, square, splat(T(1) / T(2 * k + 1)));
  const V result = fma(e, splat(T(0.69314718055994530942)), T(2) * f * series);
  return x == x ? result : x;
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
