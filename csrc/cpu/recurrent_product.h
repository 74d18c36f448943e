// Products of a few rows with weights that stay the same for a whole sequence: packed once, in the
// order they are read. Included by files that are compiled once per instruction set.
#pragma once

#include "product.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int64_t kHalfOfL1 = 16 << 10;

// Results of a product, [groups][size] (the gates of all units): tile t has the units from
// t * units * lanes on of every group, so that all gates of a unit come out together.
//
// In pairs, operands and weights are bf16, two of them in the place of a number: half the weights
// to read, and half the instructions.
template <class T>
struct Shape {
  int groups, units;  // units: vectors of each group in a tile
  int64_t size, depth, tiles;
  bool pairs;
  Shape(int groups, int64_t size, int64_t length, bool pairs = false)
      : groups(groups), size(size), depth(pairs ? (length + 1) / 2 : length), pairs(pairs) {
    const int64_t vectors = (size + lanes<T> - 1) / lanes<T>;
    // One row of few vectors is a chain of additions: four at once keep the unit busy.
    units = groups > 1 ? 1 : vectors >= 3 ? 4 : static_cast<int>(vectors);
    tiles = (vectors + units - 1) / units;
  }
  int vectors() const { return groups * units; }
  int64_t pitch() const { return tiles * units * lanes<T>; }  // between groups of a result row
  int64_t row() const { return groups * pitch(); }
  int64_t tile_elements() const { return (depth + 1) * vectors() * lanes<T>; }
  int64_t elements() const { return tiles * tile_elements(); }
  // The units of a tile.
  int64_t begin(int64_t tile) const { return tile * units * lanes<T>; }
  int64_t end(int64_t tile) const {
    const int64_t end = (tile + 1) * units * lanes<T>;
    return end < size ? end : size;
  }
};

template <class T, class M>
inline T number(M x) {
  if constexpr (sizeof(M) == 2)
    return to_float(x);
  else
    return x;
}

// Element (n, k) of a weight is at n * stride_n + k * stride_k, of which one is 1; of length k.
template <class M>
struct Source {
  const M* weight;
  int64_t stride_n, stride_k, length;
};

// What a packed weight has for step k of unit n.
template <bool kPairs, class T, class M>
inline T packed_number(const Source<M>& source, int64_t n, int64_t k) {
  const M* const from = source.weight + n * source.stride_n;
  if constexpr (kPairs) {
    uint16_t both[2] = {};
    std::memcpy(both, from + 2 * k * source.stride_k, sizeof(M));
    if (2 * k + 1 < source.length)
      std::memcpy(both + 1, from + (2 * k + 1) * source.stride_k, sizeof(M));
    return bit_cast<T>(both);
  } else {
    return number<T>(from[k * source.stride_k]);
  }
}

// The first steps of a whole vector of units from n on, by vectors; returned is how many.
template <bool kPairs, class T, class M>
int64_t pack_whole(const Source<M>& source, int64_t n, int64_t depth, T* target, int64_t width) {
  int64_t k = 0;
  if (source.stride_n == 1) {
    const M* const from = source.weight + n;
    for (const int64_t whole = kPairs ? source.length / 2 : depth; k < whole; ++k) {
      if constexpr (kPairs) {
        const auto first = bit_cast<U32x>(load(from + 2 * k * source.stride_k));
        const auto second = bit_cast<U32x>(load(from + (2 * k + 1) * source.stride_k));
        store(target + k * width, bit_cast<V<T>>(first >> 16 | second));
      } else {
        store(target + k * width, load(from + k * source.stride_k));
      }
    }
    return k;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4 && (kPairs || sizeof(M) == 4)) {
    const M* const from = source.weight + n * source.stride_n;
    for (const int64_t whole = kPairs ? source.length / 2 : depth; k + 16 <= whole; k += 16) {
      if constexpr (kPairs) {
        // Neighbours in the source are a pair: 4 bytes as they are. A pitch that is odd has none.
        if (source.stride_n % 2 != 0) break;
        transpose(reinterpret_cast<const float*>(from) + k, source.stride_n / 2, target + k * width,
                  width);
      } else {
        transpose(from + k, source.stride_n, target + k * width, width);
      }
    }
  }
#endif
  return k;
}

// A tile is one vector row of what the sums start from (the bias), then depth rows of weights;
// 0 where there are no more units.
template <bool kPairs, class T, class M>
void pack(const Shape<T>& shape, const Source<M>& source, const M* bias, T* packed) {
  const int width = shape.vectors() * lanes<T>;
  for (int64_t tile = 0; tile < shape.tiles; ++tile, packed += shape.tile_elements()) {
    for (int v = 0; v < shape.vectors(); ++v) {
      const int64_t unit = (tile * shape.units + v % shape.units) * lanes<T>;
      const int64_t n = v / shape.units * shape.size + unit, left = shape.size - unit;
      const int64_t count = left < lanes<T> ? left : lanes<T>;
      T* const target = packed + v * lanes<T>;
      for (int64_t k = 0; k <= shape.depth && (count < lanes<T> || k == 0); ++k)
        store(target + k * width, V<T>{});
      for (int64_t lane = 0; lane < count && bias != nullptr; ++lane)
        target[lane] = number<T>(bias[n + lane]);
      const int64_t done =
          count == lanes<T> ? pack_whole<kPairs>(source, n, shape.depth, target + width, width) : 0;
      for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t k = done; k < shape.depth; ++k)
          target[(k + 1) * width + lane] = packed_number<kPairs, T>(source, n + lane, k);
    }
  }
}

// out[r][offset[v]] = start + sum over k of a[r][k] * w[k][v]: one multiplication and addition
// after the other for each element, whatever the number of rows. back: from the last k on.
template <bool kPairs, class T, int N, int R>
void multiply(const T* const* a, int64_t depth, const T* w, bool back, T* const* out,
              const int64_t* offset) {
  V<T> sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[r][v] = load(w + v * lanes<T>);
  const T* row[R];
  for (int r = 0; r < R; ++r) row[r] = a[r];
  const int64_t step = back ? -1 : 1;
  int64_t k = back ? depth - 1 : 0;
  w += (k + 1) * N * lanes<T>;
  for (int64_t n = 0; n < depth; ++n, k += step, w += step * N * lanes<T>) {
    V<T> weight[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) weight[v] = load(w + v * lanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V<T> x = splat(row[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
#if defined(__AVX512BF16__)
        if constexpr (kPairs) {
          sum[r][v] = add_pairs(x, weight[v], sum[r][v]);
          continue;
        }
#endif
        sum[r][v] = fma(x, weight[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) store(out[r] + offset[v], sum[r][v]);
}

template <bool kPairs, class T, int N, int R>
void multiply_rows(int rows, const T* const* a, int64_t depth, const T* w, bool back, T* const* out,
                   const int64_t* offset) {
  if (rows == R) return multiply<kPairs, T, N, R>(a, depth, w, back, out, offset);
  if constexpr (R > 1) multiply_rows<kPairs, T, N, R - 1>(rows, a, depth, w, back, out, offset);
}

// One tile of the results of some rows: count of them, whose operands and results lie at
// a + index[i] * a_pitch and out + index[i] * shape.row().
template <bool kPairs, class T, int N>
void multiply_tile(const Shape<T>& shape, int64_t tile, const T* packed, int64_t count,
                   const int32_t* index, const T* a, int64_t a_pitch, bool back, T* out) {
  int64_t offset[N];
  for (int v = 0; v < N; ++v)
    offset[v] = v / shape.units * shape.pitch() + shape.begin(tile) + v % shape.units * lanes<T>;
  constexpr int most = most_rows(N);
  const int64_t blocks = (count + most - 1) / most;
  for (int64_t block = 0; block < blocks; ++block) {  // as equal as can be
    const int64_t begin = block * count / blocks, end = (block + 1) * count / blocks;
    const T* rows[most];
    T* results[most];
    for (int64_t i = begin; i < end; ++i) {
      rows[i - begin] = a + index[i] * a_pitch;
      results[i - begin] = out + index[i] * shape.row();
    }
    multiply_rows<kPairs, T, N, most>(static_cast<int>(end - begin), rows, shape.depth,
                                      packed + tile * shape.tile_elements(), back, results, offset);
  }
}

template <bool kPairs, class T>
void multiply_any(const Shape<T>& shape, int64_t tile, const T* packed, int64_t count,
                  const int32_t* index, const T* a, int64_t a_pitch, bool back, T* out) {
  switch (shape.vectors()) {
    case 1:
      return multiply_tile<kPairs, T, 1>(shape, tile, packed, count, index, a, a_pitch, back, out);
    case 2:
      return multiply_tile<kPairs, T, 2>(shape, tile, packed, count, index, a, a_pitch, back, out);
    case 3:
      return multiply_tile<kPairs, T, 3>(shape, tile, packed, count, index, a, a_pitch, back, out);
    default:
      return multiply_tile<kPairs, T, 4>(shape, tile, packed, count, index, a, a_pitch, back, out);
  }
}

// Tiles [first, last); finish(tile) after each, while its results are in L1.
//
// back is of every other step: it begins with the weights that the step before ended with, which
// are still in the cache however many there are. One tile too large for L1 is itself gone through
// from the end, which is the one case where it changes the order of a sum.
template <class T, class Finish>
void multiply_tiles(const Shape<T>& shape, int64_t first, int64_t last, const T* packed,
                    int64_t count, const int32_t* index, const T* a, int64_t a_pitch, bool back,
                    T* out, Finish finish) {
  const bool reverse = back && shape.tiles == 1 &&
                       shape.tile_elements() * static_cast<int64_t>(sizeof(T)) > kHalfOfL1;
  for (int64_t n = first; n < last; ++n) {
    const int64_t tile = back ? first + last - 1 - n : n;
    if constexpr (kHasPairs && sizeof(T) == 4) {
      if (shape.pairs)
        multiply_any<true>(shape, tile, packed, count, index, a, a_pitch, reverse, out);
      else
        multiply_any<false>(shape, tile, packed, count, index, a, a_pitch, reverse, out);
    } else {
      multiply_any<false>(shape, tile, packed, count, index, a, a_pitch, reverse, out);
    }
    finish(tile);
  }
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
