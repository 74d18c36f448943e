// Rotary position embedding on the CPU: every number is read and written once, in fp32 in between.
#include "rotary_embedding.h"

#include <type_traits>

#include "rows.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kWidth = lanes<float>;

// Two vectors of pairs (a0 b0 a1 b1 ...) as (a0 a1 ...), (b0 b1 ...), and back.
struct Lanes {
  I32x even, odd, low, high;
  Lanes() {
    for (int i = 0; i < kWidth; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
      low[i] = i / 2 + (i % 2) * kWidth;
      high[i] = low[i] + kWidth / 2;
    }
  }
};

// The lanes of two vectors, counted through, in another order.
inline F32x pick(F32x first, F32x second, I32x order) {
#if defined(__clang__)
  F32x result;
  for (int i = 0; i < kWidth; ++i)
    result[i] = order[i] < kWidth ? first[order[i]] : second[order[i] - kWidth];
  return result;
#else
  return __builtin_shuffle(first, second, order);
#endif
}

template <class M, bool Interleaved>
void rotate_row(const M* x, M* y, const float* cos, const float* sin, float sign, int64_t half,
                const Lanes& lane) {
  for (int64_t i = 0; i < half; i += kWidth) {
    const int64_t count = half - i < kWidth ? half - i : kWidth;
    const F32x c = load_some<float>(cos + i, count), s = load_some<float>(sin + i, count) * sign;
    if constexpr (Interleaved) {
      const int64_t rest = 2 * count - kWidth;
      const F32x first = load_some<float>(x + 2 * i, 2 * count);
      const F32x second = rest > 0 ? load_some<float>(x + 2 * i + kWidth, rest) : F32x{};
      const F32x a = pick(first, second, lane.even);
      const F32x b = pick(first, second, lane.odd);
      const F32x u = fma(a, c, -(b * s)), v = fma(b, c, a * s);
      store_some<float>(y + 2 * i, pick(u, v, lane.low), 2 * count);
      if (rest > 0) store_some<float>(y + 2 * i + kWidth, pick(u, v, lane.high), rest);
    } else {
      const F32x a = load_some<float>(x + i, count), b = load_some<float>(x + half + i, count);
      store_some<float>(y + i, fma(a, c, -(b * s)), count);
      store_some<float>(y + half + i, fma(b, c, a * s), count);
    }
  }
}

void rotate(const RotaryEmbedding& args, int64_t begin, int64_t end) {
  const int64_t half = args.rotated / 2;
  const float sign = args.inverse ? -1.0f : 1.0f;
  const Lanes lane;
  with_type<float>(args.input.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      const M* x = reinterpret_cast<const M*>(row_of(args.input, row));
      M* y = reinterpret_cast<M*>(row_of(args.output, row));
      int64_t position = row % args.length;
      position = args.positions == nullptr
                     ? position + args.offset
                     : args.positions[row / args.entry * args.positions_stride + position];
      const float *cos = args.cos + position * half, *sin = args.sin + position * half;
      if (args.interleaved)
        rotate_row<M, true>(x, y, cos, sin, sign, half, lane);
      else
        rotate_row<M, false>(x, y, cos, sin, sign, half, lane);
      std::memcpy(y + args.rotated, x + args.rotated,
                  static_cast<size_t>(args.size - args.rotated) * sizeof(M));
    }
  });
}

}  // namespace

extern const RotaryEmbeddingCpu rotary_embedding{rotate};

}  // namespace fastseq::FASTSEQ_ISA
