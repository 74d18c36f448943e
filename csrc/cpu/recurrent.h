// The CPU kernels of the recurrent family, one set per instruction set. They do no threading of
// their own: the caller packs the weights and hands out ranges of rows of the batch, each of which
// runs through all steps by itself. Results do not depend on how the ranges were cut.
#pragma once

#include "../recurrent.h"
#include "team.h"

namespace fastseq {

struct RecurrentCpu {
  // Bytes that Recurrent::packed needs for the forward or the backward.
  int64_t (*packed_bytes)(const Recurrent& args, bool backward);
  void (*pack)(const Recurrent& args, bool backward);
  void (*forward)(const RecurrentForward& args, int64_t begin, int64_t end);
  void (*backward)(const RecurrentBackward& args, int64_t begin, int64_t end);
  // All rows by the threads of a team, of which there are most_members at most (1: none), and the
  // zeros that it shares.
  int64_t (*most_members)(const Recurrent& args, bool backward);
  int64_t (*team_bytes)(const Recurrent& args, bool backward);
  void (*forward_team)(const RecurrentForward& args, const Team& team);
  void (*backward_team)(const RecurrentBackward& args, const Team& team);
  // The products around the loop, for small layers: bytes of what is packed, the packing; the
  // input's gates (rows of all steps), the weights' gradients (rows of the gates), the input's.
  int64_t (*products_bytes)(const RecurrentProducts& args);
  void (*pack_products)(const RecurrentProducts& args);
  void (*input_gates)(const RecurrentProducts& args, int64_t begin, int64_t end);
  void (*weight_gradients)(const RecurrentProducts& args, int64_t begin, int64_t end);
  void (*input_gradient)(const RecurrentProducts& args, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const RecurrentCpu recurrent;
}
namespace avx512 {
extern const RecurrentCpu recurrent;
}
namespace avx2 {
extern const RecurrentCpu recurrent;
}
#endif
namespace generic {
extern const RecurrentCpu recurrent;
}

}  // namespace fastseq
