// What forward and backward of the recurrent kernels share: the packed weights, the rows at hand,
// zoneout, layer norm. Included by files that are compiled once per instruction set.
#pragma once

#include <type_traits>

#include "../math/gates.h"
#include "../recurrent.h"
#include "recurrent_product.h"
#include "scratch.h"
#include "tanh.h"
#include "team.h"

extern "C" double sqrt(double);

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int64_t kChunk = 64;

template <Cell kCell>
struct CellTag {
  static constexpr Cell cell = kCell;
};

// v as it is after a way through memory.
template <class T, class M>
inline V<T> rounded(V<T> v) {
  if constexpr (std::is_same_v<T, M>) {
    return v;
  } else {
    M narrow[lanes<T>];
    store(narrow, v);
    return load(narrow);
  }
}

// The two products of a step, of which a layer without projection has one. Where the machine has
// products of bf16, that of the hidden state, which bf16 layers have rounded, is in pairs.
template <class T>
struct Weights {
  Shape<T> hidden, projection;
  const T *packed_hidden, *packed_projection;
  Weights(const Recurrent& a, bool backward)
      : hidden(backward ? Shape<T>(1, a.state, gates_of(a.cell) * a.hidden, in_pairs(a))
                        : Shape<T>(gates_of(a.cell), a.hidden, a.state, in_pairs(a))),
        projection(backward ? Shape<T>(1, a.hidden, a.state) : Shape<T>(1, a.state, a.hidden)),
        packed_hidden(static_cast<const T*>(a.packed)),
        packed_projection(packed_hidden + (a.packed == nullptr ? 0 : hidden.elements())) {}

  static bool in_pairs(const Recurrent& a) {
    return kHasPairs && a.dtype == DType::bf16 && a.keep == nullptr && a.weight_hh != nullptr;
  }

  int64_t elements() const { return hidden.elements() + projection.elements(); }

  // The longest row any buffer has.
  int64_t widest() const {
    const int64_t gates = (hidden.groups * hidden.size + 2 * hidden.depth + 64) / 64 * 64;
    const int64_t row = hidden.row() > projection.row() ? hidden.row() : projection.row();
    return row > gates ? row : gates;
  }

  template <class M>
  void pack_all(const Recurrent& a, bool backward) const {
    const int64_t gates = gates_of(a.cell) * a.hidden;
    const auto source = [backward](const void* weight, int64_t rows, int64_t columns) {
      const M* const data = static_cast<const M*>(weight);
      return backward ? Source<M>{data, 1, columns, rows} : Source<M>{data, columns, 1, columns};
    };
    // With a norm the bias comes after it.
    const auto* bias =
        a.norm_hh != nullptr || backward ? nullptr : static_cast<const M*>(a.bias_hh);
    T* const target = static_cast<T*>(a.packed);
    const Source<M> hh = source(a.weight_hh, gates, a.state);
    if constexpr (kHasPairs && sizeof(M) == 2) {
      if (hidden.pairs)
        pack<true>(hidden, hh, bias, target);
      else
        pack<false>(hidden, hh, bias, target);
    } else {
      pack<false>(hidden, hh, bias, target);
    }
    if (a.weight_hr == nullptr) return;
    pack<false>(projection, source(a.weight_hr, a.state, a.hidden), static_cast<const M*>(nullptr),
                target + hidden.elements());
  }
};

// Buffers cut from the thread's scratch memory, or from what a team shares.
template <class T>
struct Carver {
  T* next;
  bool shared;
  Carver(int64_t elements, const Team& team)
      : next(static_cast<T*>(team.scratch)), shared(team.scratch != nullptr) {
    if (!shared) next = static_cast<T*>(thread_scratch(static_cast<size_t>(elements) * sizeof(T)));
  }
  T* take(int64_t elements) {
    T* const taken = next;
    next += elements;
    for (int64_t i = 0; i < elements && !shared; ++i) taken[i] = T(0);
    return taken;
  }
};

// Rows [begin, end) of the batch, and which of them take part in a step.
struct Active {
  int64_t begin, count = 0;
  int32_t index[kChunk];  // of the rows that do, from begin on
  Active(int64_t begin, int64_t end) : begin(begin) {
    for (int64_t i = 0; i < end - begin; ++i) index[count++] = static_cast<int32_t>(i);
  }
  // Those whose length is above t; idle(row) for each of the others.
  template <class Idle>
  void select(const int64_t* lengths, int64_t t, int64_t rows, Idle idle) {
    if (lengths == nullptr) return;
    count = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (t < lengths[begin + i])
        index[count++] = static_cast<int32_t>(i);
      else
        idle(i);
    }
  }
};

// The part of its value before that each of some units keeps (h: which = 0, c: which = 1).
template <class T>
V<T> held(const Recurrent& a, int which, int64_t t, int64_t b, int64_t unit) {
  if (a.seed == nullptr) return splat(static_cast<T>(which == 0 ? a.zoneout_h : a.zoneout_c));
  const auto row = static_cast<uint64_t>((which * a.steps + t) * a.batch + b);
  const auto key = random::row_key(static_cast<uint64_t>(*a.seed), row);
  const uint32_t threshold = which == 0 ? a.threshold_h : a.threshold_c;
  T part[lanes<T>];
  for (int i = 0; i < lanes<T>; ++i)
    part[i] = random::bits(key, static_cast<uint32_t>(unit + i)) < threshold ? T(1) : T(0);
  return load(part);
}

template <class T>
struct Moments {
  T mean, rstd;
};

// Of the first size elements in each of some groups, pitch apart.
template <class T>
Moments<T> moments(const T* x, int groups, int64_t size, int64_t pitch, double eps) {
  double mean = 0, square = 0;
  const double each = 1.0 / static_cast<double>(groups * size);
  for (int g = 0; g < groups; ++g) {
    V<T> sum{};
    for (int64_t u = 0; u < size; u += lanes<T>)
      sum += keep_first<T>(load(x + g * pitch + u), size - u);
    mean += horizontal_sum<T>(sum);
  }
  mean *= each;
  for (int g = 0; g < groups; ++g) {
    V<T> sum{};
    for (int64_t u = 0; u < size; u += lanes<T>) {
      const V<T> centred = keep_first<T>(load(x + g * pitch + u) - static_cast<T>(mean), size - u);
      sum = fma(centred, centred, sum);
    }
    square += horizontal_sum<T>(sum);
  }
  return {static_cast<T>(mean), static_cast<T>(1.0 / sqrt(square * each + eps))};
}

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
