// The forward kernels of LayerNorm and RMSNorm; layer_norm.cu has the formula and the traffic.
#pragma once

#include "../layer_norm.h"
#include "../math/random.h"
#include "fragment.cuh"
#include "reduce.cuh"

namespace fastseq::layer_norm {

// residual + dropout(input), in fp32.
template <int kVector, int kChunks>
__device__ __forceinline__ void add_residual(Fragment<kVector, kChunks>& x,
                                             const Fragment<kVector, kChunks>& residual,
                                             const Dropout& dropout, int64_t row,
                                             const Columns& columns, int64_t first_column) {
  if (dropout.seed != nullptr) {
    const random::RowKey key =
        random::row_key(static_cast<uint64_t>(*dropout.seed), static_cast<uint64_t>(row));
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t begin = static_cast<uint32_t>(first_column + columns.begin<kVector>(c));
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool kept = random::bits(key, begin + i) >= dropout.threshold;
        x.values[c][i] = kept ? x.values[c][i] * static_cast<float>(dropout.scale) : 0.0f;
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x.values[c][i] += residual.values[c][i];
  }
}

// Writes x and leaves in it what was written: the rounded values are what the norm is taken of.
template <int kVector, int kChunks>
__device__ __forceinline__ void store_rounded(const Rows& to, int64_t offset,
                                              Fragment<kVector, kChunks>& x, const Columns& columns,
                                              bool active) {
  Packed<kVector, kChunks> packed;
  pack(packed, x, to.dtype);
  if (active) store(to.data, to.dtype, offset, packed, columns);
  unpack(x, packed, to.dtype);
}

template <int kVector, int kChunks>
__device__ __forceinline__ float sum(const Fragment<kVector, kChunks>& x) {
  float total = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += x.values[c][i];
  }
  return total;
}

// Centred on the mean, or on 0 for rms; columns past the end of the row do not count.
template <int kVector, int kChunks>
__device__ __forceinline__ float sum_of_squares(const Fragment<kVector, kChunks>& x, float centre,
                                                const Columns& columns) {
  float total = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (columns.begin<kVector>(c) >= columns.row_length) continue;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float centred = x.values[c][i] - centre;
      total += centred * centred;
    }
  }
  return total;
}

template <int kVector, int kChunks>
__device__ __forceinline__ void normalise(Fragment<kVector, kChunks>& x, float mean, float rstd) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x.values[c][i] = (x.values[c][i] - mean) * rstd;
  }
}

// x * weight + bias, where present; the packed parameters are already on their way.
template <int kVector, int kChunks>
__device__ __forceinline__ void apply_affine(Fragment<kVector, kChunks>& x,
                                             const Packed<kVector, kChunks>& weight,
                                             const Packed<kVector, kChunks>& bias,
                                             const LayerNormForward& problem) {
  Fragment<kVector, kChunks> parameter;
  if (problem.weight.data != nullptr) {
    unpack(parameter, weight, problem.weight.dtype);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x.values[c][i] *= parameter.values[c][i];
    }
  }
  if (problem.bias.data != nullptr) {
    unpack(parameter, bias, problem.bias.dtype);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x.values[c][i] += parameter.values[c][i];
    }
  }
}

__device__ __forceinline__ void store_statistics(const LayerNormForward& problem, int64_t row,
                                                 float mean, float rstd) {
  if (problem.mean.data != nullptr) static_cast<float*>(problem.mean.data)[row] = mean;
  if (problem.rstd.data != nullptr) static_cast<float*>(problem.rstd.data)[row] = rstd;
}

// How many blocks of 512 threads an SM should hold, which bounds the registers: 40, 64 or 128. Two
// of them keep up to 64 kB of loads in flight; 32 elements of two rows at once need the 128.
constexpr int forward_blocks(int elements, bool residual) {
  if (elements <= 4) return residual ? 2 : 3;
  return elements == 32 && residual ? 1 : 2;
}

// A team of threads holds a row in registers.
template <int kVector, int kChunks, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads, forward_blocks(kVector* kChunks, kResidual))
    forward_kernel(const LayerNormForward problem, int team_threads) {
  FASTSEQ_SHARED(TeamScratch, scratch);
  const Team team = make_team(team_threads);
  const Columns columns{team.threads, team.lane, static_cast<int>(problem.row_length)};
  const int teams = count_teams(blockDim.x, team_threads);
  const float length = static_cast<float>(problem.row_length);
  int half = 0;

  // The parameters are applied to a group of up to 8 elements at a time. Where that is all a thread
  // has, they are asked for before the row and arrive with it; more would take too many registers.
  constexpr int kGroup = kChunks * kVector <= 8 ? kChunks : 8 / kVector;
  constexpr bool kPrefetch = kGroup == kChunks;
  Packed<kVector, kGroup> weight, bias;
  if constexpr (kPrefetch) {
    load(weight, problem.weight, 0, columns);
    load(bias, problem.bias, 0, columns);
  }
  const int64_t row = int64_t{blockIdx.x} * teams + team.index;
  const bool active = row < problem.rows;
  Packed<kVector, kChunks> packed;
  Fragment<kVector, kChunks> x;
  load(packed, problem.input.data, problem.input.dtype, row_offset(problem.input, row), columns,
       active);
  if constexpr (kResidual) {
    Packed<kVector, kChunks> packed_residual;
    Fragment<kVector, kChunks> residual;
    load(packed_residual, problem.residual.data, problem.residual.dtype,
         row_offset(problem.residual, row), columns, active);
    unpack(x, packed, problem.input.dtype);
    unpack(residual, packed_residual, problem.residual.dtype);
    add_residual(x, residual, problem.dropout, row, columns, 0);
    store_rounded(problem.new_residual, row_offset(problem.new_residual, row), x, columns, active);
  } else {
    unpack(x, packed, problem.input.dtype);
  }

  float mean[1] = {0};
  if (!problem.rms) {
    mean[0] = sum(x);
    team_sum(mean, team, scratch, half);
    mean[0] /= length;
  }
  float variance[1] = {sum_of_squares(x, mean[0], columns)};
  team_sum(variance, team, scratch, half);
  const float rstd = rsqrtf(variance[0] / length + static_cast<float>(problem.eps));
  if (active && team.lane == 0) store_statistics(problem, row, mean[0], rstd);

  normalise(x, mean[0], rstd);
  const int64_t output_offset = row_offset(problem.output, row);
#pragma unroll
  for (int g = 0; g < kChunks; g += kGroup) {
    const int begin = g * team.threads * kVector;
    const Columns group_columns{team.threads, team.lane, columns.row_length - begin};
    if constexpr (!kPrefetch) {
      load(weight, problem.weight, begin, group_columns);
      load(bias, problem.bias, begin, group_columns);
    }
    Fragment<kVector, kGroup> group;
#pragma unroll
    for (int c = 0; c < kGroup; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) group.values[c][i] = x.values[g + c][i];
    }
    apply_affine(group, weight, bias, problem);
    if (active) {
      store(problem.output.data, problem.output.dtype, output_offset + begin, group, group_columns);
    }
  }
}

// A block strides over a row too long for its registers. It reads the row three times: for the
// mean, the centred squares and the output, the later times mostly from L1 or L2. With a residual
// the sum is read back from new_residual, each thread what it wrote itself.
template <int kVector>
__global__ void __launch_bounds__(kMaxThreads) forward_long_kernel(const LayerNormForward problem) {
  FASTSEQ_SHARED(TeamScratch, scratch);
  const Team team = make_team(kMaxThreads);
  const int64_t length = problem.row_length;
  constexpr int64_t kStrip = int64_t{kMaxThreads} * kVector;
  const bool has_residual = problem.residual.data != nullptr;
  const Rows& source = has_residual ? problem.new_residual : problem.input;
  int half = 0;

  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    const int64_t source_offset = row_offset(source, row);
    const auto strip_columns = [&](int64_t strip) {
      return Columns{team.threads, team.lane, static_cast<int>(min(length - strip, kStrip))};
    };
    const auto load_strip = [&](const Rows& rows, int64_t offset, int64_t strip) {
      Packed<kVector, 1> packed;
      Fragment<kVector, 1> fragment;
      load(packed, rows.data, rows.dtype, offset + strip, strip_columns(strip));
      unpack(fragment, packed, rows.dtype);
      return fragment;
    };

    float mean[1] = {0};
    if (has_residual || !problem.rms) {
      const int64_t input_offset = row_offset(problem.input, row);
      const int64_t residual_offset = has_residual ? row_offset(problem.residual, row) : 0;
      for (int64_t strip = 0; strip < length; strip += kStrip) {
        Fragment<kVector, 1> x = load_strip(problem.input, input_offset, strip);
        if (has_residual) {
          const Fragment<kVector, 1> residual =
              load_strip(problem.residual, residual_offset, strip);
          add_residual(x, residual, problem.dropout, row, strip_columns(strip), strip);
          store_rounded(problem.new_residual, source_offset + strip, x, strip_columns(strip), true);
        }
        mean[0] += sum(x);
      }
      team_sum(mean, team, scratch, half);
      mean[0] = problem.rms ? 0.0f : mean[0] / static_cast<float>(length);
    }

    float variance[1] = {0};
    for (int64_t strip = 0; strip < length; strip += kStrip) {
      variance[0] +=
          sum_of_squares(load_strip(source, source_offset, strip), mean[0], strip_columns(strip));
    }
    team_sum(variance, team, scratch, half);
    const float rstd =
        rsqrtf(variance[0] / static_cast<float>(length) + static_cast<float>(problem.eps));
    if (team.lane == 0) store_statistics(problem, row, mean[0], rstd);

    const int64_t output_offset = row_offset(problem.output, row);
    for (int64_t strip = 0; strip < length; strip += kStrip) {
      const Columns columns = strip_columns(strip);
      Fragment<kVector, 1> x = load_strip(source, source_offset, strip);
      Packed<kVector, 1> weight, bias;
      load(weight, problem.weight, strip, columns);
      load(bias, problem.bias, strip, columns);
      normalise(x, mean[0], rstd);
      apply_affine(x, weight, bias, problem);
      store(problem.output.data, problem.output.dtype, output_offset + strip, x, columns);
    }
  }
}

}  // namespace fastseq::layer_norm
