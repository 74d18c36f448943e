// The ops of the attention family: the problem filled in, a kernel launched.
#pragma once

#include "../attention.h"
#include "../cpu/instruction_set.h"
#include "common.h"

namespace fastseq {
namespace {

// A view [batch, heads, queries, keys], broadcast by strides.
Plane plane_of(const std::optional<Tensor>& tensor) {
  Plane plane;
  if (!tensor) return plane;
  STD_TORCH_CHECK(tensor->dim() == 4, "a bias or mask comes as a view of four dimensions");
  plane.data = tensor->data_ptr();
  if (tensor->scalar_type() != ScalarType::Bool) plane.dtype = dtype_of(*tensor);
  for (int i = 0; i < 4; ++i) plane.stride[i] = tensor->stride(i);
  return plane;
}

// geometry: heads, group, shift, left, right.
ScoreTerms terms_of(const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                    const std::optional<Tensor>& slopes, const std::optional<Tensor>& sinks,
                    const std::optional<Tensor>& seed, double scale, double softcap,
                    int64_t threshold, double keep_scale, const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(geometry.size() >= 5, "geometry has too few numbers");
  ScoreTerms terms;
  terms.scale = scale;
  terms.softcap = softcap;
  terms.bias = plane_of(bias);
  terms.mask = plane_of(mask);
  if (slopes) terms.slopes = static_cast<const float*>(slopes->data_ptr());
  if (sinks) terms.sinks = static_cast<const float*>(sinks->data_ptr());
  terms.dropout = dropout_of(seed, threshold, keep_scale);
  terms.heads = geometry[0];
  terms.group = geometry[1];
  terms.shift = geometry[2];
  terms.left = geometry[3];
  terms.right = geometry[4];
  return terms;
}

HeadRows head_rows_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(3) == 1 || tensor.stride(3) == 1,
                  "attention kernels take rows whose elements lie side by side");
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

Statistic statistic_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(2) == 1 || tensor.stride(2) == 1,
                  "attention kernels take the numbers of a head's queries side by side");
  return {static_cast<float*>(tensor.data_ptr()), {tensor.stride(0), tensor.stride(1)}};
}

// geometry goes on: row_offset, row_pitch.
Attention attention_of(const Tensor& query, const Tensor& key, const Tensor& value,
                       const Tensor& output, const Tensor& lse, const ScoreTerms& terms,
                       const std::vector<int64_t>& geometry, int32_t* finite) {
  STD_TORCH_CHECK(geometry.size() == 7, "geometry has too few numbers");
  Attention problem;
  problem.terms = terms;
  problem.terms.row_offset = geometry[5];
  problem.terms.row_pitch = geometry[6];
  problem.batch = query.size(0);
  problem.queries = query.size(2);
  problem.keys = key.size(2);
  problem.head_dim = query.size(3);
  problem.value_dim = value.size(3);
  problem.dtype = dtype_of(query);
  problem.query = head_rows_of(query);
  problem.key = head_rows_of(key);
  problem.value = head_rows_of(value);
  problem.output = head_rows_of(output);
  problem.lse = statistic_of(lse);
  problem.finite = finite;
  return problem;
}

// Tasks that are worth a thread, of so many multiplications each.
int64_t task_grain(int64_t products) { return 1 + (1 << 20) / (products + 1); }

// Fills output and lse; returned is whether all of output is finite.
bool attention_forward_cpu(Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse,
                           std::optional<Tensor> bias, std::optional<Tensor> mask,
                           std::optional<Tensor> slopes, std::optional<Tensor> sinks,
                           std::optional<Tensor> seed, double scale, double softcap,
                           int64_t threshold, double keep_scale, std::vector<int64_t> geometry) {
  int32_t finite = 1;
  const Attention problem = attention_of(
      query, key, value, output, lse,
      terms_of(bias, mask, slopes, sinks, seed, scale, softcap, threshold, keep_scale, geometry),
      geometry, &finite);
  const AttentionCpu& kernels = *instruction_set().attention;
  const int64_t queries = problem.queries,
                parts = (queries + kernels.task_queries - 1) / kernels.task_queries;
  const int64_t each = queries < kernels.task_queries ? queries : kernels.task_queries;
  parallel(problem.batch * problem.terms.heads * parts,
           task_grain(each * problem.keys * (problem.head_dim + problem.value_dim)),
           [&](int64_t begin, int64_t end) { kernels.forward(problem, begin, end); });
  return finite != 0;
}

// Fills the gradients and adds to that of the bias; returned is whether the first three are finite.
bool attention_backward_cpu(Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse,
                            Tensor grad_output, std::optional<Tensor> grad_lse,
                            std::optional<Tensor> delta, bool whole, Tensor grad_query,
                            Tensor grad_key, Tensor grad_value, std::optional<Tensor> grad_bias,
                            std::optional<Tensor> bias, std::optional<Tensor> mask,
                            std::optional<Tensor> slopes, std::optional<Tensor> seed, double scale,
                            double softcap, int64_t threshold, double keep_scale,
                            std::vector<int64_t> geometry) {
  int32_t finite = 1;
  Attention problem = attention_of(query, key, value, output, lse,
                                   terms_of(bias, mask, slopes, std::nullopt, seed, scale, softcap,
                                            threshold, keep_scale, geometry),
                                   geometry, &finite);
  problem.grad_output = head_rows_of(grad_output);
  problem.grad_query = head_rows_of(grad_query);
  problem.grad_key = head_rows_of(grad_key);
  problem.grad_value = head_rows_of(grad_value);
  const AttentionCpu& kernels = *instruction_set().attention;
  const int64_t heads = problem.terms.heads, keys = problem.keys, queries = problem.queries;
  const int64_t rows = problem.batch * heads * queries;
  const int64_t products = queries * (3 * problem.head_dim + 2 * problem.value_dim);
  if (grad_lse) problem.grad_lse = statistic_of(*grad_lse);
  std::optional<Tensor> deltas = delta;
  if (delta) {
    problem.delta = statistic_of(*delta);
  } else if (keys > kernels.tile_keys) {
    deltas = empty({problem.batch, heads, queries}, ScalarType::Float, query);
    problem.delta = statistic_of(*deltas);
    parallel(rows, grain(problem.value_dim + 1),
             [&](int64_t begin, int64_t end) { kernels.delta(problem, begin, end); });
  }
  problem.whole = whole;
  // As many as give every thread something where heads are few; each needs memory.
  problem.splits = keys <= 2 * kernels.tile_keys ? 1 : keys <= 4 * kernels.tile_keys ? 2 : 4;
  if (grad_bias) {
    problem.grad_bias = static_cast<float*>(grad_bias->data_ptr());
    for (int i = 0; i < 4; ++i)
      problem.grad_bias_stride[i] = grad_bias->size(i) == 1 ? 0 : grad_bias->stride(i);
    STD_TORCH_CHECK(problem.grad_bias_stride[3] <= 1,
                    "rows of grad_bias have their elements apart");
    problem.over_batch = grad_bias->size(0) == 1;
    problem.over_heads = grad_bias->size(1) == 1;
    if (problem.grad_bias_stride[3] == 0) problem.splits = 1;  // all keys add to one number
  }
  problem.pitch = kernels.pitch(problem.head_dim);
  const Tensor partial = empty({problem.splits, rows, problem.pitch}, ScalarType::Float, query);
  problem.partial = static_cast<float*>(partial.data_ptr());
  const int64_t outer =
      (problem.over_batch ? 1 : problem.batch) * (problem.over_heads ? 1 : problem.key_heads());
  parallel(outer * problem.splits,
           task_grain(problem.terms.group * products * keys / problem.splits),
           [&](int64_t begin, int64_t end) { kernels.backward(problem, begin, end); });
  parallel(rows, grain(problem.splits * problem.pitch + 1),
           [&](int64_t begin, int64_t end) { kernels.grad_query(problem, begin, end); });
  return finite != 0;
}

// query [B, H, Lq, D], key [B, Hk, Lk, D], value [B, Hk, Lk, Dv], the last dimension contiguous.
std::tuple<Tensor, Tensor> attention_decode_cpu(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::optional<Tensor> slopes, std::optional<Tensor> sinks, std::optional<Tensor> key_lengths,
    double scale, double softcap, int64_t left, int64_t right, bool bottom_right, int64_t split) {
  Decode problem;
  problem.batch = query.size(0);
  problem.queries = query.size(2);
  problem.keys = key.size(2);
  problem.head_dim = query.size(3);
  problem.value_dim = value.size(3);
  const int64_t heads = query.size(1), key_heads = key.size(1);
  problem.bottom_right = bottom_right;
  const int64_t shift = bottom_right ? problem.keys - problem.queries : 0;
  problem.terms = terms_of(bias, mask, slopes, sinks, std::nullopt, scale, softcap, 0, 1.0,
                           {heads, heads / key_heads, shift, left, right});
  if (key_lengths) problem.key_lengths = static_cast<const int64_t*>(key_lengths->data_ptr());
  problem.dtype = dtype_of(query);
  problem.query = query.data_ptr();
  problem.key = key.data_ptr();
  problem.value = value.data_ptr();
  for (int i = 0; i < 3; ++i) {
    problem.query_stride[i] = query.stride(i);
    problem.key_stride[i] = key.stride(i);
    problem.value_stride[i] = value.stride(i);
  }
  problem.split = split;
  const Tensor output =
      empty({problem.batch, heads, problem.queries, problem.value_dim}, query.scalar_type(), query);
  const Tensor lse = empty({problem.batch, heads, problem.queries}, ScalarType::Float, query);
  const int64_t tasks = problem.batch * key_heads * problem.splits();
  const int64_t rows = heads / key_heads * problem.queries;
  const Tensor partial = empty({tasks, rows, problem.value_dim + 2}, ScalarType::Float, query);
  problem.partial = static_cast<float*>(partial.data_ptr());
  problem.output = output.data_ptr();
  problem.lse = static_cast<float*>(lse.data_ptr());
  const AttentionCpu& kernels = *instruction_set().attention;
  parallel(tasks, grain(split * problem.head_dim),
           [&](int64_t begin, int64_t end) { kernels.decode(problem, begin, end); });
  parallel(problem.batch * key_heads, grain(problem.splits() * rows * problem.value_dim),
           [&](int64_t begin, int64_t end) { kernels.merge(problem, begin, end); });
  return {output, lse};
}

}  // namespace
}  // namespace fastseq
