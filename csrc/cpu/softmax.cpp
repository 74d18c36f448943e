// Softmax, log_softmax and masked_softmax on the CPU, forward and backward, along any dimension.
//
//   forward    maximum -> exp and its sum -> scale       reads x once, writes y once
//   backward   sum of grad * y -> write                  reads y and grad once, writes once
//
// Along the last dimension a row is swept three times, but only the first sweep meets memory: what
// lies between the sweeps is kept in fp32 in a buffer that L1 or L2 holds, so exp is taken once an
// element and 16-bit numbers are converted once.
//
// Along another dimension the elements of a column lie apart, and those of neighbouring columns side
// by side: columns are taken kTile vectors at a time, a lane each, and nothing goes across lanes.
// The buffer serves here, too: the rows of such a tile often lie a power of two apart, where a few
// hundred of them fall into the same sets of the cache and throw each other out. Columns too long
// for a buffer in L2 are read in every sweep.
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

// exp(x - shift), or with Log x - shift, into the buffer; returns the sum of exp(x - shift).
template <class T, class M, bool Log>
double exponentials(const M* x, T shift, T* buffer, int64_t n, const Ahead& ahead) {
  constexpr int width = lanes<T>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    V<T> sum = {};
    int64_t i = begin;
    for (; i + width <= end; i += width) {
      const V<T> shifted = load(x + i) - shift;
      const V<T> power = exp(shifted);
      sum += power;
      store(buffer + i, Log ? shifted : power);
      ahead.prefetch(i);
    }
    if (i < end) {
      const V<T> shifted = load_some<T>(x + i, end - i) - shift;
      const V<T> power = keep_first<T>(exp(shifted), end - i);
      sum += power;
      store(buffer + i, Log ? shifted : power);  // the buffer has room for a whole vector
    }
    total += horizontal_sum<T>(sum);
  }
  return total;
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
  T* const buffer =
      static_cast<T*>(thread_scratch(static_cast<size_t>(n + lanes<T>) * sizeof(T)));
  with_type<T>(args.input.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      const M* x = reinterpret_cast<const M*>(row_of(args.input, row));
      const Ahead ahead(args.input, row, n > kAhead ? n : kAhead);
      const T maximum = row_maximum<T>(x, n);
      write_normalized<T, Log>(args, row, buffer,
                               exponentials<T, M, Log>(x, maximum, buffer, n, ahead));
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
template <class T>
inline V<T> masked(V<T> scores, const uint8_t* mask, int64_t count) {
  typedef uint8_t Bytes __attribute__((vector_size(lanes<T>)));
  Bytes bytes = {};
  std::memcpy(&bytes, mask, static_cast<size_t>(count < lanes<T> ? count : lanes<T>));
  const auto takes_part = __builtin_convertvector(bytes, typename Simd<T>::Mask) != 0;
  return takes_part ? scores : splat(-infinity<T>());
}

template <class T, class B>
inline V<T> masked(V<T> scores, const B* mask, int64_t count) {
  const V<T> bias = load_some<T>(mask, count);
  return bias == -infinity<T>() ? bias : scores + bias;
}

// The masked scores of a row into the buffer; returns their maximum. Mask is null, or B the type of
// its elements.
template <class T, class M, class Masked>
T scores_of(const M* x, T scale, T* buffer, int64_t n, const Ahead& ahead, Masked apply) {
  constexpr int width = lanes<T>;
  V<T> most = splat(-infinity<T>());
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    const V<T> scores = apply(load(x + i) * scale, i, int64_t(width));
    store(buffer + i, scores);
    most = maximum(most, scores);
    ahead.prefetch(i);
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
T masked_scores(const SoftmaxForward& args, int64_t row, T* buffer, int64_t n, const Ahead& ahead) {
  const M* x = reinterpret_cast<const M*>(row_of(args.input, row));
  const T scale = static_cast<T>(args.scale);
  if (args.mask.data == nullptr)
    return scores_of<T>(x, scale, buffer, n, ahead, [](V<T> v, int64_t, int64_t) { return v; });
  T most = 0;
  with_mask<T>(args.mask, row, [&](const auto* mask) {
    using B = std::remove_const_t<std::remove_pointer_t<decltype(mask)>>;
    if (args.mask.stride_column != 0) {
      most = scores_of<T>(x, scale, buffer, n, ahead, [mask](V<T> v, int64_t i, int64_t count) {
        return masked<T>(v, mask + i, count);
      });
      return;
    }
    B same[lanes<T>];
    for (B& element : same) element = *mask;
    most = scores_of<T>(x, scale, buffer, n, ahead, [&same](V<T> v, int64_t, int64_t) {
      return masked<T>(v, same, lanes<T>);
    });
  });
  return most;
}

template <class T>
void forward_masked(const SoftmaxForward& args, int64_t begin, int64_t end) {
  const int64_t n = args.length;
  T* const buffer =
      static_cast<T*>(thread_scratch(static_cast<size_t>(n + lanes<T>) * sizeof(T)));
  with_type<T>(args.input.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      int64_t seen = n;
      if (args.causal.queries != 0) {
        seen = row % args.causal.queries + args.causal.offset + 1;
        seen = seen < 0 ? 0 : seen > n ? n : seen;
      }
      const Ahead ahead(args.input, row, n > kAhead ? n : kAhead);
      const T most = masked_scores<T, M>(args, row, buffer, seen, ahead);
      // A row without anything that takes part: exp(-Inf - 0) = 0, but NaN stays NaN.
      const T shift = most == -infinity<T>() ? T(0) : most;
      const double total = exponentials<T, T, false>(buffer, shift, buffer, seen, Ahead(args.output, row, 0));
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
T row_sum(const M* grad, const M* y, int64_t n, const Ahead& ahead) {
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
      ahead.prefetch(i);
      ahead.prefetch(i + width);
    }
    for (; i < end; i += width)
      even += summand<T, K>(load_some<T>(grad + i, end - i), load_some<T>(y + i, end - i));
    total += horizontal_sum<T>(even + odd);
  }
  return settled(static_cast<T>(total));
}

// grad_output, output and grad_input of one type in memory, or all converted in the workspace.
template <class T, class M, Kind K>
void backward_row(const SoftmaxBackward& args, int64_t row, const M* grad, const M* y, M* target,
                  bool past_cache) {
  const int64_t n = args.length;
  const int64_t distance = n > kAhead ? n : kAhead;
  const Ahead grad_ahead(args.grad_output, row, distance), ahead(args.output, row, distance);
  const V<T> sum = splat(row_sum<T, M, K>(grad, y, n, grad_ahead));
  write_values<T>(
      target, n, past_cache,
      [=, scale = static_cast<T>(args.scale)](int64_t i, auto read) {
        return gradient<T, K>(read(grad + i), read(y + i), sum, scale);
      },
      [ahead](int64_t i) { ahead.prefetch(i); });
}

template <class T, Kind K>
void backward_rows(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  const int64_t n = args.length, stride = (n + 63) / 64 * 64;
  const DType type = args.output.dtype;
  with_type<T>(type, [&](auto* of_type) {
    using M = std::remove_pointer_t<decltype(of_type)>;
    if (args.grad_output.dtype == type && args.grad_input.dtype == type) {
      for (int64_t row = begin; row < end; ++row)
        backward_row<T, M, K>(args, row, reinterpret_cast<M*>(row_of(args.grad_output, row)),
                              reinterpret_cast<M*>(row_of(args.output, row)),
                              reinterpret_cast<M*>(row_of(args.grad_input, row)), args.past_cache);
      return;
    }
    T* const work = static_cast<T*>(thread_scratch(static_cast<size_t>(3 * stride) * sizeof(T)));
    for (int64_t row = begin; row < end; ++row) {
      const T* grad = read_row(args.grad_output, row, work, n);
      const T* y = read_row(args.output, row, work + stride, n);
      backward_row<T, T, K>(args, row, grad, y, work + 2 * stride, false);
      write_row(args.grad_input, row, work + 2 * stride, n);
    }
  });
  fence();
}

// ---- columns
// --------------------------------------------------------------------------------------

// Where the tile of a task lies in a tensor.
template <class M>
struct Tile {
  M* data;
  int64_t stride;  // between the elements of a column
  Tile(const Rows& rows, int64_t outer, int64_t length, int64_t column) {
    const int64_t row = outer * length;
    char* const first = row_of(rows, row);
    data = reinterpret_cast<M*>(first) + column;
    stride = length == 1 ? 0 : (row_of(rows, row + 1) - first) / int64_t(sizeof(M));
  }
  M* operator[](int64_t i) const { return data + i * stride; }
};

// How many columns, of which the last vector's only some are its own: a tile at the right edge that
// has whole vectors to its left begins earlier, so as to read whole vectors, and a narrow one reads
// few lanes.
template <class T>
struct Lanes {
  int64_t columns;  // 1 to kTile * lanes
  V<T> read(const float* p, int k) const { return get(p, k); }
  template <class M>
  V<T> get(const M* p, int k) const {
    return load_some<T>(p + k * lanes<T>, columns - k * lanes<T>);
  }
};

// Runs f(vectors, columns) with a constant number of vectors: kTile of them whole, or one at a time.
template <class T, class F>
void for_vectors(int64_t columns, F f) {
  if (columns >= kTile * lanes<T>) return f(std::integral_constant<int, kTile>(), int64_t(0), columns);
  for (int64_t begin = 0; begin < columns; begin += lanes<T>)
    f(std::integral_constant<int, 1>(), begin, columns - begin);
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
