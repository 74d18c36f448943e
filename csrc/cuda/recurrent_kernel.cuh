// The loop of every persistent kernel: all steps of a tile of rows, weights resident.
//
// A step of a block, forward:
//
//   1  the copies of the step after next start (cp.async into shared memory)
//   2  each warp multiplies its weights with the state, [rows, K] in shared memory
//   3  splits of K add up through shared memory: one barrier of the block, if there are several;
//      then those of partners, by transfers that count
//   4  gates, cell and h of the thread's own units in registers; results to a stage
//   5  own h goes to the state of every block of the group
//   6  the results of the step before leave the stage for global memory
//   7  a barrier of the block; before the next product all of its state must have come from the
//      others, in a grid by a counter and L2
//
// The state has two buffers, written for step n + 1 while step n's is read; see recurrent_group.cuh
// for why that is enough. A grid's blocks have one: shared memory is what decides how large a layer
// they take, and they wait for L2 anyway. The backward is the same with other products: of the
// gates' gradients with the weights' columns, taken after the exchange, so it makes one more of
// them.
//
// Blocks with two strands do all this for one tile of rows and then for another, whose state has
// come meanwhile. A strand has its own part of shared memory; what a thread keeps to itself (h, c)
// lies there until the strand's next turn.
//
// Deterministic: every sum has one order, which the plan's splits fix.
#pragma once

#include "recurrent_group.cuh"

namespace fastseq::recurrent {

// Adds the other splits' sums to those of the first, in their order. All threads of the block; when
// it is over, none of them reads a state any more that has the next one's place.
template <class Sums, int kMatrices>
__device__ __forceinline__ void add_splits(Sums& sums, const Plan& plan, const Place& place,
                                           char* shared) {
  if (plan.splits == 1) {
    if (plan.layout.next_state == 0) __syncthreads();
    return;
  }
  float4* const partial = reinterpret_cast<float4*>(shared + plan.layout.partial) + place.lane;
  const auto at = [&](int split, int m) -> float4& {
    const int tile = warp_of() - place.split * plan.tiles;
    return partial[(((split - 1) * plan.tiles + tile) * kMatrices + m) * 32];
  };
  if (place.split > 0) {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      const float (&v)[4] = sums.values[m];
      at(place.split, m) = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  __syncthreads();
  if (place.split > 0) return;
  for (int s = 1; s < plan.splits; ++s)
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      const float4 more = at(s, m);
      float (&v)[4] = sums.values[m];
      v[0] += more.x, v[1] += more.y, v[2] += more.z, v[3] += more.w;
    }
}

// Hands the sums of partners' tiles to the block that has the units, and adds what partners made
// for the block's own, in the order of their ranks after its own. Warps of the first split.
template <class Sums, int kMatrices>
__device__ __forceinline__ void add_partners(Sums& sums, const Plan& plan, const Place& place,
                                             char* shared, int n) {
  uint64_t* const count = count_of(plan, shared, 0);
  float4* const slots = reinterpret_cast<float4*>(shared + plan.layout.sums) + place.lane;
  const auto at = [&](int partner, int tile, int m) -> float4& {
    return slots[((partner * plan.own_tiles + tile) * kMatrices + m) * 32];
  };
  if (!has_cells(plan, place)) {
    const int share = share_of(plan);
    const int owner = warp_of() / plan.own_tiles, tile = warp_of() % plan.own_tiles;
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      const float (&v)[4] = sums.values[m];
      transfer_send(&at(share > owner ? share - 1 : share, tile, m),
                    make_float4(v[0], v[1], v[2], v[3]), count, static_cast<unsigned>(owner));
    }
    return;
  }
  transfer_wait(count, static_cast<unsigned>(n % 2));
#pragma unroll 1
  for (int p = 0; p + 1 < plan.partners; ++p)
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      const float4 more = at(p, place.tile, m);
      float (&v)[4] = sums.values[m];
      v[0] += more.x, v[1] += more.y, v[2] += more.z, v[3] += more.w;
    }
}

template <class Pass>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    persistent_kernel(const __grid_constant__ Directions<typename Pass::Problem> directions,
                      const Plan plan, const Copies copies, const Workspace workspace) {
  FASTSEQ_DYNAMIC_SHARED(char, shared);
  constexpr Tile kTile = Pass::kTile;
  Place place = place_of(plan, workspace.first_group, directions.of[0].hidden);
  const typename Pass::Problem& problem = directions.of[place.direction];
  Pass pass(problem, plan, place, shared, copies);
  constexpr int kStrands = Pass::kStrands;
  constexpr bool kTakesTurns = kStrands > 1;
  const auto turn = [&](int strand) {
    turn_to(place, strand, plan, workspace.first_group);
    pass.shared = shared + strand * plan.layout.strand;
  };
  const auto keep = [&] {
    if (kTakesTurns && has_cells(plan, place))
      pass.move_kept([](const float& mine, float& kept) { kept = mine; });
  };

  for (int s = 0; s < kStrands; ++s) {
    turn(s);
    // Columns of rows that do not exist, and inner elements of units that do not, are zeros for
    // good.
    const int state_words = (plan.layout.input - plan.layout.state) / 16;
    for (int i = static_cast<int>(threadIdx.x); i < state_words; i += static_cast<int>(blockDim.x))
      reinterpret_cast<uint4*>(pass.shared + plan.layout.state)[i] = make_uint4(0, 0, 0, 0);
    bring_lengths(problem, plan, place, pass.shared);
    pass.bring(0);
    copy_commit();
  }
  for (int s = 0; s < kStrands; ++s) {
    turn(s);
    if (problem.steps > 1) pass.bring(1);
    copy_commit();
  }
  Weights<Pass::kArith, kTile.matrices, kTile.held> weights;
  weights.load(plan, shared, warp_of(), place.lane,
               [&](int half, int k) { return pass.weights(half, k); });
  __syncthreads();
  for (int s = 0; s < kStrands; ++s) {
    turn(s);
    pass.begin();
    keep();
  }
  copy_wait<1>();
  if (plan.exchange == Exchange::cluster || has_partners(plan)) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStrands; ++s)
        for (int n = 0; n < 2; ++n)
          transfer_init(count_of(plan, shared + s * plan.layout.strand, n));
    }
    cluster_barrier();
    if (place.units == 0 && !has_partners(plan)) return;  // no one sends here
  } else {
    __syncthreads();
  }

  typename Pass::Sums sums;
  const int steps = static_cast<int>(problem.steps);
  const auto state = [&](int n) {
    return pass.shared + plan.layout.state + (n % 2) * plan.layout.next_state;
  };
  const auto multiply = [&](int n) {
    expect_sums(plan, pass.shared, kTile.matrices);
    weights.multiply(sums, state(n), plan.layout.state_pitch, place.lane);
    add_splits<typename Pass::Sums, kTile.matrices>(sums, plan, place, shared);
    if (has_partners(plan) && place.split == 0)
      add_partners<typename Pass::Sums, kTile.matrices>(sums, plan, place, pass.shared, n);
  };
  const bool is_grid = plan.exchange == Exchange::grid;
  const auto count = [&] { return workspace.counts + kCountStride * place.group; };
  // The strand's turn: what it kept, and all of state n, which its blocks have sent a while ago.
  const auto take_up = [&](int strand, int n) {
    if (kTakesTurns) {
      turn(strand);
      if (has_cells(plan, place))
        pass.move_kept([](float& mine, const float& kept) { mine = kept; });
    }
    if (is_grid && n > 0) {
      grid_wait(count(), static_cast<unsigned>(n) * static_cast<unsigned>(plan.blocks));
      fetch_state(plan, place, workspace, state(n), n);
      __syncthreads();
    }
    if (n > 0) wait_for_state(plan, pass.shared, n);
  };
  for (int n = 0; n < steps; ++n) {
    const bool goes_on = Pass::kBackward || n + 1 < steps;  // somebody reads the next state
    for (int s = 0; s < kStrands; ++s) {
      place.lane = opaque(place.lane);
      place.tile = opaque(place.tile);
      take_up(s, n);
      if (goes_on)
        expect_state(plan, pass.shared, n + 1, Pass::kFields * plan.units * Pass::kElement);
      if (n + 2 < steps) pass.bring(n + 2);
      copy_commit();
      multiply(n);
      if (has_cells(plan, place)) {
        char* const sent = sent_of(plan, place, pass.shared, state(n + 1), Pass::kElement);
        pass.step(n, sums, sent);
        if (goes_on)
          send<Pass::kOctets, Pass::kFields, Pass::kElement>(plan, place, workspace, pass.shared,
                                                             n + 1, sent);
      }
      copy_wait<1>();
      if (is_grid && goes_on) grid_arrive(count());
      if (n > 0) pass.take(n - 1);
      keep();
      if (!is_grid || !goes_on) __syncthreads();
    }
  }
  for (int s = 0; s < kStrands; ++s) {
    take_up(s, Pass::kBackward ? steps : 0);
    if constexpr (Pass::kBackward) {
      multiply(steps);
      if (has_cells(plan, place)) pass.finish(sums);
      if (kTakesTurns) __syncthreads();  // the splits' sums have been read
    } else {
      pass.finish();
    }
    pass.take(steps - 1);
  }
}

}  // namespace fastseq::recurrent
