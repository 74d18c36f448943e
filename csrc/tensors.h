// From stable-ABI tensors to the plain structs that kernels take.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "types.h"

namespace fastseq {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, "fastseq kernels take fp32, fp16, bf16 and fp64 tensors");
  }
}

// An uninitialised contiguous tensor on the device of another.
inline Tensor empty(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype,
                    const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  const auto device = like.device();
  AtenTensorHandle handle;
  // The shim directly: the dispatcher's way to aten::empty costs a microsecond more.
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())),
      device.index(), &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes(static_cast<size_t>(tensor.dim()));
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = tensor.size(static_cast<int64_t>(i));
  return sizes;
}

// A contiguous tensor as numel / row_length rows, or a [outer, inner, row_length] view by its
// strides. An empty tensor is an absent one.
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
