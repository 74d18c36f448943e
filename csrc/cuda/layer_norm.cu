// LayerNorm and RMSNorm, plain or of residual + dropout(input): forward and backward.
//
//   x      = residual + dropout(input), rounded to new_residual's dtype (or x = input)
//   output = (x - mean) * rstd * weight + bias
//
//   g      = grad_output * weight        n = (x - mean) * rstd
//   grad_x = rstd * (g - mean_columns(g) - n * mean_columns(g * n)) + grad_new_residual
//   grad_weight = sum_rows(grad_output * n)        grad_bias = sum_rows(grad_output)
//   (rms: mean = 0 and mean_columns(g) is left out)
//
// Memory traffic, in passes over [rows, row_length]: forward 2 (4 with a residual), backward 3 (one
// more for each of grad_new_residual and grad_input), which is the minimum; plus the partial sums
// of grad_weight and grad_bias, 8 bytes * row_length * partial_rows written and read once. Rows
// beyond the registers (16384 elements of 16 bits or 8192 otherwise forward, 8192 backward) are
// read again, from L1 or L2 as a rule; their backward reads x and grad_output twice from DRAM.
//
// Arithmetic: about 10 fp32 instructions an element forward and 20 backward, where 4.8 TB/s leave a
// 132-SM chip about 27 for each 4 bytes moved: bound by memory. The variance is centred on the mean
// in a second pass over registers, so that mean >> std keeps its digits.
//
// The kernels exist for their launch (3 us, where a launch from Python costs several times that),
// so small and middle sizes decide the configuration: layer_norm_launch.h has it, with reasons.
// Registers: at most 128 by launch bounds; tests/test_simt_layer_norm.py has what each takes. Only
// the vector width and the number of vectors a thread are template parameters; dtypes are run-time
// values (fragment.cuh), which keeps this file to 28 kernels.
//
// Deterministic: every sum has one fixed order, without atomics. A row's bits depend on its length,
// the alignment of the tensors and nothing else; those of grad_weight and grad_bias also on
// partial_rows.
#include <initializer_list>

#include "layer_norm.h"
#include "layer_norm_backward.cuh"
#include "layer_norm_forward.cuh"
#include "layer_norm_launch.h"

namespace fastseq {
namespace {

using layer_norm::Launch;
using ForwardKernel = void (*)(LayerNormForward, int);
using BackwardKernel = void (*)(LayerNormBackward, int);

template <int kVector, int kChunks>
ForwardKernel forward_kernel(bool residual) {
  return residual ? &layer_norm::forward_kernel<kVector, kChunks, true>
                  : &layer_norm::forward_kernel<kVector, kChunks, false>;
}

ForwardKernel select_forward(const Launch& launch, bool residual) {
  if (launch.vector == 8) {
    return launch.chunks == 1 ? forward_kernel<8, 1>(residual) : forward_kernel<8, 4>(residual);
  }
  if (launch.vector == 4) {
    return launch.chunks == 1 ? forward_kernel<4, 1>(residual) : forward_kernel<4, 4>(residual);
  }
  return launch.chunks == 4 ? forward_kernel<1, 4>(residual) : forward_kernel<1, 16>(residual);
}

BackwardKernel select_backward(const Launch& launch) {
  if (launch.vector == 8) {
    return launch.chunks == 1 ? &layer_norm::backward_kernel<8, 1>
                              : &layer_norm::backward_kernel<8, 2>;
  }
  if (launch.vector == 4) {
    return launch.chunks == 1 ? &layer_norm::backward_kernel<4, 1>
                              : &layer_norm::backward_kernel<4, 4>;
  }
  return launch.chunks == 4 ? &layer_norm::backward_kernel<1, 4>
                            : &layer_norm::backward_kernel<1, 16>;
}

template <typename Kernel>
Kernel select_vector(int vector, Kernel eight, Kernel four, Kernel one) {
  return vector == 8 ? eight : vector == 4 ? four : one;
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

DType widest_dtype(std::initializer_list<DType> dtypes) {
  for (const DType dtype : dtypes) {
    if (dtype == DType::f64) return dtype;
  }
  return DType::f32;
}

const char* check(const LayerNormForward& problem) {
  const DType widest = widest_dtype(
      {problem.input.dtype, problem.residual.dtype, problem.weight.dtype, problem.bias.dtype,
       problem.output.dtype, problem.new_residual.dtype, problem.mean.dtype, problem.rstd.dtype});
  if (const char* reason = layer_norm_rejects_cuda(problem.row_length, widest)) return reason;
  const bool residual = problem.residual.data != nullptr;
  if (problem.rows == 0 || problem.row_length == 0) return nullptr;
  if (problem.input.data == nullptr || problem.output.data == nullptr) {
    return "layer_norm: input and output are required";
  }
  if (residual != (problem.new_residual.data != nullptr)) {
    return "layer_norm: new_residual goes with residual";
  }
  if (problem.dropout.seed != nullptr && !residual) {
    return "layer_norm: dropout needs a residual";
  }
  return nullptr;
}

const char* check(const LayerNormBackward& problem) {
  const DType widest = widest_dtype(
      {problem.grad_output.dtype, problem.grad_new_residual.dtype, problem.x.dtype,
       problem.weight.dtype, problem.mean.dtype, problem.rstd.dtype, problem.grad_x.dtype,
       problem.grad_input.dtype, problem.grad_weight.dtype, problem.grad_bias.dtype});
  if (const char* reason = layer_norm_rejects_cuda(problem.row_length, widest)) return reason;
  if (problem.rows == 0 || problem.row_length == 0) return nullptr;
  if (problem.grad_output.data == nullptr || problem.x.data == nullptr ||
      problem.rstd.data == nullptr || (problem.mean.data == nullptr && !problem.rms)) {
    return "layer_norm: the backward needs grad_output, x, rstd and, without rms, mean";
  }
  const bool has_sums = problem.grad_weight.data != nullptr || problem.grad_bias.data != nullptr;
  if (has_sums && (problem.partials == nullptr || problem.partial_rows < 1)) {
    return "layer_norm: a weight or bias gradient needs partials";
  }
  return nullptr;
}

// One launch computes what runs along the rows and, with rows in registers, the partial sums too.
const char* launch_rows(const LayerNormBackward& problem, bool has_sums, cudaStream_t stream) {
  const int vector = layer_norm::backward_vector(problem);
  const bool has_rows = problem.grad_x.data != nullptr || problem.grad_input.data != nullptr;
  const Launch launch = layer_norm::choose_backward(problem.row_length, vector);
  if (launch.chunks > 0) {
    const int teams = launch.block_threads / launch.team_threads;
    const int64_t tiles = std::min(layer_norm::ceil_div(problem.rows, teams), layer_norm::kMaxGrid);
    const int64_t blocks = has_sums ? problem.partial_rows : tiles;
    const size_t staging =
        has_sums && teams > 1 ? sizeof(float) * teams * static_cast<size_t>(problem.row_length) : 0;
    FASTSEQ_LAUNCH(select_backward(launch), dim3(static_cast<unsigned>(blocks)),
                   dim3(launch.block_threads), staging, stream)(problem, launch.team_threads);
    return launch_error();
  }
  if (has_rows) {
    const auto kernel =
        select_vector(vector, &layer_norm::backward_long_kernel<8>,
                      &layer_norm::backward_long_kernel<4>, &layer_norm::backward_long_kernel<1>);
    const unsigned blocks = static_cast<unsigned>(std::min(problem.rows, layer_norm::kMaxGrid));
    FASTSEQ_LAUNCH(kernel, dim3(blocks), dim3(kMaxThreads), 0, stream)(problem);
    if (const char* error = launch_error()) return error;
  }
  if (!has_sums) return nullptr;
  const auto kernel =
      select_vector(vector, &layer_norm::column_sums_kernel<8>, &layer_norm::column_sums_kernel<4>,
                    &layer_norm::column_sums_kernel<1>);
  const int64_t strips =
      layer_norm::ceil_div(problem.row_length, int64_t{layer_norm::kColumnThreads} * vector);
  if (strips * problem.partial_rows > layer_norm::kMaxGrid) return "layer_norm: too many columns";
  FASTSEQ_LAUNCH(kernel, dim3(static_cast<unsigned>(strips * problem.partial_rows)),
                 dim3(layer_norm::kColumnThreads), 0, stream)(problem);
  return launch_error();
}

}  // namespace

const char* layer_norm_rejects_cuda(int64_t row_length, DType widest) {
  if (widest == DType::f64) return "layer_norm: the CUDA kernels have no float64";
  // The index of a column of partial sums is a block index.
  if (row_length > layer_norm::kMaxGrid) return "layer_norm: rows of more than 2^31 - 1 elements";
  return nullptr;
}

int64_t layer_norm_partial_rows_cuda(int64_t rows, int64_t row_length, int sm_count) {
  return layer_norm::partial_rows(rows, row_length, sm_count);
}

const char* layer_norm_forward_cuda(const LayerNormForward& problem, void* stream_handle) {
  if (const char* reason = check(problem)) return reason;
  if (problem.rows == 0 || problem.row_length == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const int vector = layer_norm::forward_vector(problem);
  const Launch launch = layer_norm::choose_forward(problem.rows, problem.row_length, vector);
  if (launch.blocks > layer_norm::kMaxGrid) return "layer_norm: too many rows";
  const dim3 grid(static_cast<unsigned>(launch.blocks));
  if (launch.chunks > 0) {
    const ForwardKernel kernel = select_forward(launch, problem.residual.data != nullptr);
    FASTSEQ_LAUNCH(kernel, grid, dim3(launch.block_threads), 0, stream)
    (problem, launch.team_threads);
  } else {
    const auto kernel =
        select_vector(vector, &layer_norm::forward_long_kernel<8>,
                      &layer_norm::forward_long_kernel<4>, &layer_norm::forward_long_kernel<1>);
    FASTSEQ_LAUNCH(kernel, grid, dim3(kMaxThreads), 0, stream)(problem);
  }
  return launch_error();
}

const char* layer_norm_backward_cuda(const LayerNormBackward& given, void* stream_handle) {
  if (const char* reason = check(given)) return reason;
  const bool has_sums = given.grad_weight.data != nullptr || given.grad_bias.data != nullptr;
  if (given.row_length == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  LayerNormBackward problem = given;
  if (problem.rows == 0) {
    problem.partial_rows = 0;  // the sum of no rows: the last kernel writes zeros
  } else if (const char* error = launch_rows(problem, has_sums, stream)) {
    return error;
  }
  if (!has_sums) return nullptr;
  const int64_t blocks = layer_norm::ceil_div(problem.row_length, layer_norm::kFinishColumns);
  FASTSEQ_LAUNCH(&layer_norm::finish_columns_kernel, dim3(static_cast<unsigned>(blocks), 2),
                 dim3(layer_norm::kFinishColumns * layer_norm::kFinishRows), 0, stream)(problem);
  return launch_error();
}

}  // namespace fastseq
