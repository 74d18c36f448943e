// The loop of every persistent kernel: all steps of a tile of rows, weights resident.
//
// A step of a block, forward:
//
//   1  the copies of the step after next start (cp.async into shared memory)
//   2  each warp multiplies its weights with the state, [rows, K] in shared memory
//   3  splits of K add up through shared memory: one barrier of the block, if there are several
//   4  gates, cell and h of the thread's own units in registers; results to a stage
//   5  own h goes to the state of every block of the group
//   6  the results of the step before leave the stage for global memory
//   7  a barrier of the block; and all of the next state must have come from the others, in a grid
//      by a counter and L2
//
// The state has two buffers, written for step n + 1 while step n's is read; see recurrent_group.cuh
// for why that is enough. The backward is the same with other products: of the gates' gradients
// with the weights' columns, taken after the exchange, so it makes one more of them.
//
// Deterministic: every sum has one order, which the plan's splits fix.
#pragma once

#include "recurrent_group.cuh"

namespace fastseq::recurrent {

// Adds the other splits' sums to those of the first, in their order. All threads of the block.
template <class Sums, int kMatrices, int kColumns>
__device__ __forceinline__ void add_splits(Sums& sums, const Plan& plan, const Place& place,
                                           char* shared) {
  if (plan.splits == 1) return;
  float4* const partial = reinterpret_cast<float4*>(shared + plan.layout.partial) + place.lane;
  const auto at = [&](int split, int m, int c) -> float4& {
    return partial[(((split - 1) * plan.tiles + place.tile) * kMatrices * kColumns + m * kColumns +
                    c) *
                   32];
  };
  if (place.split > 0) {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float (&v)[4] = sums.values[m][c];
        at(place.split, m, c) = make_float4(v[0], v[1], v[2], v[3]);
      }
  }
  __syncthreads();
  if (place.split > 0) return;
  for (int s = 1; s < plan.splits; ++s)
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float4 more = at(s, m, c);
        float (&v)[4] = sums.values[m][c];
        v[0] += more.x, v[1] += more.y, v[2] += more.z, v[3] += more.w;
      }
}

template <class Pass>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    persistent_kernel(const typename Pass::Problem problem, const Plan plan, const Copies copies,
                      const Workspace workspace) {
  FASTSEQ_DYNAMIC_SHARED(char, shared);
  constexpr Tile kTile = Pass::kTile;
  Place place = place_of(plan, workspace.first_group, problem.batch, problem.hidden);
  Pass pass(problem, plan, place, shared, copies);

  // Columns of rows that do not exist, and inner elements of units that do not, are zeros for good.
  const int state_words = 2 * plan.rows * plan.layout.state_pitch / 16;
  for (int i = static_cast<int>(threadIdx.x); i < state_words; i += static_cast<int>(blockDim.x))
    reinterpret_cast<uint4*>(shared + plan.layout.state)[i] = make_uint4(0, 0, 0, 0);
  pass.bring(0);
  copy_commit();
  if (problem.steps > 1) pass.bring(1);
  copy_commit();
  Weights<Pass::kArith, kTile.matrices, kTile.held> weights;
  weights.load(plan, shared, place.warp, place.lane,
               [&](int half, int k) { return pass.weights(half, k); });
  __syncthreads();
  pass.begin();
  copy_wait<1>();
  if (plan.exchange == Exchange::cluster) {
    if (threadIdx.x == 0) {
      transfer_init(count_of(plan, shared, 0));
      transfer_init(count_of(plan, shared, 1));
    }
    cluster_barrier();
    if (place.units == 0) return;  // no one sends here
  } else {
    __syncthreads();
  }

  typename Pass::Sums sums;
  const int steps = static_cast<int>(problem.steps);
  const auto state = [&](int n) {
    return shared + plan.layout.state + (n % 2) * plan.rows * plan.layout.state_pitch;
  };
  const auto multiply = [&](int n) {
    weights.multiply(sums, state(n), plan.layout.state_pitch, place.lane);
    add_splits<typename Pass::Sums, kTile.matrices, Pass::kN>(sums, plan, place, shared);
  };
  const bool is_grid = plan.exchange == Exchange::grid;
  unsigned* const count = workspace.counts + kCountStride * place.group;
  for (int n = 0; n < steps; ++n) {
    place.lane = opaque(place.lane);
    const bool goes_on = Pass::kBackward || n + 1 < steps;  // somebody reads the next state
    if (goes_on) expect_state(plan, shared, n + 1, Pass::kFields * plan.units * Pass::kElement);
    if (n + 2 < steps) pass.bring(n + 2);
    copy_commit();
    multiply(n);
    if (place.split == 0) {
      pass.step(n, sums, state(n + 1));
      if (goes_on) pass.publish(n + 1, state(n + 1), workspace);
    }
    copy_wait<1>();
    if (is_grid && goes_on) {
      grid_arrive(count);
      if (n > 0) pass.take(n - 1);
      grid_wait(count, static_cast<unsigned>((n + 1) * plan.blocks));
      fetch_state(plan, place, workspace, state(n + 1), n + 1);
    } else if (n > 0) {
      pass.take(n - 1);
    }
    __syncthreads();
    if (goes_on) wait_for_state(plan, shared, n + 1);
  }
  if constexpr (Pass::kBackward) {
    multiply(steps);
    if (place.split == 0) pass.finish(sums);
  } else {
    pass.finish();
  }
  pass.take(steps - 1);
}

}  // namespace fastseq::recurrent
