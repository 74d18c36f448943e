// Softmax, log_softmax and masked_softmax on the CPU, forward and backward, along any dimension.
//
//   forward    maximum -> exp and its sum -> scale       reads x once, writes y once
//   backward   sum of grad * y -> write                  reads y and grad once, writes once
//
// Along the last dimension a row is swept three times, but only the first sweep meets memory: what
// lies between the sweeps is kept in fp32 in a buffer that L1 or L2 holds, so exp is taken once an
// element and 16-bit numbers are converted once.
//
// Short rows go by a few at a time, phase by phase: what is done across the lanes of one (its
// maximum, its sum, a division) takes long and hinders nobody else.
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
  constexpr int width = lanes<T>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += block<T>) {
    const int64_t end = begin + block<T> < n ? begin + block<T> : n;
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
    by_phases<T>(
        n, begin, end,
        [&](int64_t row, int64_t r, T*) { most[r] = row_maximum<T>(row_at(row), n); },
        [&](int64_t row, int64_t r, T* buffer) {
          const Ahead ahead(args.input, row, n > kAhead ? n : kAhead);
          finish[r] = finish_of<T, Log>(
              exponentials<T, M, Log, coarse>(row_at(row), most[r], buffer, n, ahead));
        },
        [&](int64_t row, int64_t r, T* buffer) {
          write_finished<T, Log, Out>(args, row, buffer, n, finish[r]);
        });
  });
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

// The columns that a row may see.
inline int64_t columns_seen(const SoftmaxForward& args, int64_t row) {
  if (args.causal.queries == 0) return args.length;
  const int64_t seen = row % args.causal.queries + args.causal.offset + 1;
  return seen < 0 ? 0 : seen > args.length ? args.length : seen;
}

template <class T>
void forward_masked(const SoftmaxForward& args, int64_t begin, int64_t end) {
  const int64_t n = args.length;
  T shift[kTogether], finish[kTogether];
  with_types<T>(args.input.dtype, args.output.dtype, [&](auto* from, auto* to) {
    using M = std::remove_pointer_t<decltype(from)>;
    using Out = std::remove_pointer_t<decltype(to)>;
    constexpr bool coarse = sizeof(M) == 2 && sizeof(Out) == 2;
    by_phases<T>(
        n, begin, end,
        [&](int64_t row, int64_t r, T* buffer) {
          const T most = masked_scores<T, M>(args, row, buffer, columns_seen(args, row));
          // A row without anything that takes part: exp(-Inf - 0) = 0, but NaN stays NaN.
          shift[r] = most == -infinity<T>() ? T(0) : most;
        },
        [&](int64_t row, int64_t r, T* buffer) {
          const Ahead ahead(args.input, row, n > kAhead ? n : kAhead);
          finish[r] = finish_of<T, false>(exponentials<T, T, false, coarse>(
              buffer, shift[r], buffer, columns_seen(args, row), ahead));
        },
        [&](int64_t row, int64_t r, T* buffer) {
          // Whole vectors, so that the zeros after them begin where they may be streamed.
          int64_t seen = columns_seen(args, row);
          for (; seen < n && seen % lanes<T> != 0; ++seen) buffer[seen] = 0;
          write_finished<T, false, Out>(args, row, buffer, seen, finish[r]);
        });
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
