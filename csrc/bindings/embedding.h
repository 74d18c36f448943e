// The ops of the embedding: outputs allocated, the problem filled in, the kernels launched.
#pragma once

#include "../cpu/instruction_set.h"
#include "common.h"

namespace fastseq {
namespace {

EmbeddingKeys embedding_keys(const std::optional<Tensor>& keys, int64_t offset, int64_t length) {
  if (!keys) return {nullptr, length, offset};
  return {static_cast<const int64_t*>(keys->data_ptr()), keys->numel(), 0};
}

// The first row that reads no row of the table, or -1. Before any kernel: these read by the keys.
int64_t first_bad_key(const EmbeddingTable& table) {
  for (int64_t i = 0; i < table.keys.count; ++i) {
    const int64_t key = table.keys.of(i);
    if (key < 0 || key >= table.rows) return i;
  }
  return -1;
}

// Tables are contiguous, [*, size] of one dtype; ids has a key for every row of the output,
// positions and segments for every row or for the rows of one sequence, as many as length; all
// contiguous. Returns the output; the table, 0, 1 or 2, with a key that is out of its range (or
// -1); and where in the keys it is. Then nothing was computed.
std::tuple<Tensor, int64_t, int64_t> embedding_forward_cpu(
    Tensor token, Tensor position, std::optional<Tensor> segment, Tensor ids,
    std::optional<Tensor> positions, std::optional<Tensor> segments, int64_t offset, int64_t length,
    double scale, std::optional<Tensor> seed, int64_t threshold, double keep_scale) {
  EmbeddingForward problem;
  problem.rows = ids.numel();
  problem.size = token.size(1);
  problem.token = {token.data_ptr(), token.size(0), embedding_keys(ids, 0, length)};
  problem.position = {position.data_ptr(), position.size(0),
                      embedding_keys(positions, offset, length)};
  if (segment)
    problem.segment = {segment->data_ptr(), segment->size(0), embedding_keys(segments, 0, length)};
  std::vector<int64_t> sizes = sizes_of(ids);
  sizes.push_back(problem.size);
  const Tensor output = empty(sizes, token.scalar_type(), token);
  int64_t number = 0;
  for (const EmbeddingTable* table : {&problem.token, &problem.position, &problem.segment}) {
    if (number == 2 && !segment) break;
    const int64_t bad = first_bad_key(*table);
    if (bad >= 0) return {output, number, bad};
    ++number;
  }
  problem.scale = scale;
  problem.dropout = dropout_of(seed, threshold, keep_scale);
  problem.output = rows_of(output, problem.size);
  problem.past_cache = past_cache(output);
  const EmbeddingCpu& kernels = *instruction_set().embedding;
  parallel(problem.rows, grain(problem.size),
           [&](int64_t begin, int64_t end) { kernels.forward(problem, begin, end); });
  return {output, -1, -1};
}

// The gradient of a table [rows, size]; skip is a key whose row gets none, or -1. grad is
// contiguous, or a view [outer, inner, size] of its rows.
Tensor embedding_backward_cpu(Tensor grad, std::optional<Tensor> keys, int64_t offset,
                              int64_t length, int64_t rows, int64_t skip, double scale,
                              std::optional<Tensor> seed, int64_t threshold, double keep_scale) {
  EmbeddingBackward problem;
  problem.rows = rows;
  problem.size = grad.size(grad.dim() - 1);
  problem.grad = rows_of(grad, problem.size);
  problem.scale = scale;
  problem.dropout = dropout_of(seed, threshold, keep_scale);
  const Tensor output = empty({rows, problem.size}, grad.scalar_type(), grad);
  problem.output = rows_of(output, problem.size);
  problem.past_cache = past_cache(output);
  const int64_t read = grad.numel() / problem.size;
  const EmbeddingKeys of = embedding_keys(keys, offset, length);
  std::vector<int64_t> head(static_cast<size_t>(rows), -1), next(static_cast<size_t>(read));
  for (int64_t row = read; row-- > 0;) {
    const int64_t key = of.of(row);
    STD_TORCH_CHECK(key >= 0 && key < rows, "embedding: ids were changed after forward");
    if (key == skip) continue;
    next[static_cast<size_t>(row)] = head[static_cast<size_t>(key)];
    head[static_cast<size_t>(key)] = row;
  }
  problem.head = head.data();
  problem.next = next.data();
  const EmbeddingCpu& kernels = *instruction_set().embedding;
  parallel(rows, grain(problem.size),
           [&](int64_t begin, int64_t end) { kernels.backward(problem, begin, end); });
  return output;
}

}  // namespace
}  // namespace fastseq
