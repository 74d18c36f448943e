// The CPU kernels of the embedding, one set per instruction set; a task is a row of the result.
#pragma once

#include "../embedding.h"

namespace fastseq {

struct EmbeddingCpu {
  void (*forward)(const EmbeddingForward& args, int64_t begin, int64_t end);
  void (*backward)(const EmbeddingBackward& args, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const EmbeddingCpu embedding;
}
namespace avx512 {
extern const EmbeddingCpu embedding;
}
namespace avx2 {
extern const EmbeddingCpu embedding;
}
#endif
namespace generic {
extern const EmbeddingCpu embedding;
}

}  // namespace fastseq
