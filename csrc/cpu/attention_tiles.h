// Attention over tiles that stay in a core's L2 from the first product to the last.
//
//   forward    per tile of keys and block of queries: scores, the terms of each row, an online
//              softmax (Milakov & Gimelshein 2018), the weighted sum
//   backward   scores and dp again, p and ds from lse and delta, the products with these; the
//              gradients of a tile's keys are complete then, those of queries are summed over tiles
//
// A task is some queries of a head (forward), or some tiles of keys of a head (backward), and what
// is summed in what order depends on lengths alone: not on threads, not on the batch. Where the
// machine multiplies pairs of bf16, bf16 comes to the products as it is, with p and ds rounded to
// it; all else is multiplied in fp32.
#pragma once

#include "attention_terms.h"
#include "scratch.h"
#include "tile_product.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// 16 times 6 queries, by the 64 to 256 numbers of a panel; with 256 keys of head_dim 64 all that
// the backward pass touches between two tiles of queries is 0.5 MB in fp32.
constexpr int64_t kBlockQueries = 96;
constexpr int64_t kTile = 256;
// Queries for which a tile of keys is packed once.
constexpr int64_t kTaskQueries = 6 * kBlockQueries;

struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
  bool empty() const { return end <= begin; }
};

// The keys that any of the queries may see.
inline Range seen(const Attention& args, const Range& queries) {
  const ScoreTerms& terms = args.terms;
  Range keys{0, args.keys};
  if (terms.left >= 0 && queries.begin + terms.shift - terms.left > 0)
    keys.begin = queries.begin + terms.shift - terms.left;
  if (terms.right >= 0 && queries.end + terms.shift + terms.right < keys.end)
    keys.end = queries.end + terms.shift + terms.right;
  return keys;
}

// A tile of keys, and how it is packed.
struct Tile : Range {
  Panels panels;
  Tile(int64_t begin, int64_t last)
      : Range{begin, begin + kTile < last ? begin + kTile : last}, panels(count()) {}
};

// What these queries see of a tile, from its begin on; whole panels on the left.
inline Range seen_of(const Attention& args, const Tile& tile, const Range& queries) {
  Range keys = seen(args, queries);
  const int64_t width = tile.panels.width();
  keys.begin = (keys.begin > tile.begin ? keys.begin - tile.begin : 0) / width * width;
  keys.end = (keys.end < tile.end ? keys.end : tile.end) - tile.begin;
  return keys;
}

template <class M>
inline M* at(const HeadRows& rows, int64_t batch, int64_t head, int64_t row) {
  return static_cast<M*>(rows.data) + batch * rows.stride[0] + head * rows.stride[1] +
         row * rows.stride[2];
}

inline float* at(const Statistic& statistic, int64_t batch, int64_t head, int64_t row) {
  return statistic.data + batch * statistic.stride[0] + head * statistic.stride[1] + row;
}

inline random::RowKey dropout_key(const Attention& args, const RowAt& row) {
  const ScoreTerms& terms = args.terms;
  const int64_t both = row.batch * terms.heads + row.head;
  if (terms.dropout.seed == nullptr) return {};
  return random::row_key(
      static_cast<uint64_t>(*terms.dropout.seed),
      static_cast<uint64_t>(terms.row_offset + both * terms.row_pitch + row.query));
}

// Writes width numbers times factor; whether all are finite.
template <class M>
inline bool write_row(const float* from, float factor, M* to, int64_t width) {
  F32x nothing = {};
  for (int64_t c = 0; c < width; c += kWidth) {
    const F32x x = load_some<float>(from + c, width - c) * factor;
    store_some<float>(to + c, x, width - c);
    nothing += x * 0.0f;  // NaN of Inf and NaN
  }
  return horizontal_sum<float>(nothing) == 0.0f;
}

inline void report(const Attention& args, bool finite) {
  if (!finite) __atomic_store_n(args.finite, 0, __ATOMIC_RELAXED);
}

// Tiles cut out of a thread's scratch memory: layout(carve) takes them, once to see how much it is.
class Carve {
 public:
  template <class Layout>
  static void all(const Layout& layout) {
    Carve carve;
    layout(carve);
    carve.at_ = reinterpret_cast<uintptr_t>(thread_scratch(carve.at_));
    layout(carve);
  }
  template <class T = float>
  T* take(int64_t count) {
    const uintptr_t here = at_;
    at_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(here);
  }

 private:
  uintptr_t at_ = 0;
};

// The sizes of a problem in words: fp32, or pairs of bf16.
template <bool kPairs>
struct Sizes {
  int64_t depth, value_depth;     // words of a row of a query or key, and of a value
  int64_t pitch, value_pitch;     // such rows as left sides: whole vectors
  Panels columns, value_columns;  // and as right sides and results
  explicit Sizes(const Attention& args)
      : depth(words(args.head_dim)),
        value_depth(words(args.value_dim)),
        pitch(round_up(depth, kWidth)),
        value_pitch(round_up(value_depth, kWidth)),
        columns(args.head_dim),
        value_columns(args.value_dim) {}
  static int64_t words(int64_t numbers) { return kPairs ? (numbers + 1) / 2 : numbers; }
};

// What p and ds are in products.
template <bool kPairs>
using Weight = std::conditional_t<kPairs, bf16, float>;

// Products of some rows with the keys that these see of a tile: scores, times factor.
template <bool kPairs>
inline void multiply_keys(const float* rows, int64_t count, const float* packed, int64_t pitch,
                          int64_t depth, const Panels& panels, const Range& keys, float factor,
                          float* scores) {
  const int64_t width = panels.width(), first = keys.begin / width;
  multiply_tile<kPairs>({rows, pitch, 1}, {packed + first * pitch * width, pitch * width, width},
                        count, depth, panels.vectors, (keys.end + width - 1) / width - first,
                        {scores + keys.begin, kTile, false, factor});
}

// sums += weights [count][kTile] of these keys times their rows.
template <bool kPairs>
inline void multiply_weights(const Weight<kPairs>* weights, int64_t count, const Range& keys,
                             const float* right, const Panels& columns, float* sums,
                             int64_t pitch) {
  const int64_t first = keys.begin / (kPairs ? 2 : 1);
  multiply_tile<kPairs>(
      {reinterpret_cast<const float*>(weights) + first, kTile / (kPairs ? 2 : 1), 1},
      {right + first * columns.pitch(), columns.width(), columns.pitch()}, count,
      Sizes<kPairs>::words(keys.count()), columns.vectors, columns.count,
      {sums, pitch, true, 1.0f});
}

// ---- forward -----------------------------------------------------------------------------------

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
  const float before = *running.largest, here = row_maximum(s, row.keys);
  const float largest = here > before ? here : before;
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

// ---- backward ----------------------------------------------------------------------------------

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
    interleave(p + here.begin, kTile, here.count(), count, tiles.p_pairs + here.begin, kTile);
    interleave(ds + here.begin, kTile, here.count(), count, tiles.ds_pairs + here.begin, kTile);
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
  std::memset(partial, 0, static_cast<size_t>(terms.group * head_size) * sizeof(float));
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
