// The CPU kernels of the softmax family, one set per instruction set. They do no threading of their
// own: the caller hands out ranges of tasks. Results do not depend on how the ranges were cut.
#pragma once

#include "../softmax.h"

namespace fastseq {

struct SoftmaxCpu {
  int64_t columns;  // of a task where inner > 1 and the arithmetic is fp32; half as many in fp64
  void (*forward)(const SoftmaxForward& args, int64_t begin, int64_t end);
  void (*backward)(const SoftmaxBackward& args, int64_t begin, int64_t end);
};

// A row is a task; of columns that lie side by side, so many that a stretch of memory is worth
// asking for.
inline int64_t softmax_tasks(const SoftmaxCpu& kernels, int64_t outer, int64_t inner, DType dtype) {
  const int64_t columns = dtype == DType::f64 ? kernels.columns / 2 : kernels.columns;
  return inner == 1 ? outer : outer * ((inner + columns - 1) / columns);
}

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
