// Kernels that do nothing but wait, as a step of a persistent recurrence waits: barriers of a
// block, a cluster and a grid, and what goes through the shared memory of another block. The words
// are those of csrc/cuda/sync.cuh, so what is timed is what our kernels do, and tests/simt runs
// them on the host.
//
// Each takes `steps` of its kind one after another, a multiple of 256, and leaves in memory[1] a
// number that only right ones give: `steps` itself. memory[0] is a counter, 0 at the start.
#pragma once

#include "../../csrc/cuda/sync.cuh"

namespace fastseq::latency {

constexpr int kExchanged = 128;  // words a block gives to each block of its cluster: 512 bytes
constexpr unsigned kLargestCluster = 16;

// A barrier is timed bare; every 256th step a thread counts what another has counted, so that a
// barrier that does not hold shows.
constexpr int kSeldom = 256;

__device__ __forceinline__ bool counts(int step) { return step % kSeldom == kSeldom - 1; }

__global__ void block_barrier(int steps, unsigned* memory) {
  FASTSEQ_SHARED(unsigned, turns);
  if (threadIdx.x == 0) turns = 0;
  for (int i = 0; i < steps; ++i) {
    __syncthreads();
    if (counts(i) && threadIdx.x == static_cast<unsigned>(i / kSeldom) % blockDim.x) {
      turns += kSeldom;
    }
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) memory[1] = turns;
}

// The barrier of flags that our kernels have: blocks count up a word in L2, and poll it.
__global__ void flag_barrier(int steps, unsigned* memory) {
  for (int i = 1; i <= steps; ++i) {
    grid_arrive(memory);
    grid_wait(memory, static_cast<unsigned>(i) * gridDim.x);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) memory[1] = load_acquire(memory) / gridDim.x;
}

__global__ void cluster_barriers(int steps, unsigned* memory) {
  FASTSEQ_SHARED(unsigned, turns);
  if (threadIdx.x == 0) turns = 0;
  unsigned* const first = map_shared(&turns, 0);
  for (int i = 0; i < steps; ++i) {
    cluster_barrier();
    const auto turn = static_cast<unsigned>(i / kSeldom);
    if (counts(i) && threadIdx.x == 0 && cluster_rank() == turn % cluster_size()) {
      *first += kSeldom;
    }
  }
  cluster_barrier();
  if (blockIdx.x == 0 && threadIdx.x == 0) memory[1] = turns;
  cluster_barrier();  // a block whose memory others read may not end before them
}

// A load from the next block's shared memory, whose address the load before it brought.
__global__ void remote_load(int steps, unsigned* memory) {
  FASTSEQ_SHARED(unsigned[32], next);
  if (threadIdx.x < 32) next[threadIdx.x] = (threadIdx.x + 1) % 32;
  cluster_barrier();
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    const unsigned* const peer = map_shared(&next[0], 1 % cluster_size());
    unsigned at = 0;
    for (int i = 0; i < steps; ++i) at = peer[at];
    const unsigned rounds = static_cast<unsigned>(steps) / 32;
    if (blockIdx.x == 0) memory[1] = rounds * 32 + at;
  }
  cluster_barrier();
}

// A word to the next block's shared memory and back, each end waiting until it has come.
__global__ void round_trip(int steps, unsigned* memory) {
  FASTSEQ_SHARED(unsigned, word);
  FASTSEQ_SHARED(uint64_t, come);
  if (threadIdx.x == 0) transfer_init(&come);
  cluster_barrier();
  const unsigned rank = cluster_rank();
  if (threadIdx.x == 0 && rank < 2) {
    unsigned value = 0;
    for (int i = 0; i < steps; ++i) {
      transfer_expect(&come, sizeof(word));
      if (rank == 0) transfer_send(&word, value, &come, 1);
      transfer_wait(&come, static_cast<unsigned>(i) & 1);
      value = word;
      if (rank == 1) transfer_send(&word, value + 1, &come, 0);
    }
    if (blockIdx.x == 0) memory[1] = value;
  }
  cluster_barrier();
}

// A state of 128 words a block goes to every block of the cluster, as in a step of a recurrence:
// two buffers in turn, since a block that sends a step's words has had all of the step before.
__global__ void exchange(int steps, unsigned* memory) {
  FASTSEQ_SHARED(uint4[2 * kLargestCluster * kExchanged / 4], words);
  FASTSEQ_SHARED(uint64_t[2], come);
  const unsigned rank = cluster_rank(), size = cluster_size();
  if (threadIdx.x == 0) {
    transfer_init(&come[0]);
    transfer_init(&come[1]);
  }
  cluster_barrier();
  constexpr unsigned kPieces = kExchanged / 4;  // of 16 bytes
  unsigned value = 0;
  for (int i = 0; i < steps; ++i) {
    const int buffer = i & 1;
    if (threadIdx.x == 0) transfer_expect(&come[buffer], size * kExchanged * 4);
    uint4* const mine = words + (static_cast<unsigned>(buffer) * kLargestCluster + rank) * kPieces;
    for (unsigned p = threadIdx.x; p < size * kPieces; p += blockDim.x) {
      const uint4 piece = make_uint4(value, value, value, value);
      transfer_send(mine + p % kPieces, piece, &come[buffer], p / kPieces);
    }
    transfer_wait(&come[buffer], static_cast<unsigned>(i / 2) & 1);
    const unsigned from = static_cast<unsigned>(buffer) * kLargestCluster + (rank + 1) % size;
    value = words[from * kPieces + threadIdx.x % kPieces].x + 1;
    __syncthreads();  // all have read before any sends into the other blocks' next buffer
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) memory[1] = value;
  cluster_barrier();
}

__global__ void nothing(int steps, unsigned* memory) {
  if (blockIdx.x == 0 && threadIdx.x == 0) memory[1] = static_cast<unsigned>(steps);
}

// What is timed, by the name in the report.
struct Pattern {
  const char* name;
  void (*kernel)(int, unsigned*);
  bool clusters, cooperative;
};

constexpr Pattern kPatterns[] = {
    {"block barrier", block_barrier, false, false},
    {"flag barrier", flag_barrier, false, true},
    {"cluster barrier", cluster_barriers, true, false},
    {"remote load", remote_load, true, false},
    {"round trip", round_trip, true, false},
    {"exchange of 512 B", exchange, true, false},
    {"launch", nothing, false, false},
    {"cooperative launch", nothing, false, true},
};

}  // namespace fastseq::latency
