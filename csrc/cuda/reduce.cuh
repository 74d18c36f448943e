// Sums over the threads that share a row.
#pragma once

#include "launch.cuh"

namespace fastseq {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;

// The threads that share one row: a power of two, within one warp or spanning whole warps.
struct Team {
  int threads;  // in this team
  int index;    // of this team in the block
  int lane;     // of this thread in its team
};

// How many teams of that size the given number of threads makes.
__device__ __forceinline__ int count_teams(unsigned threads, int team_threads) {
  return static_cast<int>(threads) >> (__ffs(team_threads) - 1);
}

__device__ __forceinline__ Team make_team(int team_threads) {
  return {team_threads, count_teams(threadIdx.x, team_threads),
          static_cast<int>(threadIdx.x) & (team_threads - 1)};
}

// Where warps leave their sums for one another. Two halves in turn: a warp may write its next sum
// while a slower one still reads the last, so one barrier a sum is enough.
struct TeamScratch {
  float sums[2][2][kMaxWarps];
};

// Sums each value over the team; every thread gets the same bits, in an order that depends on the
// team's size alone. All threads of the block must call it together. half is the caller's, first 0.
template <int kCount>
__device__ __forceinline__ void team_sum(float (&values)[kCount], const Team& team,
                                         TeamScratch& scratch, int& half) {
  static_assert(kCount <= 2, "TeamScratch holds two sums");
  for (int distance = min(team.threads, kWarp) / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] += __shfl_xor_sync(0xffffffffu, values[i], distance);
    }
  }
  if (team.threads <= kWarp) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = team.threads / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch.sums[half][i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int w = 0; w < warps; ++w) values[i] += scratch.sums[half][i][team.index * warps + w];
  }
  half ^= 1;
}

}  // namespace fastseq
