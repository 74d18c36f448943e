// The problem a recurrent kernel solves, on any device: one layer in one direction, all its steps.
//
//   LSTM   i, f, o = sigmoid, g = tanh of x + W h;   c = f c + i g;   h = o tanh(c)
//   GRU    r, z = sigmoid(x + W h + b);   n = tanh(x + r (W h + b));   h = (1 - z) n + z h
//   RNN    h = tanh or relu of x + W h
//
// where x are the input's gates of all steps, a library product made before. What comes back of the
// backward are the gradients of these gates; the weights' are library products of them. Shapes in
// the comments: T steps, B rows, H units, G gates, a state of P (H, or the projection's size).
#pragma once

#include "types.h"

namespace fastseq {

enum class Cell : int { lstm, gru, tanh, relu };

constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
constexpr int saved_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 1; }

// Steps of rows, [T, B, n] by two strides in elements; the n are contiguous.
struct Steps {
  void* data = nullptr;  // null: absent
  int64_t stride_t = 0, stride_b = 0;
};

// What forward and backward share. All data are of type dtype, but cells and statistics, which are
// of the arithmetic's: fp32, or fp64 for fp64. An absent one is null.
struct Recurrent {
  Cell cell = Cell::lstm;
  DType dtype = DType::f32;
  int64_t steps = 0, batch = 0, hidden = 0, state = 0;
  bool reverse = false;
  const void *h0 = nullptr, *c0 = nullptr;                                    // [B, P], [B, H]
  const void *weight_hh = nullptr, *bias_hh = nullptr, *weight_hr = nullptr;  // [GH, P] [GH] [P, H]
  const void *norm_hh = nullptr, *norm_c = nullptr, *bias_c = nullptr;        // [GH], [H], [H]
  const int64_t* lengths = nullptr;                                           // [B]
  // Zoneout: with a seed a unit of h or c keeps its value where its bits are below the threshold
  // (row (which * T + t) * B + b of the generator); without, it keeps that part of it.
  const int64_t* seed = nullptr;
  uint32_t threshold_h = 0, threshold_c = 0;
  double zoneout_h = 0, zoneout_c = 0;
  const void* keep = nullptr;  // [B, P]: h is multiplied by this before the recurrent product
  double eps = 0;
  void* packed = nullptr;  // the weights as the kernel wants them, see recurrent_packed (CPU)
};

struct RecurrentForward : Recurrent {
  Steps gates_x;                  // [T, B, GH]
  const void* gates_h = nullptr;  // [B, GH]: the product itself, of a single step: no weights then
  void* output = nullptr;         // [T, B, P]
  void *h_n = nullptr, *c_n = nullptr;
  void *gates = nullptr, *cells = nullptr;  // [T, B, 4H or H], [T, B, H], for the backward
  void *normalized = nullptr, *statistics = nullptr;  // with norms: [T, B, GH], [T, B, 3]
};

struct RecurrentBackward : Recurrent {
  Steps grad_output, grad_cells;  // [T, B, P], [T, B, H]
  const void *grad_h_n = nullptr, *grad_c_n = nullptr;
  const void *output = nullptr, *gates = nullptr, *cells = nullptr;
  const void *normalized = nullptr, *statistics = nullptr;
  int64_t bptt = 0;      // no gradient flows past every so many steps
  double grad_clip = 0;  // what flows back to a state is clamped to this
  void *grad_gates_x = nullptr, *grad_gates_h = nullptr;  // [T, B, GH]; _h where it differs
  void *grad_h0 = nullptr, *grad_c0 = nullptr;
  void* grad_projected = nullptr;  // [T, B, P]
  void* grad_rows = nullptr;       // with norms, sums over time: [B, 2GH + 2H]
};

// The products before and after the loop over steps, in fp32, contiguous; an absent one is null.
struct RecurrentProducts {
  int64_t steps = 0, batch = 0, features = 0, gates = 0, state = 0;  // gates: GH
  bool reverse = false;
  const float *input = nullptr, *weight_ih = nullptr;  // [T, B, I], [GH, I]
  const float *bias_ih = nullptr, *bias_hh = nullptr;  // [GH] each, added to the input's gates
  const float *output = nullptr, *h0 = nullptr;        // [T, B, P], [B, P]
  const float *grad_gates_x = nullptr, *grad_gates_h = nullptr;  // [T, B, GH]
  float* packed = nullptr;                                       // for gates_x alone
  float* gates_x = nullptr;                                      // [T, B, GH]
  float *grad_input = nullptr, *grad_weight_ih = nullptr, *grad_weight_hh = nullptr;
  float *grad_bias_ih = nullptr, *grad_bias_hh = nullptr;
};

}  // namespace fastseq
