// Some rows back through all steps of a layer in one direction. Included by files that are compiled
// once per instruction set.
//
// From step to step go the gradients of h and c. What is written are the gradients of the gates, of
// which the weights' are library products over all steps at once.
#pragma once

#include "recurrent_rows.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

template <class T, class M, Cell kCell>
struct BackwardRows {
  static constexpr int G = gates_of(kCell);
  static constexpr int S = saved_of(kCell);
  static constexpr bool kLstm = kCell == Cell::lstm;

  const RecurrentBackward& a;
  Team team;
  const Weights<T> weights;
  const int64_t begin, rows, H, P;
  const int64_t pitch, gate_pitch;
  int64_t from, to, to_state;  // this thread's units, and elements of the state
  Active active;
  // Gradients of the rows at hand: of h and c, as they come from the step after; of h as a step
  // made it; of what was projected; of h beside the recurrent product; of the gates and of that
  // product, [GH]. And of a row, what its cell was, what its tanh was taken of, and a scratch row.
  // Of the gates there are two, of which a team's next step fills the one that nobody reads.
  T *h, *c, *made, *unprojected, *direct, *back, *gates[2], *cell_row, *squash_row, *scratch_row,
      *first_row;
  M* low[2] = {nullptr, nullptr};  // the gates in bf16, where the product is one of pairs

  BackwardRows(const RecurrentBackward& args, int64_t first, int64_t last, const Team& team)
      : a(args),
        team(team),
        weights(args, true),
        begin(first),
        rows(last - first),
        H(args.hidden),
        P(args.state),
        pitch(weights.projection.row() > weights.hidden.row() ? weights.projection.row()
                                                              : weights.hidden.row()),
        gate_pitch((G * H + lanes<T> - 1) / lanes<T> * lanes<T>),
        from(cut(team.begin(weights.hidden.tiles), H)),
        to(cut(team.end(weights.hidden.tiles), H)),
        to_state(team.total == 1 ? P : to),
        active(first, last) {
    Carver<T> carver(rows * (6 * pitch + 3 * gate_pitch) + 4 * pitch + gate_pitch, team);
    h = carver.take(rows * pitch);
    c = carver.take(rows * pitch);
    made = carver.take(rows * pitch);
    unprojected = a.weight_hr == nullptr ? made : carver.take(rows * pitch);
    direct = carver.take(rows * pitch);
    back = carver.take(rows * pitch);
    gates[0] = gates[1] = carver.take(rows * gate_pitch);
    if (team.total > 1) gates[1] = carver.take(rows * gate_pitch);
    if (weights.hidden.pairs) {
      low[0] = reinterpret_cast<M*>(carver.take(rows * gate_pitch));
      low[1] = low[0] + rows * gate_pitch;
    }
    cell_row = carver.take(pitch);
    squash_row = carver.take(pitch);
    scratch_row = carver.take(gate_pitch);
    first_row = carver.take(pitch);
  }

  // The unit at which a tile of the product begins; the last one ends with the units.
  int64_t cut(int64_t tile, int64_t end) const {
    return tile == weights.hidden.tiles ? end : weights.hidden.begin(tile);
  }

  static const M* at(const void* data, int64_t element) {
    return static_cast<const M*>(data) + element;
  }
  static M* at(void* data, int64_t element) { return static_cast<M*>(data) + element; }
  static V<T> read(const M* p, int64_t count) { return load_some<T>(p, count); }

  void run() {
    for (int64_t i = 0; i < rows; ++i) {
      if (a.grad_h_n != nullptr)
        convert_row(at(a.grad_h_n, (begin + i) * P + from), a.dtype, h + i * pitch + from,
                    to_state - from);
      if (kLstm && a.grad_c_n != nullptr)
        convert_row(at(a.grad_c_n, (begin + i) * H + from), a.dtype, c + i * pitch + from,
                    to - from);
    }
    if (a.grad_rows != nullptr)
      std::memset(static_cast<T*>(a.grad_rows) + begin * row_sums_size(), 0,
                  static_cast<size_t>(rows * row_sums_size()) * sizeof(T));
    for (int64_t n = a.steps - 1; n >= 0; --n)
      if (!step(n, a.reverse ? a.steps - 1 - n : n)) return;
    for (int64_t i = 0; i < rows; ++i) {
      write(a.grad_h0, (begin + i) * P + from, h + i * pitch + from, to_state - from);
      if (kLstm) write(a.grad_c0, (begin + i) * H + from, c + i * pitch + from, to - from);
    }
  }

  int64_t row_sums_size() const { return 2 * (G + 1) * H; }

  static void write(void* data, int64_t element, const T* source, int64_t n) {
    for (int64_t u = 0; u < n; u += lanes<T>)
      store_some<T>(at(data, element) + u, load(source + u), n - u);
  }

  // False: the others do the rest.
  bool step(int64_t n, int64_t t) {
    const bool odd = n % 2 == 1;
    active.select(a.lengths, t, rows, [&](int64_t i) {
      if (team.is_first()) clear(t, i);
    });
    for (int64_t k = 0; k < active.count; ++k) arrive(t, active.index[k]);
    if (a.weight_hr != nullptr)
      multiply_tiles(weights.projection, 0, weights.projection.tiles, weights.packed_projection,
                     active.count, active.index, made, pitch, odd, unprojected, [](int64_t) {});
    for (int64_t k = 0; k < active.count; ++k) units(odd, t, active.index[k]);
    if (!team.meet()) return false;
    if (team.is_alone()) to = H, to_state = P;
    const bool is_cut = a.bptt > 0 && n > 0 && n % a.bptt == 0;
    if (a.weight_hh != nullptr && !is_cut) {
      const T* operand = gates[odd];
      int64_t operand_pitch = gate_pitch;
      if (low[odd] != nullptr) {
        operand = reinterpret_cast<const T*>(low[odd]);
        operand_pitch = gate_pitch / 2;
      }
      const int64_t tiles = weights.hidden.tiles;
      multiply_tiles(weights.hidden, team.begin(tiles), team.end(tiles), weights.packed_hidden,
                     active.count, active.index, operand, operand_pitch, odd, back, [](int64_t) {});
    }
    for (int64_t k = 0; k < active.count; ++k) leave(active.index[k], is_cut);
    return true;
  }

  void clear(int64_t t, int64_t i) {
    const int64_t place = t * a.batch + begin + i;
    const auto zero = [&](void* data, int64_t n) {
      if (data != nullptr) std::memset(at(data, place * n), 0, static_cast<size_t>(n) * sizeof(M));
    };
    zero(a.grad_gates_x, G * H);
    zero(a.grad_gates_h, G * H);
    zero(a.grad_projected, P);
  }

  // The gradient of the h that step t made, and the part of it that zoneout sends straight on.
  void arrive(int64_t t, int64_t i) {
    const int64_t b = begin + i;
    const M* const given =
        a.grad_output.data == nullptr
            ? nullptr
            : at(a.grad_output.data, t * a.grad_output.stride_t + b * a.grad_output.stride_b);
    for (int64_t u = from; u < to_state; u += lanes<T>) {
      V<T> total = load(h + i * pitch + u), straight{};
      if (given != nullptr) total += read(given + u, P - u);
      if (a.zoneout_h != 0) {
        const V<T> part = held<T>(a, 0, t, b, u);
        straight = part * total;
        total -= straight;
      }
      if (a.grad_projected != nullptr) {
        total = rounded<T, M>(total);
        store_some<T>(at(a.grad_projected, (t * a.batch + b) * P + u), total, P - u);
      }
      store(made + i * pitch + u, total);
      store(direct + i * pitch + u, straight);
    }
  }

  // All gates of a row's units.
  void units(bool odd, int64_t t, int64_t i) {
    const int64_t b = begin + i, place = t * a.batch + b;
    const M* const saved = at(a.gates, place * S * H);
    M* const gates_x = at(a.grad_gates_x, place * G * H);
    const T* const grad_h =
        a.weight_hr == nullptr ? made + i * pitch : unprojected + i * weights.projection.row();
    T* const operand = gates[odd] + i * gate_pitch;
    M* const operand_low = low[odd] == nullptr ? nullptr : low[odd] + i * gate_pitch;
    const int64_t before = t + (a.reverse ? 1 : -1);
    const int64_t length = a.lengths == nullptr || a.lengths[b] > a.steps ? a.steps : a.lengths[b];
    const bool is_first = before < 0 || before >= length;
    const T* c_before = nullptr;
    if constexpr (kLstm) {
      if (is_first) convert_row(at(a.c0, b * H + from), a.dtype, first_row + from, to - from);
      c_before = is_first ? first_row : static_cast<const T*>(a.cells) + (before * a.batch + b) * H;
      cells(place, c_before, saved);
      if (a.norm_c != nullptr) norm_of_cell(place, b, grad_h, saved);
    }
    const M* const h_before = is_first ? at(a.h0, b * P) : at(a.output, (before * a.batch + b) * P);
    for (int64_t u = from; u < to; u += lanes<T>) {
      const int64_t count = H - u;
      V<T> gate[4];
      for (int s = 0; s < S; ++s) gate[s] = read(saved + s * H + u, count);
      const V<T> grad = load(grad_h + u);
      if constexpr (kCell == Cell::gru) {
        T* const d = direct + i * pitch + u;
        const V<T> straight = gates::gru_backward<VectorMath>(gate[0], gate[1], gate[2], gate[3],
                                                              read(h_before + u, count), grad);
        store(d, load(d) + straight);
        for (int g = 0; g < 3; ++g) store_some<T>(gates_x + g * H + u, gate[g], count);
        gate[2] = gate[3];
      } else if constexpr (kLstm) {
        T* const grad_c = c + i * pitch + u;
        V<T> total = load(grad_c), straight{};
        if (a.grad_cells.data != nullptr)
          total += load_some<T>(static_cast<const T*>(a.grad_cells.data) +
                                    t * a.grad_cells.stride_t + b * a.grad_cells.stride_b + u,
                                count);
        if (a.zoneout_c != 0) {
          straight = held<T>(a, 1, t, b, u) * total;
          total -= straight;
        }
        const V<T> tanh_c = load(squash_row + u);
        total += a.norm_c != nullptr ? load(cell_row + u) : grad * gate[3] * (1 - tanh_c * tanh_c);
        gates::lstm_backward<VectorMath>(gate[0], gate[1], gate[2], gate[3],
                                         load_some<T>(c_before + u, count), grad * tanh_c, total);
        store(grad_c, total + straight);
        for (int g = 0; g < 4; ++g) store_some<T>(gates_x + g * H + u, gate[g], count);
      } else {
        const V<T> y = gate[0];
        gate[0] = kCell == Cell::tanh ? grad * (1 - y * y) : y > 0 ? grad : V<T>{};
        store_some<T>(gates_x + u, gate[0], count);
      }
      for (int g = 0; g < G; ++g) store_some<T>(operand + g * H + u, rounded<T, M>(gate[g]), count);
    }
    if (a.norm_hh != nullptr) norm_of_gates(place, b, operand);
    for (int g = 0; g < G && (a.grad_gates_h != nullptr || operand_low != nullptr); ++g)
      for (int64_t u = from; u < to; u += lanes<T>) {
        const int64_t e = g * H + u, count = H - u;
        const V<T> grad = load_some<T>(operand + e, count);
        if (a.grad_gates_h != nullptr)
          store_some<T>(at(a.grad_gates_h, place * G * H + e), grad, count);
        if (operand_low != nullptr) store_some<T>(operand_low + e, grad, count);
      }
  }

  // cell_row: the cell before zoneout; squash_row: its tanh, unless it is normalized first.
  void cells(int64_t place, const T* c_before, const M* saved) {
    const T* const after = static_cast<const T*>(a.cells) + place * H;
    for (int64_t u = from; u < to; u += lanes<T>) {
      const int64_t count = H - u;
      V<T> cell = load_some<T>(after + u, count);
      if (a.zoneout_c != 0)
        cell = read(saved + H + u, count) * load_some<T>(c_before + u, count) +
               read(saved + u, count) * read(saved + 2 * H + u, count);
      store(cell_row + u, cell);
      if (a.norm_c == nullptr) store(squash_row + u, tanh(cell));
    }
  }

  // From the cell in cell_row: its tanh into squash_row, and into cell_row the gradient through it.
  void norm_of_cell(int64_t place, int64_t b, const T* grad_h, const M* saved) {
    const T* const statistics = static_cast<const T*>(a.statistics) + place * 3;
    const T mean = statistics[1], rstd = statistics[2];
    T* const sums = static_cast<T*>(a.grad_rows) + b * row_sums_size() + 2 * G * H;
    V<T> sum{}, product{};
    for (int64_t u = 0; u < H; u += lanes<T>) {
      const int64_t count = H - u;
      const V<T> x = (load(cell_row + u) - mean) * rstd;
      const V<T> gain = read(at(a.norm_c, u), count);
      V<T> y = x * gain;
      if (a.bias_c != nullptr) y += read(at(a.bias_c, u), count);
      const V<T> tanh_y = tanh(y);
      const V<T> slope = load(grad_h + u) * read(saved + 3 * H + u, count) * (1 - tanh_y * tanh_y);
      accumulate(sums + u, slope * x, count);
      accumulate(sums + H + u, slope, count);
      store(squash_row + u, tanh_y);
      store(cell_row + u, x);
      store(scratch_row + u, slope * gain);
      sum += keep_first<T>(slope * gain, count);
      product += keep_first<T>(slope * gain * x, count);
    }
    const T mean_grad = horizontal_sum<T>(sum) / static_cast<T>(H);
    const T mean_product = horizontal_sum<T>(product) / static_cast<T>(H);
    for (int64_t u = 0; u < H; u += lanes<T>)
      store(cell_row + u,
            rstd * (load(scratch_row + u) - mean_grad - load(cell_row + u) * mean_product));
  }

  // From the gradient of the normalized hidden gates, in place, to that of the product.
  void norm_of_gates(int64_t place, int64_t b, T* operand) {
    const int64_t n = G * H;
    const T rstd = static_cast<const T*>(a.statistics)[place * 3];
    const M* const normal = at(a.normalized, place * n);
    T* const sums = static_cast<T*>(a.grad_rows) + b * row_sums_size();
    V<T> sum{}, product{};
    for (int64_t e = 0; e < n; e += lanes<T>) {
      const int64_t count = n - e;
      const V<T> x = read(normal + e, count), grad = load(operand + e);
      accumulate(sums + e, grad * x, count);
      accumulate(sums + n + e, grad, count);
      const V<T> scaled = grad * read(at(a.norm_hh, e), count);
      store(scratch_row + e, scaled);
      sum += keep_first<T>(scaled, count);
      product += keep_first<T>(scaled * x, count);
    }
    const T mean = horizontal_sum<T>(sum) / static_cast<T>(n);
    const T mean_product = horizontal_sum<T>(product) / static_cast<T>(n);
    for (int64_t e = 0; e < n; e += lanes<T>) {
      const V<T> x = read(normal + e, n - e);
      store(operand + e, rounded<T, M>(rstd * (load(scratch_row + e) - mean - x * mean_product)));
    }
  }

  static void accumulate(T* sum, V<T> more, int64_t count) {
    store_some<T>(sum, load_some<T>(sum, count) + more, count);
  }

  // The gradients of the state the step started from.
  void leave(int64_t i, bool is_cut) {
    const T bound = static_cast<T>(a.grad_clip);
    const auto clip = [bound](V<T> grad) {
      return bound == 0 ? grad : minimum(splat(bound), maximum(splat(-bound), grad));
    };
    const T* const product = back + i * weights.hidden.row();
    for (int64_t u = from; u < to_state; u += lanes<T>) {
      V<T> grad = load(direct + i * pitch + u);
      if (a.weight_hh != nullptr) {
        V<T> through = load(product + u);
        if (a.keep != nullptr) through *= read(at(a.keep, (begin + i) * P + u), P - u);
        grad += through;
      }
      store(h + i * pitch + u, is_cut ? V<T>{} : clip(grad));
    }
    if (!kLstm) return;
    for (int64_t u = from; u < to; u += lanes<T>) {
      T* const grad = c + i * pitch + u;
      store(grad, is_cut ? V<T>{} : clip(load(grad)));
    }
  }
};

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
