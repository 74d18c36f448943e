// Attention on the CPU: what lies between the matrix products, and decoding as a whole.
//
// Between the products a row of scores (q_i . k_j for all j at hand) is swept some times in L1:
//
//   forward    terms -> maximum -> exp and sum -> probabilities, dropped out, in the product's
//   dtype backward   terms -> probability from lse -> gradient of the score
//
// "Terms" are whatever is added or hidden, a sweep each, and none where there is none. The products
// themselves are the library's: see fastseq/ops/attention_blockwise.py.
//
// Decoding has so few queries that the keys and values are read once and memory is all that counts:
// per tile of keys the scores, an online softmax (Milakov & Gimelshein 2018), and the weighted sum.
// Long caches are split into tasks whose length does not depend on threads, and merged in order.
#include "attention.h"

#include <type_traits>

#include "exp.h"
#include "rows.h"
#include "scratch.h"

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

// Products to scores; where factor is given, cap' of each goes there.
void apply_terms(const ScoreTerms& terms, int64_t shift, const RowAt& at, float* s, float* factor) {
  const int64_t n = at.keys;
  const float scale = static_cast<float>(terms.scale);
  if (terms.softcap != 0) {
    const float cap = static_cast<float>(terms.softcap), inner = scale / cap;
    for (int64_t j = 0; j < n; j += kWidth) {
      const F32x t = tanh(load_some<float>(s + j, n - j) * inner);
      store_some<float>(s + j, t * cap, n - j);
      if (factor != nullptr) store_some<float>(factor + j, 1.0f - t * t, n - j);
    }
  } else {
    for (int64_t j = 0; j < n; j += kWidth)
      store_some<float>(s + j, load_some<float>(s + j, n - j) * scale, n - j);
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

// ---- rows of a piece
// -----------------------------------------------------------------------------

struct PieceRow {
  RowAt at;
  int64_t statistics;  // of lse and delta
  random::RowKey key;
};

inline PieceRow row_at(const ScorePiece& args, int64_t r) {
  const ScoreTerms& terms = args.terms;
  const int64_t i = args.first_i + r % args.count_i;
  const int64_t g = args.first_g + r / args.count_i % args.count_g;
  const int64_t n = args.first_n + r / (args.count_i * args.count_g);
  const int64_t key_heads = terms.heads / terms.group;
  const int64_t head = n % key_heads * terms.group + g, batch = n / key_heads;
  const int64_t both = batch * terms.heads + head;
  PieceRow row{{batch, head, i, args.first_key, args.keys}, both * args.queries + i, {}};
  if (terms.dropout.seed != nullptr)
    row.key = random::row_key(static_cast<uint64_t>(*terms.dropout.seed),
                              static_cast<uint64_t>(terms.row_offset + both * terms.row_pitch + i));
  return row;
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

// The largest of a row; its partial last vector filled up with -Inf.
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

template <class M>
void forward_row(const ScorePiece& args, int64_t r) {
  const PieceRow row = row_at(args, r);
  const ScoreTerms& terms = args.terms;
  const int64_t n = args.keys;
  float* s = args.scores + r * n;
  M* p = static_cast<M*>(args.probabilities.data) + r * n;
  apply_terms(terms, terms.shift, row.at, s, nullptr);
  float largest = row_maximum(s, n);
  const float sink = terms.sinks != nullptr ? terms.sinks[row.at.head] : -kInfinity;
  largest = sink > largest ? sink : largest;
  if (largest == -kInfinity) {
    args.lse[row.statistics] = -kInfinity;
    std::memset(p, 0, static_cast<size_t>(n) * sizeof(M));
    return;
  }
  float total = exponentials(s, n, largest);
  if (sink != -kInfinity) total += exp(splat(sink - largest))[0];
  args.lse[row.statistics] = largest + static_cast<float>(::log(static_cast<double>(total)));
  const float factor = 1.0f / total;
  U32x column = first_columns(args.first_key);
  for (int64_t j = 0; j < n; j += kWidth) {
    F32x power = load_some<float>(s + j, n - j) * factor;
    if (terms.dropout.seed != nullptr) power *= kept(terms.dropout, row.key, column);
    store_some<float>(p + j, power, n - j);
    column += static_cast<uint32_t>(kWidth);
  }
}

template <class M>
void backward_row(const ScorePiece& args, int64_t r) {
  const PieceRow row = row_at(args, r);
  const ScoreTerms& terms = args.terms;
  const int64_t n = args.keys;
  float* s = args.scores + r * n;
  float* grad = args.grad + r * n;
  M* p = static_cast<M*>(args.probabilities.data) + r * n;
  M* ds = static_cast<M*>(args.grad_scores.data) + r * n;
  float* factor = nullptr;
  if (terms.softcap != 0)
    factor = static_cast<float*>(thread_scratch(static_cast<size_t>(n + kWidth) * sizeof(float)));
  apply_terms(terms, terms.shift, row.at, s, factor);
  float lse = args.lse[row.statistics];
  if (lse == -kInfinity) lse = kInfinity;  // nothing is seen: every probability is 0
  // Probabilities in place of scores, negative where dropped, and the sums of p and of p dp.
  U32x column = first_columns(args.first_key);
  F32x sum = {}, total = {};
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t count = n - j;
    F32x power = keep_first<float>(exp(load_some<float>(s + j, count) - lse), count);
    F32x gradient = load_some<float>(grad + j, count);
    total += power;
    if (terms.dropout.seed != nullptr) {
      const F32x keep = kept(terms.dropout, row.key, column);
      gradient = gradient * keep;
      store_some<float>(grad + j, gradient, count);
      column += static_cast<uint32_t>(kWidth);
      sum = fma(power, gradient, sum);
      power = keep > 0.0f ? power : -power;
    } else {
      sum = fma(power, gradient, sum);
    }
    store_some<float>(s + j, power, count);
  }
  float delta = horizontal_sum<float>(sum);
  if (args.whole && lse != kInfinity) delta /= horizontal_sum<float>(total);
  if (args.delta != nullptr)
    delta = args.delta[row.statistics];
  else if (args.grad_lse != nullptr && lse != kInfinity)
    delta -= args.grad_lse[row.statistics];
  const float keep_scale = static_cast<float>(terms.dropout.scale);
  const bool separate = static_cast<void*>(ds) != static_cast<void*>(grad);
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t count = n - j;
    const F32x signed_power = load_some<float>(s + j, count);
    const F32x power = signed_power < 0.0f ? -signed_power : signed_power;
    F32x gradient = power * (load_some<float>(grad + j, count) - delta);
    if (separate) store_some<float>(grad + j, gradient, count);
    if (factor != nullptr) gradient *= load_some<float>(factor + j, count);
    store_some<float>(p + j, maximum(splat(0.0f), signed_power) * keep_scale, count);
    store_some<float>(ds + j, gradient, count);
  }
}

template <class F>
inline void with_product_type(DType dtype, F f) {
  with_type<float>(dtype, f);
}

void forward_rows(const ScorePiece& args, int64_t begin, int64_t end) {
  with_product_type(args.probabilities.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t r = begin; r < end; ++r) forward_row<M>(args, r);
  });
}

void backward_rows(const ScorePiece& args, int64_t begin, int64_t end) {
  with_product_type(args.probabilities.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t r = begin; r < end; ++r) backward_row<M>(args, r);
  });
}

// ---- decoding
// ------------------------------------------------------------------------------------

constexpr int64_t kTileKeys = 128;
constexpr int kRowsAtOnce = 4;

// s[r][j] = q_r . k_j for Rows rows and count keys; q is fp32 in rows of padded elements.
template <int Rows, class M>
void products(const float* q, int64_t padded, const M* k, int64_t stride, int64_t d, int64_t count,
              float* s) {
  for (int64_t j = 0; j < count; ++j) {
    const M* key = k + j * stride;
    __builtin_prefetch(key + 8 * stride);
    F32x sum[Rows] = {};
    int64_t c = 0;
    for (; c + kWidth <= d; c += kWidth) {
      const F32x x = load(key + c);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[r] = fma(x, load(q + r * padded + c), sum[r]);
    }
    if (c < d) {
      const F32x x = load_some<float>(key + c, d - c);
      for (int r = 0; r < Rows; ++r) sum[r] = fma(x, load(q + r * padded + c), sum[r]);
    }
    for (int r = 0; r < Rows; ++r) s[r * kTileKeys + j] = horizontal_sum<float>(sum[r]);
  }
}

// out[r] += sum over count keys of p[r][j] v_j, for elements [c, c + 4 vectors) at a time.
template <int Rows, class M>
void weighted_sum(const float* p, const M* v, int64_t stride, int64_t d, int64_t count,
                  int64_t padded, float* out) {
  constexpr int kVectors = 4;
  int64_t c = 0;
  for (; c + kVectors * kWidth <= d; c += kVectors * kWidth) {
    F32x sum[Rows][kVectors];
    for (int r = 0; r < Rows; ++r)
      for (int u = 0; u < kVectors; ++u) sum[r][u] = load(out + r * padded + c + u * kWidth);
    for (int64_t j = 0; j < count; ++j) {
      const M* value = v + j * stride + c;
      __builtin_prefetch(value + 8 * stride);
      F32x x[kVectors];
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) x[u] = load(value + u * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const F32x weight = splat(p[r * kTileKeys + j]);
#pragma GCC unroll 4
        for (int u = 0; u < kVectors; ++u) sum[r][u] = fma(weight, x[u], sum[r][u]);
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int u = 0; u < kVectors; ++u) store(out + r * padded + c + u * kWidth, sum[r][u]);
  }
  for (; c < d; c += kWidth)
    for (int r = 0; r < Rows; ++r) {
      F32x sum = load(out + r * padded + c);
      for (int64_t j = 0; j < count; ++j)
        sum = fma(splat(p[r * kTileKeys + j]), load_some<float>(v + j * stride + c, d - c), sum);
      store(out + r * padded + c, sum);
    }
}

// Calls f with the number of rows as a constant, kRowsAtOnce at a time.
template <class F>
inline void by_rows(int64_t rows, F f) {
  int64_t r = 0;
  for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) f(r, std::integral_constant<int, 4>{});
  for (; r < rows; ++r) f(r, std::integral_constant<int, 1>{});
}

inline int64_t round_up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

template <class M>
void decode_task(const Decode& args, int64_t task) {
  const ScoreTerms& terms = args.terms;
  const int64_t splits = args.splits(), key_heads = terms.heads / terms.group;
  const int64_t n = task / splits, batch = n / key_heads, key_head = n % key_heads;
  const int64_t rows = terms.group * args.queries, d = args.head_dim, dv = args.value_dim;
  const int64_t padded = round_up(d), padded_v = round_up(dv);
  int64_t keys = args.key_lengths != nullptr ? args.key_lengths[batch] : args.keys;
  keys = keys < 0 ? 0 : keys > args.keys ? args.keys : keys;
  const int64_t shift = args.bottom_right ? keys - args.queries : 0;
  int64_t begin = task % splits * args.split, end = begin + args.split;
  end = end < keys ? end : keys;
  // What no query of the task sees is not read.
  if (terms.left >= 0 && begin < shift - terms.left) begin = shift - terms.left;
  if (terms.right >= 0 && end > args.queries + shift + terms.right)
    end = args.queries + shift + terms.right;

  float* q = static_cast<float*>(thread_scratch(
      static_cast<size_t>(rows * (padded + padded_v + kTileKeys + 2)) * sizeof(float)));
  float* sums = q + rows * padded;
  float* s = sums + rows * padded_v;
  float* largest = s + rows * kTileKeys;
  float* total = largest + rows;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = key_head * terms.group + r / args.queries;
    const M* source = static_cast<const M*>(args.query) + batch * args.query_stride[0] +
                      head * args.query_stride[1] + r % args.queries * args.query_stride[2];
    for (int64_t c = 0; c < padded; c += kWidth)
      store(q + r * padded + c, load_some<float>(source + c, d - c));
    for (int64_t c = 0; c < padded_v; ++c) sums[r * padded_v + c] = 0;
    largest[r] = -kInfinity;
    total[r] = 0;
  }
  const M* k =
      static_cast<const M*>(args.key) + batch * args.key_stride[0] + key_head * args.key_stride[1];
  const M* v = static_cast<const M*>(args.value) + batch * args.value_stride[0] +
               key_head * args.value_stride[1];
  for (int64_t first = begin; first < end; first += kTileKeys) {
    const int64_t count = end - first < kTileKeys ? end - first : kTileKeys;
    by_rows(rows, [&](int64_t r, auto number) {
      products<decltype(number)::value>(q + r * padded, padded, k + first * args.key_stride[2],
                                        args.key_stride[2], d, count, s + r * kTileKeys);
    });
    for (int64_t r = 0; r < rows; ++r) {
      float* row = s + r * kTileKeys;
      const int64_t head = key_head * terms.group + r / args.queries;
      apply_terms(terms, shift, {batch, head, r % args.queries, first, count}, row, nullptr);
      const float before = largest[r], here = row_maximum(row, count);
      largest[r] = here > before ? here : before;
      if (largest[r] == -kInfinity) {
        for (int64_t j = 0; j < count; ++j) row[j] = 0;
        continue;
      }
      const float sum = exponentials(row, count, largest[r]);
      const float less = exp(splat(before - largest[r]))[0];
      total[r] = total[r] * less + sum;
      if (less != 1.0f)
        for (int64_t c = 0; c < padded_v; c += kWidth)
          store(sums + r * padded_v + c, load(sums + r * padded_v + c) * less);
    }
    by_rows(rows, [&](int64_t r, auto number) {
      weighted_sum<decltype(number)::value>(s + r * kTileKeys, v + first * args.value_stride[2],
                                            args.value_stride[2], dv, count, padded_v,
                                            sums + r * padded_v);
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* partial = args.partial + (task * rows + r) * (dv + 2);
    std::memcpy(partial, sums + r * padded_v, static_cast<size_t>(dv) * sizeof(float));
    partial[dv] = largest[r];
    partial[dv + 1] = total[r];
  }
}

void decode(const Decode& args, int64_t begin, int64_t end) {
  with_product_type(args.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = begin; task < end; ++task) decode_task<M>(args, task);
  });
}

void merge(const Decode& args, int64_t begin, int64_t end) {
  const ScoreTerms& terms = args.terms;
  const int64_t splits = args.splits(), rows = terms.group * args.queries, dv = args.value_dim;
  const int64_t pitch = dv + 2, key_heads = terms.heads / terms.group;
  with_product_type(args.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t n = begin; n < end; ++n)
      for (int64_t r = 0; r < rows; ++r) {
        const float* partial = args.partial + (n * splits * rows + r) * pitch;
        const int64_t head = n % key_heads * terms.group + r / args.queries;
        const int64_t row = (n / key_heads * terms.heads + head) * args.queries + r % args.queries;
        float largest = terms.sinks != nullptr ? terms.sinks[head] : -kInfinity;
        for (int64_t i = 0; i < splits; ++i) {
          const float here = partial[i * rows * pitch + dv];
          largest = here > largest ? here : largest;
        }
        const bool nothing = largest == -kInfinity;
        const float base = nothing ? 0.0f : largest;
        float total = terms.sinks != nullptr ? exp(splat(terms.sinks[head] - base))[0] : 0.0f;
        for (int64_t i = 0; i < splits; ++i) {
          const float* part = partial + i * rows * pitch;
          total += part[dv + 1] * exp(splat(part[dv] - base))[0];
        }
        args.lse[row] =
            nothing ? -kInfinity : base + static_cast<float>(::log(static_cast<double>(total)));
        const float factor = nothing ? 0.0f : 1.0f / total;
        M* out = static_cast<M*>(args.output) + row * dv;
        for (int64_t c = 0; c < dv; c += kWidth) {
          F32x sum = {};
          for (int64_t i = 0; i < splits; ++i) {
            const float* part = partial + i * rows * pitch;
            const float weight = exp(splat(part[dv] - base))[0];
            sum = fma(load_some<float>(part + c, dv - c), splat(weight), sum);
          }
          store_some<float>(out + c, sum * factor, dv - c);
        }
      }
  });
}

}  // namespace

extern const AttentionCpu attention{forward_rows, backward_rows, decode, merge};

}  // namespace fastseq::FASTSEQ_ISA
