// The CPU kernel of the rotary embedding, one per instruction set; a task is a row.
#pragma once

#include "../rotary_embedding.h"

namespace fastseq {

struct RotaryEmbeddingCpu {
  void (*rotate)(const RotaryEmbedding& args, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const RotaryEmbeddingCpu rotary_embedding;
}
namespace avx512 {
extern const RotaryEmbeddingCpu rotary_embedding;
}
namespace avx2 {
extern const RotaryEmbeddingCpu rotary_embedding;
}
#endif
namespace generic {
extern const RotaryEmbeddingCpu rotary_embedding;
}

}  // namespace fastseq
