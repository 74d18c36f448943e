// Softmax, log_softmax and masked_softmax on the CPU, forward and backward, along any dimension.
//
//   forward    exp and its sum -> scale             reads x once, writes y once
//   backward   sum of grad * y -> write             reads y and grad once, writes once
//
// Forward along the last dimension takes e^x over a power of two that is near the row's largest, so
// no sweep looks for the maximum, and writes one row while it reads another. log_softmax, fp64,
// very long rows and very large scores go by the maximum, in three sweeps of which only the first
// meets memory. What lies between the sweeps is kept in fp32 in a buffer that L1 or L2 holds, so
// exp is taken once an element and 16-bit numbers are converted once.
//
// By the maximum, short rows go by a few at a time, phase by phase: what is done across the lanes
// of one (its maximum, its sum, a division) takes long and hinders nobody else.
//
// Along another dimension: softmax_columns.h.
//
// Arithmetic is in the compute type T (float, or double for fp64); M is a type in memory.
#include "softmax.h"

#include <type_traits>

#include "exp.h"
#include "rows.h"
#include "scratch.h"
#include "softmax_columns.h"

extern "C" double log(double);

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int64_t kTogether = 8;  // rows at most
// Elements of them, so that what a phase leaves is in L1 for the next.
constexpr int64_t kTogetherElements = 2048;

inline int64_t rows_together(int64_t n) {
  const int64_t rows = kTogetherElements / n;
  return rows < 1 ? 1 : rows < kTogether ? rows : kTogether;
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

// How to read a vector at p, and what of it counts: all, or its first elements.
template <class T>
struct Whole {
  static constexpr int64_t count = lanes<T>;
  template <class M>
  V<T> operator()(const M* p) const {
    return load(p);
  }
  V<T> keep(V<T> v) const { return v; }
};
template <class T>
struct Some {
  int64_t count;
  template <class M>
  V<T> operator()(const M* p) const {
    return load_some<T>(p, count);
  }
  V<T> keep(V<T> v) const { return keep_first<T>(v, count); }
};

// The sum of power_at(i, read) over a row's vectors.
template <class T, class PowerAt>
double summed(int64_t n, PowerAt power_at) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += block<T>) {
    const int64_t end = begin + block<T> < n ? begin + block<T> : n;
    V<T> sum = {};
    int64_t i = begin;
    for (; i + lanes<T> <= end; i += lanes<T>) sum += power_at(i, Whole<T>{});
    if (i < end) sum += power_at(i, Some<T>{end - i});
    total += horizontal_sum<T>(sum);
  }
  return total;
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

#if defined(__AVX512BW__)
// As integers bf16 numbers are ordered once the negative ones are turned round: 32 at a time. A NaN
// may come out as the maximum; its row is NaN anyway.
template <>
float row_maximum<float, bf16>(const bf16* x, int64_t n) {
  const auto ordered = [](__m512i v) {
    return _mm512_xor_si512(v, _mm512_srli_epi16(_mm512_srai_epi16(v, 15), 1));
  };
  __m512i most = _mm512_set1_epi16(INT16_MIN);
  for (int64_t i = 0; i < n; i += 32) {
    const uint32_t mask = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
    const __m512i v = _mm512_maskz_loadu_epi16(mask, x + i);
    most = _mm512_mask_max_epi16(most, mask, most, ordered(v));
  }
  __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  __m128i rest = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // The unsigned minimum is what there is an instruction for.
  rest = _mm_minpos_epu16(_mm_xor_si128(rest, _mm_set1_epi16(0x7fff)));
  const auto top = static_cast<uint16_t>(_mm_extract_epi16(rest, 0) ^ 0x7fff);
  return to_float(bf16{static_cast<uint16_t>(top ^ (static_cast<int16_t>(top) < 0 ? 0x7fff : 0))});
}
#endif

// exp(x - shift), or with Log x - shift, into the buffer; returns the sum of exp(x - shift).
template <class T, class M, bool Log, bool Coarse>
double exponentials(const M* x, T shift, T* buffer, int64_t n, const Ahead& ahead) {
  return summed<T>(n, [=](int64_t i, auto read) {
    const V<T> shifted = read(x + i) - shift;
    const V<T> power = read.keep(power_of<T, Coarse>(shifted));
    store(buffer + i, Log ? shifted : power);  // the buffer has room for a whole vector
    ahead.prefetch(i);
    return power;
  });
}

// What turns the buffer into the output: a factor, or with Log a summand. Taken as soon as the sum
// is known, so that the division goes on beside the next row's exponentials.
template <class T, bool Log>
T finish_of(double total) {
  if constexpr (Log) return static_cast<T>(-::log(total));
  // Only a masked row can sum up to 0: all its exponentials are 0 then, and so is the result.
  return total == 0 ? T(0) : static_cast<T>(1.0 / total);
}

// The output from the first n elements in the buffer; a masked row has zeros after them.
template <class T, bool Log, class Out>
void write_finished(const SoftmaxForward& args, int64_t row, const T* buffer, int64_t n, T finish) {
  Out* const y = reinterpret_cast<Out*>(row_of(args.output, row));
  const auto nothing = [](int64_t) {};
  write_values<T>(
      y, n, args.past_cache,
      [=](int64_t i, auto read) {
        return Log ? read(buffer + i) + finish : read(buffer + i) * finish;
      },
      nothing);
  if (n < args.length)
    write_values<T>(
        y + n, args.length - n, args.past_cache, [](int64_t, auto) { return V<T>{}; }, nothing);
}

// Calls f(row, r, buffer of its own) for up to kTogether rows: first one phase for all, then the
// next.
template <class T, class First, class Second, class Third>
void by_phases(int64_t n, int64_t begin, int64_t end, First first, Second second, Third third) {
  const int64_t together = rows_together(n), stride = (n / lanes<T> + 1) * lanes<T>;
  T* const buffer =
      static_cast<T*>(thread_scratch(static_cast<size_t>(together * stride) * sizeof(T)));
  for (int64_t row = begin; row < end; row += together) {
    const int64_t count = end - row < together ? end - row : together;
    for (int64_t r = 0; r < count; ++r) first(row + r, r, buffer + r * stride);
    for (int64_t r = 0; r < count; ++r) second(row + r, r, buffer + r * stride);
    for (int64_t r = 0; r < count; ++r) third(row + r, r, buffer + r * stride);
  }
  fence();
}

// The columns that a row may see.
inline int64_t columns_seen(const SoftmaxForward& args, int64_t row) {
  if (args.causal.queries == 0) return args.length;
  const int64_t seen = row % args.causal.queries + args.causal.offset + 1;
  return seen < 0 ? 0 : seen > args.length ? args.length : seen;
}

// ---- without a sweep for the maximum
// ---------------------------------------

// Where exp_scaled is at hand e^score / 2^n does for e^(score - maximum), with any 2^n of the order
// of the largest e^score. Should it be too small a row starts again, with its maximum.
template <class T>
constexpr bool scales = sizeof(T) == 4 && kScaled;

// The n of a row by the largest of some of its scores, in the middle and at both ends, for a mask
// likes to cover an end. NaN where it is too large (or -Inf, or NaN) for exp_scaled.
template <class Scores>
float scale_of(int64_t n, Scores scores) {
  const Some<float> read{n};
  const int64_t last = n > lanes<float> ? n - lanes<float> : 0;
  const F32x most = maximum(scores(0, read), maximum(scores(last / 2, read), scores(last, read)));
  const float top = horizontal_maximum<float>(first_or_least<float>(most, n));
  const bool near = top > -512 && top < 512;
  return near ? static_cast<float>(static_cast<int>(top * 1.44f)) : __builtin_nanf("");
}

// The sum of a row's exponentials, and 1 over it: taken as soon as the sum is known.
struct Divisor {
  float sum = 0, reciprocal = 0;
  Divisor() = default;
  explicit Divisor(double total)
      : sum(static_cast<float>(total)), reciprocal(finish_of<float, false>(total)) {}

  // What the product with the reciprocal leaves over is divided too where it would show: an
  // exponential that is all of the sum has the probability 1, and a gradient of 0.
  template <class Out>
  F32x divide(F32x power) const {
    const F32x y = power * reciprocal;
    if constexpr (sizeof(Out) < 4) return y;
    return fma(fma(-y, splat(sum), power), splat(reciprocal), y);
  }
};

// A row that is done but for the writing: its exponentials, and what they are to be divided by.
template <class Out>
struct Finished {
  const float* powers = nullptr;
  Out* y = nullptr;
  int64_t seen = 0, length = 0;  // zeros from seen on
  Divisor divisor;
  bool past_cache = false;
  int64_t vectors = 0;  // elements in whole vectors of what is seen
  bool streams = false;

  Finished() = default;
  Finished(const SoftmaxForward& args, int64_t row, float* powers, Divisor divisor)
      : powers(powers),
        y(reinterpret_cast<Out*>(row_of(args.output, row))),
        seen(columns_seen(args, row)),
        length(args.length),
        divisor(divisor),
        past_cache(args.past_cache) {
    // Whole vectors, so that the zeros after them begin where they may be streamed.
    for (; seen < length && seen % lanes<float> != 0; ++seen) powers[seen] = 0;
    vectors = seen / lanes<float> * lanes<float>;
    streams = past_cache && reinterpret_cast<uintptr_t>(y) % (sizeof(Out) * lanes<float>) == 0;
  }
  void write(int64_t i) const {
    const F32x v = divisor.divide<Out>(load(powers + i));
    streams ? stream(y + i, v) : store(y + i, v);
  }
  void write_from(int64_t i) const {
    const auto nothing = [](int64_t) {};
    write_values<float>(
        y + i, seen - i, past_cache,
        [p = powers + i, divisor = divisor](int64_t k, auto read) {
          return divisor.divide<Out>(read(p + k));
        },
        nothing);
    if (seen < length)
      write_values<float>(
          y + seen, length - seen, past_cache, [](int64_t, auto) { return F32x{}; }, nothing);
  }
};

// A row's exponentials are taken vector by vector beside the writing of the row before the last, so
// that memory is read and written at once, and no row waits for the last one's sum. Longer rows
// would leave L2 in between.
constexpr int64_t kBehind = 2;
constexpr int64_t kLongestBehind = 16384;

// with_scores(row, f) calls f with a function of a place and how to read there, which gives scores,
// and with what asks for the memory that follows; by_maximum(row, buffer) takes a row's
// exponentials the other way.
template <class Out, bool Coarse, class WithScores, class ByMaximum>
void forward_scaled(const SoftmaxForward& args, int64_t begin, int64_t end, WithScores with_scores,
                    ByMaximum by_maximum) {
  constexpr double most = 0x1p100;  // a sum below which no exponential was out of reach
  constexpr int width = lanes<float>;
  const int64_t stride = (args.length / width + 1) * width;
  float* const ring =
      static_cast<float*>(thread_scratch(static_cast<size_t>((kBehind + 1) * stride) * 4));
  Divisor divisor[kBehind + 1];
  for (int64_t row = begin, slot = 0; row < end + kBehind; ++row) {
    const int64_t oldest = slot == kBehind ? 0 : slot + 1;
    Finished<Out> done;
    if (row - kBehind >= begin)
      done = {args, row - kBehind, ring + oldest * stride, divisor[oldest]};
    int64_t written = 0;
    if (row < end) {
      const int64_t n = columns_seen(args, row);
      float* const buffer = ring + slot * stride;
      double total = most;
      with_scores(row, [&](auto scores, auto next) {
        const float scale = scale_of(n, scores);
        if (scale != scale) return;
        total = summed<float>(n, [=, scale = splat(scale)](int64_t i, auto read) {
          const F32x power = read.keep(exp_scaled<Coarse>(scores(i, read), scale));
          store(buffer + i, power);
          next.prefetch(i);
          if (i < done.vectors) done.write(i);
          return power;
        });
        written = (n + width - 1) / width * width;
      });
      divisor[slot] = Divisor(total < most ? total : by_maximum(row, buffer));
    }
    if (row - kBehind >= begin) done.write_from(written < done.vectors ? written : done.vectors);
    slot = oldest;
  }
  fence();
}

template <class T, bool Log>
void forward_rows(const SoftmaxForward& args, int64_t begin, int64_t end) {
  const int64_t n = args.length;
  T most[kTogether], finish[kTogether];
  with_types<T>(args.input.dtype, args.output.dtype, [&](auto* from, auto* to) {
    using M = std::remove_pointer_t<decltype(from)>;
    using Out = std::remove_pointer_t<decltype(to)>;
    constexpr bool coarse = sizeof(M) == 2 && sizeof(Out) == 2;
    const auto row_at = [&](int64_t row) {
      return reinterpret_cast<const M*>(row_of(args.input, row));
    };
    const auto total_of = [&](int64_t row, T most, T* buffer) {
      const Ahead ahead(args.input, row, n > kAhead ? n : kAhead);
      return exponentials<T, M, Log, coarse>(row_at(row), most, buffer, n, ahead);
    };
    if constexpr (scales<T> && !Log) {
      if (n <= kLongestBehind)
        return forward_scaled<Out, coarse>(
            args, begin, end,
            [&](int64_t row, auto f) {
              f([x = row_at(row)](int64_t i, auto read) { return read(x + i); },
                Ahead(args.input, row, n > kAhead ? n : kAhead));
            },
            [&](int64_t row, float* buffer) {
              return total_of(row, row_maximum<T>(row_at(row), n), buffer);
            });
    }
    by_phases<T>(
        n, begin, end,
        [&](int64_t row, int64_t r, T*) { most[r] = row_maximum<T>(row_at(row), n); },
        [&](int64_t row, int64_t r, T* buffer) {
          finish[r] = finish_of<T, Log>(total_of(row, most[r], buffer));
        },
        [&](int64_t row, int64_t r, T* buffer) {
          write_finished<T, Log, Out>(args, row, buffer, n, finish[r]);
        });
  });
}

// ---- masked rows
// ----------------------------------------------------------------------------------

// a / b and a % b; 64 bits take twice as long, which shows once a row.
inline int64_t divide(int64_t a, int64_t b, int64_t& rest) {
  if ((a | b) >> 32 != 0) {
    rest = a % b;
    return a / b;
  }
  const auto narrow = static_cast<uint32_t>(a), by = static_cast<uint32_t>(b);
  rest = narrow % by;
  return narrow / by;
}

// Calls f with a pointer to the element of the mask that row begins with, as uint8_t or M.
template <class T, class F>
void with_mask(const RowMask& mask, int64_t row, F f) {
  int64_t last, middle;
  const int64_t first = divide(divide(row, mask.size[1], last), mask.size[0], middle);
  const int64_t element = first * mask.stride[0] + middle * mask.stride[1] + last * mask.stride[2];
  if (mask.boolean) return f(static_cast<const uint8_t*>(mask.data) + element);
  with_type<T>(mask.dtype, [&](auto* type) {
    using B = std::remove_pointer_t<decltype(type)>;
    f(static_cast<const B*>(mask.data) + element);
  });
}

// scale * x and what a mask makes of it: -Inf where it takes scores out, whatever they are, NaN
// included.
template <class T, class B>
inline V<T> masked(V<T> x, V<T> scale, const B* mask, int64_t count) {
  if constexpr (std::is_same_v<B, uint8_t>) {
    const V<T> scores = x * scale;
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
    return bias == -infinity<T>() ? bias : fma(x, scale, bias);
  }
}

// The memory that follows in the input and in the mask.
template <class B>
struct AheadOfBoth {
  Ahead input;
  const B* mask;
  void prefetch(int64_t i) const {
    input.prefetch(i);
    __builtin_prefetch(mask + i, 0, 2);
  }
};

// Calls f with a function that gives the scores of a row, and with what asks for what follows.
template <class T, class M, class F>
void with_masked_scores(const SoftmaxForward& args, int64_t row, F f) {
  const M* x = reinterpret_cast<const M*>(row_of(args.input, row));
  const V<T> scale = splat(static_cast<T>(args.scale));
  const int64_t distance = args.length > kAhead ? args.length : kAhead;
  const Ahead ahead(args.input, row, distance);
  if (args.mask.data == nullptr)
    return f([=](int64_t i, auto read) { return read(x + i) * scale; }, ahead);
  with_mask<T>(args.mask, row, [&](const auto* mask) {
    using B = std::remove_const_t<std::remove_pointer_t<decltype(mask)>>;
    if (args.mask.stride_column != 0)
      return f(
          [=](int64_t i, auto read) { return masked<T>(read(x + i), scale, mask + i, read.count); },
          AheadOfBoth<B>{ahead, mask + distance});
    B same[lanes<T>];
    for (B& element : same) element = *mask;
    f([=, &same](int64_t i,
                 auto read) { return masked<T>(read(x + i), scale, same, int64_t(lanes<T>)); },
      ahead);
  });
}

// Scores into the buffer; returns their maximum.
template <class T, class Scores>
T scores_of(int64_t n, T* buffer, Scores scores) {
  V<T> most = splat(-infinity<T>());
  for (int64_t i = 0; i < n; i += lanes<T>) {
    const int64_t count = n - i;
    const V<T> v = count >= lanes<T> ? scores(i, Whole<T>{})
                                     : first_or_least<T>(scores(i, Some<T>{count}), count);
    store(buffer + i, v);
    most = maximum(most, v);
  }
  return horizontal_maximum<T>(most);
}

template <class T, class M, class Out>
void forward_masked_rows(const SoftmaxForward& args, int64_t begin, int64_t end) {
  constexpr bool coarse = sizeof(M) == 2 && sizeof(Out) == 2;
  const auto maximum_of = [&](int64_t row, T* buffer) {
    T most = 0;
    with_masked_scores<T, M>(args, row, [&](auto scores, auto) {
      most = scores_of<T>(columns_seen(args, row), buffer, scores);
    });
    // A row without anything that takes part: exp(-Inf - 0) = 0, but NaN stays NaN.
    return most == -infinity<T>() ? T(0) : most;
  };
  const auto total_of = [&](int64_t row, T shift, T* buffer) {
    const int64_t n = args.length;
    const Ahead ahead(args.input, row, n > kAhead ? n : kAhead);
    return exponentials<T, T, false, coarse>(buffer, shift, buffer, columns_seen(args, row), ahead);
  };
  if constexpr (scales<T>) {
    if (args.length <= kLongestBehind)
      return forward_scaled<Out, coarse>(
          args, begin, end, [&](int64_t row, auto f) { with_masked_scores<T, M>(args, row, f); },
          [&](int64_t row, T* buffer) { return total_of(row, maximum_of(row, buffer), buffer); });
  }
  T shift[kTogether], finish[kTogether];
  by_phases<T>(
      args.length, begin, end,
      [&](int64_t row, int64_t r, T* buffer) { shift[r] = maximum_of(row, buffer); },
      [&](int64_t row, int64_t r, T* buffer) {
        finish[r] = finish_of<T, false>(total_of(row, shift[r], buffer));
      },
      [&](int64_t row, int64_t r, T* buffer) {
        int64_t seen = columns_seen(args, row);
        for (; seen < args.length && seen % lanes<T> != 0; ++seen) buffer[seen] = 0;
        write_finished<T, false, Out>(args, row, buffer, seen, finish[r]);
      });
}

template <class T>
void forward_masked(const SoftmaxForward& args, int64_t begin, int64_t end) {
  with_types<T>(args.input.dtype, args.output.dtype, [&](auto* from, auto* to) {
    using M = std::remove_pointer_t<decltype(from)>;
    using Out = std::remove_pointer_t<decltype(to)>;
    forward_masked_rows<T, M, Out>(args, begin, end);
  });
}

// ---- backward along rows
// --------------------------------------------------------------------------

template <class T, class M, Kind K>
T row_sum(const M* grad, const M* y, int64_t n, int64_t ahead) {
  constexpr int width = lanes<T>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += block<T>) {
    const int64_t end = begin + block<T> < n ? begin + block<T> : n;
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
  return static_cast<T>(total);
}

template <class T, Kind K>
void backward_rows(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  const int64_t n = args.length, ahead = n > kAhead ? n : kAhead;
  T sum[kTogether];
  with_types<T>(args.output.dtype, args.grad_input.dtype, [&](auto* from, auto* to) {
    using M = std::remove_pointer_t<decltype(from)>;
    using Out = std::remove_pointer_t<decltype(to)>;
    const auto at = [](const Rows& rows, int64_t row) {
      return reinterpret_cast<const M*>(row_of(rows, row));
    };
    by_phases<T>(
        n, begin, end,
        [&](int64_t row, int64_t r, T*) {
          sum[r] = row_sum<T, M, K>(at(args.grad_output, row), at(args.output, row), n, ahead);
        },
        [](int64_t, int64_t, T*) {},
        [&](int64_t row, int64_t r, T*) {
          const M *grad = at(args.grad_output, row), *y = at(args.output, row);
          write_values<T>(
              reinterpret_cast<Out*>(row_of(args.grad_input, row)), n, args.past_cache,
              [=, sum = splat(sum[r]), scale = static_cast<T>(args.scale)](int64_t i, auto read) {
                return gradient<T, K>(read(grad + i), read(y + i), sum, scale);
              },
              [=](int64_t i) { __builtin_prefetch(y + i + ahead, 0, 2); });
        });
  });
}

// ---- what to run
// ----------------------------------------------------------------------------------

template <class T, bool Log>
void forward_all(const SoftmaxForward& args, int64_t begin, int64_t end) {
  if (args.masked) return forward_masked<T>(args, begin, end);
  if (args.inner == 1) return forward_rows<T, Log>(args, begin, end);
  forward_columns<T, Log>(args, begin, end);
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
  if constexpr (K != Kind::masked) backward_columns<T, K>(args, begin, end);
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

extern const SoftmaxCpu softmax{kSlab, forward, backward};

}  // namespace fastseq::FASTSEQ_ISA
