// Tensors as kernels see them on any device: plain pointers, sizes and strides (in elements).
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
  double scale = 1;
};

}  // namespace fastseq
