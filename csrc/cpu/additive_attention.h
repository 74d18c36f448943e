// The CPU kernels of additive attention, one set per instruction set, in stages: each is a number
// of tasks that the caller hands out in ranges, and begins when the one before has ended. Results
// do not depend on how the ranges were cut.
#pragma once

#include "../additive_attention.h"

namespace fastseq {

constexpr int64_t kAdditiveQueries = 16;   // of a task of scores
constexpr int64_t kAdditiveChannels = 16;  // of a task of gradients

struct AdditiveAttentionCpu {
  int64_t panel;  // keys taken at a time
  // A task is an entry of the batch: which numbers are too large, and the factors of the queries.
  void (*prepare_queries)(const AdditiveAttention& args, int64_t begin, int64_t end);
  // A task is a panel of an entry: the factors of the keys.
  void (*prepare_keys)(const AdditiveAttention& args, int64_t begin, int64_t end);
  // A task is kAdditiveQueries queries of an entry.
  void (*scores)(const AdditiveAttention& args, int64_t begin, int64_t end);
  // A task is a panel of an entry: the gradient of the scores by panels.
  void (*prepare_gradients)(const AdditiveAttention& args, int64_t begin, int64_t end);
  // A task is kAdditiveChannels channels of an entry.
  void (*gradients)(const AdditiveAttention& args, int64_t begin, int64_t end);
  // A task is a panel of an entry: the gradient of the keys from its panels.
  void (*finish_keys)(const AdditiveAttention& args, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const AdditiveAttentionCpu additive_attention;
}
namespace avx512 {
extern const AdditiveAttentionCpu additive_attention;
}
namespace avx2 {
extern const AdditiveAttentionCpu additive_attention;
}
#endif
namespace generic {
extern const AdditiveAttentionCpu additive_attention;
}

}  // namespace fastseq
