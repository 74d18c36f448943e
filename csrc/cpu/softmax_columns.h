// Softmax and log_softmax along a dimension that is not the last, forward and backward. Included by
// softmax.cpp.
//
// The elements of a column lie apart, those of neighbouring columns side by side: a slab of columns
// is read row by row, a lane for each column, and nothing goes across lanes. What is kept of a
// column, its maximum or sum, is in L1, and kGroup rows are taken at a time, from registers.
//
//   forward    maximum and sum of exp together -> exp again and scale
//   backward   sum of grad * y -> write
//
// Both read a slab twice, the second time last row first, for those are still in cache. Forward
// might keep exp in a buffer instead of taking it twice; but only narrow slabs fit one that L2
// holds, and to read a matrix by narrow slabs costs more than exp: the rows of a slab lie pages
// apart, where no prefetching by the processor goes.
#pragma once

#include <type_traits>

#include "exp.h"
#include "rows.h"
#include "scratch.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int64_t kSlab = 512;  // columns of a task at most
constexpr int kGroup = 8;       // rows of which each has a vector in a register
constexpr int64_t kBefore = 4;  // rows to look back while the last are written first

template <class T>
inline T infinity() {
  return static_cast<T>(__builtin_inf());
}

// e^x for results that are rounded to 16 bits (Coarse), or for any.
template <class T, bool Coarse>
inline V<T> power_of(V<T> x) {
  if constexpr (Coarse)
    return exp_coarse(x);
  else
    return exp_nonpositive(x);
}

enum class Kind { softmax, log_softmax, masked };

// What an element adds to the sum of its row or column.
template <class T, Kind K>
inline V<T> summand(V<T> grad, V<T> y) {
  if constexpr (K == Kind::log_softmax)
    return grad;
  else if constexpr (K == Kind::masked)
    return y == T(0) ? V<T>{} : grad * y;
  else
    return grad * y;
}

template <class T, Kind K>
inline V<T> gradient(V<T> grad, V<T> y, V<T> sum, T scale) {
  if constexpr (K == Kind::log_softmax)
    return grad - exp(y) * sum;
  else if constexpr (K == Kind::masked)
    return y == T(0) ? V<T>{} : (grad - sum) * y * scale;
  else
    return (grad - sum) * y;
}

// Columns [first, first + count) of slice outer.
struct Slab {
  int64_t outer, first, count;
};

// Runs solve on the slabs of the tasks [begin, end).
template <class Solve>
void for_slabs(int64_t inner, int64_t columns, int64_t begin, int64_t end, Solve solve) {
  const int64_t slabs = (inner + columns - 1) / columns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % slabs * columns;
    solve(Slab{task / slabs, first, inner - first < columns ? inner - first : columns});
  }
  fence();
}

// Row i of a slab begins at data + i * stride.
template <class M>
struct Place {
  M* data;
  int64_t stride;
  Place(const Rows& rows, const Slab& slab, int64_t length) {
    char* const start = row_of(rows, slab.outer * length);
    const int64_t bytes = length == 1 ? 0 : row_of(rows, slab.outer * length + 1) - start;
    data = reinterpret_cast<M*>(start) + slab.first;
    stride = bytes / static_cast<int64_t>(sizeof(M));
  }
  M* operator[](int64_t i) const { return data + i * stride; }
};

// Kahan's sum of one number a column: total and what it lost to rounding.
template <class T>
inline void add_to(T* total, T* lost, V<T> more) {
  const V<T> before = load(total), y = more - load(lost), sum = before + y;
  store(lost, (sum - before) - y);
  store(total, sum);
}

// Calls merge(i, j, rows) with constant rows for the vectors j of the rows from i on.
template <class T, class Merge>
inline void by_groups(int64_t length, int64_t count, Merge merge) {
  int64_t i = 0;
  for (; i + kGroup <= length; i += kGroup)
    for (int64_t j = 0; j < count; j += lanes<T>)
      merge(i, j, std::integral_constant<int, kGroup>{});
  for (; i < length; ++i)
    for (int64_t j = 0; j < count; j += lanes<T>) merge(i, j, std::integral_constant<int, 1>{});
}

// Writes value(i, j) to all of a slab, last row first.
template <class T, class M, class Value>
inline void write_slab(const Place<M>& y, int64_t length, int64_t count, bool past_cache,
                       Value value) {
  constexpr int64_t vector = lanes<T> * sizeof(M);
  const bool streams = past_cache && reinterpret_cast<uintptr_t>(y.data) % vector == 0 &&
                       y.stride * static_cast<int64_t>(sizeof(M)) % vector == 0;
  for (int64_t i = length - 1; i >= 0; --i) {
    int64_t j = 0;
    if (streams)
      for (; j + lanes<T> <= count; j += lanes<T>) stream(y[i] + j, value(i, j));
    for (; j < count; j += lanes<T>) store_some<T>(y[i] + j, value(i, j), count - j);
  }
}

template <class T, class M, class Out, bool Log, bool Coarse>
void forward_slab(const SoftmaxForward& args, const Slab& slab) {
  const int64_t n = args.length, count = slab.count;
  const Place<const M> x(args.input, slab, n);
  // Of each column the maximum so far, and the sum of exp(x - maximum) with what it lost.
  alignas(64) T most[kSlab], total[kSlab] = {}, lost[kSlab] = {};
  for (T& m : most) m = -infinity<T>();
  by_groups<T>(n, count, [&](int64_t i, int64_t j, auto rows) {
    V<T> v[rows()];
    const V<T> before = load(most + j);
    V<T> top = before;
    for (int r = 0; r < rows(); ++r) {
      v[r] = load_some<T>(x[i + r] + j, count - j);
      __builtin_prefetch(x[i + r + kGroup] + j);
      top = maximum(top, v[r]);
    }
    store(most + j, top);
    // Of a group of -Inf alone every exponential is 0, which -Inf - -Inf would not give.
    const V<T> from = top == -infinity<T>() ? V<T>{} : top;
    V<T> sum = {};
    for (int r = 0; r < rows(); ++r) sum += power_of<T, Coarse>(v[r] - from);
    const V<T> less = power_of<T, Coarse>(before - from);
    store(total + j, load(total + j) * less);
    store(lost + j, load(lost + j) * less);
    add_to(total + j, lost + j, sum);
  });
  for (int64_t j = 0; j < count; j += lanes<T>)
    store(total + j, Log ? log<T>(load(total + j)) : T(1) / load(total + j));
  write_slab<T>(Place<Out>(args.output, slab, n), n, count, args.past_cache,
                [&](int64_t i, int64_t j) {
                  __builtin_prefetch(x[i - kBefore] + j);
                  const V<T> shifted = load_some<T>(x[i] + j, count - j) - load(most + j);
                  const V<T> factor = load(total + j);
                  return Log ? shifted - factor : power_of<T, Coarse>(shifted) * factor;
                });
}

template <class T, bool Log>
void forward_columns(const SoftmaxForward& args, int64_t begin, int64_t end) {
  with_types<T>(args.input.dtype, args.output.dtype, [&](auto* from, auto* to) {
    using M = std::remove_pointer_t<decltype(from)>;
    using Out = std::remove_pointer_t<decltype(to)>;
    for_slabs(args.inner, args.columns, begin, end, [&](const Slab& slab) {
      forward_slab<T, M, Out, Log, sizeof(M) == 2 && sizeof(Out) == 2>(args, slab);
    });
  });
}

template <class T, class M, class Out, Kind K>
void backward_slab(const SoftmaxBackward& args, const Slab& slab) {
  const int64_t n = args.length, count = slab.count;
  const Place<const M> grad(args.grad_output, slab, n), y(args.output, slab, n);
  alignas(64) T total[kSlab] = {}, lost[kSlab] = {};
  by_groups<T>(n, count, [&](int64_t i, int64_t j, auto rows) {
    V<T> sum = {};
    for (int r = 0; r < rows(); ++r) {
      sum += summand<T, K>(load_some<T>(grad[i + r] + j, count - j),
                           load_some<T>(y[i + r] + j, count - j));
      // Into L2: two tensors' rows ahead would fill L1.
      __builtin_prefetch(grad[i + r + kGroup] + j, 0, 2);
      __builtin_prefetch(y[i + r + kGroup] + j, 0, 2);
    }
    add_to(total + j, lost + j, sum);
  });
  write_slab<T>(Place<Out>(args.grad_input, slab, n), n, count, args.past_cache,
                [&](int64_t i, int64_t j) {
                  __builtin_prefetch(grad[i - kBefore] + j);
                  __builtin_prefetch(y[i - kBefore] + j);
                  return gradient<T, K>(load_some<T>(grad[i] + j, count - j),
                                        load_some<T>(y[i] + j, count - j), load(total + j), T(1));
                });
}

template <class T, Kind K>
void backward_columns(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  with_types<T>(args.output.dtype, args.grad_input.dtype, [&](auto* from, auto* to) {
    using M = std::remove_pointer_t<decltype(from)>;
    using Out = std::remove_pointer_t<decltype(to)>;
    for_slabs(args.inner, args.columns, begin, end,
              [&](const Slab& slab) { backward_slab<T, M, Out, K>(args, slab); });
  });
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
