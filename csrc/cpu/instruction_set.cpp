#include "instruction_set.h"

#include <cstdlib>
#include <string>

// A new family adds its kernels here.
#define FASTSEQ_KERNELS(isa)                                                              \
  InstructionSet {                                                                        \
    #isa, &isa::layer_norm, &isa::cross_entropy, &isa::softmax, &isa::additive_attention, \
        &isa::rotary_embedding, &isa::attention, &isa::recurrent, &isa::feed_forward,     \
        &isa::embedding                                                                   \
  }
#define FASTSEQ_KERNELS_OF(isa) FASTSEQ_KERNELS(isa)  // of a macro's value

namespace fastseq {

const InstructionSet& instruction_set() {
#if defined(FASTSEQ_ONLY_ISA)  // built for one machine
  static const InstructionSet chosen = FASTSEQ_KERNELS_OF(FASTSEQ_ONLY_ISA);
#else
  static const InstructionSet chosen = [] {
    const char* variable = std::getenv("FASTSEQ_CPU_ISA");
    const std::string asked = variable == nullptr ? "" : variable;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && (asked.empty() || asked == "avx512_bf16"))
      return FASTSEQ_KERNELS(avx512_bf16);
    if (avx512 && (asked.empty() || asked == "avx512")) return FASTSEQ_KERNELS(avx512);
    if (avx2 && asked != "generic") return FASTSEQ_KERNELS(avx2);
#endif
    return FASTSEQ_KERNELS(generic);
  }();
#endif
  return chosen;
}

}  // namespace fastseq
