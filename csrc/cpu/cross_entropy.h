// The CPU kernels of the cross_entropy family, one set per instruction set. They do no threading of
// their own: the caller hands out ranges of rows. Results do not depend on how these were cut.
#pragma once

#include "../cross_entropy.h"

namespace fastseq {

struct CrossEntropyCpu {
  // Statistics, losses and weights of the rows [begin, end).
  void (*forward)(const CrossEntropyForward& args, int64_t begin, int64_t end);
  // The loss of all rows, from theirs.
  void (*reduce)(const CrossEntropyForward& args);
  // Gradients of the rows [begin, end).
  void (*backward)(const CrossEntropyBackward& args, int64_t begin, int64_t end);
  // Of all class weights.
  double (*weight_sum)(const Vector& weight, int64_t classes);
  // Tokens of the rows [begin, end).
  void (*sample)(const Sample& args, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const CrossEntropyCpu cross_entropy;
}
namespace avx512 {
extern const CrossEntropyCpu cross_entropy;
}
namespace avx2 {
extern const CrossEntropyCpu cross_entropy;
}
#endif
namespace generic {
extern const CrossEntropyCpu cross_entropy;
}

}  // namespace fastseq
