// The ops of the softmax family: outputs allocated, the problem filled in, a kernel launched.
#pragma once

#include "../cpu/instruction_set.h"
#include "common.h"

namespace fastseq {
namespace {

// Runs a kernel on all tasks of a problem. Wide tasks read memory best, but every thread wants one.
template <class Problem>
void run_softmax(void (*kernel)(const Problem&, int64_t, int64_t), Problem& problem) {
  if (problem.inner > 1) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t outer = std::max<int64_t>(problem.outer, 1), parts = (threads - 1) / outer + 1;
    const int64_t share = ((problem.inner + parts - 1) / parts + 63) / 64 * 64;
    problem.columns = std::min(instruction_set().softmax->most_columns, share);
  }
  const int64_t columns = problem.columns;
  const int64_t tasks = problem.outer * ((problem.inner + columns - 1) / columns);
  parallel(tasks, grain(problem.length * std::min(problem.inner, columns)),
           [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

// A contiguous tensor, or a view [outer, inner, row_length] as rows_of takes it, where a row is the
// dimension itself (inner = 1) or what comes behind it.
Tensor softmax_forward_cpu(Tensor input, int64_t length, int64_t inner, bool log,
                           ScalarType output_dtype) {
  const Tensor output = empty(sizes_of(input), output_dtype, input);
  SoftmaxForward problem;
  problem.outer = input.numel() / (length * inner);
  problem.length = length;
  problem.inner = inner;
  problem.log = log;
  problem.input = rows_of(input, inner == 1 ? length : inner);
  problem.output = rows_of(output, inner == 1 ? length : inner);
  problem.past_cache = past_cache(output);
  run_softmax(instruction_set().softmax->forward, problem);
  return output;
}

// The mask is a view [*, *, *, length or 1] whose leading dimensions, broadcast by strides, are the
// rows of the input.
RowMask mask_of(const std::optional<Tensor>& mask) {
  RowMask result;
  if (!mask) return result;
  STD_TORCH_CHECK(mask->dim() == 4, "a mask comes as a view of four dimensions");
  result.data = mask->data_ptr();
  result.boolean = mask->scalar_type() == ScalarType::Bool;
  if (!result.boolean) result.dtype = dtype_of(*mask);
  for (int i = 0; i < 2; ++i) result.size[i] = mask->size(i + 1);
  for (int i = 0; i < 3; ++i) result.stride[i] = mask->stride(i);
  result.stride_column = mask->stride(3);
  return result;
}

Tensor masked_softmax_forward_cpu(Tensor input, std::optional<Tensor> mask, int64_t length,
                                  double scale, int64_t queries, int64_t causal_offset,
                                  ScalarType output_dtype) {
  const Tensor output = empty(sizes_of(input), output_dtype, input);
  SoftmaxForward problem;
  problem.outer = input.numel() / length;
  problem.length = length;
  problem.input = rows_of(input, length);
  problem.output = rows_of(output, length);
  problem.masked = true;
  problem.scale = scale;
  problem.mask = mask_of(mask);
  problem.causal = {queries, causal_offset};
  problem.past_cache = past_cache(output);
  run_softmax(instruction_set().softmax->forward, problem);
  return output;
}

Tensor softmax_backward_cpu(Tensor grad_output, Tensor output, int64_t length, int64_t inner,
                            bool log, bool masked, double scale, ScalarType input_dtype) {
  const Tensor grad_input = empty(sizes_of(output), input_dtype, output);
  const int64_t row_length = inner == 1 ? length : inner;
  SoftmaxBackward problem;
  problem.outer = output.numel() / (length * inner);
  problem.length = length;
  problem.inner = inner;
  problem.log = log;
  problem.masked = masked;
  problem.scale = scale;
  problem.grad_output = rows_of(grad_output, row_length);
  problem.output = rows_of(output, row_length);
  problem.grad_input = rows_of(grad_input, row_length);
  problem.past_cache = past_cache(grad_input);
  STD_TORCH_CHECK(problem.grad_output.dtype == problem.output.dtype,
                  "softmax: grad_output must have the output's dtype");
  run_softmax(instruction_set().softmax->backward, problem);
  return grad_input;
}

}  // namespace
}  // namespace fastseq
