// Forward: from the input's gates and the state to the next state. See recurrent_kernel.cuh.
#pragma once

#include "recurrent_group.cuh"
#include "recurrent_math.cuh"

namespace fastseq::recurrent {

template <Cell kCell, Arithmetic kArithmetic, int kTurns>
struct Forward {
  using Problem = RecurrentForward;
  using E = Element<kArithmetic>;
  using Type = typename E::Type;
  using Math = DeviceMath<sizeof(Type) == 4>;
  static constexpr Tile kTile = tile_of(kCell, kArithmetic, kTurns, false);
  static constexpr Arithmetic kArith = kArithmetic;
  static constexpr int kOctets = kTile.octets, kGates = gates_of(kCell), kSaved = saved_of(kCell);
  static constexpr int kFields = 1;  // of a unit in the state
  static constexpr int kStrands = kTurns, kElement = sizeof(Type);
  static constexpr bool kLstm = kCell == Cell::lstm, kBackward = false;
  static constexpr int kWords = kept_words(kCell, kOctets, kBackward);
  using Sums = Accumulators<kArithmetic, kTile.matrices>;

  const Problem& a;
  const Plan& plan;
  const Place& place;
  const Copies& copies;
  char* shared;  // of the strand
  // Of the thread's units, one of each octet, and rows: two of every eight.
  float h[kOctets][2], c[kLstm ? kOctets : 1][2];

  __device__ __forceinline__ Forward(const Problem& problem, const Plan& cut, const Place& where,
                                     char* memory, const Copies& share)
      : a(problem), plan(cut), place(where), copies(share), shared(memory) {}

  __device__ __forceinline__ int time(int n) const {
    return a.reverse ? static_cast<int>(a.steps) - 1 - n : n;
  }
  // Elements of the block's part of the state.
  __device__ __forceinline__ int part() const { return plan.chunks * kChunkBytes / kElement; }
  // Of the block's units, and of all.
  __device__ __forceinline__ int unit(int octet) const {
    return (place.tile * kOctets + octet) * 8 + place.lane / 4;
  }
  __device__ __forceinline__ bool exists(int octet) const { return unit(octet) < place.units; }
  __device__ __forceinline__ int row(int e) const { return place.lane % 4 * 2 + e; }

  // Sixteen bytes of weights from inner element k on, of a half of the tile's matrices: gate
  // half % kGates of an octet's unit.
  __device__ __forceinline__ uint4 weights(int half, int k) const {
    const int octet = half / kGates, gate = half % kGates;
    k += share_of(plan) * part();
    const int left = place.first_unit + unit(octet) < a.hidden ? static_cast<int>(a.hidden) - k : 0;
    const int64_t row = gate * a.hidden + place.first_unit + unit(octet);
    const Type* const from = static_cast<const Type*>(a.weight_hh) + row * a.hidden + k;
    if (copies.wide) {
      return left > 0 ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
    }
    return gather(from, 1, left);
  }

  __device__ __forceinline__ void store_state(char* sent, int e, int octet, float value) const {
    const int r = row(e);
    if (a.keep != nullptr && r < rows_of(plan, place) && exists(octet)) {
      const Type keep = static_cast<const Type*>(
          a.keep)[(place.first_row() + r) * a.hidden + place.first_unit + unit(octet)];
      value *= E::to_float(keep);
    }
    reinterpret_cast<Type*>(sent + r * plan.layout.sent_pitch)[unit(octet)] =
        E::operand(E::from_float(value));
  }

  __device__ __forceinline__ float* biases() const {
    return reinterpret_cast<float*>(shared + plan.layout.bias);
  }

  // The first state, of which every block reads all it multiplies, and what the thread keeps to
  // itself.
  __device__ __forceinline__ void begin() {
    char* const state = shared + plan.layout.state;
    const Type* const h0 = static_cast<const Type*>(a.h0);
    const int first = share_of(plan) * part();
    const int count = min(part(), static_cast<int>(a.hidden) - first);
    for (int r = 0; r < rows_of(plan, place); ++r)
      for (int u = static_cast<int>(threadIdx.x); u < count; u += static_cast<int>(blockDim.x)) {
        const int64_t at = (place.first_row() + r) * a.hidden + first + u;
        Type value = h0[at];
        if (a.keep != nullptr)
          value =
              E::from_float(E::to_float(value) * E::to_float(static_cast<const Type*>(a.keep)[at]));
        reinterpret_cast<Type*>(state + r * plan.layout.state_pitch)[u] = E::operand(value);
      }
    if constexpr (kCell == Cell::gru) {
      for (int g = 0; g < 3; ++g)
        for (int u = static_cast<int>(threadIdx.x); u < plan.units;
             u += static_cast<int>(blockDim.x)) {
          const int64_t at = g * a.hidden + place.first_unit + u;
          biases()[g * plan.units + u] = a.bias_hh == nullptr || u >= place.units
                                             ? 0.0f
                                             : E::to_float(static_cast<const Type*>(a.bias_hh)[at]);
        }
    }
    if (!has_cells(plan, place)) return;
#pragma unroll
    for (int q = 0; q < kOctets; ++q) {
      const int64_t u = place.first_unit + unit(q);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t b = place.first_row() + row(e);
        const bool real = row(e) < rows_of(plan, place);
        h[q][e] = real && exists(q) ? E::to_float(h0[b * a.hidden + u]) : 0.0f;
        if constexpr (kLstm)
          c[q][e] = real && exists(q)
                        ? E::to_float(static_cast<const Type*>(a.c0)[b * a.hidden + u])
                        : 0.0f;
      }
    }
  }

  __device__ __forceinline__ char* input(int n) const {
    return shared + plan.layout.input + n % kInputStages * plan.layout.input_bytes;
  }
  __device__ __forceinline__ char* output(int n) const {
    return shared + plan.layout.output + n % 2 * plan.layout.output_bytes;
  }

  // Starts to bring in what step n reads.
  __device__ __forceinline__ void bring(int n) const {
    const Steps& x = a.gates_x;
    char* const from =
        static_cast<char*>(x.data) +
        (time(n) * x.stride_t + place.first_row() * x.stride_b + place.first_unit) * kElement;
    bring_in<kGates, kElement>({input(n), from, x.stride_b * kElement, a.hidden * kElement}, plan,
                               place, copies);
  }

  // Takes out what step n left.
  __device__ __forceinline__ void take(int n) const {
    const int64_t at = int64_t{time(n)} * a.batch + place.first_row();
    const int units = plan.units;
    char* stage = output(n);
    const auto strip = [&](void* data, int fields, int bytes) {
      char* to = data == nullptr ? nullptr
                                 : static_cast<char*>(data) +
                                       (at * fields * a.hidden + place.first_unit) * bytes;
      const Strip made{stage, to, fields * a.hidden * bytes, a.hidden * bytes};
      stage += kRows * stage_pitch(fields * bytes * units);
      return made;
    };
    take_out<1, kElement>(strip(a.output, 1, kElement), plan, place, copies);
    take_out<kSaved, kElement>(strip(a.gates, kSaved, kElement), plan, place, copies);
    if constexpr (kLstm) take_out<1, 4>(strip(a.cells, 1, 4), plan, place, copies);
  }

  // From the thread's part of the product to the next state, for the thread's own units and rows.
  __device__ __forceinline__ void step(int n, const Sums& sums, char* sent) {
    const int t = time(n);
    const char* const x = input(n);
    char* const out = output(n);
    const int x_pitch = stage_pitch(kGates * kElement * plan.units);
    const int h_pitch = stage_pitch(kElement * plan.units);
    const int saved_pitch = stage_pitch(kSaved * kElement * plan.units);
    char* const saved_out = out + kRows * h_pitch;
    char* const cells_out = saved_out + kRows * saved_pitch;
#pragma unroll
    for (int q = 0; q < kOctets; ++q)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int u = unit(q), r = row(e);
        const bool active = t < lengths_of(plan, shared)[r] && exists(q);
        float gate[4], made;
        float product[kGates];
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          const int half = q * kGates + g;
          product[g] = sums.values[half / 2][half % 2 * 2 + e];
          gate[g] = E::to_float(reinterpret_cast<const Type*>(x + r * x_pitch)[g * plan.units + u]);
        }
        if constexpr (kLstm) {
#pragma unroll
          for (int g = 0; g < 4; ++g) gate[g] += product[g];
          const float cell = gates::lstm<Math>(gate[0], gate[1], gate[2], gate[3], c[q][e]);
          made = gate[3] * Math::tanh(cell);
          reinterpret_cast<float*>(cells_out + r * stage_pitch(4 * plan.units))[u] =
              active ? cell : 0.0f;
          if (active) c[q][e] = cell;
        } else if constexpr (kCell == Cell::gru) {
          const float* const bias = biases() + u;
          gate[0] += product[0] + bias[0];
          gate[1] += product[1] + bias[plan.units];
          gate[3] = product[2] + bias[2 * plan.units];
          made = gates::gru<Math>(gate[0], gate[1], gate[2], gate[3], h[q][e]);
        } else {
          const float sum = gate[0] + product[0];
          gate[0] = made = a.cell == Cell::tanh ? Math::tanh(sum) : sum < 0 ? 0.0f : sum;
        }
        const Type rounded = E::from_float(made);
        reinterpret_cast<Type*>(out + r * h_pitch)[u] = active ? rounded : Type{};
#pragma unroll
        for (int s = 0; s < kSaved; ++s)
          reinterpret_cast<Type*>(saved_out + r * saved_pitch)[s * plan.units + u] =
              active ? E::from_float(gate[s]) : Type{};
        if (active) h[q][e] = E::to_float(rounded);
        store_state(sent, e, q, h[q][e]);
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
        if constexpr (kLstm) next(c[q][e]);
      }
  }

  __device__ __forceinline__ void finish() const {
    if (!has_cells(plan, place)) return;
#pragma unroll
    for (int q = 0; q < kOctets; ++q)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (row(e) >= rows_of(plan, place) || !exists(q)) continue;
        const int64_t at = (place.first_row() + row(e)) * a.hidden + place.first_unit + unit(q);
        static_cast<Type*>(a.h_n)[at] = E::from_float(h[q][e]);
        if constexpr (kLstm) static_cast<Type*>(a.c_n)[at] = E::from_float(c[q][e]);
      }
  }
};

}  // namespace fastseq::recurrent
