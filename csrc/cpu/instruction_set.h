// The kernels for the instruction set of this machine, all families.
#pragma once

#include "additive_attention.h"
#include "attention.h"
#include "cross_entropy.h"
#include "embedding.h"
#include "feed_forward.h"
#include "layer_norm.h"
#include "recurrent.h"
#include "rotary_embedding.h"
#include "softmax.h"

namespace fastseq {

struct InstructionSet {
  const char* name;
  const LayerNormCpu* layer_norm;
  const CrossEntropyCpu* cross_entropy;
  const SoftmaxCpu* softmax;
  const AdditiveAttentionCpu* additive_attention;
  const RotaryEmbeddingCpu* rotary_embedding;
  const AttentionCpu* attention;
  const RecurrentCpu* recurrent;
  const FeedForwardCpu* feed_forward;
  const EmbeddingCpu* embedding;
};

// The widest the machine has; FASTSEQ_CPU_ISA=avx512|avx2|generic asks for less (tests do).
const InstructionSet& instruction_set();

}  // namespace fastseq
