// Token, position and segment embedding added up in one pass.
//
//   forward    output[r] = dropout(scale token[ids[r]] + position[p(r)] + segment[segments[r]])
//   backward   for one table at a time: the sum over the rows that read it, or 0
#pragma once

#include "types.h"

namespace fastseq {

// Which row of a table the row r reads: data[r % count], or without data offset + r % count.
struct EmbeddingKeys {
  const int64_t* data = nullptr;
  int64_t count = 1, offset = 0;
  int64_t of(int64_t row) const {
    if (row >= count) row %= count;  // a division is dear for a short row
    return data == nullptr ? offset + row : data[row];
  }
};

struct EmbeddingTable {
  const void* data = nullptr;  // [rows, size]; null: absent
  int64_t rows = 0;
  EmbeddingKeys keys;
};

struct EmbeddingForward {
  int64_t rows = 0, size = 0;
  EmbeddingTable token, position, segment;
  double scale = 1;
  Dropout dropout;
  Rows output;
  bool past_cache = false;
};

struct EmbeddingBackward {
  int64_t rows = 0, size = 0;  // of the table whose gradient this is
  Rows grad;
  double scale = 1;
  Dropout dropout;
  // The rows of grad that read a row of the table, ascending: head[k], then next[of that]; -1 ends.
  const int64_t *head = nullptr, *next = nullptr;
  Rows output;
  bool past_cache = false;
};

}  // namespace fastseq
