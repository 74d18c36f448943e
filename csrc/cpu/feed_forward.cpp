// Bias, activation and dropout between the products of a feed-forward block: one pass each way.
//
//   forward    reads hidden, writes the output
//   backward   reads hidden and the output's gradient, writes hidden's gradient and the output
//              again, and adds up the bias's gradient
//
// Some 20 to 40 operations a vector, with one exponential and one quotient: from L2 on
// memory and arithmetic take about as long.
#include "feed_forward.h"

#include <type_traits>

#include "exp.h"
#include "rows.h"
#include "scratch.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kWidth = lanes<float>;

// An activation and its derivative at once: they share all that is dear.
struct Point {
  F32x value, slope;
};

inline F32x absolute(F32x x) { return bit_cast<F32x>(bit_cast<U32x>(x) & 0x7fffffffu); }

// z times the normal distribution up to z. Its tail, erfc(|z| / sqrt(2)) / 2, is
// e^(-z^2/2) t q(t) with t = 1 / (1 + 0.265 |z|) (the form of Abramowitz & Stegun 7.1.26) and q a
// minimax fit, 1.4e-8 of the result off for |z| < 14. So what is near 0 keeps its digits on both
// sides, and the exponential is the density's too. What z^2 / 2 is rounded by remains: z^2 / 4 ulp.
inline Point gelu(F32x z) {
  const F32x power = exp(z * z * -0.5f);
  const F32x t = 1.0f / fma(absolute(z), splat(0x1.0f5c28p-2f), splat(1.0f));
  F32x q = fma(t, splat(0x1.f6624cp-6f), splat(-0x1.25da7ap-3f));
  q = fma(q, t, splat(0x1.bb045cp-3f));
  q = fma(q, t, splat(-0x1.d5c996p-4f));
  q = fma(q, t, splat(0x1.1839e4p-3f));
  q = fma(q, t, splat(0x1.f1eb38p-5f));
  q = fma(q, t, splat(0x1.a42eacp-4f));
  q = fma(q, t, splat(0x1.af281cp-4f));
  q = fma(q, t, splat(0x1.b11d12p-4f));
  const F32x tail = power * t * q;
  const F32x up_to = z < 0 ? tail : 1.0f - tail;
  return {z * up_to, fma(z, power * 0x1.988454p-2f, up_to)};
}

// s = 1 / (1 + e^-x) and its derivative s (1 - s), which 1 - s would take digits from.
struct Logistic {
  F32x value, slope;
  explicit Logistic(F32x x) {
    const F32x e = exp(-absolute(x));
    const F32x high = 1.0f / (1.0f + e), low = e * high;
    value = x < 0 ? low : high;
    slope = high * low;
  }
};

// z / 2 (1 + tanh(u)) = z s(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3).
inline Point gelu_tanh(F32x z) {
  const F32x square = z * z;
  const Logistic s(z * fma(square, splat(0x1.2444f2p-4f), splat(0x1.988454p+0f)));
  const F32x inner = fma(square, splat(0x1.b6676cp-3f), splat(0x1.988454p+0f));
  return {z * s.value, fma(z * s.slope, inner, s.value)};
}

inline Point silu(F32x z) {
  const Logistic s(z);
  return {z * s.value, fma(z, s.slope, s.value)};
}

template <Activation A>
inline Point activate(F32x z) {
  if constexpr (A == Activation::gelu) return gelu(z);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh(z);
  if constexpr (A == Activation::silu || A == Activation::swiglu) return silu(z);
  return {z < 0 ? F32x{} : z, z};  // ReLU's backward takes another way
}

// The dropout of one row, a vector at a time.
struct RowDropout {
  bool drops;
  random::RowKey key{};
  U32x lane;
  uint32_t threshold;
  float scale;

  RowDropout(const Dropout& dropout, int64_t row)
      : drops(dropout.seed != nullptr),
        threshold(dropout.threshold),
        scale(static_cast<float>(dropout.scale)) {
    if (drops)
      key = random::row_key(static_cast<uint64_t>(*dropout.seed), static_cast<uint64_t>(row));
    for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i) + key.first;
  }

  // What the elements from column i on are multiplied by; a mask, so that 0 times Inf is 0.
  U32x kept(int64_t i) const {
    U32x x = lane + static_cast<uint32_t>(i);
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= key.second;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return bit_cast<U32x>(x >= threshold);
  }
  F32x apply(F32x v, U32x mask) const { return bit_cast<F32x>(bit_cast<U32x>(v * scale) & mask); }
};

template <class M>
inline void put(M* p, F32x v, int64_t count, bool past_cache) {
  past_cache ? stream(p, v) : store_some<float>(p, v, count);
}

// Whether every vector of a row can be stored past the cache.
template <class M>
inline bool streams(const M* row, int64_t size, bool past_cache) {
  return past_cache && size % kWidth == 0 &&
         reinterpret_cast<uintptr_t>(row) % (sizeof(M) * kWidth) == 0;
}

// Bias in fp32, as long as a row of hidden; 0 where there is none.
struct Bias {
  const float *first, *second;
  Bias(const Vector& bias, int64_t size, bool gated) {
    const int64_t length = gated ? 2 * size : size;
    auto* buffer = static_cast<float*>(thread_scratch(static_cast<size_t>(length) * sizeof(float)));
    first = read_parameter<float>(bias, 0.0f, buffer, length);
    second = first + size;
  }
};

template <class M, Activation A>
void forward_rows(const FeedForwardForward& args, int64_t begin, int64_t end) {
  constexpr bool gated = A == Activation::swiglu;
  const int64_t size = args.size;
  const Bias bias(args.bias, size, gated);
  for (int64_t row = begin; row < end; ++row) {
    const M* hidden = reinterpret_cast<const M*>(row_of(args.hidden, row));
    M* output = reinterpret_cast<M*>(row_of(args.output, row));
    const RowDropout dropout(args.dropout, row);
    const bool past_cache = streams(output, size, args.past_cache);
    for (int64_t i = 0; i < size; i += kWidth) {
      const int64_t count = size - i;
      const F32x z = load_some<float>(hidden + i, count) + load_some<float>(bias.first + i, count);
      F32x value = activate<A>(z).value;
      if constexpr (gated)
        value *=
            load_some<float>(hidden + size + i, count) + load_some<float>(bias.second + i, count);
      if (dropout.drops) value = dropout.apply(value, dropout.kept(i));
      put(output + i, value, count, past_cache);
    }
  }
  fence();
}

template <class M, Activation A>
void backward_row(const FeedForwardBackward& args, int64_t row, const Bias& bias, float* sums) {
  constexpr bool gated = A == Activation::swiglu, relu = A == Activation::relu;
  const int64_t size = args.size;
  const auto rows = [row](const Rows& tensor) {
    return tensor.data == nullptr ? nullptr : reinterpret_cast<M*>(row_of(tensor, row));
  };
  const M *grad = rows(args.grad), *hidden = rows(args.hidden);
  M *grad_hidden = rows(args.grad_hidden), *output = rows(args.output);
  const RowDropout dropout(args.dropout, row);
  const bool grad_past = streams(grad_hidden, size, args.past_cache);
  const bool output_past = streams(output, size, args.past_cache);
  // The gradient as it is rounded, so that the bias's is the sum of what the others see.
  const auto write = [&](int64_t i, int64_t at, F32x value, int64_t count) {
    if (sums != nullptr)
      store_some<float>(sums + at + i, load_some<float>(sums + at + i, count) + value, count);
    if (grad_hidden != nullptr) put(grad_hidden + at + i, value, count, grad_past);
  };
  for (int64_t i = 0; i < size; i += kWidth) {
    const int64_t count = size - i;
    F32x g = load_some<float>(grad + i, count);
    const F32x h = load_some<float>(hidden + i, count);
    if constexpr (relu) {
      write(i, 0, h == 0 ? F32x{} : g * dropout.scale, count);
      continue;
    }
    const Point point = activate<A>(h + load_some<float>(bias.first + i, count));
    F32x value = point.value;
    const U32x kept = dropout.drops ? dropout.kept(i) : U32x{};
    if (dropout.drops) g = dropout.apply(g, kept);
    if constexpr (gated) {
      const F32x other =
          load_some<float>(hidden + size + i, count) + load_some<float>(bias.second + i, count);
      write(i, 0, g * other * point.slope, count);
      write(i, size, g * value, count);
      value *= other;
    } else {
      write(i, 0, g * point.slope, count);
    }
    if (output == nullptr) continue;
    if (dropout.drops) value = dropout.apply(value, kept);
    put(output + i, value, count, output_past);
  }
}

template <class M, Activation A>
void backward_rows(const FeedForwardBackward& args, int64_t begin, int64_t end) {
  constexpr bool gated = A == Activation::swiglu;
  const int64_t length = gated ? 2 * args.size : args.size;
  const Bias bias(args.bias, args.size, gated);
  for (int64_t partial = begin; partial < end; ++partial) {
    float* sums = args.partials == nullptr ? nullptr : args.partials + partial * length;
    if (sums != nullptr) std::memset(sums, 0, static_cast<size_t>(length) * sizeof(float));
    const int64_t last = args.rows * (partial + 1) / args.partial_rows;
    for (int64_t row = args.rows * partial / args.partial_rows; row < last; ++row)
      backward_row<M, A>(args, row, bias, sums);
  }
  fence();
}

// Calls f with a null pointer of the memory type and the activation as a constant.
template <class F>
void with_kind(DType dtype, Activation activation, F f) {
  with_type<float>(dtype, [&](auto* type) {
    switch (activation) {
      case Activation::relu:
        return f(type, std::integral_constant<Activation, Activation::relu>{});
      case Activation::gelu:
        return f(type, std::integral_constant<Activation, Activation::gelu>{});
      case Activation::gelu_tanh:
        return f(type, std::integral_constant<Activation, Activation::gelu_tanh>{});
      case Activation::silu:
        return f(type, std::integral_constant<Activation, Activation::silu>{});
      case Activation::swiglu:
        return f(type, std::integral_constant<Activation, Activation::swiglu>{});
    }
  });
}

void forward(const FeedForwardForward& args, int64_t begin, int64_t end) {
  with_kind(args.hidden.dtype, args.activation, [&](auto* type, auto activation) {
    forward_rows<std::remove_pointer_t<decltype(type)>, activation.value>(args, begin, end);
  });
}

void backward(const FeedForwardBackward& args, int64_t begin, int64_t end) {
  with_kind(args.hidden.dtype, args.activation, [&](auto* type, auto activation) {
    backward_rows<std::remove_pointer_t<decltype(type)>, activation.value>(args, begin, end);
  });
}

void finish(const FeedForwardBackward& args, int64_t begin, int64_t end) {
  const int64_t length = args.activation == Activation::swiglu ? 2 * args.size : args.size;
  for (int64_t i = begin; i < end; i += kWidth) {
    F32x sum = {};
    for (int64_t row = 0; row < args.partial_rows; ++row)
      sum += load_some<float>(args.partials + row * length + i, end - i);
    for (int lane = 0; lane < kWidth && i + lane < end; ++lane)
      write_parameter(args.grad_bias, i + lane, sum[lane]);
  }
}

}  // namespace

extern const FeedForwardCpu feed_forward{forward, backward, finish};

}  // namespace fastseq::FASTSEQ_ISA
