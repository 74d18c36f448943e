// Rotary position embedding: pairs of a row's numbers turned by an angle of the row's position.
//
//   y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin      (inverse: sin negated)
//
// A pair is (i, i + rotated / 2), or interleaved (2i, 2i + 1), of the first rotated numbers of a
// row; the others are copied.
#pragma once

#include "types.h"

namespace fastseq {

// Row r has the position positions[r / entry * positions_stride + r % length] or, without
// positions, offset + r % length: rows are [batch, heads, length].
struct RotaryEmbedding {
  int64_t rows = 0, size = 0, rotated = 0;
  int64_t length = 1, entry = 1;  // rows of a sequence, and of an entry of the batch
  bool interleaved = false, inverse = false;
  Rows input, output;
  const float *cos = nullptr, *sin = nullptr;  // [*, rotated / 2]
  const int64_t* positions = nullptr;
  int64_t positions_stride = 0;  // from one entry of the batch to the next
  int64_t offset = 0;
};

}  // namespace fastseq
