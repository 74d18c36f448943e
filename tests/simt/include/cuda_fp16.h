// float16 as in CUDA's header of this name: rounding to nearest even, one NaN.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16;
  const unsigned exponent = value.bits >> 10 & 0x1fu;
  const unsigned mantissa = value.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned short sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
  if (std::isnan(value)) return {0x7fff};
  const float magnitude = std::fabs(value);
  if (magnitude == 0) return {sign};
  // Halfway between the largest float16 and what would come next rounds to infinity.
  if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00u)};
  int exponent;
  std::frexp(magnitude, &exponent);
  // In units of the last place, which for subnormals is 2^-24; nearbyint rounds to even.
  const int unit = std::max(exponent - 11, -24);
  const unsigned units = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // A carry out of the mantissa runs into the exponent, which is what is wanted.
  const unsigned magnitude_bits = (static_cast<unsigned>(unit + 24) << 10) + units;
  return {static_cast<unsigned short>(sign | magnitude_bits)};
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
