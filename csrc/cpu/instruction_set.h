// The kernels for the instruction set of this machine, all families.
#pragma once

#include "layer_norm.h"

namespace fastseq {

struct InstructionSet {
  const char* name;
  const LayerNormCpu* layer_norm;
};

// The widest the machine has; FASTSEQ_CPU_ISA=avx512|avx2|generic asks for less (tests do).
const InstructionSet& instruction_set();

}  // namespace fastseq
