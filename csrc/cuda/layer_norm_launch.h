// Launch configurations of the layer-norm kernels: pure functions of the problem, no CUDA in them.
//
// Nothing here is tuned by measurement yet; each choice states the arithmetic behind it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../layer_norm.h"

namespace fastseq::layer_norm {

// A row of up to max_threads * vector * chunks elements stays in registers; longer ones are read
// again (chunks = 0), from L1 or L2 as a rule.
struct Launch {
  int vector;        // consecutive elements per access: 8 (16-bit), 4 or 1
  int chunks;        // such vectors per thread
  int team_threads;  // threads per row, a power of two
  int block_threads;
  int64_t blocks;
};

constexpr int64_t kMaxGrid = 0x7fffffff;
// 512 threads leave each 128 registers, which the 32 elements of the widest fragment need.
constexpr int kMaxTeam = 512;

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline int64_t ceil_power_of_two(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

inline int element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline bool is_aligned(const void* data, DType dtype, int vector) {
  const int bytes = std::min(16, vector * element_bytes(dtype));
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

inline bool is_aligned(const Vector& vector_data, int vector) {
  return is_aligned(vector_data.data, vector_data.dtype, vector);
}

// Every row has to begin on a boundary, so the strides count as well as the address.
inline bool is_aligned(const Rows& rows, int vector) {
  if (rows.data == nullptr) return true;
  const int64_t bytes = std::min(16, vector * element_bytes(rows.dtype));
  return is_aligned(rows.data, rows.dtype, vector) &&
         rows.stride_outer * element_bytes(rows.dtype) % bytes == 0 &&
         (rows.inner == 1 || rows.stride_inner * element_bytes(rows.dtype) % bytes == 0);
}

// The widest vector that divides the row and that every tensor is aligned for. 8 where a 16-bit
// tensor is read, so that its accesses are of 128 bits too.
template <typename IsAligned>
int choose_vector(int64_t row_length, bool any_16_bit, IsAligned aligned) {
  if (any_16_bit && row_length % 8 == 0 && aligned(8)) return 8;
  return row_length % 4 == 0 && aligned(4) ? 4 : 1;
}

inline int forward_vector(const LayerNormForward& problem) {
  const bool any_16_bit = problem.input.dtype != DType::f32;
  return choose_vector(problem.row_length, any_16_bit, [&](int vector) {
    return is_aligned(problem.input, vector) && is_aligned(problem.residual, vector) &&
           is_aligned(problem.output, vector) && is_aligned(problem.new_residual, vector) &&
           is_aligned(problem.weight, vector) && is_aligned(problem.bias, vector);
  });
}

inline int backward_vector(const LayerNormBackward& problem) {
  const bool any_16_bit = problem.grad_output.dtype != DType::f32 || problem.x.dtype != DType::f32;
  return choose_vector(problem.row_length, any_16_bit, [&](int vector) {
    return is_aligned(problem.grad_output, vector) && is_aligned(problem.x, vector) &&
           is_aligned(problem.grad_new_residual, vector) && is_aligned(problem.grad_x, vector) &&
           is_aligned(problem.grad_input, vector) && is_aligned(problem.weight, vector) &&
           is_aligned(problem.partials, DType::f32, vector);
  });
}

// Rows of up to 32 vectors take one a thread, in teams within a warp: no barrier, and the
// parameters are fetched ahead. Longer ones take several (64 bytes a thread for whole vectors),
// which keeps enough loads waiting to cover DRAM latency: 4.8 TB/s * 0.7 us / 132 SMs = 25 kB,
// where 1024 resident threads times 64 B are 64 kB. The number of rows has no say: a row's bits
// must not depend on the batch it came in, and the order of its sum follows from the choice here.
inline Launch choose_forward(int64_t rows, int64_t row_length, int vector) {
  const int few = vector == 1 ? 4 : 1;
  const int many = vector == 1 ? 16 : 4;
  const int64_t vectors = ceil_div(row_length, vector);
  Launch launch{vector, 0, kMaxTeam, kMaxTeam, rows};
  if (vectors > int64_t{kMaxTeam} * many) return launch;
  launch.chunks = vectors <= 32 * few ? few : many;
  launch.team_threads = static_cast<int>(ceil_power_of_two(ceil_div(vectors, launch.chunks)));
  // Short rows share a block of 128 threads: small enough to spread a few rows over many SMs, and
  // 16 such blocks fill one.
  launch.block_threads = std::max(launch.team_threads, 128);
  launch.blocks = ceil_div(rows, launch.block_threads / launch.team_threads);
  return launch;
}

// A thread of the backward keeps x, the gradient, the weight and two sums for each of its elements,
// so 16 of them are what 128 registers hold: rows of up to 8192 elements. The grid is persistent,
// as each block writes its sums once; blocks is left to the caller (partial rows).
inline Launch choose_backward(int64_t row_length, int vector) {
  const int few = vector == 1 ? 4 : 1;
  const int many = 16 / vector;
  const int64_t vectors = ceil_div(row_length, vector);
  Launch launch{vector, 0, kMaxTeam, kMaxTeam, 0};
  if (vectors > int64_t{kMaxTeam} * many) return launch;
  launch.chunks = vectors <= 32 * few ? few : many;
  launch.team_threads = static_cast<int>(ceil_power_of_two(ceil_div(vectors, launch.chunks)));
  launch.block_threads = std::max(launch.team_threads, 256);
  return launch;
}

// Blocks of the persistent backward. 256 threads of up to 128 registers: two blocks to an SM; those
// of 512 threads (rows above 4096): one. Never more than there are tiles of rows at 16 elements a
// thread, so that no partial row is written for nothing.
inline int64_t partial_rows(int64_t rows, int64_t row_length, int sm_count) {
  const int64_t padded = ceil_power_of_two(std::max<int64_t>(row_length, 16));
  const int64_t teams = std::max<int64_t>(1, 4096 / padded);
  const int64_t resident = int64_t{sm_count} * (row_length <= 4096 ? 2 : 1);
  return std::max<int64_t>(1, std::min(ceil_div(rows, teams), resident));
}

}  // namespace fastseq::layer_norm
