// The CPU kernels of the layer_norm family, one set per instruction set. They do no threading of
// their own: the caller hands out ranges of rows (forward), of partial rows (backward) and of
// columns (finish). Results do not depend on how the ranges were cut.
#pragma once

#include "../layer_norm.h"

namespace fastseq {

struct LayerNormCpu {
  // Rows [begin, end).
  void (*forward)(const LayerNormForward& args, int64_t begin, int64_t end);
  // The rows of the partial rows [begin, end): gradients of x, and into args.partials the sums for
  // weight and bias over the rows of each.
  void (*backward)(const LayerNormBackward& args, int64_t begin, int64_t end);
  // grad_weight and grad_bias of the columns [begin, end), from all partial rows in order.
  void (*finish)(const LayerNormBackward& args, int64_t begin, int64_t end);
};

// Partial rows for a problem of that many rows: a function of the problem alone, so that the sums
// over rows are taken in the same order whatever the number of threads.
inline int64_t layer_norm_partial_rows(int64_t rows) {
  const int64_t wanted = rows / 128;
  return wanted < 1 ? 1 : wanted > 64 ? 64 : wanted;
}

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const LayerNormCpu layer_norm;
}
namespace avx512 {
extern const LayerNormCpu layer_norm;
}
namespace avx2 {
extern const LayerNormCpu layer_norm;
}
#endif
namespace generic {
extern const LayerNormCpu layer_norm;
}

}  // namespace fastseq
