// Decoding: so few queries that the keys and values are read once and memory is all that counts.
//
// Per tile of keys the scores, an online softmax (Milakov & Gimelshein 2018), and the weighted sum.
// Long caches are split into tasks whose length does not depend on threads, and merged in order.
#pragma once

#include "attention_terms.h"
#include "product.h"
#include "scratch.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

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

template <class M>
void decode_task(const Decode& args, int64_t task) {
  const ScoreTerms& terms = args.terms;
  const int64_t splits = args.splits(), key_heads = terms.heads / terms.group;
  const int64_t n = task / splits, batch = n / key_heads, key_head = n % key_heads;
  const int64_t rows = terms.group * args.queries, d = args.head_dim, dv = args.value_dim;
  const int64_t padded = round_up(d, kWidth), padded_v = round_up(dv, kWidth);
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
  const float scale = static_cast<float>(terms.scale);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = key_head * terms.group + r / args.queries;
    const M* source = static_cast<const M*>(args.query) + batch * args.query_stride[0] +
                      head * args.query_stride[1] + r % args.queries * args.query_stride[2];
    for (int64_t c = 0; c < padded; c += kWidth)
      store(q + r * padded + c, load_some<float>(source + c, d - c) * scale);
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
      const float before = largest[r];
      largest[r] = larger(before, row_maximum(row, count));
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
  with_type<float>(args.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = begin; task < end; ++task) decode_task<M>(args, task);
  });
}

void merge(const Decode& args, int64_t begin, int64_t end) {
  const ScoreTerms& terms = args.terms;
  const int64_t splits = args.splits(), rows = terms.group * args.queries, dv = args.value_dim;
  const int64_t pitch = dv + 2, key_heads = terms.heads / terms.group;
  with_type<float>(args.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t n = begin; n < end; ++n)
      for (int64_t r = 0; r < rows; ++r) {
        const float* partial = args.partial + (n * splits * rows + r) * pitch;
        const int64_t head = n % key_heads * terms.group + r / args.queries;
        const int64_t row = (n / key_heads * terms.heads + head) * args.queries + r % args.queries;
        float largest = terms.sinks != nullptr ? terms.sinks[head] : -kInfinity;
        for (int64_t i = 0; i < splits; ++i)
          largest = larger(largest, partial[i * rows * pitch + dv]);
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
}  // namespace fastseq::FASTSEQ_ISA
