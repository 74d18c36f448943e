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
  int lane;               // 4 * (lane / 4) + quad
  int tile, split;        // of the warp; tiles that are not of 0 to own_tiles are partners'
  int first_unit, units;  // of the block: the first, and how many exist
  int tile_of_rows;       // of the direction's
  __device__ __forceinline__ int64_t first_row() const { return int64_t{tile_of_rows} * kRows; }
};

// The same number, of which the compiler knows nothing: what follows from it is worked out anew in
// each step, in place of being kept in registers, which are the weights'.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

__device__ __forceinline__ int warp_of() { return opaque(static_cast<int>(threadIdx.x)) / 32; }

__device__ __forceinline__ bool has_partners(const Plan& plan) {
  return kHasClusters && plan.partners > 1;
}

// Which of its partners the block is, and so which part of the state it has. Not kept in a
// register.
__device__ __forceinline__ int share_of(const Plan& plan) {
  return has_partners(plan) ? static_cast<int>(cluster_rank()) : 0;
}

__device__ __forceinline__ Place place_of(const Plan& plan, int first_group, int64_t hidden) {
  Place place;
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  place.rank = block % plan.blocks;
  place.lane = thread % 32;
  place.split = thread / 32 / plan.tiles;
  place.tile = thread / 32 % plan.tiles - share_of(plan) * plan.own_tiles;
  place.first_unit = place.rank * plan.units;
  place.units =
      static_cast<int>(max(int64_t{0}, min(int64_t{plan.units}, hidden - place.first_unit)));
  // One direction's groups, then the other's.
  const int group = first_group + block / plan.blocks * plan.strands;
  place.direction = group >= plan.groups ? 1 : 0;
  return place;
}

// That exist of the group's; worked out where they are wanted, for a register.
__device__ __forceinline__ int rows_of(const Plan& plan, const Place& place) {
  return static_cast<int>(max(int64_t{0}, min(int64_t{kRows}, plan.batch - place.first_row())));
}

// The place's group and rows become those of a strand.
__device__ __forceinline__ void turn_to(Place& place, int strand, const Plan& plan,
                                        int first_group) {
  place.group = static_cast<int>(blockIdx.x) / plan.blocks * plan.strands + strand;
  const int tile = first_group + place.group;
  place.tile_of_rows = tile >= plan.groups ? tile - plan.groups : tile;
}

// Whether the warp makes the next state of its tile's units.
__device__ __forceinline__ bool has_cells(const Plan& plan, const Place& place) {
  return place.split == 0 &&
         static_cast<unsigned>(place.tile) < static_cast<unsigned>(plan.own_tiles);
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
    lengths_of(plan, shared)[row] =
        row < rows_of(plan, place) ? length_of(a, place.first_row() + row) : 0;
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

// Partners hand on sums as a cluster's blocks hand on states. One buffer is enough: to send those
// of step n + 1 a block needs all of state n + 1, to which the receiver added after it had read.
__device__ __forceinline__ void expect_sums(const Plan& plan, char* shared, int matrices) {
  if (!has_partners(plan) || threadIdx.x != 0) return;
  transfer_expect(count_of(plan, shared, 0),
                  static_cast<unsigned>((plan.partners - 1) * plan.own_tiles * matrices * 512));
}

// Where a piece of state n that lies at `piece` in the block's shared memory lies in the group's
// global memory, which the blocks of a grid exchange it through.
__device__ __forceinline__ uint4* global_state(const Workspace& workspace, const Plan& plan,
                                               const Place& place, int n, int row, int byte) {
  const int64_t buffer = 2 * int64_t{place.group} + n % 2;
  return reinterpret_cast<uint4*>(workspace.states + (buffer * kRows + row) * plan.state_bytes +
                                  byte);
}

// Where the block's units of state n are filled in, for the other blocks to get.
__device__ __forceinline__ char* sent_of(const Plan& plan, const Place& place, char* shared,
                                         char* state, int element) {
  return has_partners(plan) ? shared + plan.layout.sent : state + place.first_unit * element;
}

// Sends what the warp's lanes have filled in of state n to the other blocks: of each row and field,
// the 8 * kOctets units of the warp's tile.
template <int kOctets, int kFields, int kElement>
__device__ __forceinline__ void send(const Plan& plan, const Place& place,
                                     const Workspace& workspace, char* shared, int n, char* sent) {
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
    const int byte = place.tile * 8 * kOctets * kElement + piece % kPieces * 16;
    uint4* const from = reinterpret_cast<uint4*>(sent + row * plan.layout.sent_pitch +
                                                 field * plan.layout.sent_field + byte);
    if (is_grid) {
      const int to = (field * plan.padded_units + place.first_unit) * kElement + byte;
      __stcg(global_state(workspace, plan, place, n, row, to), *from);
    } else {
      transfer_send(from, *from, count_of(plan, shared, n), static_cast<unsigned>(peer));
    }
  }
}

// The block's part of state n from the group's global memory.
__device__ __forceinline__ void fetch_state(const Plan& plan, const Place& place,
                                            const Workspace& workspace, char* state, int n) {
  const int part = plan.chunks * kChunkBytes, first = share_of(plan) * part;
  const int pieces = min(part, plan.state_bytes - first) / 16;
  for (int row = 0; row < kRows; ++row)
    for (int i = static_cast<int>(threadIdx.x); i < pieces; i += static_cast<int>(blockDim.x))
      *reinterpret_cast<uint4*>(state + row * plan.layout.state_pitch + i * 16) =
          __ldcg(global_state(workspace, plan, place, n, row, first + i * 16));
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
  const int count = rows_of(plan, place) * kFields * per_row;
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
