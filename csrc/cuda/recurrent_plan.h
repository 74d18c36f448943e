// Which persistent kernel runs a layer in one direction, and how it is cut: a pure function of the
// problem and the chip, no CUDA in it.
//
// A group of blocks runs a tile of rows of the batch through all steps. Each of its blocks owns
// some units, the weights of which stay in its registers and shared memory; what all units made in
// a step (h forward, the gates' gradients backward) is exchanged between the steps: through the
// block's shared memory, that of the blocks of a cluster, or L2. Blocks may take two tiles in turns
// (strands), so that one is computed while the other's exchange is on its way. The blocks of a grid
// may form clusters that share the product (partners): each multiplies for the units of all of
// them, but with its part of the state alone, and sends what it made to the block whose units these
// are. So a state is read from L2 once a cluster, and each block has room for its part.
//
// A block's product of a step is M rows (gates of units; units backward) by N columns (rows of the
// batch) over K (all units; all their gates backward). Each warp makes a tile of whole units over a
// split of K. The number of blocks and the splits, which decide in what order a sum is taken, do
// not depend on the batch: a row's bits are the same whatever batch it came in.
//
// No figure here is measured yet. The costs are arithmetic on data-sheet rates and published
// latencies, marked where they are guesses; tests/test_simt_recurrent.py checks the memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../recurrent.h"

#ifdef __CUDACC__
#define FASTSEQ_BOTH __host__ __device__
#else
#define FASTSEQ_BOTH
#endif

namespace fastseq::recurrent {

// How the numbers of a product are multiplied; all add up in fp32. f32 is exact: no tensor core.
enum class Arithmetic : int { f16, bf16, tf32, f32 };

// Through what a group's blocks exchange the state.
enum class Exchange : int { block, cluster, grid };

constexpr int kMaxWarps = 16;        // of a block; 128 registers are left for each thread
constexpr int kRows = 8;             // of the batch in a group: the columns of a product
constexpr int kRegisters = 128;      // that the launch bounds leave
constexpr int kMaxCluster = 16;      // above 8 a cluster is not portable, but H100 and H200 take it
constexpr int kFragmentBytes = 512;  // of 16 by 16 (fp32: 16 by 8) weights, a lane's 16 in a row

// A warp's tile: octets of 8 units with `slots` rows of the product each, which make `matrices` of
// 16 rows. Of its split of K the first `held` chunks stay in registers, the others in shared
// memory.
struct Tile {
  int octets, slots, matrices, held;
  constexpr int units() const { return 8 * octets; }
};

// A chunk is 64 bytes of a column of the state: two fragments of weights for each matrix.
constexpr int kChunkBytes = 64;
constexpr int element_bytes(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::f16 || arithmetic == Arithmetic::bf16 ? 2 : 4;
}
constexpr int chunk_elements(Arithmetic arithmetic) {
  return kChunkBytes / element_bytes(arithmetic);
}

// Held weights take 8 registers a chunk and matrix; as many are held as leave no kernel without
// registers for the rest (the most it takes is 128, and tests/test_simt_recurrent.py has them all).
constexpr int held_chunks(Cell cell, Arithmetic arithmetic, int strands, bool backward) {
  const bool exact = arithmetic == Arithmetic::f32, turns = strands > 1;
  const bool rounded = arithmetic == Arithmetic::tf32;
  if (backward) {
    if (cell == Cell::lstm) return exact ? 4 : turns || rounded ? 6 : 7;
    if (cell == Cell::gru) return exact ? 4 : turns ? 7 : 8;
    return exact ? 5 : turns ? 5 : 8;
  }
  if (cell == Cell::lstm) return exact ? 1 : turns ? 4 : 5;
  if (cell == Cell::gru) return exact ? 0 : turns ? 1 : 2;
  return exact ? 4 : turns ? 7 : 8;
}

constexpr Tile tile_of(Cell cell, Arithmetic arithmetic, int strands, bool backward) {
  const int held = held_chunks(cell, arithmetic, strands, backward);
  if (backward) return {2, 1, 1, held};
  if (cell == Cell::lstm) return {1, 4, 2, held};
  if (cell == Cell::gru) return {2, 3, 3, held};
  return {2, 1, 1, held};
}

struct Chip {
  int multiprocessors = 0;
  int shared_bytes = 0;  // that a block can have
  int max_cluster = 1;   // 1: none
};

// What the blocks of a grid share in global memory, for a launch of some of the groups: their
// states, [group][2][rows][state_bytes], and how many blocks have written them, a count for each
// group that is zero before the launch, 128 bytes apart.
struct Workspace {
  char* states = nullptr;
  unsigned* counts = nullptr;
  int first_group = 0;
};
constexpr int kCountStride = 32;  // in counts

// What one launch runs side by side, each on blocks of its own: a layer in one direction, or in
// two, which are alike but for their tensors and the order of their steps.
constexpr int kMaxDirections = 2;
template <class Problem>
struct Directions {
  Problem of[kMaxDirections];
};

struct Task {
  Cell cell = Cell::lstm;
  Arithmetic arithmetic = Arithmetic::bf16;
  int64_t batch = 0, hidden = 0;
  bool backward = false;
  int directions = 1;  // that run at once
};

// Where a block's shared memory has what, in bytes from its start; pitches are of a row of the
// batch. Of the state and the output one buffer is read while the other is filled; but a grid's
// blocks, which fetch a state from L2 after all have read the last, have one for the state. The
// input is asked for two steps ahead.
struct Layout {
  int weights = 0;  // [warp][chunk - held][matrix][2][lane][16]
  int partial = 0;  // [split - 1][tile][matrix][lane] float4
  // What follows there is for every strand, so many bytes apart.
  int strand = 0;
  int counts = 0;                         // of bytes received, one for each state buffer
  int state = 0, state_pitch = 0;         // [2 or 1][rows][K]
  int next_state = 0;                     // from a state's buffer to the next's
  int input = 0, output = 0;              // [3] and [2] of stages, see stage_bytes
  int input_bytes = 0, output_bytes = 0;  // of one
  int lengths = 0;                        // [rows], 0 of a row that does not exist
  int bias = 0;                           // [3][units] in fp32, of a GRU's forward
  int kept = 0;                           // [own tile][words][lane], with several strands
  int sums = 0;                           // [partner - 1][own tile][matrix][lane] float4
  // What the block adds to the next state, [rows][fields][units]: in the state, or with partners,
  // whose part of the state may have none of it, in a place of its own.
  int sent = 0, sent_pitch = 0, sent_field = 0;
  int bytes = 0;
};

// What a thread of the first split keeps to itself from step to step, of each of its units and
// rows.
constexpr int kept_words(Cell cell, int octets, bool backward) {
  const int words = cell == Cell::lstm ? (backward ? 3 : 2) : cell == Cell::gru && backward ? 2 : 1;
  return words * octets * 2;
}

// Of a step, in cycles: estimates. The product takes as long as the longest of the first three.
struct Costs {
  double issue = 0;   // of the multiplications
  double chain = 0;   // of one warp's, each waiting for the last
  double shared = 0;  // of the weights and the state from shared memory
  double step = 0;
};

struct Plan {
  const char* rejected = nullptr;  // why no kernel takes the problem
  Exchange exchange = Exchange::block;
  int blocks = 0;  // of a group
  int64_t batch = 0;
  int groups = 0;      // of a direction
  int directions = 1;  // that one launch runs side by side
  int at_once = 0;     // groups that run at once: an estimate, but of a grid what a launch has
  int waves = 0;       // in which all run, one after the other
  int strands =
      1;          // groups that a grid's blocks take in turns, so that one computes while one waits
  int units = 0;  // of a block, whole tiles; the last block may have fewer that exist
  int partners = 1;           // blocks of a grid that share the product: a cluster
  int tiles = 0, splits = 0;  // tiles that the block multiplies, its partners' too,
  int own_tiles = 0;          // and those of its own units
  int chunks = 0;             // of K, all of them or the block's part
  int split_chunks = 0;       // of a split; the last may have fewer
  int threads = 0;
  int64_t weight_bytes = 0;  // of a block: in registers and shared memory,
  int64_t held_bytes = 0;    // and in registers alone
  Costs costs;
  Layout layout;

  int padded_units = 0;  // of the blocks that have any,
  int sharers = 0;       // and how many those are
  int state_bytes = 0;   // of a row of the state, as far as units reach
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A row of a stage: 16 bytes past a multiple of 64, so that the four pairs of rows a warp reads at
// once lie in different banks.
constexpr int kInputStages = 3;
FASTSEQ_BOTH constexpr int stage_pitch(int bytes) { return (bytes + 63) / 64 * 64 + 16; }

// What a step brings in and takes out through shared memory, of one unit and row: parts, each of so
// many fields of so many bytes.
struct Part {
  int fields, bytes;
};
struct Parts {
  Part part[5];
};
constexpr Parts input_parts(Cell cell, int element, bool backward) {
  const int cells = cell == Cell::lstm ? 4 : 0;
  if (!backward) return {{{gates_of(cell), element}}};
  // Saved gates, gradient of the output, h or c of the step before, gradient of c.
  const int before = cell == Cell::gru ? element : 0;
  return {{{saved_of(cell), element}, {1, element}, {1, before}, {1, cells}, {1, cells}}};
}
constexpr Parts output_parts(Cell cell, int element, bool backward) {
  const int cells = cell == Cell::lstm ? 4 : 0;
  // Of a GRU the gradients of the gates, and where the hidden gates' is another.
  if (backward) return {{{gates_of(cell), element}, {cell == Cell::gru ? 1 : 0, element}}};
  return {{{1, element}, {saved_of(cell), element}, {1, cells}}};
}

constexpr int stage_bytes(const Parts& parts, int units, int rows) {
  int bytes = 0;
  for (const Part& part : parts.part)
    if (part.fields * part.bytes > 0) bytes += rows * stage_pitch(part.fields * part.bytes * units);
  return bytes;
}

// How a block's threads share out the units of a row: in pieces of 16 bytes where everything is
// aligned to that, else of one element. i / divisor is i * reciprocal >> 32 (0 stands for 2^32)
// while i * divisor < 2^32; of a stage, both are below 2^14.
struct Copies {
  int per_row2, per_row4;  // for elements of 2 and 4 bytes
  uint32_t reciprocal2, reciprocal4;
  bool wide;
};
inline Copies share_out(int units, bool wide) {
  const auto reciprocal = [](int divisor) {
    return divisor == 1 ? 0 : 0xffffffffu / static_cast<uint32_t>(divisor) + 1;
  };
  const int per_row2 = wide ? units / 8 : units, per_row4 = wide ? units / 4 : units;
  return {per_row2, per_row4, reciprocal(per_row2), reciprocal(per_row4), wide};
}

// A column of the state: 64 bytes past a multiple of 128, so that a warp reads its eight columns'
// 16 bytes in different banks.
constexpr int state_pitch(int chunks) { return (chunks | 1) * kChunkBytes; }

inline Layout lay_out(const Task& task, const Plan& plan) {
  const Tile tile = tile_of(task.cell, task.arithmetic, plan.strands, task.backward);
  const int element = element_bytes(task.arithmetic);
  const int loose = std::max(0, plan.split_chunks - tile.held) * tile.matrices * 2;
  Layout layout;
  layout.partial = plan.tiles * plan.splits * loose * kFragmentBytes;
  layout.counts = layout.partial + (plan.splits - 1) * plan.tiles * tile.matrices * 512;
  layout.state = layout.counts + 16;
  layout.state_pitch = state_pitch(plan.chunks);
  const int state_bytes = kRows * layout.state_pitch;
  layout.next_state = plan.exchange == Exchange::grid ? 0 : state_bytes;
  layout.input = layout.state + layout.next_state + state_bytes;
  layout.input_bytes =
      stage_bytes(input_parts(task.cell, element, task.backward), plan.units, kRows);
  layout.output_bytes =
      stage_bytes(output_parts(task.cell, element, task.backward), plan.units, kRows);
  layout.output = layout.input + kInputStages * layout.input_bytes;
  layout.lengths = layout.output + 2 * layout.output_bytes;
  layout.bias = layout.lengths + 4 * kRows;
  const bool has_bias = task.cell == Cell::gru && !task.backward;
  layout.kept = layout.bias + (has_bias ? 12 * plan.units : 0);
  const int words = kept_words(task.cell, tile.octets, task.backward);
  layout.sums = layout.kept + (plan.strands > 1 ? 128 * plan.own_tiles * words : 0);
  layout.sent = layout.sums + (plan.partners - 1) * plan.own_tiles * tile.matrices * 512;
  const int fields = task.backward ? gates_of(task.cell) : 1;
  const bool apart = plan.partners > 1;
  layout.sent_field = (apart ? plan.units : plan.padded_units) * element;
  layout.sent_pitch = apart ? stage_pitch(fields * layout.sent_field) : layout.state_pitch;
  layout.strand = layout.sent + (apart ? kRows * layout.sent_pitch : 0) - layout.counts;
  layout.bytes = layout.counts + plan.strands * layout.strand;
  return layout;
}

// ---- costs, in cycles ---------------------------------------------------------------------------

constexpr int kFragmentIssue = 8;     // of one multiplication on a quarter of a multiprocessor
constexpr int kFragmentLatency = 33;  // until the next may add to its result
constexpr int kSharedBytesPerCycle = 128;
constexpr int kGlobalBytesPerCycle = 64;  // of a multiprocessor, from L2
constexpr int kL2BytesPerCycle = 3100;    // of all: some 5.5 TB/s at 1.755 GHz
constexpr int kPointwise = 250;  // the chain of a cell's exponentials and quotients; a guess

// Guesses: a barrier of a block; one and the way through a cluster's shared memory; one, a flag's
// way through L2 and the state's first byte.
constexpr int exchange_cycles(Exchange exchange) {
  return exchange == Exchange::block ? 40 : exchange == Exchange::cluster ? 500 : 1800;
}

inline Costs costs_of(const Task& task, const Plan& plan) {
  const Tile tile = tile_of(task.cell, task.arithmetic, plan.strands, task.backward);
  const int warps = plan.tiles * plan.splits;
  const double fragments = 2.0 * plan.split_chunks * tile.matrices;  // of a warp
  Costs costs;
  costs.issue = fragments * warps * kFragmentIssue / 4;
  costs.chain = 2.0 * plan.split_chunks * kFragmentLatency;
  if (task.arithmetic == Arithmetic::f32) {  // 32 FMAs a lane
    costs.issue = fragments * warps * 32 / 4;
    costs.chain = fragments * 32;
  }
  const double loose = std::max(0, plan.split_chunks - tile.held) * 2 * tile.matrices;
  costs.shared = warps * (loose + plan.split_chunks) * kFragmentBytes / kSharedBytesPerCycle;
  const double reduce = plan.splits == 1 ? 0 : 60 + 12 * (plan.splits - 1) * tile.matrices;
  // Every block of a grid reads its part of the state from L2, all of them at the same time.
  double fetch = 0, share = 0;
  if (plan.exchange == Exchange::grid) {
    const double bytes = kRows * double(std::min(plan.state_bytes, plan.chunks * kChunkBytes));
    fetch = bytes * std::max(1.0 / kGlobalBytesPerCycle, double(plan.blocks) / kL2BytesPerCycle);
    if (plan.partners > 1)
      share = exchange_cycles(Exchange::cluster) + 12.0 * (plan.partners - 1) * tile.matrices;
  }
  costs.step = std::max({costs.issue, costs.chain, costs.shared}) + reduce + share + kPointwise +
               fetch + exchange_cycles(plan.exchange);
  // While one strand's state is on its way the others compute.
  costs.step = std::max(costs.step, plan.strands * (costs.step - exchange_cycles(plan.exchange)));
  return costs;
}

// How many groups run at once. A cluster lies in one of the chip's groups of multiprocessors, of up
// to 18 each: an estimate, as some have fewer. All of a grid runs at once or not at all.
inline int groups_at_once(const Chip& chip, const Plan& plan) {
  const auto clusters = [&](int blocks) {
    const int together = std::min(18, chip.multiprocessors);
    return chip.multiprocessors / together * (together / blocks);
  };
  const int teams = plan.exchange == Exchange::cluster ? std::max(1, clusters(plan.blocks))
                    : plan.partners > 1 ? clusters(plan.partners) / (plan.blocks / plan.partners)
                                        : chip.multiprocessors / plan.blocks;
  return teams * plan.strands;
}

inline void set_at_once(Plan& plan, int groups) {
  plan.at_once = groups;
  if (groups > 0)
    plan.waves = static_cast<int>(ceil_div(int64_t{plan.groups} * plan.directions, groups));
}

// ---- the choice ---------------------------------------------------------------------------------

// The kernel's cut for so many blocks, splits and rows; its layout may be larger than the chip's
// shared memory. chunks is 0 where there is no such cut. The last blocks of a cluster may have no
// units at all: its size is a power of two. A grid has as many as have units, in whole clusters.
inline Plan cut(const Task& task, const Chip& chip, Exchange exchange, int blocks, int splits,
                int strands, int partners) {
  const Tile tile = tile_of(task.cell, task.arithmetic, strands, task.backward);
  Plan plan;
  const int64_t units = round_up(ceil_div(task.hidden, blocks), tile.units());
  if (units * partners > kMaxWarps * tile.units()) return plan;
  if (exchange == Exchange::grid)
    blocks = static_cast<int>(round_up(ceil_div(task.hidden, units), partners));
  plan.exchange = exchange;
  plan.blocks = blocks;
  plan.strands = strands;
  plan.batch = task.batch;
  plan.directions = task.directions;
  // Strands are of one direction: of the last, one may have no rows.
  plan.groups = static_cast<int>(std::min<int64_t>(ceil_div(task.batch, kRows * strands),
                                                   0x3fffffff / blocks / task.directions) *
                                 strands);
  plan.units = static_cast<int>(units);
  plan.partners = partners;
  plan.own_tiles = plan.units / tile.units();
  plan.tiles = plan.own_tiles * partners;
  plan.splits = splits;
  plan.padded_units =
      static_cast<int>(partners > 1 ? blocks * units : round_up(task.hidden, units));
  plan.sharers = plan.padded_units / plan.units;
  const int64_t inner = int64_t{task.backward ? gates_of(task.cell) : 1} * plan.padded_units;
  plan.state_bytes = static_cast<int>(inner) * element_bytes(task.arithmetic);
  const int all_chunks = static_cast<int>(ceil_div(inner, chunk_elements(task.arithmetic)));
  const int chunks = static_cast<int>(ceil_div(all_chunks, partners));
  if ((partners - 1) * chunks >= all_chunks) return plan;
  plan.split_chunks = static_cast<int>(ceil_div(chunks, splits));
  if (plan.tiles * splits > kMaxWarps || (splits - 1) * plan.split_chunks >= chunks) return plan;
  plan.chunks = chunks;
  plan.threads = 32 * plan.tiles * splits;
  const int64_t chunk_bytes = int64_t{2} * kFragmentBytes * tile.matrices;
  plan.weight_bytes = chunk_bytes * plan.tiles * plan.splits * plan.split_chunks;
  plan.held_bytes = chunk_bytes * plan.tiles * plan.splits * std::min(plan.split_chunks, tile.held);
  plan.layout = lay_out(task, plan);
  plan.costs = costs_of(task, plan);
  set_at_once(plan, groups_at_once(chip, plan));
  return plan.at_once == 0 ? Plan{} : plan;
}

inline bool fits(const Plan& plan, const Chip& chip) {
  return plan.chunks > 0 && plan.layout.bytes <= chip.shared_bytes;
}

// A step by a library product for the whole batch and a kernel for the cells, in cycles: a launch
// of each, or what they have to do. Guesses, beside L2's rate and in fp32 that of multiplications.
inline double library_cycles(const Task& task, const Chip& chip) {
  constexpr double kLaunches = 5 * 1755, kBusy = 3 * 1755;  // of two launches, in us
  const double weights = double(gates_of(task.cell)) * task.hidden * task.hidden;
  const double read = weights * element_bytes(task.arithmetic) / kL2BytesPerCycle;
  const double multiplied = task.arithmetic == Arithmetic::f32
                                ? weights * task.batch / (128.0 * chip.multiprocessors)
                                : 0;
  return std::max(kLaunches, kBusy + std::max(read, multiplied));
}

inline Plan rejected(const char* reason) {
  Plan plan;
  plan.rejected = reason;
  return plan;
}

// Partners have to save a tenth, as all these are estimates and sums have a way more to go; and
// more than a portable cluster of them is for what fits no other way, as few chips have room for
// many.
constexpr double reluctance(int partners) { return partners == 1 ? 1 : partners <= 8 ? 1.1 : 2; }

// What a step of 64 rows takes on a grid, whose groups have so many blocks that few run at once;
// one after the other or, where there are kernels for it, in turns.
inline double cycles_of_64_rows(const Task& task, const Chip& chip, const Plan& plan) {
  const auto cycles = [](const Plan& p) { return p.costs.step * ceil_div(8, p.at_once); };
  if (element_bytes(task.arithmetic) != 2) return cycles(plan);
  const Plan turns = cut(task, chip, plan.exchange, plan.blocks, plan.splits, 2, plan.partners);
  return fits(turns, chip) ? std::min(cycles(plan), cycles(turns)) : cycles(plan);
}

// The quickest cut that fits, of 8 rows or, of a grid, of 64.
inline Plan quickest(const Task& task, const Chip& chip, Exchange exchange, int blocks, int splits,
                     int partners) {
  const int first = exchange == Exchange::block ? 1 : 2;
  const int last = exchange == Exchange::block     ? 1
                   : exchange == Exchange::cluster ? std::min(chip.max_cluster, kMaxCluster)
                                                   : chip.multiprocessors;
  Plan best;
  double least = 0;
  for (int b = first; b <= last; b *= 2) {
    if (blocks != 0 && b != blocks) continue;
    for (int s = 1; s <= kMaxWarps; ++s) {
      if (splits != 0 && s != splits) continue;
      const int most =
          exchange == Exchange::grid ? std::min({chip.max_cluster, kMaxCluster, kMaxWarps / s}) : 1;
      for (int p = 1; p <= most; p *= 2) {
        if (partners != 0 && p != partners) continue;
        const Plan plan = cut(task, chip, exchange, b, s, 1, p);
        if (!fits(plan, chip)) continue;
        const double cost =
            reluctance(p) *
            (exchange == Exchange::grid ? cycles_of_64_rows(task, chip, plan) : plan.costs.step);
        if (best.chunks == 0 || cost < least) best = plan, least = cost;
      }
    }
  }
  return best;
}

// The plan. A block alone or a cluster, whichever is quicker, and where the weights do not fit
// these a grid. For tests, exchange, blocks, splits, strands and partners can be asked for (below
// or at 0: they are not).
inline Plan choose(const Task& task, const Chip& chip, int exchange = -1, int blocks = 0,
                   int splits = 0, int strands = 0, int partners = 0) {
  if (task.hidden <= 0 || task.batch <= 0) return rejected("no persistent kernel without elements");
  if (task.directions < 1 || task.directions > kMaxDirections)
    return rejected("a launch takes one direction or two");
  const auto of = [&](Exchange which) {
    if (exchange >= 0 && exchange != static_cast<int>(which)) return Plan{};
    return quickest(task, chip, which, blocks, splits, partners);
  };
  Plan best = of(Exchange::block);
  const Plan cluster = of(Exchange::cluster);
  if (best.chunks == 0 || (cluster.chunks > 0 && cluster.costs.step < best.costs.step))
    best = cluster;
  if (best.chunks == 0) best = of(Exchange::grid);
  if (best.chunks == 0)
    return rejected("the recurrent weights and the state do not fit on the chip");
  // Groups that do not run at once take turns, two by two, where that saves a wave's time.
  if (element_bytes(task.arithmetic) == 2 && (strands > 1 || (strands == 0 && best.waves > 1))) {
    const Plan turns = cut(task, chip, best.exchange, best.blocks, best.splits, 2, best.partners);
    const bool is_quicker = turns.waves * turns.costs.step < best.waves * best.costs.step;
    if (fits(turns, chip) && (strands > 1 || is_quicker)) best = turns;
  }
  // Both are guesses: twice as long it has to be.
  if (best.waves * best.costs.step > 2 * task.directions * library_cycles(task, chip))
    return rejected("more rows than fit the chip at once: a product for each step takes less");
  return best;
}

// Bytes of a grid's workspace, the counts first; 0 for others.
inline int64_t workspace_bytes(const Plan& plan) {
  if (plan.exchange != Exchange::grid) return 0;
  return plan.at_once * (4 * kCountStride + int64_t{2} * kRows * plan.state_bytes);
}

}  // namespace fastseq::recurrent
