// Kernels whose blocks run at once, in clusters and cooperative grids, and copies that run beside
// them: right ones, and the same with a fault planted.
#include "../../csrc/cuda/sync.cuh"
#include "checks.h"

namespace simt {
namespace {

using fastseq::cluster_barrier;
using fastseq::cluster_rank;
using fastseq::cluster_size;
using fastseq::LaunchShape;
using fastseq::map_shared;

constexpr int kUnits = 40;  // of a block: a warp and a part of one

__device__ unsigned mixed(unsigned sum, unsigned unit) { return (sum + unit) * 2654435761u; }

enum class Plant { nothing, no_first, no_step, no_last, one_buffer, no_block, few_bytes };

// A recurrence spread over a cluster: every step makes a block's units of the state from the whole
// state, and gives them to every block. Two buffers in turn, so one barrier a step is enough.
template <Plant kPlant>
__global__ void cluster_kernel(const unsigned* initial, unsigned* result, int steps) {
  FASTSEQ_DYNAMIC_SHARED(unsigned, state);
  const int blocks = static_cast<int>(cluster_size()), units = blocks * kUnits;
  const int unit = static_cast<int>(cluster_rank()) * kUnits + static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x / cluster_size()) * units;
  for (int i = static_cast<int>(threadIdx.x); i < units; i += kUnits) state[i] = initial[first + i];
  if constexpr (kPlant != Plant::no_first) cluster_barrier();
  for (int step = 0; step < steps; ++step) {
    const bool two = kPlant != Plant::one_buffer;
    const unsigned* from = state + (two ? step % 2 * units : 0);
    unsigned* to = state + (two ? (step + 1) % 2 * units : 0);
    unsigned sum = 0;
    for (int i = 0; i < units; ++i) sum += from[i];
    for (int rank = 0; rank < blocks; ++rank) {
      *map_shared(to + unit, static_cast<unsigned>(rank)) =
          mixed(sum, static_cast<unsigned>(unit));
    }
    if (kPlant == Plant::no_step && step == steps - 2) continue;
    if (kPlant == Plant::no_last && step == steps - 1) continue;
    if (kPlant == Plant::no_block) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
  }
  const int last = kPlant == Plant::one_buffer ? 0 : steps % 2 * units;
  result[first + unit] = state[last + unit];
}

// The same with transfers in place of the barrier of a step. A block sends a step's units once it
// has those of the step before from all, which they sent when they were done with the buffer.
template <Plant kPlant>
__global__ void transfer_kernel(const unsigned* initial, unsigned* result, int steps) {
  FASTSEQ_DYNAMIC_SHARED(unsigned, state);
  FASTSEQ_SHARED(uint64_t[2], arrived);
  const int blocks = static_cast<int>(cluster_size()), units = blocks * kUnits;
  const int unit = static_cast<int>(cluster_rank()) * kUnits + static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x / cluster_size()) * units;
  for (int i = static_cast<int>(threadIdx.x); i < units; i += kUnits) state[i] = initial[first + i];
  if (threadIdx.x < 2) fastseq::transfer_init(&arrived[threadIdx.x]);
  if constexpr (kPlant != Plant::no_first) cluster_barrier();
  for (int step = 0; step < steps; ++step) {
    const int next = kPlant == Plant::one_buffer ? 0 : (step + 1) % 2;
    const unsigned* from = state + (kPlant == Plant::one_buffer ? 0 : step % 2 * units);
    uint64_t* barrier = &arrived[step % 2];
    const int expected = kPlant == Plant::few_bytes && step == steps - 1 ? units - 1 : units;
    if (threadIdx.x == 0) {
      fastseq::transfer_expect(barrier, static_cast<unsigned>(expected * sizeof(unsigned)));
    }
    unsigned sum = 0;
    for (int i = 0; i < units; ++i) sum += from[i];
    for (int rank = 0; rank < blocks; ++rank) {
      fastseq::transfer_send(state + next * units + unit, mixed(sum, static_cast<unsigned>(unit)),
                             barrier, static_cast<unsigned>(rank));
    }
    if (kPlant == Plant::no_step && step == steps - 2) continue;
    if (kPlant == Plant::no_last && step == steps - 1) continue;
    fastseq::transfer_wait(barrier, static_cast<unsigned>(step / 2 % 2));
  }
  result[first + unit] = state[steps % 2 * units + unit];
}

// The same in a cooperative grid, through global memory.
template <Plant kPlant>
__global__ void grid_kernel(unsigned* state, unsigned* counter, int steps) {
  const int units = static_cast<int>(gridDim.x) * kUnits;
  const int unit = static_cast<int>(blockIdx.x) * kUnits + static_cast<int>(threadIdx.x);
  for (int step = 0; step < steps; ++step) {
    const unsigned* from = state + step % 2 * units;
    unsigned sum = 0;
    for (int i = 0; i < units; ++i) sum += from[i];
    state[(step + 1) % 2 * units + unit] = mixed(sum, static_cast<unsigned>(unit));
    if (kPlant == Plant::no_block) {  // the flag says a block is done when its first thread is
      if (threadIdx.x == 0) fastseq::red_release_add(counter, 1);
    } else {
      fastseq::grid_arrive(counter);
    }
    if (kPlant == Plant::no_step && step == steps - 2) continue;
    fastseq::grid_wait(counter, static_cast<unsigned>(step + 1) * gridDim.x);
  }
}

// Each thread's element through shared memory, a group of copies ahead of its use.
template <int kPending, bool kBarrier>
__global__ void copy_kernel(const float* from, float* to, int rounds) {
  FASTSEQ_SHARED(float[2][64], values);
  const int thread = static_cast<int>(threadIdx.x);
  const auto start = [&](int round) {
    fastseq::copy_async<4>(&values[round % 2][thread], from + 64 * round + thread,
                           round < rounds ? 4 : 0);
    fastseq::copy_commit();
  };
  start(0);
  for (int round = 0; round < rounds; ++round) {
    start(round + 1);
    fastseq::copy_wait<kPending>();
    if constexpr (kBarrier) __syncthreads();
    to[64 * round + thread] = values[round % 2][63 - thread];
    __syncthreads();
  }
}

__global__ void copy_past_end_kernel(const float* from, float* to, int rounds) {
  FASTSEQ_SHARED(float[64], values);
  fastseq::copy_async<4>(&values[threadIdx.x], from + 64 * rounds + threadIdx.x);
  fastseq::copy_commit();
  fastseq::copy_wait<0>();
  to[threadIdx.x] = values[threadIdx.x];
}

__global__ void arrive_twice_kernel(unsigned*) {
  fastseq::cluster_arrive();
  fastseq::cluster_arrive();
}

__global__ void wait_alone_kernel(unsigned*) { fastseq::cluster_wait(); }

__global__ void arrive_apart_kernel(unsigned*) {
  if (threadIdx.x < 16) {
    cluster_barrier();
  } else {
    cluster_barrier();
  }
}

__global__ void leave_cluster_kernel(unsigned*) {
  if (cluster_rank() == 1) return;
  cluster_barrier();
}

__global__ void no_such_rank_kernel(unsigned*) {
  FASTSEQ_SHARED(unsigned, value);
  *map_shared(&value, 2) = 0;
}

__global__ void peer_past_end_kernel(unsigned* index) {
  FASTSEQ_DYNAMIC_SHARED(unsigned, values);
  cluster_barrier();
  map_shared(values, cluster_rank() ^ 1)[*index] = 0;
  cluster_barrier();
}

// Nobody sets the flag.
__global__ void poll_kernel(unsigned* flag) {
  while (fastseq::load_acquire(flag) == 0) __nanosleep(20);
}

template <typename Kernel>
Function on_clusters(Kernel kernel) {
  return [kernel](Request& request) -> const char* {
    const auto* initial = static_cast<const unsigned*>(request.pointer());
    auto* result = static_cast<unsigned*>(request.pointer());
    const int clusters = static_cast<int>(request.integer());
    LaunchShape shape{};
    shape.cluster = static_cast<unsigned>(request.integer());
    shape.grid = dim3(static_cast<unsigned>(clusters) * shape.cluster);
    shape.block = dim3(kUnits);
    shape.shared_bytes = sizeof(unsigned) * 2 * kUnits * shape.cluster;
    const int steps = static_cast<int>(request.integer());
    return error_text(fastseq::launch(kernel, shape, nullptr, initial, result, steps));
  };
}

template <typename Kernel>
Function on_grid(Kernel kernel) {
  return [kernel](Request& request) -> const char* {
    auto* state = static_cast<unsigned*>(request.pointer());
    auto* counter = static_cast<unsigned*>(request.pointer());
    LaunchShape shape{};
    shape.grid = dim3(static_cast<unsigned>(request.integer()));
    shape.block = dim3(kUnits);
    shape.cooperative = true;
    const int steps = static_cast<int>(request.integer());
    return error_text(fastseq::launch(kernel, shape, nullptr, state, counter, steps));
  };
}

template <typename Kernel>
Function on_copies(Kernel kernel) {
  return [kernel](Request& request) -> const char* {
    const auto* from = static_cast<const float*>(request.pointer());
    auto* to = static_cast<float*>(request.pointer());
    const int rounds = static_cast<int>(request.integer());
    const LaunchShape shape{dim3(1), dim3(64)};
    return error_text(fastseq::launch(kernel, shape, nullptr, from, to, rounds));
  };
}

template <typename Kernel>
Function on_two_blocks(Kernel kernel) {
  return [kernel](Request& request) -> const char* {
    LaunchShape shape{dim3(2), dim3(32)};
    shape.shared_bytes = 16;
    shape.cluster = 2;
    return error_text(
        fastseq::launch(kernel, shape, nullptr, static_cast<unsigned*>(request.pointer())));
  };
}

__global__ void empty_kernel() {}
__global__ void bare_kernel() {}

// What the launch says, with the opt-ins of launch() or without.
const char* launch_error(Request& request) {
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(request.integer()));
  shape.block = dim3(static_cast<unsigned>(request.integer()));
  shape.shared_bytes = static_cast<size_t>(request.integer());
  shape.cluster = static_cast<unsigned>(request.integer());
  shape.cooperative = request.integer() != 0;
  if (request.integer() != 0) return error_text(fastseq::launch(&empty_kernel, shape, nullptr));
  FASTSEQ_LAUNCH(&bare_kernel, shape.grid, shape.block, shape.shared_bytes, nullptr)();
  return error_text(cudaGetLastError());
}

}  // namespace

void add_group_checks(Functions& functions) {
  functions["cluster"] = on_clusters(&cluster_kernel<Plant::nothing>);
  functions["cluster_no_first"] = on_clusters(&cluster_kernel<Plant::no_first>);
  functions["cluster_no_step"] = on_clusters(&cluster_kernel<Plant::no_step>);
  functions["cluster_no_last"] = on_clusters(&cluster_kernel<Plant::no_last>);
  functions["cluster_one_buffer"] = on_clusters(&cluster_kernel<Plant::one_buffer>);
  functions["cluster_no_block"] = on_clusters(&cluster_kernel<Plant::no_block>);
  functions["transfer"] = on_clusters(&transfer_kernel<Plant::nothing>);
  functions["transfer_no_first"] = on_clusters(&transfer_kernel<Plant::no_first>);
  functions["transfer_no_step"] = on_clusters(&transfer_kernel<Plant::no_step>);
  functions["transfer_no_last"] = on_clusters(&transfer_kernel<Plant::no_last>);
  functions["transfer_one_buffer"] = on_clusters(&transfer_kernel<Plant::one_buffer>);
  functions["transfer_few_bytes"] = on_clusters(&transfer_kernel<Plant::few_bytes>);
  functions["grid"] = on_grid(&grid_kernel<Plant::nothing>);
  functions["grid_no_step"] = on_grid(&grid_kernel<Plant::no_step>);
  functions["grid_no_block"] = on_grid(&grid_kernel<Plant::no_block>);
  functions["copy"] = on_copies(&copy_kernel<1, true>);
  functions["copy_no_wait"] = on_copies(&copy_kernel<2, true>);
  functions["copy_no_barrier"] = on_copies(&copy_kernel<1, false>);
  functions["copy_past_end"] = on_copies(&copy_past_end_kernel);
  functions["arrive_twice"] = on_two_blocks(&arrive_twice_kernel);
  functions["wait_alone"] = on_two_blocks(&wait_alone_kernel);
  functions["arrive_apart"] = on_two_blocks(&arrive_apart_kernel);
  functions["leave_cluster"] = on_two_blocks(&leave_cluster_kernel);
  functions["no_such_rank"] = on_two_blocks(&no_such_rank_kernel);
  functions["peer_past_end"] = on_two_blocks(&peer_past_end_kernel);
  functions["poll"] = on_two_blocks(&poll_kernel);
  functions["launch_error"] = launch_error;
}

}  // namespace simt
