// From stable-ABI tensors to the plain structs that kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "layer_norm.h"

namespace fastseq {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, "fastseq kernels take fp32, fp16, bf16 and fp64 tensors");
  }
}

// A contiguous tensor as numel / row_length rows, or a [outer, inner, row_length] view by its strides.
// An empty tensor is an absent one.
inline Rows rows_of(const Tensor& tensor, int64_t row_length) {
  Rows rows;
  if (tensor.numel() == 0) return rows;
  rows.data = tensor.data_ptr();
  rows.dtype = dtype_of(tensor);
  if (tensor.is_contiguous()) {
    rows.inner = tensor.numel() / row_length;
    rows.stride_inner = row_length;
    return rows;
  }
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(2) == row_length &&
                      (row_length == 1 || tensor.stride(2) == 1),
                  "rows must be contiguous, or a view [outer, inner, row_length]");
  rows.inner = tensor.size(1);
  rows.stride_outer = tensor.stride(0);
  rows.stride_inner = tensor.stride(1);
  return rows;
}

inline Rows rows_of(const std::optional<Tensor>& tensor, int64_t row_length) {
  return tensor ? rows_of(*tensor, row_length) : Rows{};
}

inline Vector vector_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  return {tensor.data_ptr(), dtype_of(tensor)};
}

inline Vector vector_of(const std::optional<Tensor>& tensor) {
  return tensor ? vector_of(*tensor) : Vector{};
}

}  // namespace fastseq
