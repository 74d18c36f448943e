// The ops between the products of a feed-forward block: outputs allocated, a problem filled in, a
// kernel launched.
#pragma once

#include "../cpu/instruction_set.h"
#include "common.h"

namespace fastseq {
namespace {

// How many rows of hidden are as long as one of the output.
int64_t parts_of(int64_t activation) {
  return activation == static_cast<int64_t>(Activation::swiglu) ? 2 : 1;
}

std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = sizes_of(tensor);
  sizes.back() = last;
  return sizes;
}

// hidden and the gradient are contiguous, or views [outer, inner, row_length] of their rows.
Tensor feed_forward_forward_cpu(Tensor hidden, std::optional<Tensor> bias,
                                std::optional<Tensor> seed, int64_t activation, int64_t threshold,
                                double scale) {
  const int64_t length = hidden.size(hidden.dim() - 1), size = length / parts_of(activation);
  const Tensor output = empty(sizes_with_last(hidden, size), hidden.scalar_type(), hidden);
  FeedForwardForward problem;
  problem.rows = hidden.numel() / length;
  problem.size = size;
  problem.activation = static_cast<Activation>(activation);
  problem.hidden = rows_of(hidden, length);
  problem.output = rows_of(output, size);
  problem.bias = vector_of(bias);
  problem.dropout = dropout_of(seed, threshold, scale);
  problem.past_cache = past_cache(output);
  const FeedForwardCpu& kernels = *instruction_set().feed_forward;
  parallel(problem.rows, grain(length),
           [&](int64_t begin, int64_t end) { kernels.forward(problem, begin, end); });
  return output;
}

// wanted: 1 for hidden's gradient, 2 for the output, 4 for the bias's gradient; the others come
// back empty.
std::tuple<Tensor, Tensor, Tensor> feed_forward_backward_cpu(Tensor grad, Tensor hidden,
                                                             std::optional<Tensor> bias,
                                                             std::optional<Tensor> seed,
                                                             int64_t activation, int64_t threshold,
                                                             double scale, int64_t wanted) {
  const int64_t length = hidden.size(hidden.dim() - 1), size = length / parts_of(activation);
  STD_TORCH_CHECK(grad.scalar_type() == hidden.scalar_type(),
                  "feed_forward: grad must have hidden's dtype");
  const std::vector<int64_t> none{0};
  const auto allocate = [&](int64_t bit, const std::vector<int64_t>& sizes) {
    return empty(wanted & bit ? sizes : none, hidden.scalar_type(), hidden);
  };
  const Tensor grad_hidden = allocate(1, sizes_of(hidden));
  const Tensor output = allocate(2, sizes_with_last(hidden, size));
  const Tensor grad_bias = allocate(4, {length});
  FeedForwardBackward problem;
  problem.rows = hidden.numel() / length;
  problem.size = size;
  problem.activation = static_cast<Activation>(activation);
  problem.grad = rows_of(grad, size);
  problem.hidden = rows_of(hidden, length);
  problem.bias = vector_of(bias);
  problem.dropout = dropout_of(seed, threshold, scale);
  problem.grad_hidden = rows_of(grad_hidden, length);
  problem.output = rows_of(output, size);
  problem.grad_bias = vector_of(grad_bias);
  problem.past_cache = past_cache(hidden);
  problem.partial_rows = feed_forward_partial_rows(problem.rows);
  std::optional<Tensor> partials;
  if (wanted & 4) {
    partials = empty({problem.partial_rows, length}, ScalarType::Float, hidden);
    problem.partials = static_cast<float*>(partials->data_ptr());
  }
  const FeedForwardCpu& kernels = *instruction_set().feed_forward;
  const int64_t rows_each = problem.rows / problem.partial_rows + 1;
  parallel(problem.partial_rows, 1 + grain(length) / rows_each,
           [&](int64_t begin, int64_t end) { kernels.backward(problem, begin, end); });
  if (partials)
    parallel(length, 1 + 32768 / problem.partial_rows,
             [&](int64_t begin, int64_t end) { kernels.finish(problem, begin, end); });
  return {grad_hidden, output, grad_bias};
}

}  // namespace
}  // namespace fastseq
