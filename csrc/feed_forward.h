// What stands between the two products of a feed-forward block, on any device.
//
//   z      = hidden + bias
//   output = dropout(act(z))             SwiGLU: dropout(silu(z1) * z2), z = (z1, z2)
//
//   grad_z = dropout(grad) * act'(z)     and the output again, for the gradient of the second
//   weight
//
// The backward of ReLU reads its output in place of hidden: what is 0 there has no gradient, be it
// dropped or negative. Arithmetic is fp32.
#pragma once

#include "types.h"

namespace fastseq {

enum class Activation : int { relu, gelu, gelu_tanh, silu, swiglu };

struct FeedForwardForward {
  int64_t rows = 0, size = 0;  // a row of the output; one of hidden is twice as long for SwiGLU
  Activation activation = Activation::relu;
  Rows hidden, output;
  Vector bias;  // as long as a row of hidden
  Dropout dropout;
  bool past_cache = false;  // the output is larger than the cache: store without keeping (CPU)
};

struct FeedForwardBackward {
  int64_t rows = 0, size = 0;
  Activation activation = Activation::relu;
  Rows grad, hidden;  // of ReLU the output in the place of hidden
  Vector bias;
  Dropout dropout;           // of ReLU the scale alone
  Rows grad_hidden, output;  // either may be absent
  Vector grad_bias;          // may be absent
  // Sums for grad_bias over so many ranges of rows, each as long as a row of hidden (CPU).
  int64_t partial_rows = 0;
  float* partials = nullptr;
  bool past_cache = false;
};

}  // namespace fastseq
