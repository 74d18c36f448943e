// Additive attention on the CPU: scores of a block of queries, and gradients from theirs.
//
// All the time goes into the tanh of every query with every key in every channel, so what counts is
// how few instructions one takes. With E = e^2q e^2k = e^2(q + k),
//
//   tanh(q + k) / 2 = 1/2 - 1 / (1 + E)
//
// and the powers of queries and keys are taken once, not once a pair: what is left of a tanh is one
// product and one reciprocal: 8 instructions an element forward with the sum over channels (4 where
// the numbers have 16 bits and the reciprocal's 14 are enough), and 11 backward (7). tanh itself
// takes 28. That its error is absolute, 5e-8, and not relative as tanh's, is nothing to a score.
//
// e^2(q + k) fits a float, with room for a reciprocal, up to |q|, |k| <= 21; an entry of the batch
// with anything larger in it (or NaN) takes tanh itself.
//
// A lane is a key: the sum over channels needs nothing across lanes. Keys come in panels of two
// vectors, [hidden, panel], which are read from front to end.
#include "additive_attention.h"

#include <cstddef>
#include <type_traits>

#include "rows.h"
#include "scratch.h"
#include "tanh.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kWidth = lanes<float>;
constexpr int64_t kPanel = 2 * kWidth;
constexpr int kTileQueries = FASTSEQ_VECTOR_BYTES == 64 ? 8 : 4;  // as many as registers allow
constexpr int64_t kSum = 16;                                      // channels of a partial sum
constexpr int64_t kBlockQueries = 64;  // whose partial sums stay in L1, and gradients in L2
constexpr float kLargest = 21;

// tanh / 2 from its power e^2x, up to 2^122. A first guess y of 1 / (1 + power) is corrected by
// what its product with 1 + power is short of 1; nothing is rounded on the way that is not small.
inline F32x half_tanh_of_power(F32x power) {
  const F32x d = power + 1.0f;
#if defined(__AVX512F__)
  const F32x y = bit_cast<F32x>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(d)));
#elif defined(__AVX2__)
  const F32x guess = bit_cast<F32x>(_mm256_rcp_ps(bit_cast<__m256>(d)));
  const F32x y = fma(guess, fma(-d, guess, splat(1.0f)), guess);
#else
  const F32x y = 1.0f / d;
#endif
  return fma(-y, fma(-power, y, 1.0f - y), 0.5f - y);
}

// The same within 2^-14, from 1 + power.
inline F32x half_tanh_coarse(F32x d) {
#if defined(__AVX512F__)
  return 0.5f - bit_cast<F32x>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(d)));
#elif defined(__AVX2__)
  const F32x guess = bit_cast<F32x>(_mm256_rcp_ps(bit_cast<__m256>(d)));
  return fma(-guess, fma(-d, guess, splat(1.0f)), 0.5f - guess);
#else
  return 0.5f - 1.0f / d;
#endif
}

// tanh / 2 of a query and a key from their factors.
template <bool Direct, bool Coarse>
inline F32x half_tanh(F32x query, F32x key) {
  if constexpr (Direct)
    return 0.5f * tanh(query + key);
  else if constexpr (Coarse)
    return half_tanh_coarse(fma(query, key, splat(1.0f)));
  else
    return half_tanh_of_power(query * key);
}

// Calls f with Direct and Coarse of an entry as constants.
template <class F>
inline void with_kind(const AdditiveAttention& args, int64_t entry, F f) {
  if (args.direct[entry]) return f(std::true_type{}, std::false_type{});
  args.coarse ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
}

// ---- factors
// --------------------------------------------------------------------------------------

bool all_small(const Rows& rows, int64_t first, int64_t count, int64_t n) {
  I32x large = {};
  with_type<float>(rows.dtype, [&](auto* type) {
    for (int64_t row = first; row < first + count; ++row) {
      const auto* x = reinterpret_cast<decltype(type)>(row_of(rows, row));
      for (int64_t i = 0; i < n; i += kWidth) {
        const F32x v = load_some<float>(x + i, n - i);
        large |= ~((v <= kLargest) & (v >= -kLargest));  // NaN is neither
      }
    }
  });
  for (int i = 0; i < kWidth; ++i)
    if (large[i]) return false;
  return true;
}

// Powers are taken in fp64: their errors come back in every tanh.
inline F32x power_of(F32x x) {
  typedef float Half __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2)));
  Half half[2];
  std::memcpy(half, &x, sizeof(x));
  for (Half& part : half) {
    const F64x wide = __builtin_convertvector(part, F64x);
    part = __builtin_convertvector(exp(wide + wide), Half);
  }
  return bit_cast<F32x>(half);
}

inline F32x factor_of(F32x x, bool direct) { return direct ? x : power_of(x); }

void prepare_queries(const AdditiveAttention& args, int64_t begin, int64_t end) {
  const int64_t n = args.hidden;
  for (int64_t entry = begin; entry < end; ++entry) {
    const bool direct = !all_small(args.query, entry * args.queries, args.queries, n) ||
                        !all_small(args.key, entry * args.keys, args.keys, n);
    args.direct[entry] = direct;
    with_type<float>(args.query.dtype, [&](auto* type) {
      for (int64_t row = entry * args.queries; row < (entry + 1) * args.queries; ++row) {
        const auto* x = reinterpret_cast<decltype(type)>(row_of(args.query, row));
        float* const target = args.query_factors + row * n;
        for (int64_t i = 0; i < n; i += kWidth)
          store_some<float>(target + i, factor_of(load_some<float>(x + i, n - i), direct), n - i);
      }
    });
  }
}

void prepare_keys(const AdditiveAttention& args, int64_t begin, int64_t end) {
  const int64_t n = args.hidden, panels = args.panels();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t entry = task / panels, first = task % panels * kPanel;
    float* const panel = args.key_factors + task * n * kPanel;
    const bool direct = args.direct[entry];
    with_type<float>(args.key.dtype, [&](auto* type) {
      for (int64_t j = 0; j < kPanel; ++j) {
        if (first + j >= args.keys) {
          for (int64_t h = 0; h < n; ++h) panel[h * kPanel + j] = 0;
          continue;
        }
        const auto* x =
            reinterpret_cast<decltype(type)>(row_of(args.key, entry * args.keys + first + j));
        for (int64_t h = 0; h < n; h += kWidth) {
          const F32x v = factor_of(load_some<float>(x + h, n - h), direct);
          const int64_t count = n - h < kWidth ? n - h : kWidth;
          for (int64_t i = 0; i < count; ++i) panel[(h + i) * kPanel + j] = v[i];
        }
      }
    });
  }
}

// ---- scores
// ---------------------------------------------------------------------------------------

// Count queries with a panel of keys. Channels are summed up by kSum first, for smaller errors.
template <int Count, bool Direct, bool Coarse>
inline void score_tile(const float* query, const float* panel, const float* weight, int64_t n,
                       F32x (&total)[Count][2]) {
  for (int r = 0; r < Count; ++r) total[r][0] = total[r][1] = F32x{};
  for (int64_t first = 0; first < n; first += kSum) {
    const int64_t last = first + kSum < n ? first + kSum : n;
    F32x sum[Count][2] = {};
    for (int64_t h = first; h < last; ++h) {
      const F32x keys[2] = {load(panel + h * kPanel), load(panel + h * kPanel + kWidth)};
      const F32x factor = splat(2.0f * weight[h]);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) {
        const F32x q = splat(query[r * n + h]);
        sum[r][0] = fma(factor, half_tanh<Direct, Coarse>(q, keys[0]), sum[r][0]);
        sum[r][1] = fma(factor, half_tanh<Direct, Coarse>(q, keys[1]), sum[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
      total[r][0] += sum[r][0];
      total[r][1] += sum[r][1];
    }
  }
}

template <int Count, bool Direct, bool Coarse>
void score_queries(const AdditiveAttention& args, int64_t entry, int64_t first_query,
                   int64_t panel_index) {
  const int64_t n = args.hidden, first_key = panel_index * kPanel;
  F32x total[Count][2];
  score_tile<Count, Direct, Coarse>(
      args.query_factors + (entry * args.queries + first_query) * n,
      args.key_factors + (entry * args.panels() + panel_index) * n * kPanel, args.weight, n, total);
  const int64_t count = args.keys - first_key;
  for (int r = 0; r < Count; ++r) {
    float* const target =
        args.scores + (entry * args.queries + first_query + r) * args.keys + first_key;
    store_some<float>(target, total[r][0], count);
    if (count > kWidth) store_some<float>(target + kWidth, total[r][1], count - kWidth);
  }
}

void scores(const AdditiveAttention& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.queries + kAdditiveQueries - 1) / kAdditiveQueries;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t entry = task / blocks, first = task % blocks * kAdditiveQueries;
    const int64_t last =
        first + kAdditiveQueries < args.queries ? first + kAdditiveQueries : args.queries;
    with_kind(args, entry, [&](auto direct, auto coarse) {
      constexpr bool kDirect = decltype(direct)::value, kCoarse = decltype(coarse)::value;
      for (int64_t panel = 0; panel < args.panels(); ++panel) {
        int64_t query = first;
        for (; query + kTileQueries <= last; query += kTileQueries)
          score_queries<kTileQueries, kDirect, kCoarse>(args, entry, query, panel);
        for (; query < last; ++query) score_queries<1, kDirect, kCoarse>(args, entry, query, panel);
      }
    });
  }
}

// ---- gradients
// ------------------------------------------------------------------------------------

void prepare_gradients(const AdditiveAttention& args, int64_t begin, int64_t end) {
  const int64_t panels = args.panels();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t entry = task / panels, first = task % panels * kPanel;
    const int64_t count = args.keys - first < kPanel ? args.keys - first : kPanel;
    for (int64_t query = 0; query < args.queries; ++query) {
      const float* source = args.grad_scores + (entry * args.queries + query) * args.keys + first;
      float* const target = args.grad_panels + (task * args.queries + query) * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) target[j] = j < count ? source[j] : 0;
    }
  }
}

// With g the gradient of a score, in Channels channels side by side, so that g is loaded once:
//
//   grad_query[i, h] = 4 weight[h] * sum over j of g * (1/4 - half^2)       half = tanh / 2
//   grad_key[j, h]   = 4 weight[h] * sum over i of g * (1/4 - half^2)
//   grad_weight[h]   = 2 * sum over i, j of g * half
template <int Channels, bool Direct, bool Coarse>
void gradient_channels(const AdditiveAttention& args, int64_t entry, int64_t channel,
                       F32x* partial) {
  const int64_t n = args.hidden, panels = args.panels();
  double weight_sum[Channels] = {};
  for (int64_t first = 0; first < args.queries; first += kBlockQueries) {
    const int64_t count =
        args.queries - first < kBlockQueries ? args.queries - first : kBlockQueries;
    const float* const query = args.query_factors + (entry * args.queries + first) * n + channel;
    for (int64_t i = 0; i < count * Channels; ++i) partial[i] = F32x{};
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t place = ((entry * panels + panel) * n + channel) * kPanel;
      const float* const grads =
          args.grad_panels + ((entry * panels + panel) * args.queries + first) * kPanel;
      F32x keys[Channels][2], grad_keys[Channels][2] = {}, grad_weight[Channels] = {};
      for (int c = 0; c < Channels; ++c)
        for (int k = 0; k < 2; ++k)
          keys[c][k] = load(args.key_factors + place + c * kPanel + k * kWidth);
      for (int64_t i = 0; i < count; ++i) {
        const F32x g[2] = {load(grads + i * kPanel), load(grads + i * kPanel + kWidth)};
#pragma GCC unroll 2
        for (int c = 0; c < Channels; ++c) {
          const F32x q = splat(query[i * n + c]);
          F32x sum = partial[i * Channels + c];
#pragma GCC unroll 2
          for (int k = 0; k < 2; ++k) {
            F32x half = half_tanh<Direct, Coarse>(q, keys[c][k]);
            if constexpr (Direct) half = g[k] == 0.0f ? F32x{} : half;  // NaN that takes no part
            const F32x slope = fma(-half, half, splat(0.25f));
            sum = fma(g[k], slope, sum);
            grad_keys[c][k] = fma(g[k], slope, grad_keys[c][k]);
            grad_weight[c] = fma(g[k], half, grad_weight[c]);
          }
          partial[i * Channels + c] = sum;
        }
      }
      for (int c = 0; c < Channels; ++c) {
        weight_sum[c] += horizontal_sum<float>(grad_weight[c]);
        float* const target = args.grad_key_panels + place + c * kPanel;
        for (int k = 0; k < 2; ++k) {
          const F32x before = first == 0 ? F32x{} : load(target + k * kWidth);
          store(target + k * kWidth, before + grad_keys[c][k]);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int c = 0; c < Channels; ++c)
        args.grad_query[(entry * args.queries + first + i) * n + channel + c] =
            4.0f * args.weight[channel + c] * horizontal_sum<float>(partial[i * Channels + c]);
  }
  for (int c = 0; c < Channels; ++c)
    args.grad_weight[entry * n + channel + c] = static_cast<float>(2.0 * weight_sum[c]);
}

void gradients(const AdditiveAttention& args, int64_t begin, int64_t end) {
  const int64_t n = args.hidden, blocks = (n + kAdditiveChannels - 1) / kAdditiveChannels;
  F32x* const partial = static_cast<F32x*>(thread_scratch(2 * kBlockQueries * sizeof(F32x)));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t entry = task / blocks, first = task % blocks * kAdditiveChannels;
    const int64_t last = first + kAdditiveChannels < n ? first + kAdditiveChannels : n;
    with_kind(args, entry, [&](auto direct, auto coarse) {
      constexpr bool kDirect = decltype(direct)::value, kCoarse = decltype(coarse)::value;
      int64_t channel = first;
      for (; channel + 2 <= last; channel += 2)
        gradient_channels<2, kDirect, kCoarse>(args, entry, channel, partial);
      if (channel < last) gradient_channels<1, kDirect, kCoarse>(args, entry, channel, partial);
    });
  }
}

void finish_keys(const AdditiveAttention& args, int64_t begin, int64_t end) {
  const int64_t n = args.hidden, panels = args.panels();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t entry = task / panels, first = task % panels * kPanel;
    const int64_t count = args.keys - first < kPanel ? args.keys - first : kPanel;
    const float* const panel = args.grad_key_panels + task * n * kPanel;
    for (int64_t j = 0; j < count; ++j) {
      float* const target = args.grad_key + (entry * args.keys + first + j) * n;
      for (int64_t h = 0; h < n; ++h) target[h] = 4.0f * args.weight[h] * panel[h * kPanel + j];
    }
  }
}

}  // namespace

extern const AdditiveAttentionCpu additive_attention{
    kPanel, prepare_queries, prepare_keys, scores, prepare_gradients, gradients, finish_keys};

}  // namespace fastseq::FASTSEQ_ISA
