// What becomes of a row of scores between the products: what is added and hidden, dropout, and the
// parts of a softmax. A sweep each, in L1, and none where there is none.
#pragma once

#include <type_traits>

#include "../attention.h"
#include "exp.h"
#include "rows.h"

extern "C" double log(double);

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kWidth = lanes<float>;
constexpr float kInfinity = __builtin_inff();

// tanh(x); near 0 by its series, where 1 - 2 / (e^2x + 1) would cancel.
inline F32x tanh(F32x x) {
  const F32x square = x * x;
  F32x series = square * 0.021869488f - 0.053968254f;
  series = series * square + 0.13333334f;
  series = series * square - 0.33333334f;
  const F32x small = x + x * square * series;
  const F32x large = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
  return square < 0.04f ? small : large;
}

// ---- terms of a row
// ------------------------------------------------------------------------------

struct RowAt {
  int64_t batch, head, query, first_key, keys;
};

inline const char* plane_row(const Plane& plane, const RowAt& at, int64_t size) {
  const int64_t element = at.batch * plane.stride[0] + at.head * plane.stride[1] +
                          at.query * plane.stride[2] + at.first_key * plane.stride[3];
  return static_cast<const char*>(plane.data) + element * size;
}

inline void add_bias(const Plane& bias, const RowAt& at, float* s) {
  with_type<float>(bias.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    const M* p = reinterpret_cast<const M*>(plane_row(bias, at, sizeof(M)));
    const int64_t stride = bias.stride[3];
    for (int64_t j = 0; j < at.keys; j += kWidth) {
      const int64_t count = at.keys - j;
      F32x b;
      if (stride == 1) {
        __builtin_prefetch(p + j + bias.stride[2], 0, 2);  // the next row is elsewhere
        b = load_some<float>(p + j, count);
      } else {
        M few[kWidth] = {};
        for (int64_t l = 0; l < kWidth && l < count; ++l) few[l] = p[(j + l) * stride];
        b = load(few);
      }
      const F32x x = load_some<float>(s + j, count);
      // -Inf hides whatever the score is, NaN included.
      store_some<float>(s + j, b == -kInfinity ? b : x + b, count);
    }
  });
}

inline void hide(const Plane& mask, const RowAt& at, float* s) {
  const char* p = plane_row(mask, at, 1);
  const int64_t stride = mask.stride[3];
  if (stride == 0) {
    if (*p == 0)
      for (int64_t j = 0; j < at.keys; ++j) s[j] = -kInfinity;
    return;
  }
  for (int64_t j = 0; j < at.keys; ++j) s[j] = p[j * stride] != 0 ? s[j] : -kInfinity;
}

// Products times scale to scores; where factor is given, cap' of each goes there.
void apply_terms(const ScoreTerms& terms, int64_t shift, const RowAt& at, float* s, float* factor) {
  const int64_t n = at.keys;
  if (terms.softcap != 0) {
    const float cap = static_cast<float>(terms.softcap), inner = 1.0f / cap;
    for (int64_t j = 0; j < n; j += kWidth) {
      const F32x t = tanh(load_some<float>(s + j, n - j) * inner);
      store_some<float>(s + j, t * cap, n - j);
      if (factor != nullptr) store_some<float>(factor + j, 1.0f - t * t, n - j);
    }
  }
  if (terms.bias.data != nullptr) add_bias(terms.bias, at, s);
  const int64_t beside = at.query + shift - at.first_key;  // the column of relative position 0
  if (terms.slopes != nullptr) {
    const float slope = terms.slopes[at.batch * terms.heads + at.head];
    F32x column;
    for (int l = 0; l < kWidth; ++l) column[l] = static_cast<float>(l - beside);
    for (int64_t j = 0; j < n; j += kWidth) {
      const F32x relative = column + static_cast<float>(j);
      const F32x distance = relative < 0.0f ? -relative : relative;
      const F32x x = load_some<float>(s + j, n - j) - slope * distance;
      store_some<float>(s + j, x, n - j);
    }
  }
  if (terms.mask.data != nullptr) hide(terms.mask, at, s);
  if (terms.left >= 0) {
    const int64_t first = beside - terms.left;
    for (int64_t j = 0; j < n && j < first; ++j) s[j] = -kInfinity;
  }
  if (terms.right >= 0) {
    const int64_t last = beside + terms.right;
    for (int64_t j = last < -1 ? 0 : last + 1; j < n; ++j) s[j] = -kInfinity;
  }
}

// 1 / (1 - p) where a column is kept, else 0.
inline F32x kept(const Dropout& dropout, const random::RowKey& key, U32x column) {
  U32x x = column + key.first;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= key.second;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x >= dropout.threshold ? splat(static_cast<float>(dropout.scale)) : F32x{};
}

inline U32x first_columns(int64_t first_key) {
  U32x lane;
  for (int l = 0; l < kWidth; ++l) lane[l] = static_cast<uint32_t>(first_key + l);
  return lane;
}

// The larger; NaN where either is, so that a row that is NaN is not one that sees nothing.
inline float larger(float a, float b) { return a > b || a != a ? a : b; }

// The largest of a row, -Inf only of one that has nothing else: NaN is no number to be hidden.
inline float row_maximum(const float* s, int64_t n) {
  F32x even = splat(-kInfinity), odd = even;
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    even = maximum(even, load(s + j));
    odd = maximum(odd, load(s + j + kWidth));
  }
  for (; j + kWidth <= n; j += kWidth) even = maximum(even, load(s + j));
  float largest = horizontal_maximum<float>(maximum(even, odd));
  for (; j < n; ++j) largest = s[j] > largest ? s[j] : largest;
  for (j = 0; j < n && largest == -kInfinity; ++j) largest = s[j] != s[j] ? s[j] : largest;
  return largest;
}

// e^(s - largest) in place of s, and the sum of it.
inline float exponentials(float* s, int64_t n, float largest) {
  F32x even = {}, odd = {};
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    const F32x first = exp(load(s + j) - largest), second = exp(load(s + j + kWidth) - largest);
    store(s + j, first);
    store(s + j + kWidth, second);
    even += first;
    odd += second;
  }
  for (; j < n; j += kWidth) {
    const F32x power = keep_first<float>(exp(load_some<float>(s + j, n - j) - largest), n - j);
    store_some<float>(s + j, power, n - j);
    even += power;
  }
  return horizontal_sum<float>(even + odd);
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
