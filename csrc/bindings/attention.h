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

// geometry goes on: row_offset, row_pitch, first_n, first_g, first_i, first_key, queries.
ScorePiece piece_of(const Tensor& scores, const ScoreTerms& terms,
                    const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(scores.dim() == 4 && scores.is_contiguous() && geometry.size() == 12,
                  "a piece of scores is contiguous [key heads, group, queries, keys]");
  ScorePiece piece;
  piece.terms = terms;
  piece.terms.row_offset = geometry[5];
  piece.terms.row_pitch = geometry[6];
  piece.count_n = scores.size(0);
  piece.count_g = scores.size(1);
  piece.count_i = scores.size(2);
  piece.keys = scores.size(3);
  piece.first_n = geometry[7];
  piece.first_g = geometry[8];
  piece.first_i = geometry[9];
  piece.first_key = geometry[10];
  piece.queries = geometry[11];
  piece.scores = static_cast<float*>(scores.data_ptr());
  return piece;
}

void attention_forward_rows_cpu(Tensor scores, Tensor probabilities, Tensor lse,
                                std::optional<Tensor> bias, std::optional<Tensor> mask,
                                std::optional<Tensor> slopes, std::optional<Tensor> sinks,
                                std::optional<Tensor> seed, double scale, double softcap,
                                int64_t threshold, double keep_scale,
                                std::vector<int64_t> geometry) {
  ScorePiece piece = piece_of(
      scores,
      terms_of(bias, mask, slopes, sinks, seed, scale, softcap, threshold, keep_scale, geometry),
      geometry);
  piece.probabilities = {probabilities.data_ptr(), dtype_of(probabilities)};
  piece.lse = static_cast<float*>(lse.data_ptr());
  const AttentionCpu& kernels = *instruction_set().attention;
  parallel(piece.count_n * piece.count_g * piece.count_i, grain(piece.keys + 1),
           [&](int64_t begin, int64_t end) { kernels.forward_rows(piece, begin, end); });
}

void attention_backward_rows_cpu(Tensor scores, Tensor grad, Tensor probabilities,
                                 Tensor grad_scores, Tensor lse, std::optional<Tensor> grad_lse,
                                 std::optional<Tensor> delta, bool whole,
                                 std::optional<Tensor> bias, std::optional<Tensor> mask,
                                 std::optional<Tensor> slopes, std::optional<Tensor> seed,
                                 double scale, double softcap, int64_t threshold, double keep_scale,
                                 std::vector<int64_t> geometry) {
  ScorePiece piece = piece_of(scores,
                              terms_of(bias, mask, slopes, std::nullopt, seed, scale, softcap,
                                       threshold, keep_scale, geometry),
                              geometry);
  piece.probabilities = {probabilities.data_ptr(), dtype_of(probabilities)};
  piece.grad = static_cast<float*>(grad.data_ptr());
  piece.grad_scores = {grad_scores.data_ptr(), dtype_of(grad_scores)};
  piece.lse = static_cast<float*>(lse.data_ptr());
  if (grad_lse) piece.grad_lse = static_cast<const float*>(grad_lse->data_ptr());
  if (delta) piece.delta = static_cast<const float*>(delta->data_ptr());
  piece.whole = whole;
  const AttentionCpu& kernels = *instruction_set().attention;
  parallel(piece.count_n * piece.count_g * piece.count_i, grain(piece.keys + 1),
           [&](int64_t begin, int64_t end) { kernels.backward_rows(piece, begin, end); });
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
