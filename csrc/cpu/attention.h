// The CPU kernels of the attention family, one set per instruction set. They do no threading of
// their own: the caller hands out ranges. Results do not depend on how these were cut.
#pragma once

#include "../attention.h"

namespace fastseq {

struct AttentionCpu {
  // Tasks [begin, end) of batch * heads * parts of task_queries queries.
  void (*forward)(const Attention& args, int64_t begin, int64_t end);
  // Tasks [begin, end) of the (key) heads that have a gradient of a bias of their own, all of them
  // where none is wanted, * splits.
  void (*backward)(const Attention& args, int64_t begin, int64_t end);
  // Rows [begin, end) of batch * heads * queries: before backward, and after it.
  void (*delta)(const Attention& args, int64_t begin, int64_t end);
  void (*grad_query)(const Attention& args, int64_t begin, int64_t end);
  int64_t (*pitch)(int64_t head_dim);
  int64_t task_queries, tile_keys;
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
