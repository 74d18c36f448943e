// LayerNorm and RMSNorm on the CPU, forward and backward, plain and with a residual add.
//
// Every row is brought into the compute type (float, or double for fp64) once, in place where it
// already is, and stays in L1/L2 for the sweeps that follow:
//
//   forward    sum -> centred sum of squares -> write        reads x once, writes y once
//   backward   sums over the row and over rows -> write dx   reads x and dy once, writes dx once
//
// so memory sees the minimum of 2 and 3 tensor passes (5 and 6 fewer sweeps than a composition of
// vector maps). Backward takes ROWS rows at a time: the running sums for weight and bias then travel
// through L1 once for all of them.
#include "layer_norm.h"

#include "../math/random.h"
#include "scratch.h"
#include "vec.h"

extern "C" double sqrt(double);

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kRows = 4;           // rows of one backward step
constexpr int64_t kBlock = 4096;   // summands of one fp32 partial sum: bounds the error of long rows

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

template <class T>
constexpr DType own_dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;

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
  if (rows.dtype == own_dtype<T>) return reinterpret_cast<const T*>(source);
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
  if (parameter.data != nullptr && parameter.dtype == own_dtype<T>)
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

// The sum of map(x_i) over a row, in blocks of kBlock so that no fp32 sum has more summands.
template <class T, class Map>
inline double row_sum(const T* x, int64_t n, Map map) {
  constexpr int unroll = 4;
  constexpr int64_t step = unroll * lanes<T>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    V<T> sum[unroll] = {};
    int64_t i = begin;
    for (; i + step <= end; i += step)
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u) sum[u] += map(load(x + i + u * lanes<T>));
    for (; i < end; i += lanes<T>)
      sum[0] += keep_first<T>(map(load_some<T>(x + i, end - i)), end - i);
    total += horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return total;
}

template <class T>
const T* read_input(const LayerNormForward& args, int64_t row, T* buffer, T* residual_buffer) {
  const int64_t n = args.row_length;
  if (args.residual.data == nullptr) return read_row(args.input, row, buffer, n);

  convert_row(row_of(args.input, row), args.input.dtype, buffer, n);
  if (args.dropout.seed != nullptr) multiply_by_dropout(buffer, row, n, args.dropout);
  const T* residual = read_row(args.residual, row, residual_buffer, n);
  for (int64_t i = 0; i < n; i += lanes<T>) {
    const int64_t count = n - i;
    store_some<T>(buffer + i, load_some<T>(buffer + i, count) + load_some<T>(residual + i, count),
                  count);
  }
  write_row(args.new_residual, row, buffer, n);
  // What is normalized is the residual as it was rounded.
  return read_row(args.new_residual, row, buffer, n);
}

template <class T>
void forward_rows(const LayerNormForward& args, int64_t begin, int64_t end) {
  const int64_t n = args.row_length;
  const int64_t padded = (n + 63) / 64 * 64;
  T* scratch = static_cast<T*>(thread_scratch(static_cast<size_t>(4 * padded) * sizeof(T)));
  T* const buffer = scratch;
  T* const residual_buffer = scratch + padded;
  const bool affine = args.weight.data != nullptr || args.bias.data != nullptr;
  const T* weight = read_parameter<T>(args.weight, T(1), scratch + 2 * padded, affine ? n : 0);
  const T* bias = read_parameter<T>(args.bias, T(0), scratch + 3 * padded, affine ? n : 0);

  for (int64_t row = begin; row < end; ++row) {
    const T* x = read_input<T>(args, row, buffer, residual_buffer);
    T mean = 0;
    if (!args.rms) {
      mean = static_cast<T>(row_sum(x, n, [](V<T> v) { return v; }) / static_cast<double>(n));
      static_cast<T*>(args.mean.data)[row] = mean;
    }
    const double squares = row_sum(x, n, [mean](V<T> v) {
      const V<T> centred = v - mean;
      return centred * centred;
    });
    const T rstd = static_cast<T>(1.0 / sqrt(squares / static_cast<double>(n) + args.eps));
    static_cast<T*>(args.rstd.data)[row] = rstd;

    with_type<T>(args.output.dtype, [&](auto* type) {
      auto* y = reinterpret_cast<decltype(type)>(row_of(args.output, row));
      int64_t i = 0;
      if (affine) {
        for (; i + lanes<T> <= n; i += lanes<T>)
          store(y + i, (load(x + i) - mean) * rstd * load(weight + i) + load(bias + i));
        if (i < n)
          store_some<T>(y + i,
                        (load_some<T>(x + i, n - i) - mean) * rstd * load_some<T>(weight + i, n - i) +
                            load_some<T>(bias + i, n - i),
                        n - i);
      } else {
        for (; i < n; i += lanes<T>)
          store_some<T>(y + i, (load_some<T>(x + i, n - i) - mean) * rstd, n - i);
      }
    });
  }
}

// One step of backward: count <= kRows rows in the compute type.
template <class T>
struct Step {
  const T* x[kRows];
  const T* grad[kRows];
  T mean[kRows], rstd[kRows];
  T mean_grad[kRows];     // E[g], g = grad * weight
  T mean_product[kRows];  // E[g * n], n = (x - mean) * rstd
};

// Sums over each row into step, sums over the rows added to weight_sum and bias_sum.
template <class T, int Count, bool Centred>
void reduce_step(Step<T>& step, const T* weight, T* weight_sum, T* bias_sum, int64_t n) {
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
      }
      write(weight_sum + i, for_weight);
      write(bias_sum + i, for_bias);
    };
    int64_t i = begin;
    for (; i + lanes<T> <= end; i += lanes<T>)
      column(
          i, [](const T* p) { return load(p); }, [](T* p, V<T> v) { store(p, v); },
          [](V<T> v) { return v; });
    if (i < end) {
      const int64_t count = end - i;
      column(
          i, [count](const T* p) { return load_some<T>(p, count); },
          [count](T* p, V<T> v) { store_some<T>(p, v, count); },
          [count](V<T> v) { return keep_first<T>(v, count); });
    }
    for (int r = 0; r < Count; ++r) {
      total_grad[r] += horizontal_sum<T>(sum_grad[r]);
      total_product[r] += horizontal_sum<T>(sum_product[r]);
    }
  }
  for (int r = 0; r < Count; ++r) {
    step.mean_grad[r] = static_cast<T>(total_grad[r] / static_cast<double>(n));
    step.mean_product[r] = static_cast<T>(total_product[r] / static_cast<double>(n));
  }
}

// The gradient of x for row r of the step, stored through write(i, vector, count).
template <class T, class Write>
inline void gradient_row(const Step<T>& step, int r, const T* weight, const T* stream, int64_t n,
                         Write write) {
  const T* x = step.x[r];
  const T* grad = step.grad[r];
  const T mean = step.mean[r], rstd = step.rstd[r];
  const T mean_grad = step.mean_grad[r], mean_product = step.mean_product[r];
  const auto column = [&](auto read, int64_t i) {
    const V<T> normalized = (read(x + i) - mean) * rstd;
    V<T> result = ((read(grad + i) * read(weight + i) - mean_grad) - normalized * mean_product) * rstd;
    if (stream != nullptr) result += read(stream + i);
    return result;
  };
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>)
    write(i, column([](const T* p) { return load(p); }, i), lanes<T>);
  if (i < n)
    write(i, column([n, i](const T* p) { return load_some<T>(p, n - i); }, i), n - i);
}

template <class T>
void backward_rows(const LayerNormBackward& args, int64_t begin, int64_t end) {
  const int64_t n = args.row_length;
  const int64_t padded = (n + 63) / 64 * 64;
  // More rows at a time than fit the cache would turn its sweeps into memory traffic.
  const int at_once = n <= 4096 ? kRows : 1;
  T* scratch = static_cast<T*>(
      thread_scratch(static_cast<size_t>((2 * at_once + 3) * padded) * sizeof(T)));
  const auto buffer = [&](int index) { return scratch + index * padded; };
  T* const stream_buffer = buffer(2 * at_once);
  T* const result = buffer(2 * at_once + 1);
  const T* weight = read_parameter<T>(args.weight, T(1), buffer(2 * at_once + 2), n);
  const bool direct = args.grad_x.data != nullptr && args.grad_input.data == nullptr;
  const bool wants_gradient = args.grad_x.data != nullptr || args.grad_input.data != nullptr;

  for (int64_t partial = begin; partial < end; ++partial) {
    T* weight_sum = static_cast<T*>(args.partials) + partial * n;
    T* bias_sum = weight_sum + args.partial_rows * n;
    std::memset(weight_sum, 0, static_cast<size_t>(n) * sizeof(T));
    std::memset(bias_sum, 0, static_cast<size_t>(n) * sizeof(T));
    const int64_t last = args.rows * (partial + 1) / args.partial_rows;
    for (int64_t row = args.rows * partial / args.partial_rows; row < last;) {
      const int count = last - row >= at_once ? at_once : 1;
      Step<T> step;
      for (int r = 0; r < count; ++r) {
        step.x[r] = read_row(args.x, row + r, buffer(2 * r), n);
        step.grad[r] = read_row(args.grad_output, row + r, buffer(2 * r + 1), n);
        step.mean[r] = args.rms ? T(0) : static_cast<const T*>(args.mean.data)[row + r];
        step.rstd[r] = static_cast<const T*>(args.rstd.data)[row + r];
      }
      // The sums over a row do not depend on how many rows a step takes.
      if (count == kRows)
        args.rms ? reduce_step<T, kRows, false>(step, weight, weight_sum, bias_sum, n)
                 : reduce_step<T, kRows, true>(step, weight, weight_sum, bias_sum, n);
      else
        args.rms ? reduce_step<T, 1, false>(step, weight, weight_sum, bias_sum, n)
                 : reduce_step<T, 1, true>(step, weight, weight_sum, bias_sum, n);

      for (int r = 0; r < count && wants_gradient; ++r) {
        const T* stream = args.grad_new_residual.data == nullptr
                              ? nullptr
                              : read_row(args.grad_new_residual, row + r, stream_buffer, n);
        if (direct) {
          with_type<T>(args.grad_x.dtype, [&](auto* type) {
            auto* target = reinterpret_cast<decltype(type)>(row_of(args.grad_x, row + r));
            gradient_row(step, r, weight, stream, n, [target](int64_t i, V<T> v, int64_t width) {
              store_some<T>(target + i, v, width);
            });
          });
          continue;
        }
        gradient_row(step, r, weight, stream, n, [result](int64_t i, V<T> v, int64_t width) {
          store_some<T>(result + i, v, width);
        });
        if (args.grad_x.data != nullptr) write_row(args.grad_x, row + r, result, n);
        if (args.dropout.seed != nullptr) multiply_by_dropout(result, row + r, n, args.dropout);
        write_row(args.grad_input, row + r, result, n);
      }
      row += count;
    }
  }
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

bool is_double(DType input) { return input == DType::f64; }

void forward(const LayerNormForward& args, int64_t begin, int64_t end) {
  is_double(args.input.dtype) ? forward_rows<double>(args, begin, end)
                              : forward_rows<float>(args, begin, end);
}

void backward(const LayerNormBackward& args, int64_t begin, int64_t end) {
  is_double(args.x.dtype) ? backward_rows<double>(args, begin, end)
                          : backward_rows<float>(args, begin, end);
}

void finish(const LayerNormBackward& args, int64_t begin, int64_t end) {
  is_double(args.x.dtype) ? finish_columns<double>(args, begin, end)
                          : finish_columns<float>(args, begin, end);
}

}  // namespace

extern const LayerNormCpu layer_norm{forward, backward, finish};

}  // namespace fastseq::FASTSEQ_ISA
