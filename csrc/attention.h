// The problems attention kernels solve, on any device.
//
//   s_ij = cap(scale * q_i . k_j) + bias_ij - slope * |j - i|
//   lse_i = log(e^sink + sum over visible j of e^s_ij)
//   p_ij = e^(s_ij - lse_i), out_i = sum of dropout(p_ij) v_j
//
//   dp_ij = dropout(dout_i . v_j), delta_i = sum of p_ij dp_ij - dlse_i
//   ds_ij = p_ij (dp_ij - delta_i) cap'(.)
//
// with cap(x) = softcap * tanh(x / softcap). Statistics and all arithmetic are fp32.
#pragma once

#include "types.h"

namespace fastseq {

// A tensor [batch, heads, queries, keys] broadcast by strides (in elements).
struct Plane {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::f32;    // of a bias; a mask has a byte an element, not 0: visible
  int64_t stride[4] = {0, 0, 0, 0};
};

// What becomes of products of queries and keys.
struct ScoreTerms {
  double scale = 1, softcap = 0;  // 0: none
  Plane bias, mask;
  const float* slopes = nullptr;  // [batch, heads]
  const float* sinks = nullptr;   // [heads]
  int64_t heads = 1, group = 1;   // query heads, and of them for one key head
  // Query i stands beside key i + shift, and sees from left before it to right behind; -1: no
  // bound.
  int64_t shift = 0, left = -1, right = -1;
  Dropout dropout;
  // The dropout row of query i of head h of batch b: row_offset + (b * heads + h) * row_pitch + i.
  int64_t row_offset = 0, row_pitch = 0;
};

// Rows of elements side by side, [batch, heads, length].
struct HeadRows {
  void* data = nullptr;
  int64_t stride[3] = {0, 0, 0};
};

// A number for each query, [batch, heads, queries], the queries side by side.
struct Statistic {
  float* data = nullptr;  // null: absent
  int64_t stride[2] = {0, 0};
};

// Many queries and keys. Backward the keys may be some of those that lse is of: delta is of all.
// Where they are all and in one tile, delta comes from the row itself (absent), which is nearer the
// truth where one key has nearly all the weight.
struct Attention {
  ScoreTerms terms;
  int64_t batch = 0, queries = 0, keys = 0, head_dim = 0, value_dim = 0;
  DType dtype = DType::f32;
  HeadRows query, key, value, output;  // output: written forward, read backward
  Statistic lse;                       // likewise
  HeadRows grad_output, grad_query, grad_key, grad_value;
  Statistic grad_lse, delta;
  bool whole = false;  // probabilities of these keys add up to 1: no sink has a part
  // [splits, batch, heads, queries, pitch]: each split has every splits-th tile of keys.
  float* partial = nullptr;
  int64_t splits = 1, pitch = 0;
  float* grad_bias = nullptr;  // added to; null: not wanted. Stride 0 where it is summed.
  int64_t grad_bias_stride[4] = {0, 0, 0, 0};
  // Whether one gradient of a bias is of all batches, and of all heads.
  bool over_batch = false, over_heads = false;
  int32_t* finite = nullptr;  // becomes 0 where a result is not
  int64_t key_heads() const { return terms.heads / terms.group; }
};

// Few queries against many keys.
struct Decode {
  ScoreTerms terms;
  int64_t batch = 0, queries = 0, keys = 0, head_dim = 0, value_dim = 0;
  bool bottom_right = false;             // shift comes from the length of each sequence
  const int64_t* key_lengths = nullptr;  // [batch]; null: all have keys
  DType dtype = DType::f32;
  const void *query = nullptr, *key = nullptr, *value = nullptr;
  int64_t query_stride[3] = {0, 0, 0};  // batch, head, row; elements of a row lie side by side
  int64_t key_stride[3] = {0, 0, 0}, value_stride[3] = {0, 0, 0};
  int64_t split = 0;  // keys of a task
  // [batch, key heads, splits, rows, value_dim + 2]: sums, largest, total.
  float* partial = nullptr;
  void* output = nullptr;  // [batch, heads, queries, value_dim]
  float* lse = nullptr;    // [batch, heads, queries]
  int64_t splits() const { return (keys + split - 1) / split; }
};

}  // namespace fastseq
