// Hyperbolic tangent of vectors. Included by files that are compiled once per instruction set; see
// vec.h for what that forbids.
#pragma once

#include "exp.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// tanh |x| = m / (m + 2) with m = e^2|x| - 1 = 2^n p + (2^n - 1), where 2|x| = n ln 2 + r,
// |r| <= ln(2) / 2, and p = e^r - 1 = r + r^2 q(r), q as in exp. Where n is 0, m is p: nothing
// cancels, and small x keep all their digits.
//
// Within 2 ulp, 2.3 where there is no fused multiply-add (tests/test_additive_attention.py goes
// through every float of a few binades). -0 gives -0, NaN gives NaN.
inline F32x tanh(F32x x) {
  const float magic = 0x1.8p23f;
  const U32x sign = bit_cast<U32x>(x) & 0x80000000u;
  const F32x size = bit_cast<F32x>(bit_cast<U32x>(x) & 0x7fffffffu);
  // From 9.02 on the result rounds to 1.
  const F32x twice = minimum(splat(9.02f), size) * 2.0f;
  const F32x shifted = fma(twice, splat(0x1.715476p0f), splat(magic));
  const F32x n = shifted - magic;
  const F32x r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), twice));
  F32x q = fma(r, splat(0x1.6d1606p-10f), splat(0x1.12106cp-7f));
  q = fma(q, r, splat(0x1.555516p-5f));
  q = fma(q, r, splat(0x1.5554d8p-3f));
  q = fma(q, r, splat(0.5f));
  const F32x p = fma(r * r, q, r);
  const F32x power = bit_cast<F32x>((bit_cast<U32x>(shifted) << 23) + 0x3f800000u);
  const F32x m = fma(power, p, power - 1.0f);
  // m / (m + 2), corrected by what m + 2 and the quotient lost by rounding.
  const F32x d = m + 2.0f;
  const F32x lost = m - (d - 2.0f);
  const F32x inverse = 1.0f / d;
  const F32x quotient = m * inverse;
  const F32x rest = fma(-quotient, lost, fma(-quotient, d, m));
  return bit_cast<F32x>(bit_cast<U32x>(fma(rest, inverse, quotient)) | sign);
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
