// The op of the rotary embedding: output allocated, the problem filled in, the kernel launched.
#pragma once

#include "../cpu/instruction_set.h"
#include "common.h"

namespace fastseq {
namespace {

// The input is contiguous, or a view [outer, inner, size] of its rows; positions are [batch,
// length] or [1, length], each within the tables (the caller has looked).
Tensor rotary_embedding_cpu(Tensor input, Tensor cos, Tensor sin, std::optional<Tensor> positions,
                            int64_t offset, int64_t length, int64_t entry, bool interleaved,
                            bool inverse) {
  const Tensor output = empty(sizes_of(input), input.scalar_type(), input);
  RotaryEmbedding problem;
  problem.size = input.size(input.dim() - 1);
  problem.rows = input.numel() / problem.size;
  problem.rotated = 2 * cos.size(1);
  problem.length = length;
  problem.entry = entry;
  problem.interleaved = interleaved;
  problem.inverse = inverse;
  problem.input = rows_of(input, problem.size);
  problem.output = rows_of(output, problem.size);
  problem.cos = static_cast<const float*>(cos.data_ptr());
  problem.sin = static_cast<const float*>(sin.data_ptr());
  problem.offset = offset;
  if (positions) {
    problem.positions = static_cast<const int64_t*>(positions->data_ptr());
    problem.positions_stride = positions->size(0) == 1 ? 0 : length;
  }
  const RotaryEmbeddingCpu& kernels = *instruction_set().rotary_embedding;
  parallel(problem.rows, grain(problem.size),
           [&](int64_t begin, int64_t end) { kernels.rotate(problem, begin, end); });
  return output;
}

}  // namespace
}  // namespace fastseq
