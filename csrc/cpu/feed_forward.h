// The CPU kernels of the feed-forward block, one set per instruction set. They do no threading of
// their own. Results do not depend on how the ranges were cut.
#pragma once

#include "../feed_forward.h"

namespace fastseq {

// Sums for the bias's gradient, of the number of rows alone: the order in which they are added up
// is the result's bits.
inline int64_t feed_forward_partial_rows(int64_t rows) {
  const int64_t wanted = rows / 8;
  return wanted < 1 ? 1 : wanted > 64 ? 64 : wanted;
}

struct FeedForwardCpu {
  void (*forward)(const FeedForwardForward& args, int64_t begin, int64_t end);    // rows
  void (*backward)(const FeedForwardBackward& args, int64_t begin, int64_t end);  // partial rows
  void (*finish)(const FeedForwardBackward& args, int64_t begin, int64_t end);    // columns
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const FeedForwardCpu feed_forward;
}
namespace avx512 {
extern const FeedForwardCpu feed_forward;
}
namespace avx2 {
extern const FeedForwardCpu feed_forward;
}
#endif
namespace generic {
extern const FeedForwardCpu feed_forward;
}

}  // namespace fastseq
