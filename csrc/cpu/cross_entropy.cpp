// Cross-entropy on the CPU, forward and backward.
//
//   forward    maximum of a block, sum of exponentials of the block     reads the logits once
//   backward   writes (coefficient * exp(z - lse) - target's part)      reads once, writes once
//
// A row goes by in blocks that L1 holds, each met twice: once from memory for its maximum, once
// from L1 for the sum of exponentials, while the block that follows is asked for. The running sum
// is rescaled when a block has a new maximum, so memory sees every logit once whatever the row
// length.
//
// Arithmetic is in the compute type T (float, or double for fp64); M is a type in memory.
#include "cross_entropy.h"

#include <type_traits>

#include "exp.h"
#include "rows.h"
#include "scratch.h"
#include "tanh.h"

extern "C" double exp(double);
extern "C" double log(double);

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr double kInfinity = __builtin_huge_val();

enum class Smoothing { none, plain, weighted };

// ---- softcap ------------------------------------------------------------------------------------

// What stands between the logits in memory and the numbers whose softmax is taken.
template <class T>
struct Cap {
  T cap, inverse;
  explicit Cap(double softcap)
      : cap(static_cast<T>(softcap)), inverse(static_cast<T>(softcap > 0 ? 1 / softcap : 0)) {}
};

template <bool Capped, class T>
inline V<T> capped(V<T> x, const Cap<T>& cap) {
  if constexpr (Capped) return tanh(x * cap.inverse) * cap.cap;
  return x;
}

template <bool Capped, class T>
inline T capped_value(T x, const Cap<T>& cap) {
  return capped<Capped, T>(splat(x), cap)[0];
}

// ---- rows ---------------------------------------------------------------------------------------

inline double value_at(const Vector& vector, int64_t i) {
  switch (vector.dtype) {
    case DType::f64:
      return static_cast<double*>(vector.data)[i];
    case DType::f32:
      return static_cast<float*>(vector.data)[i];
    case DType::f16:
      return to_float(static_cast<f16*>(vector.data)[i]);
    default:
      return to_float(static_cast<bf16*>(vector.data)[i]);
  }
}

template <class T, class M>
inline T element(const M* p) {
  if constexpr (sizeof(M) == 2)
    return to_float(*p);
  else
    return *p;
}

// x in the first count lanes, -Inf in the others.
template <class T>
inline V<T> or_lowest(V<T> x, int64_t count) {
  return count >= lanes<T> ? x : keep_first<T>(splat(T(1)), count) != 0 ? x : splat(T(-kInfinity));
}

// The largest of some logits; NaN is passed over.
template <class T, class M>
inline T largest(const M* x, int64_t n) {
  constexpr int width = lanes<T>;
  V<T> even = splat(T(-kInfinity)), odd = even;
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    V<T> first, second;
    load_two(x + i, first, second);
    even = maximum(first, even);
    odd = maximum(second, odd);
  }
  for (; i < n; i += width) even = maximum(or_lowest<T>(load_some<T>(x + i, n - i), n - i), even);
  return horizontal_maximum<T>(maximum(odd, even));
}

template <class T>
struct Sums {
  double exponentials = 0;
  double smoothing = 0;  // of w[c] * (z[c] - pivot)
};

// The sums over one block, asking for the memory that follows it.
template <class T, class M, bool Capped, Smoothing S>
inline Sums<T> block_sums(const M* x, int64_t n, T top, T pivot, const T* weight,
                          const Cap<T>& cap) {
  constexpr int width = lanes<T>;
  V<T> sum[2] = {}, smooth[2] = {};
  const auto add = [&](int which, V<T> v, V<T> w, auto keep) {
    const V<T> z = capped<Capped, T>(v, cap);
    sum[which] += keep(exp_nonpositive(z - top));
    if constexpr (S == Smoothing::plain) smooth[which] += keep(z - pivot);
    if constexpr (S == Smoothing::weighted) smooth[which] += keep((z - pivot) * w);
  };
  const auto all = [](V<T> v) { return v; };
  const auto weights = [weight](int64_t i, int64_t count) {
    return S == Smoothing::weighted ? load_some<T>(weight + i, count) : V<T>{};
  };
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    add(0, load(x + i), weights(i, width), all);
    add(1, load(x + i + width), weights(i + width, width), all);
    __builtin_prefetch(x + i + kAhead, 0, 2);
    if (sizeof(M) == sizeof(T)) __builtin_prefetch(x + i + width + kAhead, 0, 2);
  }
  for (; i < n; i += width) {
    const int64_t count = n - i;
    add(0, load_some<T>(x + i, count), weights(i, count),
        [count](V<T> v) { return keep_first<T>(v, count); });
  }
  return {horizontal_sum<T>(sum[0] + sum[1]), horizontal_sum<T>(smooth[0] + smooth[1])};
}

template <class T, class M, bool Capped, Smoothing S>
void forward_row(const CrossEntropyForward& args, int64_t row, const T* weight) {
  const int64_t n = args.classes, target = args.target[row];
  const bool ignored = target == args.ignore_index;
  T* const maximum_out = static_cast<T*>(args.maximum.data) + row;
  T* const log_sum_out = static_cast<T*>(args.log_sum.data) + row;
  args.row_losses[row] = 0;
  args.row_weights[row] = 0;
  if (ignored && !args.every_lse) {
    *maximum_out = *log_sum_out = 0;
    return;
  }
  const M* const x = reinterpret_cast<const M*>(row_of(args.logits, row));
  const Cap<T> cap(args.softcap);
  const T at_target = ignored ? T(0) : capped_value<Capped>(element<T>(x + target), cap);
  // Smoothing sums distances from here, not logits: these may be far from 0 and near each other.
  const T pivot = at_target - at_target == 0 ? at_target : T(0);

  T raw_top = T(-kInfinity), top = raw_top;
  Sums<T> total;
  for (int64_t begin = 0; begin < n; begin += block<T>) {
    const int64_t length = n - begin < block<T> ? n - begin : block<T>;
    const T highest = largest<T>(x + begin, length);
    if (highest > raw_top) {
      const T before = top;
      raw_top = highest;
      top = capped_value<Capped>(raw_top, cap);
      // From -Inf the factor is 0: nothing but NaN can have been summed yet, and that stays.
      if (before == T(-kInfinity))
        total.exponentials *= 0;
      else if (top != before)
        total.exponentials *= ::exp(static_cast<double>(before) - top);
    }
    // Of a block of -Inf alone every exponential is 0, which -Inf - -Inf would not give.
    const T from = raw_top == T(-kInfinity) ? T(0) : top;
    const Sums<T> sums = block_sums<T, M, Capped, S>(
        x + begin, length, from, pivot, S == Smoothing::weighted ? weight + begin : nullptr, cap);
    total.exponentials += sums.exponentials;
    total.smoothing += sums.smoothing;
  }
  const double log_sum = ::log(total.exponentials);
  *maximum_out = top;
  *log_sum_out = static_cast<T>(log_sum);
  if (ignored) return;

  const double w = weight == nullptr ? 1.0 : static_cast<double>(weight[target]);
  const double lse = static_cast<double>(top) + log_sum;
  double loss = w * (1 - args.smoothing) * ((static_cast<double>(top) - at_target) + log_sum);
  if constexpr (S != Smoothing::none) {
    const double from_pivot = (static_cast<double>(top) - pivot) + log_sum;
    loss +=
        args.smoothing / static_cast<double>(n) * (args.weight_sum * from_pivot - total.smoothing);
  }
  if (args.z_loss != 0) loss += w * args.z_loss * lse * lse;
  args.row_losses[row] = loss;
  args.row_weights[row] = w;
}

// Class weights in the compute type, or null.
template <class T>
const T* weights_of(const CrossEntropy& args) {
  if (args.weight.data == nullptr || args.weight.dtype == memory_dtype<T>)
    return static_cast<const T*>(args.weight.data);
  T* const buffer = static_cast<T*>(thread_scratch(static_cast<size_t>(args.classes) * sizeof(T)));
  return read_parameter<T>(args.weight, T(1), buffer, args.classes);
}

// Calls f with constants: whether there is a softcap, and what smoothing asks for.
template <class F>
void with_features(const CrossEntropy& args, F f) {
  const bool weighted = args.weight.data != nullptr;
  const auto with_cap = [&](auto smoothing) {
    args.softcap > 0 ? f(std::true_type{}, smoothing) : f(std::false_type{}, smoothing);
  };
  if (args.smoothing == 0)
    with_cap(std::integral_constant<Smoothing, Smoothing::none>{});
  else if (!weighted)
    with_cap(std::integral_constant<Smoothing, Smoothing::plain>{});
  else
    with_cap(std::integral_constant<Smoothing, Smoothing::weighted>{});
}

template <class T>
void forward_rows(const CrossEntropyForward& args, int64_t begin, int64_t end) {
  const T* const weight = weights_of<T>(args);
  with_type<T>(args.logits.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    with_features(args, [&](auto is_capped, auto smoothing) {
      for (int64_t row = begin; row < end; ++row)
        forward_row<T, M, is_capped(), smoothing()>(args, row, weight);
    });
  });
}

void reduce(const CrossEntropyForward& args) {
  if (args.reduction == kNone) {
    for (int64_t row = 0; row < args.rows; ++row)
      write_parameter(args.loss, row, args.row_losses[row]);
    return;
  }
  double loss = 0, weight = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    loss += args.row_losses[row];
    weight += args.row_weights[row];
  }
  write_parameter(args.loss, 0, args.reduction == kMean ? loss / weight : loss);
  if (args.denominator.data != nullptr) write_parameter(args.denominator, 0, weight);
}

// ---- backward -----------------------------------------------------------------------------------

template <class T>
struct Coefficients {
  T softmax = 0;  // of exp(z - lse)
  T weight = 0;   // of the class weight, taken off; of 1 where there is none
  T target = 0;   // taken off at the target
};

template <class T>
Coefficients<T> coefficients_of(const CrossEntropyBackward& args, int64_t row, const T* weight,
                                double lse) {
  double softmax = 0, smooth = 0, at_target = 0;
  const int64_t target = args.target[row];
  if (target != args.ignore_index) {
    double grad = value_at(args.grad_loss, row * args.grad_loss_stride);
    if (args.denominator.data != nullptr) grad /= value_at(args.denominator, 0);
    const double w = weight == nullptr ? 1.0 : static_cast<double>(weight[target]);
    smooth = grad * args.smoothing / static_cast<double>(args.classes);
    at_target = grad * w * (1 - args.smoothing);
    softmax = at_target + smooth * args.weight_sum;
    if (args.z_loss != 0) softmax += grad * w * 2 * args.z_loss * lse;
  }
  if (args.grad_lse.data != nullptr) softmax += value_at(args.grad_lse, row);
  return {static_cast<T>(softmax), static_cast<T>(smooth), static_cast<T>(at_target)};
}

template <class T, class M>
void zero_row(M* y, int64_t n, bool past_cache) {
  write_values<T>(y, n, past_cache, [](int64_t, auto) { return V<T>{}; }, [](int64_t) {});
}

template <class T, class M, bool Capped, Smoothing S>
void backward_row(const CrossEntropyBackward& args, int64_t row, const T* weight) {
  constexpr int width = lanes<T>;
  const int64_t n = args.classes;
  M* const y = reinterpret_cast<M*>(row_of(args.grad_logits, row));
  const bool ignored = args.target[row] == args.ignore_index;
  if (ignored && args.grad_lse.data == nullptr) return zero_row<T>(y, n, args.past_cache);

  const M* const x = reinterpret_cast<const M*>(row_of(args.logits, row));
  const T top = static_cast<const T*>(args.maximum.data)[row];
  const T log_sum = static_cast<const T*>(args.log_sum.data)[row];
  const Coefficients<T> coefficient =
      coefficients_of<T>(args, row, weight, static_cast<double>(top) + log_sum);
  const Cap<T> cap(args.softcap);
  const int64_t target = ignored ? -1 : args.target[row];

  const auto gradient = [&, top, log_sum, coefficient](V<T> v, int64_t i, int64_t count, V<T> hit) {
    V<T> z = v, slope = {};
    if constexpr (Capped) {
      const V<T> t = tanh(v * cap.inverse);
      z = t * cap.cap;
      slope = T(1) - t * t;
    }
    V<T> grad = exp_nonpositive((z - top) - log_sum) * coefficient.softmax;
    if constexpr (S == Smoothing::plain) grad -= coefficient.weight;
    if constexpr (S == Smoothing::weighted)
      grad -= load_some<T>(weight + i, count) * coefficient.weight;
    grad -= hit;
    return Capped ? grad * slope : grad;
  };
  const auto whole = [&](int64_t i) { return gradient(load(x + i), i, width, V<T>{}); };
  // A vector that is cut off, or has the target in it.
  const auto part = [&](int64_t i, int64_t count) {
    V<T> hit = {};
    if (target >= i && target < i + count) hit[target - i] = coefficient.target;
    store_some<T>(y + i, gradient(load_some<T>(x + i, count), i, count, hit), count);
  };

  // Whole vectors begin where stores past the cache may.
  int64_t head = 0;
  if (args.past_cache) {
    constexpr uintptr_t bytes = sizeof(M) * width;
    head =
        static_cast<int64_t>((bytes - reinterpret_cast<uintptr_t>(y) % bytes) % bytes / sizeof(M));
    head = head < n ? head : n;
  }
  const int64_t last = head + (n - head) / width * width;
  const int64_t special =
      target >= head && target < last ? head + (target - head) / width * width : last;
  const auto range = [&](int64_t i, int64_t end) {
    if (args.past_cache)
      for (; i < end; i += width) stream(y + i, whole(i));
    else
      for (; i < end; i += width) store(y + i, whole(i));
  };
  if (head > 0) part(0, head);
  range(head, special);
  if (special < last) {
    part(special, width);
    range(special + width, last);
  }
  if (last < n) part(last, n - last);
}

template <class T>
void backward_rows(const CrossEntropyBackward& args, int64_t begin, int64_t end) {
  const T* const weight = weights_of<T>(args);
  with_type<T>(args.logits.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    with_features(args, [&](auto is_capped, auto smoothing) {
      for (int64_t row = begin; row < end; ++row)
        backward_row<T, M, is_capped(), smoothing()>(args, row, weight);
    });
  });
  fence();
}

void forward(const CrossEntropyForward& args, int64_t begin, int64_t end) {
  args.logits.dtype == DType::f64 ? forward_rows<double>(args, begin, end)
                                  : forward_rows<float>(args, begin, end);
}

void backward(const CrossEntropyBackward& args, int64_t begin, int64_t end) {
  args.logits.dtype == DType::f64 ? backward_rows<double>(args, begin, end)
                                  : backward_rows<float>(args, begin, end);
}

double weight_sum(const Vector& weight, int64_t classes) {
  double sum = 0;
  for (int64_t i = 0; i < classes; ++i) sum += value_at(weight, i);
  return sum;
}

// ---- sampling -----------------------------------------------------------------------------------

// -log(1 - u) of u = (bits + 1/2) / 2^32, to a few ulps from the smallest u, which the largest of
// many draws depends on, to the largest.
inline F32x exponential_variable(U32x bits) {
  const F32x u = (__builtin_convertvector(bits, F32x) + 0.5f) * 0x1p-32f;
  const F32x rest = (__builtin_convertvector(~bits, F32x) + 0.5f) * 0x1p-32f;  // 1 - u
  // log(1 - u) = 2 (f + f^3/3 + ...) with f = -u / (2 - u), below 1/7.
  const F32x f = u / (2.0f - u), square = f * f;
  F32x series = square * (1.0f / 9) + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  series = series * square + 1.0f;
  return u < 0.25f ? 2.0f * f * series : -log<float>(rest);
}

template <class M>
int64_t sample_row(const Sample& args, int64_t row) {
  constexpr int width = lanes<float>;
  const int64_t n = args.classes;
  const M* const x = reinterpret_cast<const M*>(row_of(args.logits, row));
  const auto key = random::row_key(static_cast<uint64_t>(*args.seed),
                                   static_cast<uint64_t>(args.first_row + row));
  const float inverse = static_cast<float>(1 / args.temperature);
  I32x lane;
  for (int i = 0; i < width; ++i) lane[i] = i;
  F32x best = splat(static_cast<float>(-kInfinity));
  I32x where = lane - lane - 1;
  for (int64_t i = 0; i < n; i += width) {
    const I32x column = lane + static_cast<int32_t>(i);
    U32x bits = bit_cast<U32x>(column) + key.first;
    bits ^= bits >> 16;
    bits *= 0x7feb352du;
    bits ^= key.second;
    bits ^= bits >> 15;
    bits *= 0x846ca68bu;
    bits ^= bits >> 16;
    const F32x logit = or_lowest<float>(load_some<float>(x + i, n - i), n - i);
    const F32x score = logit * inverse - log<float>(exponential_variable(bits));
    const I32x better = score > best;  // the first of equals; never of -Inf or NaN
    best = better ? score : best;
    where = better ? column : where;
  }
  int64_t token = -1;
  float top = static_cast<float>(-kInfinity);
  for (int i = 0; i < width; ++i)
    if (where[i] >= 0 && (best[i] > top || (best[i] == top && where[i] < token))) {
      top = best[i];
      token = where[i];
    }
  return token;
}

void sample(const Sample& args, int64_t begin, int64_t end) {
  with_type<float>(args.logits.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) args.tokens[row] = sample_row<M>(args, row);
  });
}

}  // namespace

extern const CrossEntropyCpu cross_entropy{forward, reduce, backward, weight_sum, sample};

}  // namespace fastseq::FASTSEQ_ISA
