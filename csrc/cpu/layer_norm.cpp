// LayerNorm and RMSNorm on the CPU, forward and backward, plain and with a residual add.
//
//   forward    sum -> centred sum of squares -> write        reads x once, writes y once
//   backward   sums over the row and over rows -> write dx   reads x and dy once, writes dx once
//
// A row is swept two or three times, but only the first sweep meets memory: the others find it in L1
// or L2, so memory sees the minimum of 2 and 3 tensor passes. Short rows go kRows at a time: their
// reductions are chains of latencies that overlap then, weight and bias are loaded once for all of
// them, and in backward the running sums for weight and bias travel through L1 once for all of them.
// While a row is written, the next is asked for (the hardware does not look that far), and an output
// larger than the cache is stored past it, which saves reading its lines first.
//
// Arithmetic is in the compute type T (float, or double for fp64); M is a type in memory.
#include "layer_norm.h"

#include <type_traits>

#include "../math/random.h"
#include "scratch.h"
#include "vec.h"

extern "C" double sqrt(double);

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kRows = 4;          // rows of one step
constexpr int64_t kShort = 4096;  // rows up to this length go kRows at a time
constexpr int64_t kAhead = 4096;  // elements to look ahead at least
constexpr int64_t kBlock = 4096;  // summands of one fp32 partial sum: bounds the error of long rows

template <class T>
using V = typename Simd<T>::V;
template <class T>
constexpr int lanes = Simd<T>::lanes;

int64_t element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

char* row_of(const Rows& rows, int64_t row) {
  const int64_t element =
      (row / rows.inner) * rows.stride_outer + (row % rows.inner) * rows.stride_inner;
  return static_cast<char*>(rows.data) + element * element_size(rows.dtype);
}

// The memory that comes next. A row is swept several times in cache while memory idles, and the
// hardware does not look past the row: the last sweep asks for what follows.
struct Ahead {
  const char* data = nullptr;
  int64_t size = 0;
  Ahead() = default;
  Ahead(const Rows& rows, int64_t row, int64_t distance)
      : data(row_of(rows, row) + distance * element_size(rows.dtype)), size(element_size(rows.dtype)) {}
  // Into L2: L1 is full of the row at hand.
  void prefetch(int64_t i) const { __builtin_prefetch(data + i * size, 0, 2); }
};

// Calls f with a null pointer of the memory type; only the types a compute type can meet.
template <class T, class F>
inline void with_type(DType dtype, F f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::f32: return f(static_cast<float*>(nullptr));
      case DType::f16: return f(static_cast<f16*>(nullptr));
      default: return f(static_cast<bf16*>(nullptr));
    }
  }
}

template <class M>
constexpr DType memory_dtype = DType::f32;
template <>
constexpr DType memory_dtype<double> = DType::f64;
template <>
constexpr DType memory_dtype<f16> = DType::f16;
template <>
constexpr DType memory_dtype<bf16> = DType::bf16;

template <class T>
void convert_row(const void* source, DType dtype, T* target, int64_t n) {
  with_type<T>(dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(const_cast<void*>(source));
    for (int64_t i = 0; i < n; i += lanes<T>)
      store_some<T>(target + i, load_some<T>(p + i, n - i), n - i);
  });
}

// The row in the compute type: itself where it is that already, else converted into buffer.
template <class T>
const T* read_row(const Rows& rows, int64_t row, T* buffer, int64_t n) {
  const char* source = row_of(rows, row);
  if (rows.dtype == memory_dtype<T>) return reinterpret_cast<const T*>(source);
  convert_row(source, rows.dtype, buffer, n);
  return buffer;
}

template <class T>
void write_row(const Rows& rows, int64_t row, const T* source, int64_t n) {
  with_type<T>(rows.dtype, [&](auto* type) {
    auto* p = reinterpret_cast<decltype(type)>(row_of(rows, row));
    for (int64_t i = 0; i < n; i += lanes<T>)
      store_some<T>(p + i, load_some<T>(source + i, n - i), n - i);
  });
}

// Weight or bias in the compute type; fill where there is none.
template <class T>
const T* read_parameter(const Vector& parameter, T fill, T* buffer, int64_t n) {
  if (parameter.data != nullptr && parameter.dtype == memory_dtype<T>)
    return static_cast<const T*>(parameter.data);
  for (int64_t i = 0; i < n; ++i) {
    if (parameter.data == nullptr) {
      buffer[i] = fill;
      continue;
    }
    switch (parameter.dtype) {
      case DType::f64: buffer[i] = static_cast<T>(static_cast<double*>(parameter.data)[i]); break;
      case DType::f32: buffer[i] = static_cast<T>(static_cast<float*>(parameter.data)[i]); break;
      case DType::f16: buffer[i] = to_float(static_cast<f16*>(parameter.data)[i]); break;
      case DType::bf16: buffer[i] = to_float(static_cast<bf16*>(parameter.data)[i]); break;
    }
  }
  return buffer;
}

void write_parameter(const Vector& parameter, int64_t i, double value) {
  const float narrow = static_cast<float>(value);
  switch (parameter.dtype) {
    case DType::f64: static_cast<double*>(parameter.data)[i] = value; break;
    case DType::f32: static_cast<float*>(parameter.data)[i] = narrow; break;
    case DType::f16: static_cast<f16*>(parameter.data)[i] = to_f16(narrow); break;
    case DType::bf16: static_cast<bf16*>(parameter.data)[i] = to_bf16(narrow); break;
  }
}

template <class T>
void multiply_by_dropout(T* row, int64_t index, int64_t n, const Dropout& dropout) {
  const auto key = random::row_key(static_cast<uint64_t>(*dropout.seed), static_cast<uint64_t>(index));
  constexpr int width = lanes<float>;
  U32x lane;
  for (int i = 0; i < width; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int64_t i = 0; i < n; i += width) {
    U32x x = lane + (static_cast<uint32_t>(i) + key.first);
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= key.second;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    const int64_t count = n - i < width ? n - i : width;
    for (int64_t j = 0; j < count; ++j)
      row[i + j] = x[j] < dropout.threshold ? T(0) : row[i + j] * static_cast<T>(dropout.scale);
  }
}

// The sums of map(r, x_i) over Count rows. A row's result does not depend on Count.
template <class T, class M, int Count, class Map>
inline void row_sums(const M* const (&x)[Count], int64_t n, Map map, double (&total)[Count]) {
  constexpr int width = lanes<T>;
  for (int r = 0; r < Count; ++r) total[r] = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    V<T> even[Count] = {}, odd[Count] = {};
    int64_t i = begin;
    for (; i + 2 * width <= end; i += 2 * width)
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        V<T> first, second;
        load_two(x[r] + i, first, second);
        even[r] += map(r, first);
        odd[r] += map(r, second);
      }
    for (; i < end; i += width)
      for (int r = 0; r < Count; ++r)
        even[r] += keep_first<T>(map(r, load_some<T>(x[r] + i, end - i)), end - i);
    for (int r = 0; r < Count; ++r) total[r] += horizontal_sum<T>(even[r] + odd[r]);
  }
}

// Writes value(i, read) into a row, asking for the memory that follows on the way; read loads a vector
// at i, of which the last may be part. An aligned row can be streamed past the cache.
template <class T, class M, class Value, class Next>
inline void write_values(M* y, int64_t n, bool past_cache, Value value, Next next) {
  constexpr int width = lanes<T>;
  const auto whole = [](const auto* p) { return load(p); };
  int64_t i = 0;
  if (past_cache && reinterpret_cast<uintptr_t>(y) % (sizeof(M) * width) == 0) {
    for (; i + width <= n; i += width) {
      stream(y + i, value(i, whole));
      next(i);
    }
  } else {
    for (; i + width <= n; i += width) {
      store(y + i, value(i, whole));
      next(i);
    }
  }
  if (i < n)
    store_some<T>(y + i, value(i, [n, i](const auto* p) { return load_some<T>(p, n - i); }), n - i);
}

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

// ---- forward --------------------------------------------------------------------------------------

// new_residual = residual + dropout(input), rounded to its type X; kept gets a copy to work on, so that
// new_residual itself can be streamed past the cache.
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

template <class T, class X, class Y, int Count>
void normalize_rows(const LayerNormForward& args, const X* const (&x)[Count], int64_t row,
                    const T* weight, const T* bias) {
  const int64_t n = args.row_length;
  const double per_element = 1.0 / static_cast<double>(n);
  double total[Count];
  T mean[Count] = {}, rstd[Count];
  if (!args.rms) {
    row_sums<T>(x, n, [](int, V<T> v) { return v; }, total);
    for (int r = 0; r < Count; ++r) {
      mean[r] = static_cast<T>(total[r] * per_element);
      static_cast<T*>(args.mean.data)[row + r] = mean[r];
    }
  }
  row_sums<T>(
      x, n,
      [&mean](int r, V<T> v) {
        const V<T> centred = v - mean[r];
        return centred * centred;
      },
      total);
  for (int r = 0; r < Count; ++r) {
    rstd[r] = static_cast<T>(1.0 / sqrt(total[r] * per_element + args.eps));
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
            return normalized(i, read) * read(weight + i) + read(bias + i);
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

// ---- backward -------------------------------------------------------------------------------------

// Count rows of backward, x and grad of one type in memory.
template <class T, class M, int Count>
struct Step {
  const M* x[Count];
  const M* grad[Count];
  T mean[Count], rstd[Count];
  T mean_grad[Count] = {};  // E[g], g = grad * weight; stays 0 for RMSNorm
  T mean_product[Count];    // E[g * n], n = (x - mean) * rstd
};

// Sums over each row into step, sums over the rows added to weight_sum and bias_sum.
template <class T, class M, int Count, bool Centred>
void reduce_step(Step<T, M, Count>& step, const T* weight, T* weight_sum, T* bias_sum, int64_t n,
                 const Ahead (&ahead)[Count]) {
  double total_grad[Count] = {}, total_product[Count] = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    V<T> sum_grad[Count] = {}, sum_product[Count] = {};
    const auto column = [&](int64_t i, auto read, auto write, auto mask) {
      const V<T> w = read(weight + i);
      V<T> for_weight = read(weight_sum + i), for_bias = read(bias_sum + i);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        const V<T> grad = read(step.grad[r] + i);
        const V<T> normalized = mask((read(step.x[r] + i) - step.mean[r]) * step.rstd[r]);
        const V<T> scaled = grad * w;
        sum_product[r] += scaled * normalized;
        if (Centred) sum_grad[r] += scaled;
        for_weight += grad * normalized;
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
    step.mean_grad[r] = static_cast<T>(total_grad[r] / static_cast<double>(n));
    step.mean_product[r] = static_cast<T>(total_product[r] / static_cast<double>(n));
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
                        rstd = step.rstd[r], mean_grad = step.mean_grad[r],
                        mean_product = step.mean_product[r], weight = work.weight,
                        stream](int64_t i, auto read) {
      const V<T> normalized = (read(x + i) - mean) * rstd;
      const V<T> scaled = read(grad + i) * read(weight + i);
      V<T> gradient = ((scaled - mean_grad) - normalized * mean_product) * rstd;
      if (stream != nullptr) gradient += read(stream + i);
      return gradient;
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
