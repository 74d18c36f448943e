// Hyperbolic tangent and logistic function of vectors. Included by files that are compiled once per
// instruction set; see vec.h for what that forbids.
#pragma once

#include "exp.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// 1 / (1 + e^-x), as e^x / (1 + e^x) below 0. The exponential is within 1 ulp, sum and quotient
// round once each: within 2 ulp, and 2.5 where the result falls to just below a power of two, whose
// ulp is half that of e^x (fp32: 2.41 found in [-88, 12], AVX-512). NaN gives NaN.
template <class V>
inline V sigmoid(V x) {
  const V e = exp(x < 0 ? x : -x);
  return (x < 0 ? e : e * 0 + 1) / (1 + e);
}

// Coefficients of q, from the highest.
constexpr double kTanh4[] = {0x1.2c83c001d2709p-9,  -0x1.116a168e18e77p-7, 0x1.64a9766b3a952p-6,
                             -0x1.ba08c4e66a3c8p-5, 0x1.1110e919f7ad3p-3,  -0x1.55555539a3fddp-2};
constexpr double kTanh8[] = {0x1.b33642a122cddp-18,  -0x1.05bbdae896297p-15, 0x1.8445870f6fe41p-14,
                             -0x1.f243823c8c981p-13, 0x1.3526e9ed54da1p-11,  -0x1.7d9f6f23e8682p-10,
                             0x1.d6d39ae3905e2p-9,   -0x1.226e3473dce5cp-7,  0x1.664f487e0a749p-6,
                             -0x1.ba1ba1ba0f126p-5,  0x1.11111111110a8p-3,   -0x1.5555555555555p-2};

// Within 2 ulp (fp32: 1.36 found; tests/test_recurrent.py goes through it) and the sign of x. Below
// 0.625 it is x + x^3 q(x^2) with Chebyshev's fit q, 6e-10 of the result off at most (fp64: 2e-18);
// above, where the quotient is below 0.45 and its error an ulp of the result at most, 1 - 2 /
// (e^2|x| + 1).
template <class T>
inline typename Simd<T>::V tanh_of(typename Simd<T>::V x) {
  using V = typename Simd<T>::V;
  using Mask = typename Simd<T>::Mask;
  constexpr int degree = sizeof(T) == 4 ? 5 : 11;
  const auto fit = [](int k) { return sizeof(T) == 4 ? kTanh4[k] : kTanh8[k]; };
  const V square = x * x;
  V q = splat(static_cast<T>(fit(0)));
  for (int k = 1; k <= degree; ++k) q = fma(q, square, splat(static_cast<T>(fit(k))));
  const V low = fma(x * square, q, x);
  const V size = x < 0 ? -x : x;
  const V high = 1 - 2 / (exp(2 * size) + 1);
  const Mask is_low = size < T(0.625);
  return is_low ? low : x < 0 ? -high : high;
}

inline F32x tanh(F32x x) { return tanh_of<float>(x); }
inline F64x tanh(F64x x) { return tanh_of<double>(x); }

// What csrc/math/gates.h asks for. In this namespace, so that its templates are another function
// for every instruction set.
struct VectorMath {
  template <class V>
  static V tanh(V x) {
    return FASTSEQ_ISA::tanh(x);
  }
  template <class V>
  static V sigmoid(V x) {
    return FASTSEQ_ISA::sigmoid(x);
  }
};

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
