// Hyperbolic tangent and logistic function on the device, for csrc/math/gates.h.
#pragma once

#include "launch.cuh"

#define FASTSEQ_HOST_DEVICE __device__ __forceinline__
#include "../math/gates.h"

namespace fastseq::recurrent {

// kExact: exponential and quotient of fp32's precision, within 2 ulp; else the hardware's
// approximations, of some 2^-21 relative to the larger of the result and its argument's rounding:
// far below half an ulp of a 16-bit result.
template <bool kExact>
struct DeviceMath {
  static __device__ __forceinline__ float exp(float x) { return kExact ? expf(x) : __expf(x); }
  static __device__ __forceinline__ float quotient(float a, float b) {
    return kExact ? a / b : __fdividef(a, b);
  }

  static __device__ __forceinline__ float sigmoid(float x) {
    // __fdividef gives 0 for a divisor above 2^126, and so it should.
    return quotient(1.0f, 1.0f + exp(-x));
  }

  // x + x^3 q(x^2) below 0.625, the fit of csrc/cpu/tanh.h; a quotient above.
  static __device__ __forceinline__ float tanh(float x) {
    const float square = x * x;
    float q = fmaf(0.002292744816178142f, square, -0.008343945515839152f);
    q = fmaf(q, square, 0.02176891865102821f);
    q = fmaf(q, square, -0.05395925957720454f);
    q = fmaf(q, square, 0.1333330355691574f);
    q = fmaf(q, square, -0.3333333317214036f);
    const float low = fmaf(x * square, q, x);
    const float size = fabsf(x);
    const float high = 1.0f - quotient(2.0f, exp(2.0f * size) + 1.0f);
    return size < 0.625f ? low : copysignf(high, x);
  }
};

}  // namespace fastseq::recurrent
