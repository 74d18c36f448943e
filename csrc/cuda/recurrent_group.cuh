// The blocks that run a tile of rows together: who owns what, how they wait for one another and
// hand on what they made; and the copies that bring a step's tensors in and take its results out.
#pragma once

#include "recurrent_product.cuh"
#include "sync.cuh"

namespace fastseq::recurrent {

// A thread's place. Rows are of the group's tile, units of the block.
struct Place {
  int group, rank;        // of the launch's groups (the strand's, now), of the group's blocks
  int direction;          // whose rows the group has
  int warp, lane;         // lane = 4 * (lane / 4) + quad
  int tile, split;        // of the warp
  int first_unit, units;  // of the block: the first, and how many exist
  int64_t first_row;
  int rows;  // that exist
};

__device__ __forceinline__ Place place_of(const Plan& plan, int first_group, int64_t hidden) {
  Place place;
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  place.rank = block % plan.blocks;
  place.warp = thread / 32;
  place.lane = thread % 32;
  place.split = place.warp / plan.tiles;
  place.tile = place.warp % plan.tiles;
  place.first_unit = place.rank * plan.units;
  place.units =
      static_cast<int>(max(int64_t{0}, min(int64_t{plan.units}, hidden - place.first_unit)));
  // One direction's groups, then the other's.
  const int group = first_group + block / plan.blocks * plan.strands;
  place.direction = group >= plan.groups ? 1 : 0;
  return place;
}

// The place's group and rows become those of a strand.
__device__ __forceinline__ void turn_to(Place& place, int strand, const Plan& plan,
                                        int first_group) {
  place.group = static_cast<int>(blockIdx.x) / plan.blocks * plan.strands + strand;
  const int of_direction = first_group + place.group - place.direction * plan.groups;
  place.first_row = int64_t{of_direction} * kRows;
  place.rows = static_cast<int>(max(int64_t{0}, min(int64_t{kRows}, plan.batch - place.first_row)));
}

// The same number, of which the compiler knows nothing: what follows from it is worked out anew in
// each step, in place of being kept in registers, which are the weights'.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Of a row, in steps.
__device__ __forceinline__ int length_of(const Recurrent& a, int64_t row) {
  return static_cast<int>(a.lengths == nullptr ? a.steps
                                               : max(int64_t{0}, min(a.lengths[row], a.steps)));
}

// The lengths of the group's rows, in shared memory: a register for each would be a weight's.
__device__ __forceinline__ int* lengths_of(const Plan& plan, char* shared) {
  return reinterpret_cast<int*>(shared + plan.layout.lengths);
}

__device__ __forceinline__ void bring_lengths(const Recurrent& a, const Plan& plan,
                                              const Place& place, char* shared) {
  const int row = static_cast<int>(threadIdx.x);
  if (row < kRows)
    lengths_of(plan, shared)[row] = row < place.rows ? length_of(a, place.first_row + row) : 0;
}

// How a cluster's blocks hand on a state: what each sends comes with a count of bytes, so that a
// block goes on once all of a state has come. That needs no barrier of the cluster, whose release
// would wait for all that was ever stored. Buffer n % 2 has state n and a count of its own, which
// turns over each time. Nobody sends into a buffer that is still read: to send state n + 2 a block
// needs all of n + 1, which the reader's warps sent after they had read state n.
__device__ __forceinline__ uint64_t* count_of(const Plan& plan, char* shared, int n) {
  return reinterpret_cast<uint64_t*>(shared + plan.layout.counts) + n % 2;
}

__device__ __forceinline__ void expect_state(const Plan& plan, char* shared, int n, int row_bytes) {
  if (plan.exchange != Exchange::cluster || plan.sharers == 1 || threadIdx.x != 0) return;
  transfer_expect(count_of(plan, shared, n),
                  static_cast<unsigned>((plan.sharers - 1) * kRows * row_bytes));
}

__device__ __forceinline__ void wait_for_state(const Plan& plan, char* shared, int n) {
  if (plan.exchange == Exchange::cluster && plan.sharers > 1)
    transfer_wait(count_of(plan, shared, n), static_cast<unsigned>((n - 1) / 2 % 2));
}

// Where a piece of state n that lies at `piece` in the block's shared memory lies in the group's
// global memory, which the blocks of a grid exchange it through.
__device__ __forceinline__ uint4* global_state(const Workspace& workspace, const Plan& plan,
                                               const Place& place, int n, int row, int byte) {
  const int64_t buffer = 2 * int64_t{place.group} + n % 2;
  return reinterpret_cast<uint4*>(workspace.states + (buffer * kRows + row) * plan.state_bytes +
                                  byte);
}

// Sends what the warp's lanes have written into state n of their own block to the others: of each
// row and field, the 8 * kOctets units that begin at byte `units` of a row.
template <int kOctets, int kFields, int kElement>
__device__ __forceinline__ void send(const Plan& plan, const Place& place,
                                     const Workspace& workspace, char* shared, int n, char* state,
                                     int units, int field_bytes) {
  constexpr int kPieces = kOctets * kElement / 2;  // of 16 bytes, in a field
  constexpr int kCount = kPieces * kFields * kRows;
  if (plan.sharers == 1) return;
  const bool is_grid = plan.exchange == Exchange::grid;
  __syncwarp();
#pragma unroll 1
  for (int i = place.lane; i < (is_grid ? kCount : kCount * (plan.sharers - 1)); i += 32) {
    // Each begins with the block after it, so that not all write to the same at once.
    int peer = place.rank + 1 + i / kCount;
    if (peer >= plan.sharers) peer -= plan.sharers;
    const int piece = i % kCount, row = piece / (kPieces * kFields);
    const int field = piece / kPieces % kFields;
    const int byte = units + field * field_bytes + piece % kPieces * 16;
    uint4* const from = reinterpret_cast<uint4*>(state + row * plan.layout.state_pitch + byte);
    if (is_grid) {
      __stcg(global_state(workspace, plan, place, n, row, byte), *from);
    } else {
      transfer_send(from, *from, count_of(plan, shared, n), static_cast<unsigned>(peer));
    }
  }
}

// All of state n from the group's global memory.
__device__ __forceinline__ void fetch_state(const Plan& plan, const Place& place,
                                            const Workspace& workspace, char* state, int n) {
  const int pieces = plan.state_bytes / 16;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int row = 0; row < kRows; ++row)
    for (int i = place.warp * 32 + place.lane; i < pieces; i += warps * 32)
      *reinterpret_cast<uint4*>(state + row * plan.layout.state_pitch + i * 16) =
          __ldcg(global_state(workspace, plan, place, n, row, i * 16));
}

// ---- copies between global memory and a stage ---------------------------------------------------

// i / divisor for the small i of a copy (see Copies).
__device__ __forceinline__ int divide(int i, uint32_t reciprocal) {
  return reciprocal == 0 ? i
                         : static_cast<int>(uint64_t{static_cast<uint32_t>(i)} * reciprocal >> 32);
}

// One tensor's place in a stage, [rows] by pitch of [kFields][units], and in global memory: row 0,
// field 0, first unit of the block; strides in bytes.
struct Strip {
  char* stage;
  char* global;
  int64_t row_stride, field_stride;
};

// move(in the stage, in global memory) for every piece of this thread.
template <int kFields, int kElement, class Move>
__device__ __forceinline__ void for_pieces(const Strip& strip, const Plan& plan, const Place& place,
                                           const Copies& copies, int stage_fields,
                                           const Move& move) {
  if (strip.global == nullptr) return;
  const int per_row = kElement == 2 ? copies.per_row2 : copies.per_row4;
  const uint32_t reciprocal = kElement == 2 ? copies.reciprocal2 : copies.reciprocal4;
  const int bytes = copies.wide ? 16 : kElement;
  const int pitch = stage_pitch(stage_fields * kElement * plan.units);
  const int count = place.rows * kFields * per_row;
#pragma unroll 1  // the registers are the weights'
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const int line = divide(i, reciprocal), at = (i - line * per_row) * bytes;
    const int row = line / kFields, field = line % kFields;
    if (at < place.units * kElement)
      move(strip.stage + row * pitch + field * plan.units * kElement + at,
           strip.global + row * strip.row_stride + field * strip.field_stride + at);
  }
}

template <int kFields, int kElement>
__device__ __forceinline__ void bring_in(const Strip& strip, const Plan& plan, const Place& place,
                                         const Copies& copies) {
  for_pieces<kFields, kElement>(
      strip, plan, place, copies, kFields, [&](char* to, const char* from) {
        if (copies.wide) {
          copy_async<16>(to, from);
        } else if constexpr (kElement == 4) {
          *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
        } else {
          *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
        }
      });
}

// Only the first kFields of the stage's fields.
template <int kFields, int kElement>
__device__ __forceinline__ void take_out(const Strip& strip, const Plan& plan, const Place& place,
                                         const Copies& copies, int stage_fields = kFields) {
  for_pieces<kFields, kElement>(
      strip, plan, place, copies, stage_fields, [&](char* from, char* to) {
        if (copies.wide) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else if constexpr (kElement == 4) {
          *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
        } else {
          *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
        }
      });
}

}  // namespace fastseq::recurrent
