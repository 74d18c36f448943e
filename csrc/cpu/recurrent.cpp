// LSTM, GRU and RNN on the CPU: a layer in one direction, forward.
//
// A thread takes some rows of the batch through all steps, so threads never wait for each other
// and each core keeps its share of the weights' reads in its own cache. Where there are fewer rows
// than threads these split the units, each with a share of the weights, and meet once a step. A
// step is a product with packed weights, tile by tile (recurrent_product.h); the gates of a tile's
// units are applied while they are in L1. At H = 64 and one row the time is that of reading the
// weights from L2; at many rows that of the multiplications; sigmoids and tanhs cost some 25
// instructions each.
//
// Arithmetic is in T (float, or double for fp64); M is the type in memory, to which each h is
// rounded before the next step reads it.
#include "recurrent.h"

#include "recurrent_backward.h"
#include "recurrent_forward.h"
#include "recurrent_small.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// Calls f with nulls of the arithmetic's and of the memory's type.
template <class F>
void with_types(DType dtype, F f) {
  float* single = nullptr;
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case DType::f32:
      return f(single, single);
    case DType::f16:
      return f(single, static_cast<f16*>(nullptr));
    case DType::bf16:
      return f(single, static_cast<bf16*>(nullptr));
  }
}

template <class Pointer>
using Pointed = std::remove_pointer_t<Pointer>;

int64_t packed_bytes(const Recurrent& args, bool backward) {
  int64_t bytes = 0;
  with_types(args.dtype, [&](auto* compute, auto*) {
    using T = Pointed<decltype(compute)>;
    bytes = Weights<T>(args, backward).elements() * static_cast<int64_t>(sizeof(T));
  });
  return bytes;
}

void pack(const Recurrent& args, bool backward) {
  with_types(args.dtype, [&](auto* compute, auto* memory) {
    using T = Pointed<decltype(compute)>;
    using M = Pointed<decltype(memory)>;
    Weights<T>(args, backward).template pack_all<M>(args, backward);
  });
}

template <class F>
void with_cell(Cell cell, F f) {
  switch (cell) {
    case Cell::lstm:
      return f(CellTag<Cell::lstm>());
    case Cell::gru:
      return f(CellTag<Cell::gru>());
    case Cell::tanh:
      return f(CellTag<Cell::tanh>());
    case Cell::relu:
      return f(CellTag<Cell::relu>());
  }
}

// Rows go through the steps so many at a time that their states stay in L2.
template <class Body>
void in_chunks(int64_t begin, int64_t end, Body body) {
  const int64_t chunks = (end - begin + kChunk - 1) / kChunk;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    body(begin + (end - begin) * chunk / chunks, begin + (end - begin) * (chunk + 1) / chunks);
}

// Calls body(nulls of both types, tag of the cell).
template <class Problem, class F>
void with_kernel(const Problem& args, F body) {
  with_types(args.dtype, [&](auto* compute, auto* memory) {
    with_cell(args.cell, [&](auto tag) { body(compute, memory, tag); });
  });
}

void forward_rows(const RecurrentForward& args, int64_t begin, int64_t end, const Team& team) {
  with_kernel(args, [&](auto* compute, auto* memory, auto tag) {
    ForwardRows<Pointed<decltype(compute)>, Pointed<decltype(memory)>, tag.cell>(args, begin, end,
                                                                                 team)
        .run();
  });
}

void backward_rows(const RecurrentBackward& args, int64_t begin, int64_t end, const Team& team) {
  with_kernel(args, [&](auto* compute, auto* memory, auto tag) {
    BackwardRows<Pointed<decltype(compute)>, Pointed<decltype(memory)>, tag.cell>(args, begin, end,
                                                                                  team)
        .run();
  });
}

void forward(const RecurrentForward& args, int64_t begin, int64_t end) {
  in_chunks(begin, end,
            [&](int64_t first, int64_t last) { forward_rows(args, first, last, Team()); });
}

void backward(const RecurrentBackward& args, int64_t begin, int64_t end) {
  in_chunks(begin, end,
            [&](int64_t first, int64_t last) { backward_rows(args, first, last, Team()); });
}

void forward_team(const RecurrentForward& args, const Team& team) {
  forward_rows(args, 0, args.batch, team);
}

void backward_team(const RecurrentBackward& args, const Team& team) {
  backward_rows(args, 0, args.batch, team);
}

// A thread has some tiles of the product and their units: what needs whole rows has no team.
int64_t most_members(const Recurrent& args, bool backward) {
  const bool whole = args.norm_hh != nullptr || args.weight_hr != nullptr || args.keep != nullptr;
  if (whole || args.weight_hh == nullptr || args.batch > kChunk) return 1;
  int64_t members = 1;
  with_types(args.dtype, [&](auto* compute, auto*) {
    members = Weights<Pointed<decltype(compute)>>(args, backward).hidden.tiles;
  });
  return members;
}

int64_t team_bytes(const Recurrent& args, bool backward) {
  int64_t bytes = 0;
  with_types(args.dtype, [&](auto* compute, auto*) {
    using T = Pointed<decltype(compute)>;
    const int64_t widest = Weights<T>(args, backward).widest();
    bytes = (args.batch * 10 + 6) * widest * static_cast<int64_t>(sizeof(T));
  });
  return bytes;
}

}  // namespace

extern const RecurrentCpu recurrent = {
    packed_bytes,  pack,          forward,        backward,      most_members, team_bytes,
    forward_team,  backward_team, products_bytes, pack_products, input_gates,  weight_gradients,
    input_gradient};

}  // namespace fastseq::FASTSEQ_ISA
