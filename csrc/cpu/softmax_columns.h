// Softmax and log_softmax along a dimension that is not the last, forward and backward. Included by
// softmax.cpp.
//
// The elements of a column lie apart, those of neighbouring columns side by side: a slab of columns
// is read row by row, a lane for each column, and nothing goes across lanes. What is kept of a
// column, its maximum or sum, is in L1, and kGroup rows are taken at a time, from registers.
//
//   forward    maximum -> exp and its sum -> scale. exp is what takes the time, so it is taken
//   once:
//              the slab is kept in fp32 in a buffer that L2 holds, which makes long slabs narrow.
//              Left where they are its rows would not stay in cache: they often lie a power of two
//              apart, in the same few sets.
//   backward   sum of grad * y -> write, last row first, for those are still in cache. A wide slab
//              that is read twice is faster here than a narrow one in a buffer.
#pragma once

#include <type_traits>

#include "exp.h"
#include "rows.h"
#include "scratch.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int64_t kSlab = 512;          // columns of a task at most
constexpr int64_t kBuffer = 512 << 10;  // bytes of L2 for the forward's slab
constexpr int kGroup = 8;               // rows of which each has a vector in a register

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
    return exp(x);
}

// Whether the numbers come in and go out in 16 bits.
inline bool is_coarse(const Rows& input, const Rows& output) {
  return element_size(input.dtype) == 2 && element_size(output.dtype) == 2;
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

// Columns of a slab: whole lines of memory. They decide how tasks are cut, and nothing else.
inline int64_t slab_columns(int64_t length, DType compute, bool forward) {
  const int64_t size = element_size(compute), line = 64 / size;
  const int64_t fitting = forward ? kBuffer / (length * size) / line * line : kSlab;
  return fitting < line ? line : fitting < kSlab ? fitting : kSlab;
}

// Runs solve on the slabs of the tasks [begin, end).
template <class Solve>
void for_slabs(int64_t inner, int64_t width, int64_t begin, int64_t end, Solve solve) {
  const int64_t slabs = (inner + width - 1) / width;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % slabs * width;
    solve(Slab{task / slabs, first, inner - first < width ? inner - first : width});
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
  const int64_t pitch = (count + lanes<T> - 1) / lanes<T> * lanes<T>;
  T* const buffer = static_cast<T*>(thread_scratch(static_cast<size_t>(n * pitch) * sizeof(T)));
  const auto at = [buffer, pitch](int64_t i, int64_t j) { return buffer + i * pitch + j; };
  const Place<const M> x(args.input, slab, n);
  alignas(64) T most[kSlab], total[kSlab] = {}, lost[kSlab] = {};
  for (T& m : most) m = -infinity<T>();
  by_groups<T>(n, count, [&](int64_t i, int64_t j, auto rows) {
    V<T> top = load(most + j);
    for (int r = 0; r < rows(); ++r) {
      const V<T> v = load_some<T>(x[i + r] + j, count - j);
      __builtin_prefetch(x[i + r + kGroup] + j);
      store(at(i + r, j), v);
      top = maximum(top, v);
    }
    store(most + j, top);
  });
  by_groups<T>(n, count, [&](int64_t i, int64_t j, auto rows) {
    const V<T> top = load(most + j);
    V<T> sum = {};
    for (int r = 0; r < rows(); ++r) {
      const V<T> shifted = load(at(i + r, j)) - top;
      const V<T> power = power_of<T, Coarse>(shifted);
      store(at(i + r, j), Log ? shifted : power);
      sum += power;
    }
    add_to(total + j, lost + j, sum);
  });
  for (int64_t j = 0; j < count; j += lanes<T>)
    store(total + j, Log ? log<T>(load(total + j)) : T(1) / load(total + j));
  write_slab<T>(Place<Out>(args.output, slab, n), n, count, args.past_cache,
                [&](int64_t i, int64_t j) {
                  const V<T> kept = load(at(i, j)), factor = load(total + j);
                  return Log ? kept - factor : kept * factor;
                });
}

template <class T, bool Log>
void forward_columns(const SoftmaxForward& args, int64_t begin, int64_t end) {
  with_type<T>(args.input.dtype, [&](auto* from) {
    with_type<T>(args.output.dtype, [&](auto* to) {
      using M = std::remove_pointer_t<decltype(from)>;
      using Out = std::remove_pointer_t<decltype(to)>;
      const int64_t width = slab_columns(args.length, memory_dtype<T>, true);
      for_slabs(args.inner, width, begin, end, [&](const Slab& slab) {
        forward_slab<T, M, Out, Log, sizeof(M) == 2 && sizeof(Out) == 2>(args, slab);
      });
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
      __builtin_prefetch(grad[i + r + kGroup] + j);
      __builtin_prefetch(y[i + r + kGroup] + j);
    }
    add_to(total + j, lost + j, sum);
  });
  write_slab<T>(Place<Out>(args.grad_input, slab, n), n, count, args.past_cache,
                [&](int64_t i, int64_t j) {
                  return gradient<T, K>(load_some<T>(grad[i] + j, count - j),
                                        load_some<T>(y[i] + j, count - j), load(total + j), T(1));
                });
}

template <class T, Kind K>
void backward_columns(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  with_type<T>(args.output.dtype, [&](auto* from) {
    with_type<T>(args.grad_input.dtype, [&](auto* to) {
      using M = std::remove_pointer_t<decltype(from)>;
      using Out = std::remove_pointer_t<decltype(to)>;
      for_slabs(args.inner, slab_columns(args.length, memory_dtype<T>, false), begin, end,
                [&](const Slab& slab) { backward_slab<T, M, Out, K>(args, slab); });
    });
  });
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
