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

// A piece of the scores: [count_n, count_g, count_i, keys], of key heads first_n on (counted
// through all batches), the queries of heads first_g on of their group, and keys first_key on.
struct ScorePiece {
  ScoreTerms terms;
  int64_t count_n = 0, count_g = 0, count_i = 0, keys = 0;
  int64_t first_n = 0, first_g = 0, first_i = 0, first_key = 0;
  int64_t queries = 0;              // row length of lse and delta, [batch, heads, queries]
  float* scores = nullptr;          // q . k
  Vector probabilities;             // dropped out; may be the scores themselves
  float* lse = nullptr;             // written forward, read backward
  float* grad = nullptr;            // backward: dp, and of it the gradient of the bias
  Vector grad_scores;               // backward: times cap'; may be grad itself
  const float* grad_lse = nullptr;  // backward: of every query; null: none
  // Backward: delta of every query, where these keys are only some of those that lse is of; null:
  // it is summed up here.
  const float* delta = nullptr;
  // Backward: a row's probabilities add up to 1, nothing (sinks, other keys) being left out. What
  // lse's rounding has taken from that is divided out of delta then: a large delta times it would
  // be the largest error there is.
  bool whole = false;
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
