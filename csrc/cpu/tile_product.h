// Products of tiles that lie in the caches, sums in registers: what attention is made of.
//
//   out[r][c] = factor * sum over k of left(r, k) * right(k, c), or the sum is added to it
//
// left is read a number at a time, wherever it lies, so that it may be a transposed tile; right by
// vectors, in panels of some of them, which for a product with a transposed tile is packed once for
// many products. In pairs both are bf16, two neighbours in k in the place of a number.
#pragma once

#include "product.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kMostVectors = kRegisters == 32 ? 4 : 2;

// How the columns of a result are cut up: panels of vectors, all alike.
struct Panels {
  int vectors;
  int64_t count;
  explicit Panels(int64_t columns) {
    const int64_t all = (columns + lanes<float> - 1) / lanes<float>;
    count = (all + kMostVectors - 1) / kMostVectors;
    vectors = count == 0 ? 1 : static_cast<int>((all + count - 1) / count);
  }
  int64_t width() const { return vectors * lanes<float>; }
  int64_t pitch() const { return count * width(); }
};

// What becomes of a product: it is added to what is there, or written times factor.
struct Result {
  float* data;
  int64_t pitch;
  bool add;
  float factor;
};

struct Left {
  const float* data;
  int64_t row, step;  // from a row to the next, from a k to the next
};

struct Right {
  const float* data;
  int64_t panel, step;
};

template <bool kPairs, int N, int R>
void multiply_block(const Left& left, const float* right, int64_t right_step, int64_t depth,
                    const Result& out) {
  F32x sum[R][N] = {};
  const float* row[R];
  for (int r = 0; r < R; ++r) row[r] = left.data + r * left.row;
  int64_t at = 0;
  for (int64_t k = 0; k < depth; ++k, at += left.step, right += right_step) {
    F32x weight[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) weight[v] = load(right + v * lanes<float>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x x = splat(row[r][at]);
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
    for (int v = 0; v < N; ++v) {
      float* p = out.data + r * out.pitch + v * lanes<float>;
      store(p, out.add ? load(p) + sum[r][v] : sum[r][v] * out.factor);
    }
}

template <bool kPairs, int N, int R>
void multiply_rest(int rows, const Left& left, const float* right, int64_t right_step,
                   int64_t depth, const Result& out) {
  if (rows == R) return multiply_block<kPairs, N, R>(left, right, right_step, depth, out);
  if constexpr (R > 1) multiply_rest<kPairs, N, R - 1>(rows, left, right, right_step, depth, out);
}

template <bool kPairs, int N>
void multiply_panels(const Left& left, const Right& right, int64_t rows, int64_t depth,
                     int64_t panels, const Result& out) {
  constexpr int most = most_rows(N);
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t r = 0; r < rows; r += most) {
      const int64_t here = rows - r < most ? rows - r : most;
      multiply_rest<kPairs, N, most>(
          static_cast<int>(here), {left.data + r * left.row, left.row, left.step},
          right.data + panel * right.panel, right.step, depth,
          {out.data + r * out.pitch + panel * N * lanes<float>, out.pitch, out.add, out.factor});
    }
}

// Rows of out, of which so many panels of vectors are written.
template <bool kPairs>
void multiply_tile(const Left& left, const Right& right, int64_t rows, int64_t depth, int vectors,
                   int64_t panels, const Result& out) {
  switch (vectors) {
    case 1:
      return multiply_panels<kPairs, 1>(left, right, rows, depth, panels, out);
    case 2:
      return multiply_panels<kPairs, 2>(left, right, rows, depth, panels, out);
    case 3:
      return multiply_panels<kPairs, 3>(left, right, rows, depth, panels, out);
    default:
      return multiply_panels<kPairs, 4>(left, right, rows, depth, panels, out);
  }
}

// ---- tiles as products want them ----------------------------------------------------------------

// Rows of width numbers as rows of pitch words, fp32 or pairs along the row; 0 in what is beyond,
// and in rows from count on.
template <bool kPairs, class M>
void gather(const M* from, int64_t stride, int64_t width, int64_t count, int64_t rows, float* to,
            int64_t pitch) {
  for (int64_t r = 0; r < count; ++r, from += stride, to += pitch) {
    if constexpr (kPairs) {
      char* bytes = reinterpret_cast<char*>(to);
      const size_t length = static_cast<size_t>(width) * sizeof(M);
      if (length > 0) std::memcpy(bytes, from, length);
      std::memset(bytes + length, 0, static_cast<size_t>(pitch) * sizeof(float) - length);
    } else {
      for (int64_t c = 0; c < pitch; c += lanes<float>)
        store(to + c, c < width ? load_some<float>(from + c, width - c) : F32x{});
    }
  }
  for (int64_t i = 0; i < (rows - count) * pitch; i += lanes<float>) store(to + i, F32x{});
}

// Rows two by two, the pairs down the columns: [(count + 1) / 2] rows of columns, pitch apart.
inline void interleave(const bf16* from, int64_t stride, int64_t width, int64_t count, float* to,
                       int64_t pitch, int64_t columns) {
  for (int64_t r = 0; r < count; r += 2, from += 2 * stride, to += pitch)
    for (int64_t c = 0; c < columns; c += lanes<float>) {
      F32x first = {}, second = {};
      if (c < width) {
        first = load_some<float>(from + c, width - c);
        if (r + 1 < count) second = load_some<float>(from + stride + c, width - c);
      }
      store(to + c, bit_cast<F32x>(bit_cast<U32x>(first) >> 16 | bit_cast<U32x>(second)));
    }
}

// The right side of a product along rows: as gather or interleave makes it.
template <bool kPairs, class M>
void gather_right(const M* from, int64_t stride, int64_t width, int64_t count, float* to,
                  int64_t pitch) {
  if constexpr (kPairs)
    interleave(from, stride, width, count, to, pitch, pitch);
  else
    gather<false>(from, stride, width, count, count, to, pitch);
}

// Rows [panels.pitch()][depth], a whole number of vectors each, become columns:
// [panel][depth][panels.width()].
inline void transpose_to_panels(const float* from, int64_t depth, const Panels& panels, float* to) {
  const int64_t width = panels.width();
  for (int64_t panel = 0; panel < panels.pitch(); panel += width, to += depth * width)
#if defined(__AVX512F__)
    for (int64_t r = 0; r < width; r += 16)
      for (int64_t k = 0; k < depth; k += 16)
        transpose(from + (panel + r) * depth + k, depth, to + k * width + r, width);
#else
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t r = 0; r < width; ++r) to[k * width + r] = from[(panel + r) * depth + k];
#endif
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
