// Attention forward, tile by tile: see attention_tiles.h.
#pragma once

#include "attention_tiles.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// e^(s - largest), dropped out, to p; the sum of it before that.
template <class M>
inline float powers(const float* s, M* p, int64_t n, float largest, const Dropout& dropout,
                    const random::RowKey& key, int64_t first_key) {
  F32x even = {}, odd = {};
  int64_t j = 0;
  if (dropout.seed == nullptr) {
    for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
      const F32x first = exp_nonpositive(load(s + j) - largest);
      const F32x second = exp_nonpositive(load(s + j + kWidth) - largest);
      store(p + j, first);
      store(p + j + kWidth, second);
      even += first;
      odd += second;
    }
  }
  U32x column = first_columns(first_key + j);
  for (; j < n; j += kWidth) {
    F32x power = exp_nonpositive(load_some<float>(s + j, n - j) - largest);
    power = n - j >= kWidth ? power : keep_first<float>(power, n - j);
    even += power;
    if (dropout.seed != nullptr) power *= kept(dropout, key, column);
    store_some<float>(p + j, power, n - j);
    column += static_cast<uint32_t>(kWidth);
  }
  return horizontal_sum<float>(even + odd);
}

// The online softmax of one query: the largest score so far, the sum of e^(s - largest), and the
// sums of values that were weighted with it.
struct Running {
  float *largest, *total, *sums;
};

template <class M>
void forward_row(const Attention& args, const RowAt& row, float* s, M* p, const Running& running,
                 int64_t width) {
  apply_terms(args.terms, args.terms.shift, row, s, nullptr);
  const float before = *running.largest, largest = larger(before, row_maximum(s, row.keys));
  if (largest == -kInfinity) {
    std::memset(p, 0, static_cast<size_t>(row.keys) * sizeof(M));
    return;
  }
  const float sum =
      powers(s, p, row.keys, largest, args.terms.dropout, dropout_key(args, row), row.first_key);
  if (largest == before) {
    *running.total += sum;
    return;
  }
  const float less = exp(splat(before - largest))[0];
  *running.largest = largest;
  *running.total = *running.total * less + sum;
  for (int64_t c = 0; c < width; c += kWidth)
    store(running.sums + c, load(running.sums + c) * less);
}

template <bool kPairs, class M>
void forward_task(const Attention& args, int64_t task) {
  using W = Weight<kPairs>;
  const ScoreTerms& terms = args.terms;
  const int64_t parts = (args.queries + kTaskQueries - 1) / kTaskQueries;
  const int64_t part = task % parts, head = task / parts % terms.heads;
  const int64_t batch = task / parts / terms.heads, key_head = head / terms.group;
  const int64_t blocks = (args.queries + kBlockQueries - 1) / kBlockQueries;
  const int64_t step = (blocks + parts - 1) / parts * kBlockQueries;
  const Range mine{part * step,
                   (part + 1) * step < args.queries ? (part + 1) * step : args.queries};
  if (mine.empty()) return;

  const Sizes<kPairs> sizes(args);
  const int64_t width = sizes.value_columns.pitch();
  float *queries, *rows, *keys, *values, *scores, *sums, *largest, *total;
  bf16* rounded;
  Carve::all([&](Carve& carve) {
    queries = carve.take(mine.count() * sizes.pitch);
    rows = carve.take(kTile * sizes.pitch);
    keys = carve.take(kTile * sizes.pitch);
    values = carve.take(kTile * width);
    scores = carve.take(kBlockQueries * kTile);
    rounded = carve.take<bf16>(kPairs ? kBlockQueries * kTile : 0);
    sums = carve.take(mine.count() * width);
    largest = carve.take(mine.count());
    total = carve.take(mine.count());
  });
  gather<kPairs>(at<M>(args.query, batch, head, mine.begin), args.query.stride[2], args.head_dim,
                 mine.count(), mine.count(), queries, sizes.pitch);
  // A sink is a key whose value is 0.
  const float sink = terms.sinks != nullptr ? terms.sinks[head] : -kInfinity;
  for (int64_t r = 0; r < mine.count(); ++r) {
    largest[r] = sink;
    total[r] = sink == -kInfinity ? 0.0f : 1.0f;
  }
  std::memset(sums, 0, static_cast<size_t>(mine.count() * width) * sizeof(float));

  const Range all = seen(args, mine);
  for (int64_t begin = all.begin; begin < all.end; begin += kTile) {
    const Tile tile(begin, all.end);
    gather<kPairs>(at<M>(args.key, batch, key_head, tile.begin), args.key.stride[2], args.head_dim,
                   tile.count(), tile.panels.pitch(), rows, sizes.pitch);
    transpose_to_panels(rows, sizes.pitch, tile.panels, keys);
    gather_right<kPairs>(at<M>(args.value, batch, key_head, tile.begin), args.value.stride[2],
                         args.value_dim, tile.count(), values, width);
    for (Range block{mine.begin, 0}; block.begin < mine.end; block.begin = block.end) {
      block.end = block.begin + kBlockQueries < mine.end ? block.begin + kBlockQueries : mine.end;
      const Range here = seen_of(args, tile, block);
      if (here.empty()) continue;
      const int64_t first = block.begin - mine.begin;
      multiply_keys<kPairs>(queries + first * sizes.pitch, block.count(), keys, sizes.pitch,
                            sizes.depth, tile.panels, here, static_cast<float>(terms.scale),
                            scores);
      W* weights;
      if constexpr (kPairs)
        weights = rounded;
      else
        weights = scores;
      for (int64_t r = 0; r < block.count(); ++r) {
        W* p = weights + r * kTile + here.begin;
        if (kPairs && here.count() % 2 != 0) std::memset(p + here.count(), 0, sizeof(W));
        forward_row(args, {batch, head, block.begin + r, tile.begin + here.begin, here.count()},
                    scores + r * kTile + here.begin, p,
                    {largest + first + r, total + first + r, sums + (first + r) * width}, width);
      }
      multiply_weights<kPairs>(weights, block.count(), here, values, sizes.value_columns,
                               sums + first * width, width);
    }
  }
  bool finite = true;
  for (int64_t r = 0; r < mine.count(); ++r) {
    const bool nothing = largest[r] == -kInfinity;
    *at(args.lse, batch, head, mine.begin + r) =
        nothing ? -kInfinity
                : largest[r] + static_cast<float>(::log(static_cast<double>(total[r])));
    finite &= write_row(sums + r * width, nothing ? 0.0f : 1.0f / total[r],
                        at<M>(args.output, batch, head, mine.begin + r), args.value_dim);
  }
  report(args, finite);
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
