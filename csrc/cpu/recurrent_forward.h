// Some rows through all steps of a layer in one direction. Included by files that are compiled once
// per instruction set.
#pragma once

#include "recurrent_rows.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

template <class T, class M, Cell kCell>
struct ForwardRows {
  static constexpr int G = gates_of(kCell);
  static constexpr int S = saved_of(kCell);
  static constexpr bool kLstm = kCell == Cell::lstm;

  const RecurrentForward& a;
  Team team;
  const Weights<T> weights;
  const int64_t begin, rows, H, P;
  const int64_t pitch, gate_pitch, row_pitch;  // of states, of a gate in gates, of gates
  Active active;
  // States of the rows at hand: h as it is, and as it will be; masked, as the product reads it; c;
  // what is projected; the hidden gates; a row's c and o while it is normalized.
  T *h, *next, *masked, *c, *unprojected, *projected, *gates, *cell_row, *o_row;
  M *low, *next_low;  // h and next in bf16, where the product is one of pairs

  ForwardRows(const RecurrentForward& args, int64_t first, int64_t last, const Team& team)
      : a(args),
        team(team),
        weights(args, false),
        begin(first),
        rows(last - first),
        H(args.hidden),
        P(args.state),
        pitch(weights.projection.pitch() > weights.hidden.pitch() ? weights.projection.pitch()
                                                                  : weights.hidden.pitch()),
        gate_pitch(weights.hidden.pitch()),
        row_pitch(weights.hidden.row()),
        active(first, last) {
    Carver<T> carver(rows * (7 * pitch + row_pitch) + 2 * pitch, team);
    h = carver.take(rows * pitch);
    next = carver.take(rows * pitch);
    masked = a.keep == nullptr ? nullptr : carver.take(rows * pitch);
    c = carver.take(rows * pitch);
    unprojected = a.weight_hr == nullptr ? nullptr : carver.take(rows * pitch);
    projected = a.weight_hr == nullptr ? nullptr : carver.take(rows * weights.projection.row());
    gates = carver.take(rows * row_pitch);
    cell_row = carver.take(pitch);
    o_row = carver.take(pitch);
    low = next_low = nullptr;
    if (weights.hidden.pairs) {
      low = reinterpret_cast<M*>(carver.take(rows * pitch));
      next_low = low + rows * pitch;
    }
  }

  static const M* at(const void* data, int64_t element) {
    return static_cast<const M*>(data) + element;
  }
  static M* at(void* data, int64_t element) { return static_cast<M*>(data) + element; }
  static V<T> read(const M* p, int64_t count) { return load_some<T>(p, count); }

  void run() {
    for (int64_t i = 0; i < rows && team.is_first(); ++i) {
      convert_row(at(a.h0, (begin + i) * P), a.dtype, h + i * pitch, P);
      if (kLstm) convert_row(at(a.c0, (begin + i) * H), a.dtype, c + i * pitch, H);
      if (a.keep != nullptr) set_operand(i);
      if (low != nullptr) write(low, i * pitch, h + i * pitch, P);
    }
    if (!team.meet()) return;
    for (int64_t n = 0; n < a.steps; ++n) {
      step(n, a.reverse ? a.steps - 1 - n : n);
      if (!team.meet()) return;
      swap(h, next);
      swap(low, next_low);
      for (int64_t m = 0; m < active.count && a.keep != nullptr; ++m) set_operand(active.index[m]);
    }
    for (int64_t i = 0; i < rows && team.is_first(); ++i) {
      write(a.h_n, (begin + i) * P, h + i * pitch, P);
      if (kLstm) write(a.c_n, (begin + i) * H, c + i * pitch, H);
    }
  }

  template <class Pointer>
  static void swap(Pointer& x, Pointer& y) {
    const Pointer old = x;
    x = y;
    y = old;
  }

  static void write(void* data, int64_t element, const T* source, int64_t n) {
    for (int64_t u = 0; u < n; u += lanes<T>)
      store_some<T>(at(data, element) + u, load(source + u), n - u);
  }

  void set_operand(int64_t i) {
    for (int64_t u = 0; u < P; u += lanes<T>)
      store(masked + i * pitch + u,
            load(h + i * pitch + u) * read(at(a.keep, (begin + i) * P + u), P - u));
  }

  void step(int64_t n, int64_t t) {
    const bool odd = n % 2 == 1;
    active.select(a.lengths, t, rows, [&](int64_t i) {
      if (team.is_first()) clear(t, i);
    });
    const auto product = [&](auto finish) {
      const T* operand = a.keep != nullptr ? masked : h;
      int64_t operand_pitch = pitch;
      if (low != nullptr) {
        operand = reinterpret_cast<const T*>(low);
        operand_pitch = pitch / 2;
      }
      const int64_t tiles = weights.hidden.tiles;
      multiply_tiles(weights.hidden, team.begin(tiles), team.end(tiles), weights.packed_hidden,
                     active.count, active.index, operand, operand_pitch, odd, gates, finish);
    };
    if (a.gates_h != nullptr) {
      for (int64_t i = 0; i < rows; ++i)
        for (int g = 0; g < G; ++g)
          convert_row(at(a.gates_h, ((begin + i) * G + g) * H), a.dtype,
                      gates + i * row_pitch + g * gate_pitch, H);
      for (int64_t i = 0; i < rows; ++i) units(t, i, 0, H);
    } else if (a.norm_hh == nullptr) {
      product([&](int64_t tile) {
        for (int64_t m = 0; m < active.count; ++m)
          units(t, active.index[m], weights.hidden.begin(tile), weights.hidden.end(tile));
      });
    } else {
      product([](int64_t) {});
      for (int64_t m = 0; m < active.count; ++m) normalized(t, active.index[m]);
    }
    if (a.weight_hr != nullptr) {
      multiply_tiles(weights.projection, 0, weights.projection.tiles, weights.packed_projection,
                     active.count, active.index, unprojected, pitch, odd, projected,
                     [](int64_t) {});
      for (int64_t m = 0; m < active.count; ++m) {
        const int64_t i = active.index[m];
        for (int64_t u = 0; u < P; u += lanes<T>)
          emit(t, i, u, load(projected + i * weights.projection.row() + u));
      }
    }
  }

  // A row that is over, or has not begun: it stays as it is, its output is 0, what is saved is not
  // read.
  void clear(int64_t t, int64_t i) {
    std::memcpy(next + i * pitch, h + i * pitch, static_cast<size_t>(pitch) * sizeof(T));
    if (low != nullptr)
      std::memcpy(next_low + i * pitch, low + i * pitch, static_cast<size_t>(pitch) * sizeof(M));
    const int64_t place = t * a.batch + begin + i;
    std::memset(at(a.output, place * P), 0, static_cast<size_t>(P) * sizeof(M));
    if (kLstm && a.cells != nullptr)
      std::memset(static_cast<T*>(a.cells) + place * H, 0, static_cast<size_t>(H) * sizeof(T));
    if (a.gates != nullptr)
      std::memset(at(a.gates, place * S * H), 0, static_cast<size_t>(S * H) * sizeof(M));
    if (a.normalized != nullptr) {
      std::memset(at(a.normalized, place * G * H), 0, static_cast<size_t>(G * H) * sizeof(M));
      std::memset(static_cast<T*>(a.statistics) + place * 3, 0, 3 * sizeof(T));
    }
  }

  // The units [from, to) of a row, from both halves of their gates.
  void units(int64_t t, int64_t i, int64_t from, int64_t to) {
    const int64_t b = begin + i, place = t * a.batch + b;
    const M* const x = at(a.gates_x.data, t * a.gates_x.stride_t + b * a.gates_x.stride_b);
    const T* const hidden = gates + i * row_pitch;
    M* const saved = a.gates == nullptr ? nullptr : at(a.gates, place * S * H);
    T* const cells = a.cells == nullptr ? nullptr : static_cast<T*>(a.cells) + place * H;
    for (int64_t u = from; u < to; u += lanes<T>) {
      const int64_t count = H - u;
      V<T> gate[4];
      for (int g = 0; g < G; ++g) gate[g] = read(x + g * H + u, count);
      V<T> result;
      if constexpr (kCell == Cell::gru) {
        gate[0] += load(hidden + u);
        gate[1] += load(hidden + gate_pitch + u);
        gate[3] = load(hidden + 2 * gate_pitch + u);
        result =
            gates::gru<VectorMath>(gate[0], gate[1], gate[2], gate[3], load(h + i * pitch + u));
      } else if constexpr (kLstm) {
        for (int g = 0; g < G; ++g) gate[g] += load(hidden + g * gate_pitch + u);
        T* const state = c + i * pitch + u;
        const V<T> before = load(state);
        V<T> cell = gates::lstm<VectorMath>(gate[0], gate[1], gate[2], gate[3], before);
        if (a.norm_c != nullptr) {
          store(cell_row + u, cell);
          store(o_row + u, gate[3]);
        } else {
          result = gate[3] * tanh(cell);
        }
        if (a.zoneout_c != 0) {
          const V<T> part = held<T>(a, 1, t, b, u);
          cell += part * (before - cell);
        }
        store(state, cell);
        if (cells != nullptr) store_some<T>(cells + u, cell, count);
      } else {
        const V<T> sum = gate[0] + load(hidden + u);
        gate[0] = result = kCell == Cell::tanh ? tanh(sum) : sum < 0 ? V<T>{} : sum;
      }
      if (saved != nullptr)
        for (int s = 0; s < S; ++s) store_some<T>(saved + s * H + u, gate[s], count);
      if (kLstm && a.norm_c != nullptr) continue;
      if (a.weight_hr != nullptr)
        store(unprojected + i * pitch + u, result);
      else
        emit(t, i, u, result);
    }
  }

  // The units from u on of the new h.
  void emit(int64_t t, int64_t i, int64_t u, V<T> result) {
    if (a.zoneout_h != 0) {
      const V<T> before = load(h + i * pitch + u);
      result += held<T>(a, 0, t, begin + i, u) * (before - result);
    }
    store_some<T>(at(a.output, (t * a.batch + begin + i) * P + u), result, P - u);
    store(next + i * pitch + u, rounded<T, M>(result));
    if (low != nullptr) store(next_low + i * pitch + u, result);
  }

  // As units, with layer norm over the hidden gates and, in an LSTM, over the cell.
  void normalized(int64_t t, int64_t i) {
    T* const hidden = gates + i * row_pitch;
    const int64_t place = t * a.batch + begin + i;
    const Moments<T> m = moments(hidden, G, H, gate_pitch, a.eps);
    for (int g = 0; g < G; ++g)
      for (int64_t u = 0; u < H; u += lanes<T>) {
        const int64_t count = H - u, e = g * H + u;
        T* const p = hidden + g * gate_pitch + u;
        const V<T> x = (load(p) - m.mean) * m.rstd;
        if (a.normalized != nullptr) store_some<T>(at(a.normalized, place * G * H + e), x, count);
        V<T> y = x * read(at(a.norm_hh, e), count);
        if (a.bias_hh != nullptr) y += read(at(a.bias_hh, e), count);
        store(p, y);
      }
    units(t, i, 0, H);
    Moments<T> cell{T(0), T(0)};
    if (a.norm_c != nullptr) {
      cell = moments(cell_row, 1, H, 0, a.eps);
      for (int64_t u = 0; u < H; u += lanes<T>) {
        const int64_t count = H - u;
        V<T> y = (load(cell_row + u) - cell.mean) * cell.rstd * read(at(a.norm_c, u), count);
        if (a.bias_c != nullptr) y += read(at(a.bias_c, u), count);
        const V<T> result = load(o_row + u) * tanh(y);
        if (a.weight_hr != nullptr)
          store(unprojected + i * pitch + u, result);
        else
          emit(t, i, u, result);
      }
    }
    if (a.statistics == nullptr) return;
    T* const statistics = static_cast<T*>(a.statistics) + place * 3;
    statistics[0] = m.rstd;
    statistics[1] = cell.mean;
    statistics[2] = cell.rstd;
  }
};

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
