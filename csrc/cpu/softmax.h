// The CPU kernels of the softmax family, one set per instruction set. They do no threading of their
// own: the caller hands out ranges of tasks. Results do not depend on how the ranges were cut.
#pragma once

#include "../softmax.h"

namespace fastseq {

struct SoftmaxCpu {
  int64_t most_columns;  // of a task
  void (*forward)(const SoftmaxForward& args, int64_t begin, int64_t end);
  void (*backward)(const SoftmaxBackward& args, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const SoftmaxCpu softmax;
}
namespace avx512 {
extern const SoftmaxCpu softmax;
}
namespace avx2 {
extern const SoftmaxCpu softmax;
}
#endif
namespace generic {
extern const SoftmaxCpu softmax;
}

}  // namespace fastseq
