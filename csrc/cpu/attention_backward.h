// Attention backward, tile by tile: see attention_tiles.h.
#pragma once

#include "attention_tiles.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// delta_i = dout_i . out_i - dlse_i of rows [begin, end), batch and head after query.
template <class M>
void delta_rows(const Attention& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % args.queries, head = row / args.queries % args.terms.heads;
    const int64_t batch = row / args.queries / args.terms.heads;
    const M* output = at<M>(args.output, batch, head, i);
    const M* grad = at<M>(args.grad_output, batch, head, i);
    F32x sum = {};
    for (int64_t c = 0; c < args.value_dim; c += kWidth)
      sum = fma(load_some<float>(output + c, args.value_dim - c),
                load_some<float>(grad + c, args.value_dim - c), sum);
    float delta = horizontal_sum<float>(sum);
    if (args.grad_lse.data != nullptr && *at(args.lse, batch, head, i) != -kInfinity)
      delta -= *at(args.grad_lse, batch, head, i);
    *at(args.delta, batch, head, i) = delta;
  }
}

struct BackwardRow {
  float* grad_bias;     // null: not wanted
  int64_t bias_stride;  // 0 or 1
  float* factor;        // of softcap; null: none
};

// Scores to p, in place, and delta by the row itself. p adds up to 1 but for lse's rounding, and a
// large delta would show that: it is divided out, unless a sink has a part.
inline float own_delta(const Attention& args, const RowAt& row, float lse,
                       const random::RowKey& key, float* s, const float* dp) {
  const Dropout& dropout = args.terms.dropout;
  U32x column = first_columns(row.first_key);
  F32x sum = {}, total = {};
  for (int64_t j = 0; j < row.keys; j += kWidth) {
    const int64_t count = row.keys - j;
    F32x power = exp_nonpositive(load_some<float>(s + j, count) - lse);
    power = count >= kWidth ? power : keep_first<float>(power, count);
    F32x gradient = load_some<float>(dp + j, count);
    if (dropout.seed != nullptr) gradient *= kept(dropout, key, column);
    column += static_cast<uint32_t>(kWidth);
    store_some<float>(s + j, power, count);
    total += power;
    sum = fma(power, gradient, sum);
  }
  float delta = horizontal_sum<float>(sum);
  if (lse == kInfinity) return 0;
  if (args.whole) delta /= horizontal_sum<float>(total);
  if (args.grad_lse.data != nullptr) delta -= *at(args.grad_lse, row.batch, row.head, row.query);
  return delta;
}

// Scores to p, dropped out, and dp to ds.
template <class M>
void backward_row(const Attention& args, const RowAt& row, const BackwardRow& with, float* s,
                  float* dp, M* p, M* ds) {
  const ScoreTerms& terms = args.terms;
  const int64_t n = row.keys;
  apply_terms(terms, terms.shift, row, s, with.factor);
  float lse = *at(args.lse, row.batch, row.head, row.query);
  if (lse == -kInfinity) lse = kInfinity;  // nothing is seen: every probability is 0
  const random::RowKey key = dropout_key(args, row);
  const bool own = args.delta.data == nullptr;
  const float delta =
      own ? own_delta(args, row, lse, key, s, dp) : *at(args.delta, row.batch, row.head, row.query);
  U32x column = first_columns(row.first_key);
  F32x sum = {};
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t count = n - j;
    F32x power = load_some<float>(s + j, count);
    if (!own) power = exp_nonpositive(power - lse);
    F32x gradient = load_some<float>(dp + j, count), dropped = power;
    if (terms.dropout.seed != nullptr) {
      const F32x keep = kept(terms.dropout, key, column);
      gradient *= keep;
      dropped *= keep;
      column += static_cast<uint32_t>(kWidth);
    }
    gradient = power * (gradient - delta);
    if (with.grad_bias != nullptr) {
      if (with.bias_stride != 0) {
        float* total = with.grad_bias + j;
        __builtin_prefetch(total + args.grad_bias_stride[2], 1, 2);  // the next row is elsewhere
        store_some<float>(total, load_some<float>(total, count) + gradient, count);
      } else {
        sum += count >= kWidth ? gradient : keep_first<float>(gradient, count);
      }
    }
    if (with.factor != nullptr) gradient *= load_some<float>(with.factor + j, count);
    store_some<float>(p + j, dropped, count);
    store_some<float>(ds + j, gradient, count);
  }
  if (with.grad_bias != nullptr && with.bias_stride == 0)
    *with.grad_bias += horizontal_sum<float>(sum);
}

// The memory of a task.
template <bool kPairs>
struct BackwardTiles {
  Sizes<kPairs> sizes;
  int64_t width, value_width;  // of a row of results
  // Of keys and values: as they are gathered, as panels for scores and dp, as rows for dq.
  float *rows, *keys, *values, *key_rows;
  float *grad_key, *grad_value;
  // Of queries and output gradients: left and right sides.
  float *query, *grad, *query_rows, *grad_rows;
  float *scores, *dp, *factor;
  // p and ds rounded, and two rows of each side by side.
  bf16 *p, *ds;
  float *p_pairs, *ds_pairs;

  explicit BackwardTiles(const Attention& args)
      : sizes(args), width(sizes.columns.pitch()), value_width(sizes.value_columns.pitch()) {
    const int64_t larger = sizes.pitch > sizes.value_pitch ? sizes.pitch : sizes.value_pitch;
    const int64_t block = kBlockQueries * kTile;
    Carve::all([&](Carve& carve) {
      rows = carve.take(kTile * larger);
      keys = carve.take(kTile * sizes.pitch);
      values = carve.take(kTile * sizes.value_pitch);
      key_rows = carve.take(kTile * width);
      grad_key = carve.take(kTile * width);
      grad_value = carve.take(kTile * value_width);
      query = carve.take(kBlockQueries * sizes.pitch);
      grad = carve.take(kBlockQueries * sizes.value_pitch);
      query_rows = carve.take(kBlockQueries * width);
      grad_rows = carve.take(kBlockQueries * value_width);
      scores = carve.take(block);
      dp = carve.take(block);
      factor = carve.take(args.terms.softcap != 0 ? kTile : 0);
      p = carve.take<bf16>(kPairs ? block : 0);
      ds = carve.take<bf16>(kPairs ? block : 0);
      p_pairs = carve.take(kPairs ? block / 2 : 0);
      ds_pairs = carve.take(kPairs ? block / 2 : 0);
    });
    if (args.terms.softcap == 0) factor = nullptr;
  }
};

template <bool kPairs, class M>
void backward_block(const Attention& args, const BackwardTiles<kPairs>& tiles, int64_t batch,
                    int64_t head, const Tile& tile, const Range& block, float* grad_query) {
  using W = Weight<kPairs>;
  const Sizes<kPairs>& sizes = tiles.sizes;
  const Range here = seen_of(args, tile, block);
  if (here.empty()) return;
  const M* query = at<M>(args.query, batch, head, block.begin);
  const M* grad = at<M>(args.grad_output, batch, head, block.begin);
  const int64_t count = block.count();
  gather<kPairs>(query, args.query.stride[2], args.head_dim, count, count, tiles.query,
                 sizes.pitch);
  gather<kPairs>(grad, args.grad_output.stride[2], args.value_dim, count, count, tiles.grad,
                 sizes.value_pitch);
  gather_right<kPairs>(query, args.query.stride[2], args.head_dim, count, tiles.query_rows,
                       tiles.width);
  gather_right<kPairs>(grad, args.grad_output.stride[2], args.value_dim, count, tiles.grad_rows,
                       tiles.value_width);
  multiply_keys<kPairs>(tiles.query, count, tiles.keys, sizes.pitch, sizes.depth, tile.panels, here,
                        static_cast<float>(args.terms.scale), tiles.scores);
  multiply_keys<kPairs>(tiles.grad, count, tiles.values, sizes.value_pitch, sizes.value_depth,
                        tile.panels, here, 1.0f, tiles.dp);
  W *p, *ds;
  if constexpr (kPairs)
    p = tiles.p, ds = tiles.ds;
  else
    p = tiles.scores, ds = tiles.dp;
  for (int64_t r = 0; r < count; ++r) {
    const RowAt row{batch, head, block.begin + r, tile.begin + here.begin, here.count()};
    BackwardRow with{nullptr, args.grad_bias_stride[3], tiles.factor};
    if (args.grad_bias != nullptr)
      with.grad_bias = args.grad_bias + batch * args.grad_bias_stride[0] +
                       head * args.grad_bias_stride[1] + row.query * args.grad_bias_stride[2] +
                       row.first_key * args.grad_bias_stride[3];
    const int64_t offset = r * kTile + here.begin;
    if (kPairs && here.count() % 2 != 0) std::memset(ds + offset + here.count(), 0, sizeof(W));
    backward_row(args, row, with, tiles.scores + offset, tiles.dp + offset, p + offset,
                 ds + offset);
  }
  multiply_weights<kPairs>(ds, count, here, tiles.key_rows, sizes.columns, grad_query, tiles.width);
  // The transposed products: what was a row is a step now.
  Left left_p, left_ds;
  if constexpr (kPairs) {
    const int64_t width = here.count();
    interleave(p + here.begin, kTile, width, count, tiles.p_pairs + here.begin, kTile, width);
    interleave(ds + here.begin, kTile, width, count, tiles.ds_pairs + here.begin, kTile, width);
    left_p = {tiles.p_pairs + here.begin, 1, kTile};
    left_ds = {tiles.ds_pairs + here.begin, 1, kTile};
  } else {
    left_p = {p + here.begin, 1, kTile};
    left_ds = {ds + here.begin, 1, kTile};
  }
  const int64_t depth = sizes.words(count);
  multiply_tile<kPairs>(left_ds, {tiles.query_rows, sizes.columns.width(), tiles.width},
                        here.count(), depth, sizes.columns.vectors, sizes.columns.count,
                        {tiles.grad_key + here.begin * tiles.width, tiles.width, true, 1.0f});
  multiply_tile<kPairs>(
      left_p, {tiles.grad_rows, sizes.value_columns.width(), tiles.value_width}, here.count(),
      depth, sizes.value_columns.vectors, sizes.value_columns.count,
      {tiles.grad_value + here.begin * tiles.value_width, tiles.value_width, true, 1.0f});
}

// Some tiles of one key head.
template <bool kPairs, class M>
void backward_head(const Attention& args, const BackwardTiles<kPairs>& tiles, int64_t batch,
                   int64_t key_head, int64_t split) {
  const ScoreTerms& terms = args.terms;
  const Sizes<kPairs>& sizes = tiles.sizes;
  const int64_t head_size = args.queries * args.pitch;
  float* partial =
      args.partial +
      ((split * args.batch + batch) * terms.heads + key_head * terms.group) * head_size;
  for (int64_t i = 0; i < terms.group * head_size; i += kWidth) store(partial + i, F32x{});
  bool finite = true;
  for (int64_t begin = split * kTile; begin < args.keys; begin += args.splits * kTile) {
    const Tile tile(begin, args.keys);
    const int64_t padded = tile.panels.pitch();
    const M* key = at<M>(args.key, batch, key_head, tile.begin);
    const M* value = at<M>(args.value, batch, key_head, tile.begin);
    gather<kPairs>(key, args.key.stride[2], args.head_dim, tile.count(), padded, tiles.rows,
                   sizes.pitch);
    transpose_to_panels(tiles.rows, sizes.pitch, tile.panels, tiles.keys);
    gather<kPairs>(value, args.value.stride[2], args.value_dim, tile.count(), padded, tiles.rows,
                   sizes.value_pitch);
    transpose_to_panels(tiles.rows, sizes.value_pitch, tile.panels, tiles.values);
    gather_right<kPairs>(key, args.key.stride[2], args.head_dim, tile.count(), tiles.key_rows,
                         tiles.width);
    std::memset(tiles.grad_key, 0, static_cast<size_t>(tile.count() * tiles.width) * sizeof(float));
    std::memset(tiles.grad_value, 0,
                static_cast<size_t>(tile.count() * tiles.value_width) * sizeof(float));
    for (int64_t g = 0; g < terms.group; ++g)
      for (Range block{0, 0}; block.begin < args.queries; block.begin = block.end) {
        block.end = block.begin + kBlockQueries;
        block.end = block.end < args.queries ? block.end : args.queries;
        backward_block<kPairs, M>(args, tiles, batch, key_head * terms.group + g, tile, block,
                                  partial + g * head_size + block.begin * args.pitch);
      }
    for (int64_t j = 0; j < tile.count(); ++j) {
      finite &= write_row(tiles.grad_key + j * tiles.width, static_cast<float>(terms.scale),
                          at<M>(args.grad_key, batch, key_head, tile.begin + j), args.head_dim);
      finite &= write_row(tiles.grad_value + j * tiles.value_width, 1.0f,
                          at<M>(args.grad_value, batch, key_head, tile.begin + j), args.value_dim);
    }
  }
  report(args, finite);
}

// Heads that add to one gradient of a bias are one task, one after the other.
template <bool kPairs, class M>
void backward_task(const Attention& args, int64_t task) {
  const int64_t key_heads = args.key_heads(), heads = args.over_heads ? 1 : key_heads;
  const int64_t split = task % args.splits, head = task / args.splits % heads;
  const int64_t batch = task / args.splits / heads;
  const BackwardTiles<kPairs> tiles(args);
  for (int64_t b = batch; b < (args.over_batch ? args.batch : batch + 1); ++b)
    for (int64_t h = head; h < (args.over_heads ? key_heads : head + 1); ++h)
      backward_head<kPairs, M>(args, tiles, b, h, split);
}

// Rows [begin, end) of the gradient of the queries, from those of the splits.
template <class M>
void grad_query_rows(const Attention& args, int64_t begin, int64_t end) {
  const int64_t heads = args.terms.heads, all = args.batch * heads * args.queries * args.pitch;
  bool finite = true;
  for (int64_t row = begin; row < end; ++row) {
    float* sum = args.partial + row * args.pitch;
    for (int64_t split = 1; split < args.splits; ++split)
      for (int64_t c = 0; c < args.pitch; c += kWidth)
        store(sum + c, load(sum + c) + load(sum + split * all + c));
    M* to = at<M>(args.grad_query, row / args.queries / heads, row / args.queries % heads,
                  row % args.queries);
    finite &= write_row(sum, static_cast<float>(args.terms.scale), to, args.head_dim);
  }
  report(args, finite);
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
