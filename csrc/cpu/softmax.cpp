// Softmax, log_softmax and masked_softmax on the CPU, forward and backward, along any dimension.
//
//   forward    maximum -> exp and its sum -> scale       reads x once, writes y once
//   backward   sum of grad * y -> write                  reads y and grad once, writes once
//
// Along the last dimension a row is swept three times, but only the first sweep meets memory: what
// lies between the sweeps is kept in fp32 in a buffer that L1 or L2 holds, so exp is taken once an
// element and 16-bit numbers are converted once.
//
// Along another dimension the elements of a column lie apart, and those of neighbouring columns
// side by side: columns are taken kTile vectors at a time, a lane each, and nothing goes across
// lanes. The buffer serves here, too: the rows of such a tile often lie a power of two apart, where
// a few hundred of them fall into the same sets of the cache and throw each other out. Columns too
// long for a buffer in L2 are read in every sweep.
//
// Arithmetic is in the compute type T (float, or double for fp64); M is a type in memory.
#include "softmax.h"

#include <type_traits>

#include "exp.h"
#include "rows.h"
#include "scratch.h"

extern "C" double log(double);

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kTile = 4;                   // vectors of a tile of columns
constexpr int64_t kBuffer = 512 << 10;     // bytes a tile's buffer may take of L2
constexpr int64_t kColumnBlock = 1 << 10;  // summands of a partial sum over a column
constexpr int64_t kRowsAhead = 16;         // rows of a column to look ahead

template <class T>
inline T infinity() {
  return static_cast<T>(__builtin_inf());
}

// v in the first count lanes, -Inf in the others.
template <class T>
inline V<T> first_or_least(V<T> v, int64_t count) {
  if (count >= lanes<T>) return v;
  typename Simd<T>::Mask lane;
  for (int i = 0; i < lanes<T>; ++i) lane[i] = i;
  using Lane = decltype(lane[0] + 0);
  return lane < static_cast<Lane>(count) ? v : splat(-infinity<T>());
}

// ---- forward along rows
// ---------------------------------------------------------------------------

template <class T, class M>
T row_maximum(const M* x, int64_t n) {
  constexpr int width = lanes<T>;
  V<T> even = splat(-infinity<T>()), odd = even;
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    V<T> first, second;
    load_two(x + i, first, second);
    even = maximum(even, first);
    odd = maximum(odd, second);
  }
  for (; i < n; i += width)
    even = maximum(even, first_or_least<T>(load_some<T>(x + i, n - i), n - i));
  return horizontal_maximum<T>(maximum(even, odd));
}

// e^x for results that are rounded to 16 bits (Coarse), or for any.
template <class T, bool Coarse>
inline V<T> power_of(V<T> x) {
  if constexpr (Coarse)
    return exp_coarse(x);
  else
    return exp(x);
}

// exp(x - shift), or with Log x - shift, into the buffer; returns the sum of exp(x - shift).
template <class T, class M, bool Log, bool Coarse>
double exponentials(const M* x, T shift, T* buffer, int64_t n, const Ahead& ahead) {
  constexpr int width = lanes<T>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    V<T> sum = {};
    int64_t i = begin;
    for (; i + width <= end; i += width) {
      const V<T> shifted = load(x + i) - shift;
      const V<T> power = power_of<T, Coarse>(shifted);
      sum += power;
      store(buffer + i, Log ? shifted : power);
      ahead.prefetch(i);
    }
    if (i < end) {
      const V<T> shifted = load_some<T>(x + i, end - i) - shift;
      const V<T> power = keep_first<T>(power_of<T, Coarse>(shifted), end - i);
      sum += power;
      store(buffer + i, Log ? shifted : power);  // the buffer has room for a whole vector
    }
    total += horizontal_sum<T>(sum);
  }
  return total;
}

// Whether the numbers of a row come in and go out in 16 bits.
inline bool is_coarse(const SoftmaxForward& args) {
  return element_size(args.input.dtype) == 2 && element_size(args.output.dtype) == 2;
}

template <class T, bool Log>
void write_normalized(const SoftmaxForward& args, int64_t row, const T* buffer, double total) {
  with_type<T>(args.output.dtype, [&](auto* type) {
    auto* y = reinterpret_cast<decltype(type)>(row_of(args.output, row));
    if constexpr (Log) {
      const T offset = static_cast<T>(::log(total));
      write_values<T>(
          y, args.length, args.past_cache,
          [=](int64_t i, auto read) { return read(buffer + i) - offset; }, [](int64_t) {});
    } else {
      // Only a masked row can sum up to 0: all its exponentials are 0 then, and so is the result.
      const T factor = total == 0 ? T(0) : static_cast<T>(1.0 / total);
      write_values<T>(
          y, args.length, args.past_cache,
          [=](int64_t i, auto read) { return read(buffer + i) * factor; }, [](int64_t) {});
    }
  });
}

template <class T, bool Log>
void forward_rows(const SoftmaxForward& args, int64_t begin, int64_t end) {
  const int64_t n = args.length;
  T* const buffer = static_cast<T*>(thread_scratch(static_cast<size_t>(n + lanes<T>) * sizeof(T)));
  with_type<T>(args.input.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      const M* x = reinterpret_cast<const M*>(row_of(args.input, row));
      const Ahead ahead(args.input, row, n > kAhead ? n : kAhead);
      const T maximum = row_maximum<T>(x, n);
      double total = 0;
      if (sizeof(M) == 2 && is_coarse(args))
        total = exponentials<T, M, Log, sizeof(M) == 2>(x, maximum, buffer, n, ahead);
      else
        total = exponentials<T, M, Log, false>(x, maximum, buffer, n, ahead);
      write_normalized<T, Log>(args, row, buffer, total);
    }
  });
  fence();
}

// ---- masked rows
// ----------------------------------------------------------------------------------

// Calls f with a pointer to the element of the mask that row begins with, as uint8_t or M.
template <class T, class F>
void with_mask(const RowMask& mask, int64_t row, F f) {
  const int64_t last = row % mask.size[1], rest = row / mask.size[1];
  const int64_t element = (rest / mask.size[0]) * mask.stride[0] +
                          (rest % mask.size[0]) * mask.stride[1] + last * mask.stride[2];
  if (mask.boolean) return f(static_cast<const uint8_t*>(mask.data) + element);
  with_type<T>(mask.dtype, [&](auto* type) {
    using B = std::remove_pointer_t<decltype(type)>;
    f(static_cast<const B*>(mask.data) + element);
  });
}

// What a mask makes of scores: -Inf where it takes them out, whatever they are, NaN included.
template <class T, class B>
inline V<T> masked(V<T> scores, const B* mask, int64_t count) {
  if constexpr (std::is_same_v<B, uint8_t>) {
    typedef uint8_t Bytes __attribute__((vector_size(lanes<T>)));
    Bytes bytes = {};
    std::memcpy(&bytes, mask, static_cast<size_t>(count < lanes<T> ? count : lanes<T>));
#if defined(__AVX512F__)
    if constexpr (lanes<T> == 16) {  // GCC takes the bytes apart by quarters
      const __m128i lanes_in = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&bytes));
      return bit_cast<V<T>>(_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()),
                                               _mm_test_epi8_mask(lanes_in, lanes_in),
                                               bit_cast<__m512>(scores)));
    }
#endif
    const auto takes_part = __builtin_convertvector(bytes, typename Simd<T>::Mask) != 0;
    return takes_part ? scores : splat(-infinity<T>());
  } else {
    const V<T> bias = load_some<T>(mask, count);
    return bias == -infinity<T>() ? bias : scores + bias;
  }
}

// scale * x as apply makes it into the buffer; returns the maximum.
template <class T, class M, class Apply>
T scores_of(const M* x, T scale, T* buffer, int64_t n, Apply apply) {
  constexpr int width = lanes<T>;
  V<T> most = splat(-infinity<T>());
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    const V<T> scores = apply(load(x + i) * scale, i, int64_t(width));
    store(buffer + i, scores);
    most = maximum(most, scores);
  }
  if (i < n) {
    const V<T> scores =
        first_or_least<T>(apply(load_some<T>(x + i, n - i) * scale, i, n - i), n - i);
    store(buffer + i, scores);
    most = maximum(most, scores);
  }
  return horizontal_maximum<T>(most);
}

template <class T, class M>
T masked_scores(const SoftmaxForward& args, int64_t row, T* buffer, int64_t n) {
  const M* x = reinterpret_cast<const M*>(row_of(args.input, row));
  const T scale = static_cast<T>(args.scale);
  if (args.mask.data == nullptr)
    return scores_of<T>(x, scale, buffer, n, [](V<T> v, int64_t, int64_t) { return v; });
  T most = 0;
  with_mask<T>(args.mask, row, [&](const auto* mask) {
    using B = std::remove_const_t<std::remove_pointer_t<decltype(mask)>>;
    if (args.mask.stride_column != 0) {
      most = scores_of<T>(x, scale, buffer, n, [mask](V<T> v, int64_t i, int64_t count) {
        return masked<T>(v, mask + i, count);
      });
      return;
    }
    B same[lanes<T>];
    for (B& element : same) element = *mask;
    most = scores_of<T>(x, scale, buffer, n,
                        [&same](V<T> v, int64_t, int64_t) { return masked<T>(v, same, lanes<T>); });
  });
  return most;
}

template <class T>
void forward_masked(const SoftmaxForward& args, int64_t begin, int64_t end) {
  const int64_t n = args.length;
  T* const buffer = static_cast<T*>(thread_scratch(static_cast<size_t>(n + lanes<T>) * sizeof(T)));
  with_type<T>(args.input.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      int64_t seen = n;
      if (args.causal.queries != 0) {
        seen = row % args.causal.queries + args.causal.offset + 1;
        seen = seen < 0 ? 0 : seen > n ? n : seen;
      }
      const Ahead ahead(args.input, row, n > kAhead ? n : kAhead);
      const T most = masked_scores<T, M>(args, row, buffer, seen);
      // A row without anything that takes part: exp(-Inf - 0) = 0, but NaN stays NaN.
      const T shift = most == -infinity<T>() ? T(0) : most;
      constexpr bool narrow = sizeof(M) == 2;
      const double total =
          narrow && is_coarse(args)
              ? exponentials<T, T, false, narrow>(buffer, shift, buffer, seen, ahead)
              : exponentials<T, T, false, false>(buffer, shift, buffer, seen, ahead);
      for (int64_t i = seen; i < n; ++i) buffer[i] = 0;
      write_normalized<T, false>(args, row, buffer, total);
    }
  });
  fence();
}

// ---- backward along rows
// --------------------------------------------------------------------------

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

template <class T, class M, Kind K>
T row_sum(const M* grad, const M* y, int64_t n, int64_t ahead) {
  constexpr int width = lanes<T>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    V<T> even = {}, odd = {};
    int64_t i = begin;
    for (; i + 2 * width <= end; i += 2 * width) {
      V<T> grads[2], ys[2];
      load_two(grad + i, grads[0], grads[1]);
      load_two(y + i, ys[0], ys[1]);
      even += summand<T, K>(grads[0], ys[0]);
      odd += summand<T, K>(grads[1], ys[1]);
      __builtin_prefetch(grad + i + ahead, 0, 2);
      if (sizeof(M) > 2) __builtin_prefetch(grad + i + width + ahead, 0, 2);
    }
    for (; i < end; i += width)
      even += summand<T, K>(load_some<T>(grad + i, end - i), load_some<T>(y + i, end - i));
    total += horizontal_sum<T>(even + odd);
  }
  return settled(static_cast<T>(total));
}

// grad_output, output and grad_input of one type in memory, or all converted in the workspace.
template <class T, class M, Kind K>
void backward_row(const SoftmaxBackward& args, const M* grad, const M* y, M* target,
                  bool past_cache) {
  const int64_t n = args.length;
  const int64_t ahead = n > kAhead ? n : kAhead;
  const V<T> sum = splat(row_sum<T, M, K>(grad, y, n, ahead));
  write_values<T>(
      target, n, past_cache,
      [=, scale = static_cast<T>(args.scale)](int64_t i, auto read) {
        return gradient<T, K>(read(grad + i), read(y + i), sum, scale);
      },
      [=](int64_t i) { __builtin_prefetch(y + i + ahead, 0, 2); });
}

template <class T, Kind K>
void backward_rows(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  const int64_t n = args.length, stride = (n + 63) / 64 * 64;
  const DType type = args.output.dtype;
  with_type<T>(type, [&](auto* of_type) {
    using M = std::remove_pointer_t<decltype(of_type)>;
    if (args.grad_output.dtype == type && args.grad_input.dtype == type) {
      for (int64_t row = begin; row < end; ++row)
        backward_row<T, M, K>(args, reinterpret_cast<M*>(row_of(args.grad_output, row)),
                              reinterpret_cast<M*>(row_of(args.output, row)),
                              reinterpret_cast<M*>(row_of(args.grad_input, row)), args.past_cache);
      return;
    }
    T* const work = static_cast<T*>(thread_scratch(static_cast<size_t>(3 * stride) * sizeof(T)));
    for (int64_t row = begin; row < end; ++row) {
      const T* grad = read_row(args.grad_output, row, work, n);
      const T* y = read_row(args.output, row, work + stride, n);
      backward_row<T, T, K>(args, grad, y, work + 2 * stride, false);
      write_row(args.grad_input, row, work + 2 * stride, n);
    }
  });
  fence();
}

// ---- columns
// --------------------------------------------------------------------------------------

// Columns side by side, those of one task or fewer: count lanes, of which Vectors vectors are full
// or the only one is not.
template <class T, int Vectors>
struct Columns {
  static constexpr int vectors = Vectors;
  static constexpr int64_t width = Vectors * lanes<T>;
  int64_t outer, first, count;

  // The element row i of these columns lies at data + i * stride.
  template <class M>
  struct Place {
    M* data;
    int64_t stride;
    M* operator[](int64_t i) const { return data + i * stride; }
  };
  template <class M>
  Place<M> place(const Rows& rows, int64_t length) const {
    char* const data = row_of(rows, outer * length);
    const int64_t bytes = length == 1 ? 0 : row_of(rows, outer * length + 1) - data;
    return {reinterpret_cast<M*>(data) + first, bytes / static_cast<int64_t>(sizeof(M))};
  }
  template <class M>
  V<T> read(const M* p, int k) const {
    if constexpr (Vectors > 1) return load(p + k * lanes<T>);
    return load_some<T>(p, count);
  }

  // Calls take(i - begin, k, vector) for every vector of the rows [begin, end).
  template <class Take>
  void each(const Rows& rows, int64_t length, int64_t begin, int64_t end, Take take) const {
    with_type<T>(rows.dtype, [&](auto* type) {
      const auto x = place<std::remove_pointer_t<decltype(type)>>(rows, length);
      for (int64_t i = begin; i < end; ++i) {
        // The hardware follows no stride past a page.
        if (Vectors > 1)
          for (int64_t at = 0; at < width; at += 64 / sizeof(*x.data))
            __builtin_prefetch(x[i + kRowsAhead] + at, 0, 2);
#pragma GCC unroll 4
        for (int k = 0; k < Vectors; ++k) take(i - begin, k, read(x[i], k));
      }
    });
  }

  // Writes value(i - begin, k) to every vector of the rows [begin, end).
  template <class Value>
  void write(const Rows& rows, int64_t length, int64_t begin, int64_t end, bool past_cache,
             Value value) const {
    with_type<T>(rows.dtype, [&](auto* type) {
      using M = std::remove_pointer_t<decltype(type)>;
      const auto y = place<M>(rows, length);
      constexpr int64_t vector = lanes<T> * sizeof(M);
      const bool streams = past_cache && Vectors > 1 &&
                           reinterpret_cast<uintptr_t>(y.data) % vector == 0 &&
                           y.stride * static_cast<int64_t>(sizeof(M)) % vector == 0;
      for (int64_t i = begin; i < end; ++i)
#pragma GCC unroll 4
        for (int k = 0; k < Vectors; ++k) {
          const V<T> v = value(i - begin, k);
          if (streams)
            stream(y[i] + k * lanes<T>, v);
          else if (Vectors > 1)
            store(y[i] + k * lanes<T>, v);
          else
            store_some<T>(y[i], v, count);
        }
    });
  }
};

// A sum over rows in partial sums of kColumnBlock, whose error bounds that of the whole.
template <class T, int Vectors>
struct ColumnSum {
  V<T> total[Vectors] = {};
  template <class Summand>
  void add(int64_t rows, Summand summand) {
    for (int64_t begin = 0; begin < rows; begin += kColumnBlock) {
      const int64_t end = begin + kColumnBlock < rows ? begin + kColumnBlock : rows;
      V<T> partial[Vectors] = {};
      for (int64_t i = begin; i < end; ++i)
#pragma GCC unroll 4
        for (int k = 0; k < Vectors; ++k) partial[k] += summand(i, k);
      for (int k = 0; k < Vectors; ++k) total[k] += partial[k];
    }
  }
};

template <class T, int Vectors, bool Log>
void forward_columns(const SoftmaxForward& args, const Columns<T, Vectors>& columns) {
  constexpr int64_t width = Columns<T, Vectors>::width;
  const int64_t n = args.length, capacity = kBuffer / (width * static_cast<int64_t>(sizeof(T)));
  const int64_t block = n < capacity ? n : capacity;
  T* const buffer = static_cast<T*>(thread_scratch(static_cast<size_t>(block * width) * sizeof(T)));
  const auto at = [buffer](int64_t i, int k) { return buffer + i * width + k * lanes<T>; };
  const bool whole = n == block;

  V<T> most[Vectors];
  for (int k = 0; k < Vectors; ++k) most[k] = splat(-infinity<T>());
  const auto read = [&](int64_t begin, int64_t end) {
    columns.each(args.input, n, begin, end, [&](int64_t i, int k, V<T> v) { store(at(i, k), v); });
  };
  columns.each(args.input, n, 0, n, [&](int64_t i, int k, V<T> v) {
    most[k] = maximum(most[k], v);
    if (whole) store(at(i, k), v);
  });

  ColumnSum<T, Vectors> sum;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = begin + block < n ? begin + block : n;
    if (!whole) read(begin, end);
    sum.add(end - begin, [&](int64_t i, int k) {
      const V<T> shifted = load(at(i, k)) - most[k];
      const V<T> power = exp(shifted);
      if (whole) store(at(i, k), Log ? shifted : power);
      return power;
    });
  }

  V<T> factor[Vectors];
  for (int k = 0; k < Vectors; ++k) factor[k] = Log ? log<T>(sum.total[k]) : T(1) / sum.total[k];
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = begin + block < n ? begin + block : n;
    if (!whole) read(begin, end);
    columns.write(args.output, n, begin, end, args.past_cache, [&](int64_t i, int k) {
      V<T> v = load(at(i, k));
      if (!whole) v = Log ? v - most[k] : exp(v - most[k]);
      return Log ? v - factor[k] : v * factor[k];
    });
  }
}

template <class T, int Vectors, Kind K>
void backward_columns(const SoftmaxBackward& args, const Columns<T, Vectors>& columns) {
  constexpr int64_t width = Columns<T, Vectors>::width;
  const int64_t n = args.length, capacity = kBuffer / (2 * width * static_cast<int64_t>(sizeof(T)));
  const int64_t block = n < capacity ? n : capacity;
  T* const buffer =
      static_cast<T*>(thread_scratch(static_cast<size_t>(2 * block * width) * sizeof(T)));
  const auto grad = [buffer](int64_t i, int k) { return buffer + 2 * i * width + k * lanes<T>; };
  const auto y = [grad](int64_t i, int k) { return grad(i, k) + width; };
  const auto read = [&](int64_t begin, int64_t end) {
    columns.each(args.grad_output, n, begin, end,
                 [&](int64_t i, int k, V<T> v) { store(grad(i, k), v); });
    columns.each(args.output, n, begin, end, [&](int64_t i, int k, V<T> v) { store(y(i, k), v); });
  };

  ColumnSum<T, Vectors> sum;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = begin + block < n ? begin + block : n;
    read(begin, end);
    sum.add(end - begin,
            [&](int64_t i, int k) { return summand<T, K>(load(grad(i, k)), load(y(i, k))); });
  }
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = begin + block < n ? begin + block : n;
    if (n != block) read(begin, end);
    columns.write(args.grad_input, n, begin, end, args.past_cache, [&](int64_t i, int k) {
      return gradient<T, K>(load(grad(i, k)), load(y(i, k)), sum.total[k], T(1));
    });
  }
}

// Runs solve on the columns of the tasks [begin, end).
template <class T, class Solve>
void for_columns(int64_t inner, int64_t begin, int64_t end, Solve solve) {
  constexpr int64_t width = kTile * lanes<T>;
  const int64_t tiles = (inner + width - 1) / width;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t outer = task / tiles;
    int64_t first = task % tiles * width;
    const int64_t last = first + width < inner ? first + width : inner;
    if (last - first == width) {
      solve(Columns<T, kTile>{outer, first, width});
      continue;
    }
    for (; first < last; first += lanes<T>) solve(Columns<T, 1>{outer, first, last - first});
  }
  fence();
}

// ---- what to run
// ----------------------------------------------------------------------------------

template <class T, bool Log>
void forward_all(const SoftmaxForward& args, int64_t begin, int64_t end) {
  if (args.masked) return forward_masked<T>(args, begin, end);
  if (args.inner == 1) return forward_rows<T, Log>(args, begin, end);
  for_columns<T>(args.inner, begin, end, [&args](const auto& columns) {
    forward_columns<T, std::decay_t<decltype(columns)>::vectors, Log>(args, columns);
  });
}

void forward(const SoftmaxForward& args, int64_t begin, int64_t end) {
  if (args.input.dtype == DType::f64)
    args.log ? forward_all<double, true>(args, begin, end)
             : forward_all<double, false>(args, begin, end);
  else
    args.log ? forward_all<float, true>(args, begin, end)
             : forward_all<float, false>(args, begin, end);
}

template <class T, Kind K>
void backward_all(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  if (args.inner == 1) return backward_rows<T, K>(args, begin, end);
  if constexpr (K != Kind::masked)
    for_columns<T>(args.inner, begin, end, [&args](const auto& columns) {
      backward_columns<T, std::decay_t<decltype(columns)>::vectors, K>(args, columns);
    });
}

template <class T>
void backward_of(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  if (args.log) return backward_all<T, Kind::log_softmax>(args, begin, end);
  if (args.masked) return backward_all<T, Kind::masked>(args, begin, end);
  backward_all<T, Kind::softmax>(args, begin, end);
}

void backward(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  args.output.dtype == DType::f64 ? backward_of<double>(args, begin, end)
                                  : backward_of<float>(args, begin, end);
}

}  // namespace

extern const SoftmaxCpu softmax{kTile * FASTSEQ_VECTOR_BYTES / 4, forward, backward};

}  // namespace fastseq::FASTSEQ_ISA
