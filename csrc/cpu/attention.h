// The CPU kernels of the attention family, one set per instruction set. They do no threading of
// their own: the caller hands out ranges. Results do not depend on how these were cut.
#pragma once

#include "../attention.h"

namespace fastseq {

struct AttentionCpu {
  // Rows [begin, end) of count_n * count_g * count_i: scores to probabilities and lse.
  void (*forward_rows)(const ScorePiece& args, int64_t begin, int64_t end);
  // Scores, their gradients before the softmax and lse to probabilities and gradients.
  void (*backward_rows)(const ScorePiece& args, int64_t begin, int64_t end);
  // Tasks [begin, end) of batch * key heads * splits.
  void (*decode)(const Decode& args, int64_t begin, int64_t end);
  // Key heads [begin, end) of batch * key heads: their splits become one result.
  void (*merge)(const Decode& args, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const AttentionCpu attention;
}
namespace avx512 {
extern const AttentionCpu attention;
}
namespace avx2 {
extern const AttentionCpu attention;
}
#endif
namespace generic {
extern const AttentionCpu attention;
}

}  // namespace fastseq
