// LayerNorm and RMSNorm on the CPU, forward and backward, plain and with a residual add.
//
//   forward    sum -> centred sum of squares -> write        reads x once, writes y once
//   backward   sums over the row and over rows -> write dx   reads x and dy once, writes dx once
//
// A row is swept two or three times, but only the first sweep meets memory: the others find it in
// L1 or L2, so memory sees the minimum of 2 and 3 tensor passes. Short rows go kRows at a time:
// their reductions are chains of latencies that overlap then, weight and bias are loaded once for
// all of them, and in backward the running sums for weight and bias travel through L1 once for all
// of them. While a row is written, the next is asked for (the hardware does not look that far), and
// an output larger than the cache is stored past it, which saves reading its lines first.
//
// Arithmetic is in the compute type T (float, or double for fp64); M is a type in memory.
#include "layer_norm.h"

#include <type_traits>

#include "rows.h"
#include "scratch.h"

extern "C" double sqrt(double);

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kRows = 4;          // rows of one step
constexpr int64_t kShort = 4096;  // rows up to this length go kRows at a time

// What a thread holds while it walks through its rows.
template <class T>
struct Workspace {
  int at_once;     // rows of a step
  int64_t stride;  // elements between buffers, a whole number of vectors
  T *x, *grad;     // at_once rows each
  T *stream, *result;
  const T *weight, *bias;

  Workspace(int64_t n, const Vector& weight_given, const Vector& bias_given)
      : at_once(n <= kShort ? kRows : 1), stride((n + 63) / 64 * 64) {
    const int buffers = 2 * at_once + 4;
    x = static_cast<T*>(thread_scratch(static_cast<size_t>(buffers * stride) * sizeof(T)));
    grad = x + at_once * stride;
    stream = grad + at_once * stride;
    result = stream + stride;
    weight = read_parameter<T>(weight_given, T(1), result + stride, n);
    bias = read_parameter<T>(bias_given, T(0), result + 2 * stride, n);
  }
};

// ---- forward
// --------------------------------------------------------------------------------------

// new_residual = residual + dropout(input), rounded to its type X; kept gets a copy to work on, so
// that new_residual itself can be streamed past the cache.
template <class T, class X>
void add_residual(const LayerNormForward& args, int64_t row, X* kept, T* buffer,
                  T* residual_buffer) {
  const int64_t n = args.row_length;
  const auto add = [&](const auto* input, const auto* residual) {
    const Ahead input_ahead(args.input, row, kAhead), residual_ahead(args.residual, row, kAhead);
    write_values<T>(
        reinterpret_cast<X*>(row_of(args.new_residual, row)), n, args.past_cache,
        [=](int64_t i, auto read) {
          const V<T> sum = read(input + i) + read(residual + i);
          store(kept + i, sum);  // kept has room for a whole vector at its end
          return sum;
        },
        [=](int64_t i) {
          input_ahead.prefetch(i);
          residual_ahead.prefetch(i);
        });
  };
  const DType type = memory_dtype<X>;
  if (args.dropout.seed == nullptr && args.input.dtype == type && args.residual.dtype == type)
    return add(reinterpret_cast<const X*>(row_of(args.input, row)),
               reinterpret_cast<const X*>(row_of(args.residual, row)));
  convert_row(row_of(args.input, row), args.input.dtype, buffer, n);
  if (args.dropout.seed != nullptr) multiply_by_dropout(buffer, row, n, args.dropout);
  add(buffer, read_row(args.residual, row, residual_buffer, n));
}

// Mean (0 for RMSNorm) and variance about it of Count rows.
template <class T, class X, int Count>
void centred_moments(const X* const (&x)[Count], int64_t n, bool rms, T* mean, double* variance) {
  const double per_element = 1.0 / static_cast<double>(n);
  double total[Count];
  T center[Count] = {};
  if (!rms) {
    row_sums<T>(x, n, [](int, V<T> v, V<T> sum) { return sum + v; }, total);
    for (int r = 0; r < Count; ++r) center[r] = static_cast<T>(total[r] * per_element);
  }
  row_sums<T>(
      x, n,
      [&center](int r, V<T> v, V<T> sum) {
        const V<T> centred = v - center[r];
        return fma(centred, centred, sum);
      },
      total);
  for (int r = 0; r < Count; ++r) {
    mean[r] = center[r];
    variance[r] = total[r] * per_element;
  }
}

// The same. Where the processor multiplies and adds pairs of bf16, one sweep without conversions
// takes the place of two: variance = E[x^2] - E[x]^2, for a row in which that cancels next to
// nothing and whose squares are far from over- and underflow; any other row the other way.
template <class T, class X, int Count>
void moments(const X* const (&x)[Count], int64_t n, bool rms, T* mean, double* variance) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<X, bf16>) {
    const double per_element = 1.0 / static_cast<double>(n);
    double sum[Count], squares[Count];
    row_sums_of_pairs(x, n, sum, squares);
    for (int r = 0; r < Count; ++r) {
      const double center = rms ? 0 : sum[r] * per_element, square = squares[r] * per_element;
      mean[r] = static_cast<T>(center);
      variance[r] = square - center * center;
      if (!(variance[r] > square / 4 && square > 1e-30 && square < 1e30)) {
        const X* const row[1] = {x[r]};
        centred_moments<T>(row, n, rms, mean + r, variance + r);
      }
    }
    return;
  }
#endif
  centred_moments<T>(x, n, rms, mean, variance);
}

template <class T, class X, class Y, int Count>
void normalize_rows(const LayerNormForward& args, const X* const (&x)[Count], int64_t row,
                    const T* weight, const T* bias) {
  const int64_t n = args.row_length;
  T mean[Count], rstd[Count];
  double variance[Count];
  moments<T>(x, n, args.rms, mean, variance);
  for (int r = 0; r < Count; ++r) {
    rstd[r] = static_cast<T>(1.0 / sqrt(variance[r] + args.eps));
    if (!args.rms) static_cast<T*>(args.mean.data)[row + r] = mean[r];
    static_cast<T*>(args.rstd.data)[row + r] = rstd[r];
  }
  const bool affine = args.weight.data != nullptr || args.bias.data != nullptr;
  for (int r = 0; r < Count; ++r) {
    Y* const y = reinterpret_cast<Y*>(row_of(args.output, row + r));
    const Ahead ahead(args.input, row + r, Count * n > kAhead ? Count * n : kAhead);
    const auto next = [ahead](int64_t i) { ahead.prefetch(i); };
    const auto normalized = [x = x[r], mean = mean[r], rstd = rstd[r]](int64_t i, auto read) {
      return (read(x + i) - mean) * rstd;
    };
    if (affine)
      write_values<T>(
          y, n, args.past_cache,
          [=](int64_t i, auto read) {
            return fma(normalized(i, read), read(weight + i), read(bias + i));
          },
          next);
    else
      write_values<T>(y, n, args.past_cache, normalized, next);
  }
}

template <class T, class X, class Y, int Count>
void forward_step(const LayerNormForward& args, int64_t row, const Workspace<T>& work) {
  const X* x[Count];
  for (int r = 0; r < Count; ++r) {
    if (args.residual.data != nullptr) {
      X* const kept = reinterpret_cast<X*>(work.x + r * work.stride);
      add_residual<T>(args, row + r, kept, work.stream, work.result);
      x[r] = kept;
    } else {
      x[r] = reinterpret_cast<const X*>(row_of(args.input, row + r));
    }
  }
  normalize_rows<T, X, Y>(args, x, row, work.weight, work.bias);
}

template <class T>
void forward_rows(const LayerNormForward& args, int64_t begin, int64_t end) {
  const Workspace<T> work(args.row_length, args.weight, args.bias);
  const Rows& source = args.residual.data != nullptr ? args.new_residual : args.input;
  with_type<T>(source.dtype, [&](auto* x) {
    with_type<T>(args.output.dtype, [&](auto* y) {
      using X = std::remove_pointer_t<decltype(x)>;
      using Y = std::remove_pointer_t<decltype(y)>;
      for (int64_t row = begin; row < end;) {
        const int count = end - row >= work.at_once ? work.at_once : 1;
        count == 1 ? forward_step<T, X, Y, 1>(args, row, work)
                   : forward_step<T, X, Y, kRows>(args, row, work);
        row += count;
      }
    });
  });
  fence();
}

// ---- backward
// -------------------------------------------------------------------------------------

// Count rows of backward, x and grad of one type in memory.
template <class T, class M, int Count>
struct Step {
  const M* x[Count];
  const M* grad[Count];
  T mean[Count], rstd[Count];
  // What the sums over the row subtract, with g = grad * weight and c = x - mean:
  //   dx = rstd * (g - E[g] - n * E[g * n]) = rstd * (g - mean_grad - c * slope),   n = c * rstd
  T mean_grad[Count];  // E[g]; 0 for RMSNorm
  T slope[Count];      // rstd^2 * E[g * c]
};

// Sums over each row into step, sums over the rows added to weight_sum and bias_sum.
template <class T, class M, int Count, bool Centred>
void reduce_step(Step<T, M, Count>& step, const T* weight, T* weight_sum, T* bias_sum, int64_t n,
                 const Ahead (&ahead)[Count]) {
  const double per_element = 1.0 / static_cast<double>(n);
  double total_grad[Count] = {}, total_product[Count] = {};
  for (int64_t begin = 0; begin < n; begin += block<T>) {
    const int64_t end = begin + block<T> < n ? begin + block<T> : n;
    V<T> sum_grad[Count] = {}, sum_product[Count] = {};
    const auto column = [&](int64_t i, auto read, auto write, auto mask) {
      const V<T> w = read(weight + i);
      V<T> for_weight = read(weight_sum + i), for_bias = read(bias_sum + i);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        const V<T> grad = read(step.grad[r] + i);
        const V<T> product = grad * mask(read(step.x[r] + i) - step.mean[r]);
        sum_product[r] = fma(product, w, sum_product[r]);
        if (Centred) sum_grad[r] = fma(grad, w, sum_grad[r]);
        for_weight = fma(product, splat<T>(step.rstd[r]), for_weight);
        for_bias += grad;
        ahead[r].prefetch(i);
      }
      write(weight_sum + i, for_weight);
      write(bias_sum + i, for_bias);
    };
    int64_t i = begin;
    for (; i + lanes<T> <= end; i += lanes<T>)
      column(
          i, [](const auto* p) { return load(p); }, [](T* p, V<T> v) { store(p, v); },
          [](V<T> v) { return v; });
    if (i < end) {
      const int64_t count = end - i;
      column(
          i, [count](const auto* p) { return load_some<T>(p, count); },
          [count](T* p, V<T> v) { store_some<T>(p, v, count); },
          [count](V<T> v) { return keep_first<T>(v, count); });
    }
    for (int r = 0; r < Count; ++r) {
      if (Centred) total_grad[r] += horizontal_sum<T>(sum_grad[r]);
      total_product[r] += horizontal_sum<T>(sum_product[r]);
    }
  }
  for (int r = 0; r < Count; ++r) {
    const double rstd = step.rstd[r];
    step.mean_grad[r] = static_cast<T>(total_grad[r] * per_element);
    step.slope[r] = static_cast<T>(total_product[r] * per_element * rstd * rstd);
  }
}

template <class T, class M, int Count>
void backward_step(const LayerNormBackward& args, int64_t row, const Workspace<T>& work,
                   T* weight_sum, T* bias_sum) {
  const int64_t n = args.row_length;
  Step<T, M, Count> step;
  for (int r = 0; r < Count; ++r) {
    if constexpr (sizeof(M) == sizeof(T)) {
      step.x[r] = read_row(args.x, row + r, work.x + r * work.stride, n);
      step.grad[r] = read_row(args.grad_output, row + r, work.grad + r * work.stride, n);
    } else {
      step.x[r] = reinterpret_cast<const M*>(row_of(args.x, row + r));
      step.grad[r] = reinterpret_cast<const M*>(row_of(args.grad_output, row + r));
    }
    step.mean[r] = args.rms ? T(0) : static_cast<const T*>(args.mean.data)[row + r];
    step.rstd[r] = static_cast<const T*>(args.rstd.data)[row + r];
  }
  // Half of what comes next is asked for in each sweep: a core has few requests in flight.
  const int64_t distance = Count * n > kAhead ? Count * n : kAhead;
  Ahead x_ahead[Count];
  for (int r = 0; r < Count; ++r) x_ahead[r] = Ahead(args.x, row + r, distance);
  args.rms ? reduce_step<T, M, Count, false>(step, work.weight, weight_sum, bias_sum, n, x_ahead)
           : reduce_step<T, M, Count, true>(step, work.weight, weight_sum, bias_sum, n, x_ahead);
  if (args.grad_x.data == nullptr && args.grad_input.data == nullptr) return;

  for (int r = 0; r < Count; ++r) {
    const T* stream = args.grad_new_residual.data == nullptr
                          ? nullptr
                          : read_row(args.grad_new_residual, row + r, work.stream, n);
    const auto value = [x = step.x[r], grad = step.grad[r], mean = step.mean[r],
                        rstd = step.rstd[r], mean_grad = step.mean_grad[r], slope = step.slope[r],
                        weight = work.weight, stream](int64_t i, auto read) {
      const V<T> scaled = read(grad + i) * read(weight + i);
      const V<T> gradient = fma(read(x + i) - mean, splat<T>(-slope), scaled - mean_grad);
      if (stream == nullptr) return gradient * rstd;
      return fma(gradient, splat<T>(rstd), read(stream + i));
    };
    const Ahead grad_ahead(args.grad_output, row + r, distance);
    const auto next = [grad_ahead](int64_t i) { grad_ahead.prefetch(i); };
    if (args.grad_x.dtype == memory_dtype<M> && args.grad_input.data == nullptr) {
      write_values<T>(reinterpret_cast<M*>(row_of(args.grad_x, row + r)), n, args.past_cache, value,
                      next);
      continue;
    }
    write_values<T>(work.result, n, false, value, next);
    if (args.grad_x.data != nullptr) write_row(args.grad_x, row + r, work.result, n);
    if (args.grad_input.data == nullptr) continue;
    if (args.dropout.seed != nullptr) multiply_by_dropout(work.result, row + r, n, args.dropout);
    write_row(args.grad_input, row + r, work.result, n);
  }
}

template <class T, class M>
void backward_rows(const LayerNormBackward& args, int64_t begin, int64_t end) {
  const int64_t n = args.row_length;
  const Workspace<T> work(n, args.weight, Vector{});
  for (int64_t partial = begin; partial < end; ++partial) {
    T* weight_sum = static_cast<T*>(args.partials) + partial * n;
    T* bias_sum = weight_sum + args.partial_rows * n;
    std::memset(weight_sum, 0, static_cast<size_t>(n) * sizeof(T));
    std::memset(bias_sum, 0, static_cast<size_t>(n) * sizeof(T));
    const int64_t last = args.rows * (partial + 1) / args.partial_rows;
    for (int64_t row = args.rows * partial / args.partial_rows; row < last;) {
      const int count = last - row >= work.at_once ? work.at_once : 1;
      count == 1 ? backward_step<T, M, 1>(args, row, work, weight_sum, bias_sum)
                 : backward_step<T, M, kRows>(args, row, work, weight_sum, bias_sum);
      row += count;
    }
  }
  fence();
}

template <class T>
void finish_columns(const LayerNormBackward& args, int64_t begin, int64_t end) {
  const int64_t n = args.row_length;
  for (int which = 0; which < 2; ++which) {
    const Vector& target = which == 0 ? args.grad_weight : args.grad_bias;
    if (target.data == nullptr) continue;
    const T* partials = static_cast<const T*>(args.partials) + which * args.partial_rows * n;
    for (int64_t i = begin; i < end; i += lanes<T>) {
      V<T> sum = {};
      for (int64_t row = 0; row < args.partial_rows; ++row)
        sum += load_some<T>(partials + row * n + i, end - i);
      for (int lane = 0; lane < lanes<T> && i + lane < end; ++lane)
        write_parameter(target, i + lane, sum[lane]);
    }
  }
}

void forward(const LayerNormForward& args, int64_t begin, int64_t end) {
  args.input.dtype == DType::f64 ? forward_rows<double>(args, begin, end)
                                 : forward_rows<float>(args, begin, end);
}

void backward(const LayerNormBackward& args, int64_t begin, int64_t end) {
  if (args.x.dtype == DType::f64) return backward_rows<double, double>(args, begin, end);
  if (args.x.dtype == args.grad_output.dtype && args.x.dtype == DType::bf16)
    return backward_rows<float, bf16>(args, begin, end);
  if (args.x.dtype == args.grad_output.dtype && args.x.dtype == DType::f16)
    return backward_rows<float, f16>(args, begin, end);
  backward_rows<float, float>(args, begin, end);
}

void finish(const LayerNormBackward& args, int64_t begin, int64_t end) {
  args.x.dtype == DType::f64 ? finish_columns<double>(args, begin, end)
                             : finish_columns<float>(args, begin, end);
}

}  // namespace

extern const LayerNormCpu layer_norm{forward, backward, finish};

}  // namespace fastseq::FASTSEQ_ISA
