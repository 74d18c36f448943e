// Backward: from the gradients that come from later steps to those of the gates. See
// recurrent_kernel.cuh.
//
// The pass goes through the steps from the last. What it exchanges are a step's gradients of the
// gates; multiplied with the columns of the weights they make the gradient of h that flows to the
// step before, which the pass takes up at its next turn.
#pragma once

#include "recurrent_group.cuh"
#include "recurrent_math.cuh"

namespace fastseq::recurrent {

template <Cell kCell, Arithmetic kArithmetic, int kTurns>
struct Backward {
  using Problem = RecurrentBackward;
  using E = Element<kArithmetic>;
  using Type = typename E::Type;
  using Math = DeviceMath<sizeof(Type) == 4>;
  static constexpr Tile kTile = tile_of(kCell, kArithmetic, kTurns, true);
  static constexpr Arithmetic kArith = kArithmetic;
  static constexpr int kOctets = kTile.octets, kGates = gates_of(kCell), kSaved = saved_of(kCell);
  static constexpr int kFields = kGates;  // of a unit in the state
  static constexpr int kStrands = kTurns, kElement = sizeof(Type);
  static constexpr bool kLstm = kCell == Cell::lstm, kGru = kCell == Cell::gru, kBackward = true;
  static constexpr int kWords = kept_words(kCell, kOctets, kBackward);
  using Sums = Accumulators<kArithmetic, kTile.matrices>;

  const Problem& a;
  const Plan& plan;
  const Place& place;
  const Copies& copies;
  char* shared;  // of the strand
  // Of the thread's units, one of each octet, and rows, two of every eight: the gradient of h while
  // nothing is added to it; of a GRU the part that goes past the product; of c; c itself.
  float h[kOctets][2], direct[kGru ? kOctets : 1][2];
  float c[kLstm ? kOctets : 1][2], cell[kLstm ? kOctets : 1][2];

  __device__ __forceinline__ Backward(const Problem& problem, const Plan& cut, const Place& where,
                                      char* memory, const Copies& share)
      : a(problem), plan(cut), place(where), copies(share), shared(memory) {}

  // Turn n takes the step that the forward made as number made(n).
  __device__ __forceinline__ int made(int n) const { return static_cast<int>(a.steps) - 1 - n; }
  __device__ __forceinline__ int time(int n) const { return a.reverse ? n : made(n); }
  __device__ __forceinline__ int time_before(int n) const { return time(n) + (a.reverse ? 1 : -1); }
  __device__ __forceinline__ int unit(int octet) const {
    return (place.tile * kOctets + octet) * 8 + place.lane / 4;
  }
  __device__ __forceinline__ bool exists(int octet) const { return unit(octet) < place.units; }
  __device__ __forceinline__ int row(int e) const { return place.lane % 4 * 2 + e; }
  // Of a unit and row in a tensor [B, H].
  __device__ __forceinline__ int64_t at(int octet, int e) const {
    return (place.first_row() + row(e)) * a.hidden + place.first_unit + unit(octet);
  }

  // Sixteen bytes of weights from inner element k on, of an octet's unit: its column. k is gate
  // k / padded units of unit k % padded units; whole pieces lie within a gate.
  __device__ __forceinline__ uint4 weights(int octet, int k) const {
    k += share_of(plan) * (plan.chunks * kChunkBytes / kElement);
    const int gate = k / plan.padded_units, from = k % plan.padded_units;
    const bool is_there = place.first_unit + unit(octet) < a.hidden && gate < kGates;
    const int left = is_there ? static_cast<int>(a.hidden) - from : 0;
    const int64_t at = (gate * a.hidden + from) * a.hidden + place.first_unit + unit(octet);
    return gather(static_cast<const Type*>(a.weight_hh) + at, a.hidden, left);
  }

  __device__ __forceinline__ void begin() {
    if (!has_cells(plan, place)) return;
    const int last = a.reverse ? 0 : static_cast<int>(a.steps) - 1;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool real = row(e) < rows_of(plan, place);
#pragma unroll
      for (int q = 0; q < kOctets; ++q) {
        const auto first = [&](const void* given) {
          return given == nullptr || !real || !exists(q)
                     ? 0.0f
                     : E::to_float(static_cast<const Type*>(given)[at(q, e)]);
        };
        h[q][e] = first(a.grad_h_n);
        if constexpr (kGru) direct[q][e] = 0;
        if constexpr (kLstm) {
          c[q][e] = first(a.grad_c_n);
          cell[q][e] =
              !real || !exists(q)
                  ? 0.0f
                  : static_cast<const float*>(a.cells)[last * a.batch * a.hidden + at(q, e)];
        }
      }
    }
  }

  // Where in a turn's stage is what: pointers to row 0.
  struct Input {
    char *gates, *grad_output, *before, *cells, *grad_cells;
    int gates_pitch, pitch, cells_pitch;
  };
  __device__ __forceinline__ Input input(int n) const {
    Input in;
    in.gates_pitch = stage_pitch(kSaved * kElement * plan.units);
    in.pitch = stage_pitch(kElement * plan.units);
    in.cells_pitch = stage_pitch(4 * plan.units);
    in.gates = shared + plan.layout.input + n % kInputStages * plan.layout.input_bytes;
    in.grad_output = in.gates + kRows * in.gates_pitch;
    in.before = in.grad_output + kRows * in.pitch;
    in.cells = in.before + (kGru ? kRows * in.pitch : 0);
    in.grad_cells = in.cells + kRows * in.cells_pitch;
    return in;
  }

  __device__ __forceinline__ char* output(int n) const {
    return shared + plan.layout.output + n % 2 * plan.layout.output_bytes;
  }

  __device__ __forceinline__ void bring(int n) const {
    const Input in = input(n);
    const int64_t t = time(n), before = time_before(n);
    const bool has_before = before >= 0 && before < a.steps;
    // Of tensors [T, B, fields * H], and of those with strides of their own.
    const auto packed = [&](char* stage, const void* data, int64_t time, int fields, int bytes) {
      const int64_t from = (time * a.batch + place.first_row()) * fields * a.hidden;
      char* const global = data == nullptr ? nullptr
                                           : const_cast<char*>(static_cast<const char*>(data)) +
                                                 (from + place.first_unit) * bytes;
      return Strip{stage, global, fields * a.hidden * bytes, a.hidden * bytes};
    };
    const auto strided = [&](char* stage, const Steps& steps, int bytes) {
      const int64_t from = t * steps.stride_t + place.first_row() * steps.stride_b;
      char* const global = steps.data == nullptr
                               ? nullptr
                               : static_cast<char*>(steps.data) + (from + place.first_unit) * bytes;
      return Strip{stage, global, steps.stride_b * bytes, 0};
    };
    bring_in<kSaved, kElement>(packed(in.gates, a.gates, t, kSaved, kElement), plan, place, copies);
    bring_in<1, kElement>(strided(in.grad_output, a.grad_output, kElement), plan, place, copies);
    if constexpr (kGru)
      bring_in<1, kElement>(packed(in.before, has_before ? a.output : nullptr, before, 1, kElement),
                            plan, place, copies);
    if constexpr (kLstm) {
      bring_in<1, 4>(packed(in.cells, has_before ? a.cells : nullptr, before, 1, 4), plan, place,
                     copies);
      bring_in<1, 4>(strided(in.grad_cells, a.grad_cells, 4), plan, place, copies);
    }
  }

  __device__ __forceinline__ void take(int n) const {
    const int64_t from = int64_t{time(n)} * a.batch + place.first_row();
    char* const stage = output(n);
    const auto strip = [&](char* part, void* data, int field) {
      char* const to = data == nullptr
                           ? nullptr
                           : static_cast<char*>(data) +
                                 ((from * kGates + field) * a.hidden + place.first_unit) * kElement;
      return Strip{part, to, kGates * a.hidden * kElement, a.hidden * kElement};
    };
    take_out<kGates, kElement>(strip(stage, a.grad_gates_x, 0), plan, place, copies);
    if constexpr (kGru) {
      char* const hidden = stage + kRows * stage_pitch(kGates * kElement * plan.units);
      take_out<2, kElement>(strip(stage, a.grad_gates_h, 0), plan, place, copies, kGates);
      take_out<1, kElement>(strip(hidden, a.grad_gates_h, 2), plan, place, copies);
    }
  }

  // The gradient of the h that step made(n) made, without what its output gets: the product with
  // the gradients of the gates after it.
  __device__ __forceinline__ void arrive_at(int n, const Sums& sums) {
    if (n == 0) return;
    const int after = made(n) + 1;  // the step it comes from
    const bool cut = a.bptt > 0 && after % a.bptt == 0;
    const int t = time(n - 1);
    const float bound = static_cast<float>(a.grad_clip);
#pragma unroll
    for (int q = 0; q < kOctets; ++q)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (t >= lengths_of(plan, shared)[row(e)] || !exists(q)) continue;
        float grad = sums.values[0][q * 2 + e];
        if (a.keep != nullptr) grad *= E::to_float(static_cast<const Type*>(a.keep)[at(q, e)]);
        if constexpr (kGru) grad += direct[q][e];
        h[q][e] = after > 0 && cut ? 0.0f : clipped(grad, bound);
      }
  }

  static __device__ __forceinline__ float clipped(float grad, float bound) {
    // Comparisons that leave a NaN what it is.
    if (bound == 0) return grad;
    return grad > bound ? bound : grad < -bound ? -bound : grad;
  }

  __device__ __forceinline__ void step(int n, const Sums& sums, char* sent) {
    arrive_at(n, sums);
    const int t = time(n), before = time_before(n);
    const Input in = input(n);
    char* const out = output(n);
    const int out_pitch = stage_pitch(kGates * kElement * plan.units);
    char* const hidden_out = out + kRows * out_pitch;
    const bool cut = a.bptt > 0 && made(n) > 0 && made(n) % a.bptt == 0;
    const float bound = static_cast<float>(a.grad_clip);
#pragma unroll
    for (int q = 0; q < kOctets; ++q)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int u = unit(q), r = row(e);
        const int length = lengths_of(plan, shared)[r];
        const bool active = t < length && exists(q);
        const bool is_first = before < 0 || before >= length;
        const auto read = [](const char* part, int element) {
          return E::to_float(reinterpret_cast<const Type*>(part)[element]);
        };
        float gate[4];
#pragma unroll
        for (int s = 0; s < kSaved; ++s)
          gate[s] = read(in.gates + r * in.gates_pitch, s * plan.units + u);
        float grad = h[q][e];
        if (a.grad_output.data != nullptr) grad += read(in.grad_output + r * in.pitch, u);
        float hidden = 0;  // of a GRU, the gradient of the hidden part of n
        if constexpr (kLstm) {
          float c_before = reinterpret_cast<const float*>(in.cells + r * in.cells_pitch)[u];
          const float c_after = cell[q][e];
          cell[q][e] = c_before;
          if (active && is_first) c_before = E::to_float(static_cast<const Type*>(a.c0)[at(q, e)]);
          float total = c[q][e];
          if (a.grad_cells.data != nullptr)
            total += reinterpret_cast<const float*>(in.grad_cells + r * in.cells_pitch)[u];
          const float tanh_c = Math::tanh(c_after);
          total += grad * gate[3] * (1 - tanh_c * tanh_c);
          gates::lstm_backward<Math>(gate[0], gate[1], gate[2], gate[3], c_before, grad * tanh_c,
                                     total);
          if (active) c[q][e] = cut ? 0.0f : clipped(total, bound);
        } else if constexpr (kGru) {
          float h_before = read(in.before + r * in.pitch, u);
          if (active && is_first) h_before = E::to_float(static_cast<const Type*>(a.h0)[at(q, e)]);
          const float straight =
              gates::gru_backward<Math>(gate[0], gate[1], gate[2], gate[3], h_before, grad);
          if (active) direct[q][e] = straight;
          hidden = gate[3];
        } else {
          const float y = gate[0];
          gate[0] = a.cell == Cell::tanh ? grad * (1 - y * y) : y > 0 ? grad : 0.0f;
        }
        char* const column = sent + r * plan.layout.sent_pitch + u * kElement;
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          const Type rounded = active ? E::from_float(gate[g]) : Type{};
          reinterpret_cast<Type*>(out + r * out_pitch)[g * plan.units + u] = rounded;
          Type operand = rounded;
          if constexpr (kGru) {
            if (g == 2) {
              operand = active ? E::from_float(hidden) : Type{};
              reinterpret_cast<Type*>(hidden_out + r * in.pitch)[u] = operand;
            }
          }
          *reinterpret_cast<Type*>(column + g * plan.layout.sent_field) = E::operand(operand);
        }
      }
  }

  // What the thread keeps of the strand, to shared memory or from there.
  template <class Move>
  __device__ __forceinline__ void move_kept(const Move& move) {
    float* kept =
        reinterpret_cast<float*>(shared + plan.layout.kept) + place.tile * kWords * 32 + place.lane;
    const auto next = [&](float& value) {
      move(value, *kept);
      kept += 32;
    };
#pragma unroll
    for (int q = 0; q < kOctets; ++q)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        next(h[q][e]);
        if constexpr (kGru) next(direct[q][e]);
        if constexpr (kLstm) next(c[q][e]), next(cell[q][e]);
      }
  }

  __device__ __forceinline__ void finish(const Sums& sums) {
    arrive_at(static_cast<int>(a.steps), sums);
#pragma unroll
    for (int q = 0; q < kOctets; ++q)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (row(e) >= rows_of(plan, place) || !exists(q)) continue;
        static_cast<Type*>(a.grad_h0)[at(q, e)] = E::from_float(h[q][e]);
        if constexpr (kLstm) static_cast<Type*>(a.grad_c0)[at(q, e)] = E::from_float(c[q][e]);
      }
  }
};

}  // namespace fastseq::recurrent
