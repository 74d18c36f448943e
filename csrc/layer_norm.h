// What a layer-norm kernel is given on any device: plain pointers, sizes and strides (in elements).
//
//   x      = residual + dropout(input)        (x = input where there is no residual)
//   output = (x - mean) * rstd * weight + bias
//   rstd   = 1 / sqrt(variance + eps);  with rms the mean is not subtracted and
//   rstd   = 1 / sqrt(mean(x^2) + eps)
//
// Statistics and all arithmetic are fp32 (fp64 where the input is fp64).
#pragma once

#include <cstdint>

namespace fastseq {

enum class DType : int { f32, f16, bf16, f64 };

// Rows of row_length contiguous elements; row r begins at
// data + (r / inner) * stride_outer + (r % inner) * stride_inner.
struct Rows {
  void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
  int64_t inner = 1, stride_outer = 0, stride_inner = 0;
};

struct Vector {
  void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
};

// The row r, column c of the input is dropped where random::bits < threshold, else multiplied by
// scale. seed is read from memory on the device, so that a captured graph draws anew when replayed.
struct Dropout {
  const int64_t* seed = nullptr;  // null: no dropout
  uint32_t threshold = 0;
  float scale = 1;
};

struct LayerNormForward {
  int64_t rows = 0, row_length = 0;
  Rows input, residual;
  Vector weight, bias;
  Dropout dropout;
  double eps = 0;
  bool rms = false;
  Rows output, new_residual;  // new_residual only with residual; output normalises its rounded values
  Vector mean, rstd;          // [rows], fp32 or fp64; mean absent with rms
  bool past_cache = false;    // the output is larger than the cache: store without keeping (CPU)
};

struct LayerNormBackward {
  int64_t rows = 0, row_length = 0;
  Rows grad_output, grad_new_residual;  // grad_new_residual may be absent
  Rows x;                               // the input, or the new residual
  Vector weight, mean, rstd;
  Dropout dropout;
  bool rms = false;
  Rows grad_x;         // gradient of x, thus of the residual; may be absent
  Rows grad_input;     // gradient of the input where it differs from grad_x (dropout, dtype); may be absent
  Vector grad_weight;  // [row_length]; may be absent
  Vector grad_bias;    // [row_length]; may be absent
  void* partials = nullptr;  // scratch of the accumulation type: [2, partial_rows, row_length]
  int64_t partial_rows = 0;
  bool past_cache = false;  // as in forward, for grad_x
};

}  // namespace fastseq
