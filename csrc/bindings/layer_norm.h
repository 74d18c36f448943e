// The ops of the layer_norm family: outputs allocated, the problem filled in, a kernel launched.
#pragma once

#include "../cpu/instruction_set.h"
#include "common.h"

#ifdef FASTSEQ_CUDA
#include "../cuda/layer_norm.h"
#endif

namespace fastseq {
namespace {

using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Allocates what the op returns, fills in the problem, and has launch solve it: the same for the
// CPU and CUDA. Outputs are laid out as the fake in fastseq/ops/layer_norm.py says.
template <class Launch>
Tensors4 layer_norm_forward(const Tensor& input, const std::optional<Tensor>& residual,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& seed, int64_t row_length, double eps,
                            bool rms, int64_t threshold, double scale, ScalarType output_dtype,
                            ScalarType residual_dtype, Launch launch) {
  const std::vector<int64_t> sizes = sizes_of(input);
  const ScalarType statistics = statistics_type(input);
  LayerNormForward problem;
  problem.rows = input.numel() / row_length;
  const Tensor output = empty(sizes, output_dtype, input);
  const Tensor new_residual =
      empty(residual ? sizes : std::vector<int64_t>{0}, residual_dtype, input);
  const Tensor mean = empty({rms ? 0 : problem.rows}, statistics, input);
  const Tensor rstd = empty({problem.rows}, statistics, input);

  problem.row_length = row_length;
  problem.input = rows_of(input, row_length);
  problem.residual = rows_of(residual, row_length);
  problem.weight = vector_of(weight);
  problem.bias = vector_of(bias);
  problem.dropout = dropout_of(seed, threshold, scale);
  problem.eps = eps;
  problem.rms = rms;
  problem.output = rows_of(output, row_length);
  problem.new_residual = rows_of(new_residual, row_length);
  problem.mean = vector_of(mean);
  problem.rstd = vector_of(rstd);
  problem.past_cache = past_cache(output);
  if (problem.rows > 0) launch(problem);
  return {output, new_residual, mean, rstd};
}

enum Wanted : int64_t { kGradX = 1, kGradInput = 2, kGradWeight = 4, kGradBias = 8 };

template <class Launch>
Tensors4 layer_norm_backward(const Tensor& grad_output,
                             const std::optional<Tensor>& grad_new_residual, const Tensor& x,
                             const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                             const Tensor& mean, const Tensor& rstd,
                             const std::optional<Tensor>& seed, int64_t row_length,
                             int64_t threshold, double scale, ScalarType input_dtype,
                             int64_t wanted, Launch launch) {
  const std::vector<int64_t> none{0};
  const std::vector<int64_t> sizes = sizes_of(x);
  const auto parameter = [&](const std::optional<Tensor>& like, bool want) {
    return like && want ? empty(sizes_of(*like), like->scalar_type(), x)
                        : empty(none, x.scalar_type(), x);
  };
  const Tensor grad_x = empty(wanted & kGradX ? sizes : none, x.scalar_type(), x);
  const Tensor grad_input = empty(wanted & kGradInput ? sizes : none, input_dtype, x);
  const Tensor grad_weight = parameter(weight, wanted & kGradWeight);
  const Tensor grad_bias = parameter(bias, wanted & kGradBias);

  LayerNormBackward problem;
  problem.rows = rstd.numel();
  problem.row_length = row_length;
  problem.grad_output = rows_of(grad_output, row_length);
  problem.grad_new_residual = rows_of(grad_new_residual, row_length);
  problem.x = rows_of(x, row_length);
  problem.weight = vector_of(weight);
  problem.mean = vector_of(mean);
  problem.rstd = vector_of(rstd);
  problem.dropout = dropout_of(seed, threshold, scale);
  problem.rms = mean.numel() == 0;
  problem.grad_x = rows_of(grad_x, row_length);
  problem.grad_input = rows_of(grad_input, row_length);
  problem.grad_weight = vector_of(grad_weight);
  problem.grad_bias = vector_of(grad_bias);
  problem.past_cache = past_cache(grad_x);
  launch(problem);
  return {grad_x, grad_input, grad_weight, grad_bias};
}

Tensors4 layer_norm_forward_cpu(Tensor input, std::optional<Tensor> residual,
                                std::optional<Tensor> weight, std::optional<Tensor> bias,
                                std::optional<Tensor> seed, int64_t row_length, double eps,
                                bool rms, int64_t threshold, double scale, ScalarType output_dtype,
                                ScalarType residual_dtype) {
  return layer_norm_forward(
      input, residual, weight, bias, seed, row_length, eps, rms, threshold, scale, output_dtype,
      residual_dtype, [&](const LayerNormForward& problem) {
        const LayerNormCpu& kernels = *instruction_set().layer_norm;
        parallel(problem.rows, grain(row_length),
                 [&](int64_t begin, int64_t end) { kernels.forward(problem, begin, end); });
      });
}

Tensors4 layer_norm_backward_cpu(Tensor grad_output, std::optional<Tensor> grad_new_residual,
                                 Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                 Tensor mean, Tensor rstd, std::optional<Tensor> seed,
                                 int64_t row_length, int64_t threshold, double scale,
                                 ScalarType input_dtype, int64_t wanted) {
  return layer_norm_backward(
      grad_output, grad_new_residual, x, weight, bias, mean, rstd, seed, row_length, threshold,
      scale, input_dtype, wanted, [&](LayerNormBackward& problem) {
        const LayerNormCpu& kernels = *instruction_set().layer_norm;
        problem.partial_rows = layer_norm_partial_rows(problem.rows);
        const Tensor partials = empty({2, problem.partial_rows, row_length}, statistics_type(x), x);
        problem.partials = partials.data_ptr();
        const int64_t rows_each = problem.rows / problem.partial_rows + 1;
        parallel(problem.partial_rows, 1 + grain(row_length) / rows_each,
                 [&](int64_t begin, int64_t end) { kernels.backward(problem, begin, end); });
        parallel(row_length, 1 + 32768 / problem.partial_rows,
                 [&](int64_t begin, int64_t end) { kernels.finish(problem, begin, end); });
      });
}

#ifdef FASTSEQ_CUDA

Tensors4 layer_norm_forward_cuda_op(Tensor input, std::optional<Tensor> residual,
                                    std::optional<Tensor> weight, std::optional<Tensor> bias,
                                    std::optional<Tensor> seed, int64_t row_length, double eps,
                                    bool rms, int64_t threshold, double scale,
                                    ScalarType output_dtype, ScalarType residual_dtype) {
  const CudaCall call(input);
  return layer_norm_forward(
      input, residual, weight, bias, seed, row_length, eps, rms, threshold, scale, output_dtype,
      residual_dtype, [&](const LayerNormForward& problem) {
        call.check("layer_norm", layer_norm_forward_cuda(problem, call.stream));
      });
}

Tensors4 layer_norm_backward_cuda_op(Tensor grad_output, std::optional<Tensor> grad_new_residual,
                                     Tensor x, std::optional<Tensor> weight,
                                     std::optional<Tensor> bias, Tensor mean, Tensor rstd,
                                     std::optional<Tensor> seed, int64_t row_length,
                                     int64_t threshold, double scale, ScalarType input_dtype,
                                     int64_t wanted) {
  const CudaCall call(x);
  return layer_norm_backward(
      grad_output, grad_new_residual, x, weight, bias, mean, rstd, seed, row_length, threshold,
      scale, input_dtype, wanted, [&](LayerNormBackward& problem) {
        problem.partial_rows = layer_norm_partial_rows_cuda(problem.rows, row_length,
                                                            multiprocessor_count_cuda(call.device));
        // Freed to torch's allocator on return: it hands the memory to later work of this stream.
        const Tensor partials = empty({2, problem.partial_rows, row_length}, ScalarType::Float, x);
        problem.partials = partials.data_ptr();
        call.check("layer_norm backward", layer_norm_backward_cuda(problem, call.stream));
      });
}

#endif

}  // namespace
}  // namespace fastseq
