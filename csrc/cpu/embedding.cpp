// Token, position and segment embedding on the CPU: bound by memory, so that a number is read and
// written once.
//
// The rows of a vocabulary lie anywhere in memory, where no hardware looks ahead: while a row is
// written the token's row after the next is asked for. A table's gradient is written once too, rows
// that no token read as zeros, each sum in fp32 in the order of the tokens.
#include "embedding.h"

#include <type_traits>

#include "rows.h"
#include "scratch.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

template <class M>
const M* row_of(const EmbeddingTable& table, int64_t row, int64_t size) {
  return static_cast<const M*>(table.data) + table.keys.of(row) * size;
}

template <class T, class M, bool Segment>
void forward_rows(const EmbeddingForward& args, int64_t begin, int64_t end) {
  constexpr int64_t kRowsAhead = 2;
  const V<T> scale = splat<T>(static_cast<T>(args.scale));
  const bool drops = args.dropout.seed != nullptr;
  T* buffer = nullptr;
  if (drops) {
    const size_t bytes = static_cast<size_t>(args.size + lanes<T>) * sizeof(T);
    buffer = static_cast<T*>(thread_scratch(bytes));
  }
  for (int64_t row = begin; row < end; ++row) {
    const M* token = row_of<M>(args.token, row, args.size);
    const M* position = row_of<M>(args.position, row, args.size);
    const M* segment = Segment ? row_of<M>(args.segment, row, args.size) : nullptr;
    const M* ahead =
        row_of<M>(args.token, row + kRowsAhead < end ? row + kRowsAhead : row, args.size);
    const auto value = [&](int64_t i, auto read) {
      V<T> sum = fma(read(token + i), scale, read(position + i));
      if constexpr (Segment) sum += read(segment + i);
      return sum;
    };
    const auto next = [&](int64_t i) { __builtin_prefetch(ahead + i, 0, 2); };
    M* output = reinterpret_cast<M*>(row_of(args.output, row));
    if (drops) {
      write_values<T>(buffer, args.size, false, value, next);
      multiply_by_dropout(buffer, row, args.size, args.dropout);
      write_row<T>(args.output, row, buffer, args.size);
    } else {
      write_values<T>(output, args.size, args.past_cache, value, next);
    }
  }
  fence();
}

template <class T, class M>
void backward_rows(const EmbeddingBackward& args, int64_t begin, int64_t end) {
  const bool drops = args.dropout.seed != nullptr;
  const int64_t room = args.size + lanes<T>;
  T* sum = static_cast<T*>(thread_scratch(2 * static_cast<size_t>(room) * sizeof(T)));
  T* dropped = sum + room;
  const V<T> scale = splat<T>(static_cast<T>(args.scale));
  const auto nothing = [](int64_t) {};
  for (int64_t target = begin; target < end; ++target) {
    M* output = reinterpret_cast<M*>(row_of(args.output, target));
    const int64_t head = args.head[target];
    if (head < 0) {
      write_values<T>(
          output, args.size, args.past_cache, [](int64_t, auto) { return V<T>{}; }, nothing);
      continue;
    }
    for (int64_t row = head; row >= 0; row = args.next[row]) {
      // The row that is read next: this sum's, or the next one's.
      int64_t after = args.next[row];
      if (after < 0 && target + 1 < end) after = args.head[target + 1];
      const char* ahead = row_of(args.grad, after < 0 ? row : after);
      const auto add = [&](const auto* grad) {
        for (int64_t i = 0; i < args.size; i += lanes<T>) {
          __builtin_prefetch(ahead + i * static_cast<int64_t>(sizeof(M)), 0, 3);
          V<T> value = load_some<T>(grad + i, args.size - i);
          if (row != head) value += load(sum + i);
          store(sum + i, value);
        }
      };
      if (drops) {
        convert_row<T>(row_of(args.grad, row), args.grad.dtype, dropped, args.size);
        multiply_by_dropout(dropped, row, args.size, args.dropout);
        add(dropped);
      } else {
        add(reinterpret_cast<const M*>(row_of(args.grad, row)));
      }
    }
    const auto value = [&](int64_t i, auto) { return load(sum + i) * scale; };
    write_values<T>(output, args.size, args.past_cache, value, nothing);
  }
  fence();
}

// Calls f with null pointers of the compute type and the memory type.
template <class F>
void with_types(DType dtype, F f) {
  if (dtype == DType::f64) return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  with_type<float>(dtype, [&](auto* type) { f(static_cast<float*>(nullptr), type); });
}

void forward(const EmbeddingForward& args, int64_t begin, int64_t end) {
  with_types(args.output.dtype, [&](auto* compute, auto* memory) {
    using T = std::remove_pointer_t<decltype(compute)>;
    using M = std::remove_pointer_t<decltype(memory)>;
    if (args.segment.data == nullptr)
      forward_rows<T, M, false>(args, begin, end);
    else
      forward_rows<T, M, true>(args, begin, end);
  });
}

void backward(const EmbeddingBackward& args, int64_t begin, int64_t end) {
  with_types(args.output.dtype, [&](auto* compute, auto* memory) {
    using T = std::remove_pointer_t<decltype(compute)>;
    using M = std::remove_pointer_t<decltype(memory)>;
    backward_rows<T, M>(args, begin, end);
  });
}

}  // namespace

extern const EmbeddingCpu embedding{forward, backward};

}  // namespace fastseq::FASTSEQ_ISA
