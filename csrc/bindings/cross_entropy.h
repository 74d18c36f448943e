// The ops of the cross_entropy family: outputs allocated, the problem filled in, kernels run.
#pragma once

#include "../cpu/instruction_set.h"
#include "common.h"

namespace fastseq {
namespace {

double weight_sum_of(const std::optional<Tensor>& weight, int64_t classes, double smoothing) {
  if (!weight || smoothing == 0) return static_cast<double>(classes);
  return instruction_set().cross_entropy->weight_sum(vector_of(*weight), classes);
}

void fill_cross_entropy(CrossEntropy& problem, const Tensor& logits, const Tensor& target,
                        const std::optional<Tensor>& weight, const Tensor& maximum,
                        const Tensor& log_sum, int64_t ignore_index, double smoothing,
                        double softcap, double z_loss) {
  problem.rows = target.numel();
  problem.classes = logits.size(logits.dim() - 1);
  problem.logits = rows_of(logits, problem.classes);
  problem.target = static_cast<const int64_t*>(target.data_ptr());
  problem.weight = vector_of(weight);
  problem.weight_sum = weight_sum_of(weight, problem.classes, smoothing);
  problem.ignore_index = ignore_index;
  problem.smoothing = smoothing;
  problem.softcap = softcap;
  problem.z_loss = z_loss;
  problem.maximum = vector_of(maximum);
  problem.log_sum = vector_of(log_sum);
}

// The first row whose target is no class, or -1. Before any kernel: these index by the target.
int64_t first_bad_target(const CrossEntropy& problem) {
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t target = problem.target[row];
    if (target != problem.ignore_index && (target < 0 || target >= problem.classes)) return row;
  }
  return -1;
}

// Returns loss, maximum, log_sum, denominator (empty unless kMean) and the first row with a target
// out of range: then nothing was computed.
std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> cross_entropy_forward_cpu(
    Tensor logits, Tensor target, std::optional<Tensor> weight, int64_t ignore_index,
    int64_t reduction, double smoothing, double softcap, double z_loss, bool every_lse,
    ScalarType loss_dtype) {
  const int64_t rows = target.numel();
  const ScalarType statistics = statistics_type(logits);
  const Tensor maximum = empty({rows}, statistics, logits);
  const Tensor log_sum = empty({rows}, statistics, logits);
  const Tensor loss = empty(
      reduction == kNone ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, loss_dtype, logits);
  const Tensor denominator = empty(
      reduction == kMean ? std::vector<int64_t>{} : std::vector<int64_t>{0}, statistics, logits);
  CrossEntropyForward problem;
  fill_cross_entropy(problem, logits, target, weight, maximum, log_sum, ignore_index, smoothing,
                     softcap, z_loss);
  const int64_t bad = first_bad_target(problem);
  if (bad >= 0) return {loss, maximum, log_sum, denominator, bad};
  problem.reduction = reduction;
  problem.every_lse = every_lse;
  problem.loss = vector_of(loss);
  problem.denominator = vector_of(denominator);
  std::vector<double> scratch(static_cast<size_t>(2 * rows));
  problem.row_losses = scratch.data();
  problem.row_weights = scratch.data() + rows;

  const CrossEntropyCpu& kernels = *instruction_set().cross_entropy;
  parallel(rows, grain(problem.classes),
           [&](int64_t begin, int64_t end) { kernels.forward(problem, begin, end); });
  kernels.reduce(problem);
  return {loss, maximum, log_sum, denominator, -1};
}

Tensor cross_entropy_backward_cpu(Tensor grad_loss, std::optional<Tensor> grad_lse, Tensor logits,
                                  Tensor target, std::optional<Tensor> weight, Tensor maximum,
                                  Tensor log_sum, Tensor denominator, int64_t ignore_index,
                                  double smoothing, double softcap, double z_loss) {
  const Tensor grad_logits = empty(sizes_of(logits), logits.scalar_type(), logits);
  CrossEntropyBackward problem;
  fill_cross_entropy(problem, logits, target, weight, maximum, log_sum, ignore_index, smoothing,
                     softcap, z_loss);
  STD_TORCH_CHECK(first_bad_target(problem) < 0, "cross_entropy: target was changed after forward");
  problem.grad_loss = vector_of(grad_loss);
  problem.grad_loss_stride = grad_loss.numel() == 1 ? 0 : 1;
  problem.grad_lse = vector_of(grad_lse);
  problem.denominator = vector_of(denominator);
  problem.grad_logits = rows_of(grad_logits, problem.classes);
  problem.past_cache = past_cache(grad_logits);
  const CrossEntropyCpu& kernels = *instruction_set().cross_entropy;
  parallel(problem.rows, grain(problem.classes),
           [&](int64_t begin, int64_t end) { kernels.backward(problem, begin, end); });
  return grad_logits;
}

Tensor sample_cpu(Tensor logits, Tensor seed, int64_t first_row, double temperature) {
  Sample problem;
  problem.classes = logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(problem.classes > 0 && problem.classes < int64_t(1) << 31,
                  "sample: logits must have 1 to 2^31 - 1 classes");
  problem.rows = logits.numel() / problem.classes;
  const Tensor tokens = empty({problem.rows}, ScalarType::Long, logits);
  problem.logits = rows_of(logits, problem.classes);
  problem.seed = static_cast<const int64_t*>(seed.data_ptr());
  problem.first_row = first_row;
  problem.temperature = temperature;
  problem.tokens = static_cast<int64_t*>(tokens.data_ptr());
  const CrossEntropyCpu& kernels = *instruction_set().cross_entropy;
  parallel(problem.rows, grain(problem.classes),
           [&](int64_t begin, int64_t end) { kernels.sample(problem, begin, end); });
  return tokens;
}

}  // namespace
}  // namespace fastseq
