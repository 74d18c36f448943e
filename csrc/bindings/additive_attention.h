// The ops of additive attention: workspace allocated, the problem filled in, stages launched.
#pragma once

#include "../cpu/instruction_set.h"
#include "common.h"

namespace fastseq {
namespace {

// query and key are [batch, length, hidden] as rows_of takes them; weight is fp32 and contiguous.
struct AdditiveAttentionCall {
  AdditiveAttentionCall(const Tensor& query, const Tensor& key, const Tensor& weight)
      : kernels(*instruction_set().additive_attention) {
    problem.batch = query.size(0);
    problem.queries = query.size(1);
    problem.keys = key.size(1);
    problem.hidden = query.size(2);
    problem.panel = kernels.panel;
    problem.query = rows_of(query, problem.hidden);
    problem.key = rows_of(key, problem.hidden);
    problem.weight = static_cast<const float*>(weight.data_ptr());
    problem.coarse = query.element_size() == 2;
    direct = empty({problem.batch}, ScalarType::Byte, query);
    query_factors =
        empty({problem.batch, problem.queries, problem.hidden}, ScalarType::Float, query);
    key_factors = empty({problem.batch, problem.panels(), problem.hidden, problem.panel},
                        ScalarType::Float, query);
    problem.direct = static_cast<unsigned char*>(direct.data_ptr());
    problem.query_factors = static_cast<float*>(query_factors.data_ptr());
    problem.key_factors = static_cast<float*>(key_factors.data_ptr());
    stage(kernels.prepare_queries, problem.batch, problem.queries + problem.keys);
    stage(kernels.prepare_keys, problem.batch * problem.panels(), problem.panel);
  }

  // Hands out tasks of so many channels' worth of rows each.
  template <class Kernel>
  void stage(Kernel kernel, int64_t tasks, int64_t rows) const {
    parallel(tasks, grain(rows * problem.hidden),
             [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  }

  const AdditiveAttentionCpu& kernels;
  AdditiveAttention problem;
  Tensor direct, query_factors, key_factors;
};

int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

Tensor additive_attention_scores_cpu(Tensor query, Tensor key, Tensor weight) {
  AdditiveAttentionCall call(query, key, weight);
  AdditiveAttention& problem = call.problem;
  const Tensor scores =
      empty({problem.batch, problem.queries, problem.keys}, ScalarType::Float, query);
  problem.scores = static_cast<float*>(scores.data_ptr());
  call.stage(call.kernels.scores, problem.batch * blocks_of(problem.queries, kAdditiveQueries),
             kAdditiveQueries * problem.keys);
  return scores;
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_gradients_cpu(Tensor grad_scores,
                                                                    Tensor query, Tensor key,
                                                                    Tensor weight) {
  AdditiveAttentionCall call(query, key, weight);
  AdditiveAttention& problem = call.problem;
  const int64_t batch = problem.batch, queries = problem.queries, hidden = problem.hidden;
  const auto fp32 = [&](const std::vector<int64_t>& sizes) {
    return empty(sizes, ScalarType::Float, query);
  };
  const int64_t panels = problem.panels();
  const Tensor grad_panels = fp32({batch, panels, queries, problem.panel});
  const Tensor grad_key_panels = fp32({batch, panels, hidden, problem.panel});
  const Tensor grad_query = fp32({batch, queries, hidden});
  const Tensor grad_key = fp32({batch, problem.keys, hidden});
  const Tensor grad_weight = fp32({batch, hidden});
  problem.grad_scores = static_cast<const float*>(grad_scores.data_ptr());
  problem.grad_panels = static_cast<float*>(grad_panels.data_ptr());
  problem.grad_key_panels = static_cast<float*>(grad_key_panels.data_ptr());
  problem.grad_query = static_cast<float*>(grad_query.data_ptr());
  problem.grad_key = static_cast<float*>(grad_key.data_ptr());
  problem.grad_weight = static_cast<float*>(grad_weight.data_ptr());
  const AdditiveAttentionCpu& kernels = call.kernels;
  call.stage(kernels.prepare_gradients, batch * panels, 1);
  call.stage(kernels.gradients, batch * blocks_of(hidden, kAdditiveChannels), queries * panels);
  call.stage(kernels.finish_keys, batch * panels, problem.panel);
  return {grad_query, grad_key, grad_weight};
}

}  // namespace
}  // namespace fastseq
