// The problem a layer-norm kernel solves, on any device.
//
//   x      = residual + dropout(input)        (x = input where there is no residual)
//   output = (x - mean) * rstd * weight + bias
//   rstd   = 1 / sqrt(variance + eps);  with rms the mean is not subtracted and
//   rstd   = 1 / sqrt(mean(x^2) + eps)
//
// Statistics and all arithmetic are fp32 (fp64 where the input is fp64).
#pragma once

#include "types.h"

namespace fastseq {

struct LayerNormForward {
  int64_t rows = 0, row_length = 0;
  Rows input, residual;
  Vector weight, bias;
  Dropout dropout;
  double eps = 0;
  bool rms = false;
  Rows output,
      new_residual;         // new_residual only with residual; output normalises its rounded values
  Vector mean, rstd;        // [rows], fp32 or fp64; mean absent with rms
  bool past_cache = false;  // the output is larger than the cache: store without keeping (CPU)
};

struct LayerNormBackward {
  int64_t rows = 0, row_length = 0;
  Rows grad_output, grad_new_residual;  // grad_new_residual may be absent
  Rows x;                               // the input, or the new residual
  Vector weight, mean, rstd;
  Dropout dropout;
  bool rms = false;
  Rows grad_x;      // gradient of x, thus of the residual; may be absent
  Rows grad_input;  // gradient of the input where it differs from grad_x (dropout, dtype); may be
                    // absent
  Vector grad_weight;        // [row_length]; may be absent
  Vector grad_bias;          // [row_length]; may be absent
  void* partials = nullptr;  // scratch of the accumulation type: [2, partial_rows, row_length]
  int64_t partial_rows = 0;
  bool past_cache = false;  // as in forward, for grad_x
};

}  // namespace fastseq
