// The problem a softmax kernel solves, on any device.
//
//   softmax         y = exp(x - max) / sum(exp(x - max))
//   log_softmax     y = x - max - log(sum(exp(x - max)))
//   masked_softmax  softmax of scale * x + mask over the columns that take part; 0 in the others,
//   and
//                   everywhere in a row without any
//
// Statistics and all arithmetic are fp32 (fp64 where the input is fp64).
#pragma once

#include "types.h"

namespace fastseq {

// A mask broadcast over rows by strides (in elements): row r has the indices
// (r / (size[0] * size[1]), r / size[1] % size[0], r % size[1]).
struct RowMask {
  const void* data = nullptr;  // null: absent
  bool boolean = false;        // one byte an element, not 0: takes part; else added to scale * x
  DType dtype = DType::f32;    // of an additive one
  int64_t size[2] = {1, 1};
  int64_t stride[3] = {0, 0, 0};
  int64_t stride_column = 1;  // 0: one element for a whole row
};

// Row r sees the columns up to r % queries + offset.
struct Causal {
  int64_t queries = 0;  // 0: not causal
  int64_t offset = 0;
};

struct SoftmaxForward {
  // outer * inner vectors of length elements each. With inner = 1 they are rows of Rows; else they
  // are columns, and Rows has outer * length rows of inner elements. On a CPU a task is a row, or
  // so many columns that lie side by side.
  int64_t outer = 0, length = 0, inner = 1, columns = 1;
  bool log = false;
  Rows input, output;
  bool masked = false;  // with inner = 1 only
  double scale = 1;     // with masked only, like all below
  RowMask mask;
  Causal causal;
  bool past_cache = false;  // the output is larger than the cache: store without keeping (CPU)
};

//   softmax      grad_input = scale * y * (grad - sum(grad * y)); with masked, what is 0 in y takes
//   no
//                part, whatever its gradient
//   log_softmax  grad_input = grad - exp(y) * sum(grad)
struct SoftmaxBackward {
  int64_t outer = 0, length = 0, inner = 1, columns = 1;
  bool log = false, masked = false;
  double scale = 1;
  Rows grad_output, output, grad_input;
  bool past_cache = false;
};

}  // namespace fastseq
