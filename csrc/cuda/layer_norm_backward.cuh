// The backward kernels of LayerNorm and RMSNorm; layer_norm.cu has the formula and the traffic.
#pragma once

#include "../layer_norm.h"
#include "../math/random.h"
#include "fragment.cuh"
#include "reduce.cuh"

namespace fastseq::layer_norm {

// Columns past the end of a row have a gradient of zero, and so are all terms they enter; rows past
// the last one have these two zero as well.
struct RowStatistics {
  float mean, rstd;
};

__device__ __forceinline__ RowStatistics load_statistics(const LayerNormBackward& problem,
                                                         int64_t row, bool active) {
  if (!active) return {0, 0};
  return {problem.rms ? 0.0f : load_float(problem.mean, row), load_float(problem.rstd, row)};
}

template <int kVector, int kChunks>
__device__ __forceinline__ void load_grad_new_residual(Packed<kVector, kChunks>& packed,
                                                       const LayerNormBackward& problem,
                                                       int64_t row, const Columns& columns,
                                                       int64_t first_column, bool active) {
  const Rows& rows = problem.grad_new_residual;
  const bool present = active && rows.data != nullptr;
  load(packed, rows.data, rows.dtype, present ? row_offset(rows, row) + first_column : 0, columns,
       present);
}

// grad = weight * grad_output, or grad_output itself where there is no weight.
template <int kVector, int kChunks>
__device__ __forceinline__ void apply_weight(Fragment<kVector, kChunks>& grad,
                                             const Packed<kVector, kChunks>& packed,
                                             const Vector& weight) {
  if (weight.data == nullptr) return;
  Fragment<kVector, kChunks> values;
  unpack(values, packed, weight.dtype);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) grad.values[c][i] *= values.values[c][i];
  }
}

template <int kVector, int kChunks>
__device__ __forceinline__ void normalise(Fragment<kVector, kChunks>& x,
                                          const RowStatistics& statistics) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x.values[c][i] = (x.values[c][i] - statistics.mean) * statistics.rstd;
    }
  }
}

// The two sums over the row that grad_x needs: of grad * normalised, and of grad.
template <int kVector, int kChunks>
__device__ __forceinline__ void add_sums(float (&sums)[2], const Fragment<kVector, kChunks>& grad,
                                         const Fragment<kVector, kChunks>& normalised) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sums[0] += grad.values[c][i] * normalised.values[c][i];
      sums[1] += grad.values[c][i];
    }
  }
}

// Turns grad into the gradient of x, adds what comes through the new residual, and writes it out.
template <int kVector, int kChunks>
__device__ __forceinline__ void finish_row(const LayerNormBackward& problem,
                                           Fragment<kVector, kChunks>& grad,
                                           const Fragment<kVector, kChunks>& normalised,
                                           const Packed<kVector, kChunks>& packed_residual,
                                           const float (&sums)[2], float rstd, int64_t row,
                                           const Columns& columns, int64_t first_column) {
  const float length = static_cast<float>(problem.row_length);
  const float slope = sums[0] / length;
  const float offset = problem.rms ? 0.0f : sums[1] / length;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      grad.values[c][i] = rstd * (grad.values[c][i] - offset - normalised.values[c][i] * slope);
    }
  }
  if (problem.grad_new_residual.data != nullptr) {
    Fragment<kVector, kChunks> residual;
    unpack(residual, packed_residual, problem.grad_new_residual.dtype);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) grad.values[c][i] += residual.values[c][i];
    }
  }
  if (problem.grad_x.data != nullptr) {
    store(problem.grad_x.data, problem.grad_x.dtype, row_offset(problem.grad_x, row) + first_column,
          grad, columns);
  }
  if (problem.grad_input.data == nullptr) return;
  if (problem.dropout.seed != nullptr) {
    const random::RowKey key =
        random::row_key(static_cast<uint64_t>(*problem.dropout.seed), static_cast<uint64_t>(row));
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t begin = static_cast<uint32_t>(first_column + columns.begin<kVector>(c));
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool kept = random::bits(key, begin + i) >= problem.dropout.threshold;
        grad.values[c][i] =
            kept ? grad.values[c][i] * static_cast<float>(problem.dropout.scale) : 0.0f;
      }
    }
  }
  store(problem.grad_input.data, problem.grad_input.dtype,
        row_offset(problem.grad_input, row) + first_column, grad, columns);
}

// Adds the teams' column sums in the order of the teams and writes the block's partial row.
// staging: [teams, row_length].
template <int kVector, int kChunks>
__device__ __forceinline__ void store_partial(float* partial,
                                              const Fragment<kVector, kChunks>& sums,
                                              const Team& team, int teams, const Columns& columns,
                                              float* staging) {
  if (teams == 1) {
    store(static_cast<void*>(partial), DType::f32, 0, sums, columns);
    return;
  }
  const int length = columns.row_length;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int begin = columns.begin<kVector>(c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (begin + i < length) staging[team.index * length + begin + i] = sums.values[c][i];
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < length; column += blockDim.x) {
    float total = 0;
    for (int t = 0; t < teams; ++t) total += staging[t * length + column];
    partial[column] = total;
  }
  __syncthreads();
}

__device__ __forceinline__ float* partial_row(const LayerNormBackward& problem, int which,
                                              int64_t index) {
  return static_cast<float*>(problem.partials) +
         (which * problem.partial_rows + index) * problem.row_length;
}

// A team of threads holds a row in registers, with the column sums of all rows it has seen.
template <int kVector, int kChunks>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(const LayerNormBackward problem, int team_threads) {
  FASTSEQ_SHARED(TeamScratch, scratch);
  FASTSEQ_DYNAMIC_SHARED(float, staging);
  const Team team = make_team(team_threads);
  const Columns columns{team.threads, team.lane, static_cast<int>(problem.row_length)};
  const int teams = count_teams(blockDim.x, team_threads);
  const bool needs_rows = problem.grad_x.data != nullptr || problem.grad_input.data != nullptr;
  int half = 0;

  // With 16 elements a thread there are no registers to keep the weight in: it is read again, from
  // L1. 16 scalars also need their addresses, so grad_new_residual waits until the rest is done.
  constexpr bool kKeepWeight = kVector * kChunks <= 8;
  constexpr bool kPrefetch = kChunks <= 4;
  Packed<kVector, kChunks> weight;
  if constexpr (kKeepWeight) load(weight, problem.weight, 0, columns);
  Fragment<kVector, kChunks> weight_sums{}, bias_sums{};
  for (int64_t first = int64_t{blockIdx.x} * teams; first < problem.rows;
       first += int64_t{gridDim.x} * teams) {
    const int64_t row = first + team.index;
    const bool active = row < problem.rows;
    Packed<kVector, kChunks> packed_x, packed_grad, packed_residual;
    Fragment<kVector, kChunks> x, grad;
    load(packed_grad, problem.grad_output.data, problem.grad_output.dtype,
         row_offset(problem.grad_output, row), columns, active);
    load(packed_x, problem.x.data, problem.x.dtype, row_offset(problem.x, row), columns, active);
    if constexpr (kPrefetch) {
      load_grad_new_residual(packed_residual, problem, row, columns, 0, active);
    }
    const RowStatistics statistics = load_statistics(problem, row, active);
    unpack(grad, packed_grad, problem.grad_output.dtype);
    unpack(x, packed_x, problem.x.dtype);
    normalise(x, statistics);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        weight_sums.values[c][i] += grad.values[c][i] * x.values[c][i];
        bias_sums.values[c][i] += grad.values[c][i];
      }
    }
    if (!needs_rows) continue;
    if constexpr (!kKeepWeight) load(weight, problem.weight, 0, columns);
    apply_weight(grad, weight, problem.weight);
    float sums[2] = {0, 0};
    add_sums(sums, grad, x);
    team_sum(sums, team, scratch, half);
    if constexpr (!kPrefetch) {
      load_grad_new_residual(packed_residual, problem, row, columns, 0, active);
    }
    if (active) {
      finish_row(problem, grad, x, packed_residual, sums, statistics.rstd, row, columns, 0);
    }
  }

  if (problem.grad_weight.data != nullptr) {
    store_partial(partial_row(problem, 0, blockIdx.x), weight_sums, team, teams, columns, staging);
  }
  if (problem.grad_bias.data != nullptr) {
    store_partial(partial_row(problem, 1, blockIdx.x), bias_sums, team, teams, columns, staging);
  }
}

// Rows too long for the registers, the part along the row: a block strides over a row twice.
template <int kVector>
__global__ void __launch_bounds__(kMaxThreads)
    backward_long_kernel(const LayerNormBackward problem) {
  FASTSEQ_SHARED(TeamScratch, scratch);
  const Team team = make_team(kMaxThreads);
  const int64_t length = problem.row_length;
  constexpr int64_t kStrip = int64_t{kMaxThreads} * kVector;
  int half = 0;

  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    const int64_t grad_offset = row_offset(problem.grad_output, row);
    const int64_t x_offset = row_offset(problem.x, row);
    const RowStatistics statistics = load_statistics(problem, row, true);
    Fragment<kVector, 1> x, grad;
    const auto load_strip = [&](int64_t strip, const Columns& columns) {
      Packed<kVector, 1> packed_x, packed_grad, weight;
      load(packed_grad, problem.grad_output.data, problem.grad_output.dtype, grad_offset + strip,
           columns);
      load(packed_x, problem.x.data, problem.x.dtype, x_offset + strip, columns);
      load(weight, problem.weight, strip, columns);
      unpack(grad, packed_grad, problem.grad_output.dtype);
      unpack(x, packed_x, problem.x.dtype);
      normalise(x, statistics);
      apply_weight(grad, weight, problem.weight);
    };
    const auto strip_columns = [&](int64_t strip) {
      return Columns{team.threads, team.lane, static_cast<int>(min(length - strip, kStrip))};
    };

    float sums[2] = {0, 0};
    for (int64_t strip = 0; strip < length; strip += kStrip) {
      load_strip(strip, strip_columns(strip));
      add_sums(sums, grad, x);
    }
    team_sum(sums, team, scratch, half);
    for (int64_t strip = 0; strip < length; strip += kStrip) {
      const Columns columns = strip_columns(strip);
      Packed<kVector, 1> packed_residual;
      load_grad_new_residual(packed_residual, problem, row, columns, strip, true);
      load_strip(strip, columns);
      finish_row(problem, grad, x, packed_residual, sums, statistics.rstd, row, columns, strip);
    }
  }
}

constexpr int kColumnThreads = 128;

// The part across rows: a thread owns one vector of columns and adds up every partial_rows-th row.
// Blocks of one strip of columns follow one another, so that they share the rows' statistics.
template <int kVector>
__global__ void __launch_bounds__(kColumnThreads)
    column_sums_kernel(const LayerNormBackward problem) {
  constexpr int64_t kStrip = int64_t{kColumnThreads} * kVector;
  const int64_t strip = static_cast<int64_t>(blockIdx.x) / problem.partial_rows * kStrip;
  const int64_t first = static_cast<int64_t>(blockIdx.x) % problem.partial_rows;
  const Columns columns{kColumnThreads, static_cast<int>(threadIdx.x),
                        static_cast<int>(min(problem.row_length - strip, kStrip))};
  Fragment<kVector, 1> weight_sums{}, bias_sums{};
  for (int64_t row = first; row < problem.rows; row += problem.partial_rows) {
    Packed<kVector, 1> packed_x, packed_grad;
    Fragment<kVector, 1> x, grad;
    load(packed_grad, problem.grad_output.data, problem.grad_output.dtype,
         row_offset(problem.grad_output, row) + strip, columns);
    load(packed_x, problem.x.data, problem.x.dtype, row_offset(problem.x, row) + strip, columns);
    const RowStatistics statistics = load_statistics(problem, row, true);
    unpack(grad, packed_grad, problem.grad_output.dtype);
    unpack(x, packed_x, problem.x.dtype);
    normalise(x, statistics);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      weight_sums.values[0][i] += grad.values[0][i] * x.values[0][i];
      bias_sums.values[0][i] += grad.values[0][i];
    }
  }
  if (problem.grad_weight.data != nullptr) {
    store(partial_row(problem, 0, first) + strip, DType::f32, 0, weight_sums, columns);
  }
  if (problem.grad_bias.data != nullptr) {
    store(partial_row(problem, 1, first) + strip, DType::f32, 0, bias_sums, columns);
  }
}

constexpr int kFinishColumns = 32;
constexpr int kFinishRows = 16;

// Adds up the partial rows: 32 columns a block, so that a warp reads 128 contiguous bytes, and 16
// warps that share the rows, always in the same order. blockIdx.y: 0 the weight, 1 the bias.
static __global__ void __launch_bounds__(kFinishColumns* kFinishRows)
    finish_columns_kernel(const LayerNormBackward problem) {
  FASTSEQ_SHARED(float[kFinishRows][kFinishColumns], sums);
  const Vector& to = blockIdx.y == 0 ? problem.grad_weight : problem.grad_bias;
  if (to.data == nullptr) return;
  const int lane = static_cast<int>(threadIdx.x) % kFinishColumns;
  const int warp = static_cast<int>(threadIdx.x) / kFinishColumns;
  const int64_t column = int64_t{blockIdx.x} * kFinishColumns + lane;
  const bool active = column < problem.row_length;
  float total = 0;
  if (active) {
#pragma unroll 4
    for (int64_t row = warp; row < problem.partial_rows; row += kFinishRows) {
      total += partial_row(problem, blockIdx.y, row)[column];
    }
  }
  sums[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || !active) return;
  total = 0;
#pragma unroll
  for (int w = 0; w < kFinishRows; ++w) total += sums[w][lane];
  Fragment<1, 1> value{{{total}}};
  store(to.data, to.dtype, column, value, Columns{1, 0, 1});
}

}  // namespace fastseq::layer_norm
