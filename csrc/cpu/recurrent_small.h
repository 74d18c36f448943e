// The products before and after the loop over steps, of layers so small that a library call costs
// as much as its product. Included by files that are compiled once per instruction set.
//
// All of them are one: rows of results, each the sum over k of a number of A times a row of B.
// Nothing is packed but the input's weight, whose columns are wanted as rows.
#pragma once

#include "recurrent_product.h"
#include "scratch.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// out[r][n] = start + sum over k of a[r * a_row + k * a_step] * b[k * b_step + n].
template <class T>
struct Product {
  const T* a;
  int64_t a_row, a_step;
  const T* b;
  int64_t b_step, depth;
  T* out;
  int64_t out_row, width;
  const T* start;  // what every row's sums start from; null: from 0
  bool more;       // on top of what is in out
};

// R rows of N vectors from column n on, the last of them of tail elements; steps [first, last),
// whose sum is added to what is there: errors are those of a panel and of as many as there are.
template <class T, int R, int N>
void product_block(const Product<T>& p, int64_t row, int64_t n, int64_t tail, int64_t first,
                   int64_t last, bool more) {
  constexpr int64_t full = lanes<T>;
  const auto count = [tail](int v) { return v == N - 1 ? tail : full; };
  V<T> sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const int64_t at = n + v * full;
      sum[r][v] = more || p.start == nullptr ? V<T>{} : load_some<T>(p.start + at, count(v));
    }
  const T* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = p.a + (row + r) * p.a_row;
  const auto steps = [&](auto is_full) {
    for (int64_t k = first; k < last; ++k) {
      const T* const from = p.b + k * p.b_step + n;
      V<T> b[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v)
        b[v] = decltype(is_full)::value || v < N - 1 ? load(from + v * full)
                                                     : load_some<T>(from + v * full, tail);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V<T> x = splat(a[r][k * p.a_step]);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) sum[r][v] = fma(x, b[v], sum[r][v]);
      }
    }
  };
  tail == full ? steps(std::true_type()) : steps(std::false_type());
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      T* const out = p.out + (row + r) * p.out_row + n + v * full;
      if (more) sum[r][v] += load_some<T>(out, count(v));
      store_some<T>(out, sum[r][v], count(v));
    }
}

template <class T, int N, int R>
void product_rows(const Product<T>& p, int rows, int64_t row, int64_t n, int64_t tail,
                  int64_t first, int64_t last, bool more) {
  if (rows == R) return product_block<T, R, N>(p, row, n, tail, first, last, more);
  if constexpr (R > 1) product_rows<T, N, R - 1>(p, rows, row, n, tail, first, last, more);
}

template <class T, int N>
void product_columns(const Product<T>& p, int64_t begin, int64_t end, int64_t n, int64_t tail) {
  constexpr int most = most_rows(N);
  constexpr int64_t panel = 64;  // steps of B that stay in L1 for all rows
  for (int64_t first = 0; first < p.depth || first == 0; first += panel) {
    const int64_t last = first + panel < p.depth ? first + panel : p.depth;
    const int64_t blocks = (end - begin + most - 1) / most;
    for (int64_t block = 0; block < blocks; ++block) {  // as equal as can be
      const int64_t from = begin + (end - begin) * block / blocks;
      const int64_t to = begin + (end - begin) * (block + 1) / blocks;
      product_rows<T, N, most>(p, static_cast<int>(to - from), from, n, tail, first, last,
                               p.more || first > 0);
    }
  }
}

// Rows [begin, end) of the results. Each is summed in the order of k, whatever the range.
template <class T>
void product(const Product<T>& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  for (int64_t n = 0; n < p.width; n += 4 * lanes<T>) {
    const int64_t left = p.width - n;
    const int64_t vectors = (left + lanes<T> - 1) / lanes<T>;
    const int64_t tail = left - (vectors - 1) * lanes<T>;
    switch (vectors) {
      case 1:
        product_columns<T, 1>(p, begin, end, n, tail);
        break;
      case 2:
        product_columns<T, 2>(p, begin, end, n, tail);
        break;
      case 3:
        product_columns<T, 3>(p, begin, end, n, tail);
        break;
      case 4:
        product_columns<T, 4>(p, begin, end, n, tail);
        break;
      default:
        product_columns<T, 4>(p, begin, end, n, lanes<T>);
    }
  }
}

// The input's weight with its columns as rows, pitch apart, and the sum of both biases behind them.
inline int64_t gates_pitch(const RecurrentProducts& a) {
  return (a.gates + lanes<float> - 1) / lanes<float> * lanes<float>;
}

int64_t products_bytes(const RecurrentProducts& a) {
  return (a.features + 1) * gates_pitch(a) * static_cast<int64_t>(sizeof(float));
}

void pack_products(const RecurrentProducts& a) {
  const int64_t pitch = gates_pitch(a), width = a.gates;
  const Source<float> source{a.weight_ih, a.features, 1, a.features};
  for (int64_t n = 0; n < width; n += lanes<float>) {
    const int64_t left = width - n, count = left < lanes<float> ? left : lanes<float>;
    const int64_t done =
        count < lanes<float> ? 0 : pack_whole<false>(source, n, a.features, a.packed + n, pitch);
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t k = done; k < a.features; ++k)
        a.packed[k * pitch + n + lane] = a.weight_ih[(n + lane) * a.features + k];
  }
  float* const bias = a.packed + a.features * pitch;
  for (int64_t n = 0; n < width; ++n)
    bias[n] = (a.bias_ih == nullptr ? 0 : a.bias_ih[n]) + (a.bias_hh == nullptr ? 0 : a.bias_hh[n]);
}

void input_gates(const RecurrentProducts& a, int64_t begin, int64_t end) {
  const int64_t pitch = gates_pitch(a);
  product<float>({a.input, a.features, 1, a.packed, pitch, a.features, a.gates_x, a.gates, a.gates,
                  a.packed + a.features * pitch, false},
                 begin, end);
}

// Sums over all rows of the columns [begin, end), 64 rows at a time: their errors are those of 64
// additions and of as many as there are parts.
void column_sums(const float* data, int64_t rows, int64_t width, int64_t begin, int64_t end,
                 float* out) {
  for (int64_t n = begin; n < end; n += lanes<float>) {
    const int64_t count = end - n;
    V<float> total{};
    for (int64_t first = 0; first < rows; first += 64) {
      const int64_t last = first + 64 < rows ? first + 64 : rows;
      V<float> part{};
      for (int64_t r = first; r < last; ++r) part += load_some<float>(data + r * width + n, count);
      total += part;
    }
    store_some<float>(out + n, total, count);
  }
}

// Rows [begin, end) of the gates: of both weights' gradients and of the biases'.
void weight_gradients(const RecurrentProducts& a, int64_t begin, int64_t end) {
  const int64_t rows = a.steps * a.batch, step = a.batch * a.gates;
  if (a.grad_weight_ih != nullptr)
    product<float>({a.grad_gates_x, 1, a.gates, a.input, a.features, rows, a.grad_weight_ih,
                    a.features, a.features, nullptr, false},
                   begin, end);
  if (a.grad_weight_hh != nullptr) {
    // The first step in time started from h0, all others from the output of the step before.
    const float* const first = a.grad_gates_h + (a.reverse ? (a.steps - 1) * step : 0);
    const float* const later = a.grad_gates_h + (a.reverse ? 0 : step);
    const float* const before = a.output + (a.reverse ? a.batch * a.state : 0);
    product<float>({first, 1, a.gates, a.h0, a.state, a.batch, a.grad_weight_hh, a.state, a.state,
                    nullptr, false},
                   begin, end);
    product<float>({later, 1, a.gates, before, a.state, rows - a.batch, a.grad_weight_hh, a.state,
                    a.state, nullptr, true},
                   begin, end);
  }
  if (a.grad_bias_ih != nullptr)
    column_sums(a.grad_gates_x, rows, a.gates, begin, end, a.grad_bias_ih);
  if (a.grad_bias_hh != nullptr)
    column_sums(a.grad_gates_h, rows, a.gates, begin, end, a.grad_bias_hh);
}

// Rows [begin, end) of all steps' rows: of the input's gradient.
void input_gradient(const RecurrentProducts& a, int64_t begin, int64_t end) {
  product<float>({a.grad_gates_x, a.gates, 1, a.weight_ih, a.features, a.gates, a.grad_input,
                  a.features, a.features, nullptr, false},
                 begin, end);
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
