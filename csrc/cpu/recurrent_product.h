// Products of a few rows with weights that stay the same for a whole sequence: packed once, in the
// order they are read. Included by files that are compiled once per instruction set.
#pragma once

#include "rows.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

constexpr int64_t kHalfOfL1 = 16 << 10;

// Rows whose sums stay in registers beside N vectors of weights and one of the row; 6 for 4
// vectors of AVX-512.
constexpr int most_rows(int vectors) {
  const int rows = (kRegisters - vectors - 1) / vectors;
  return rows > 8 ? 8 : rows;
}

// Results of a product, [groups][size] (the gates of all units): tile t has the units from
// t * units * lanes on of every group, so that all gates of a unit come out together.
template <class T>
struct Shape {
  int groups, units;  // units: vectors of each group in a tile
  int64_t size, depth, tiles;
  Shape(int groups, int64_t size, int64_t depth) : groups(groups), size(size), depth(depth) {
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

// A tile is one vector row of what the sums start from (the bias), then depth rows of weights;
// 0 where there are no more units. Element (n, k) of the weight is at n * stride_n + k * stride_k,
// of which one is 1. 64 rows of the target stay in L1 while they are filled, by whole lines of the
// source.
template <class T, class M>
void pack(const Shape<T>& shape, const M* weight, int64_t stride_n, int64_t stride_k, const M* bias,
          T* packed) {
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
      for (int64_t begin = 0; begin < shape.depth; begin += 64) {
        const int64_t end = begin + 64 < shape.depth ? begin + 64 : shape.depth;
        if (stride_n == 1) {
          for (int64_t k = begin; k < end; ++k)
            for (int64_t lane = 0; lane < count; ++lane)
              target[(k + 1) * width + lane] = number<T>(weight[n + lane + k * stride_k]);
        } else {
          for (int64_t lane = 0; lane < count; ++lane)
            for (int64_t k = begin; k < end; ++k)
              target[(k + 1) * width + lane] = number<T>(weight[(n + lane) * stride_n + k]);
        }
      }
    }
  }
}

// out[r][offset[v]] = start + sum over k of a[r][k] * w[k][v]: one multiplication and addition
// after the other for each element, whatever the number of rows. back: from the last k on.
template <class T, int N, int R>
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
      for (int v = 0; v < N; ++v) sum[r][v] = fma(x, weight[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) store(out[r] + offset[v], sum[r][v]);
}

template <class T, int N, int R>
void multiply_rows(int rows, const T* const* a, int64_t depth, const T* w, bool back, T* const* out,
                   const int64_t* offset) {
  if (rows == R) return multiply<T, N, R>(a, depth, w, back, out, offset);
  if constexpr (R > 1) multiply_rows<T, N, R - 1>(rows, a, depth, w, back, out, offset);
}

// One tile of the results of some rows: count of them, whose operands and results lie at
// a + index[i] * a_pitch and out + index[i] * shape.row().
template <class T, int N>
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
    multiply_rows<T, N, most>(static_cast<int>(end - begin), rows, shape.depth,
                              packed + tile * shape.tile_elements(), back, results, offset);
  }
}

// All tiles; finish(tile) after each, while its results are in L1.
//
// back is of every other step: it begins with the weights that the step before ended with, which
// are still in the cache however many there are. One tile too large for L1 is itself gone through
// from the end, which is the one case where it changes the order of a sum.
template <class T, class Finish>
void multiply_all(const Shape<T>& shape, const T* packed, int64_t count, const int32_t* index,
                  const T* a, int64_t a_pitch, bool back, T* out, Finish finish) {
  const bool reverse = back && shape.tiles == 1 &&
                       shape.tile_elements() * static_cast<int64_t>(sizeof(T)) > kHalfOfL1;
  for (int64_t n = 0; n < shape.tiles; ++n) {
    const int64_t tile = back ? shape.tiles - 1 - n : n;
    switch (shape.vectors()) {
      case 1:
        multiply_tile<T, 1>(shape, tile, packed, count, index, a, a_pitch, reverse, out);
        break;
      case 2:
        multiply_tile<T, 2>(shape, tile, packed, count, index, a, a_pitch, reverse, out);
        break;
      case 3:
        multiply_tile<T, 3>(shape, tile, packed, count, index, a, a_pitch, reverse, out);
        break;
      default:
        multiply_tile<T, 4>(shape, tile, packed, count, index, a, a_pitch, reverse, out);
    }
    finish(tile);
  }
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
