// The problem that the CPU kernels of additive attention solve for a block of queries.
//
//   scores      s[i, j] = sum over h of weight[h] * tanh(query[i, h] + key[j, h])
//   gradients   of query, key and weight from the gradient of the scores
//
// The softmax over the scores and the products with the values are other kernels'.
#pragma once

#include "types.h"

namespace fastseq {

// All of it fp32, but for query and key as they come. What is indexed by a key lies in panels of so
// many keys as the kernels take at a time: [batch, panels, hidden or queries, panel], 0 past the
// last key.
struct AdditiveAttention {
  int64_t batch = 0, queries = 0, keys = 0, hidden = 0, panel = 0;
  Rows query, key;  // [batch, queries, hidden], [batch, keys, hidden]
  const float* weight = nullptr;
  bool coarse = false;  // the numbers come in 16 bits: 2^-14 of a tanh is enough

  // Filled by prepare: which entries of the batch have numbers too large for powers of e, and of
  // each entry either the powers e^2q, e^2k or the numbers themselves.
  unsigned char* direct = nullptr;  // [batch]
  float* query_factors = nullptr;   // [batch, queries, hidden]
  float* key_factors = nullptr;     // [batch, panels, hidden, panel]

  float* scores = nullptr;  // [batch, queries, keys]

  const float* grad_scores = nullptr;  // [batch, queries, keys]
  float* grad_panels = nullptr;        // [batch, panels, queries, panel]: the same, by panels
  float* grad_key_panels = nullptr;    // [batch, panels, hidden, panel]: of the key but for factors
  float* grad_query = nullptr;         // [batch, queries, hidden]
  float* grad_key = nullptr;           // [batch, keys, hidden]
  float* grad_weight = nullptr;        // [batch, hidden]

  int64_t panels() const { return (keys + panel - 1) / panel; }
};

}  // namespace fastseq
