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

// 16 times the 6 rows whose sums stay in registers; with tiles of 256 keys and head_dim 64, what
// the backward pass goes through for a block is 0.6 MB in fp32.
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

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
