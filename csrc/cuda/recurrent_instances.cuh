// The kernels of one cell: 6 forward and 6 backward, chosen by arithmetic and by strands.
// Everything else is a run-time value of the plan.
#pragma once

#include "recurrent.h"
#include "recurrent_backward.cuh"
#include "recurrent_forward.cuh"
#include "recurrent_kernel.cuh"

namespace fastseq::recurrent {

template <Cell kCell, template <Cell, Arithmetic, int> class Pass>
auto instance(Arithmetic arithmetic, int strands)
    -> void (*)(Directions<typename Pass<kCell, Arithmetic::f32, 1>::Problem>, Plan, Copies,
                Workspace) {
  switch (arithmetic) {
    case Arithmetic::f16:
      return strands == 1 ? &persistent_kernel<Pass<kCell, Arithmetic::f16, 1>>
                          : &persistent_kernel<Pass<kCell, Arithmetic::f16, 2>>;
    case Arithmetic::bf16:
      return strands == 1 ? &persistent_kernel<Pass<kCell, Arithmetic::bf16, 1>>
                          : &persistent_kernel<Pass<kCell, Arithmetic::bf16, 2>>;
    case Arithmetic::tf32:
      return strands == 1 ? &persistent_kernel<Pass<kCell, Arithmetic::tf32, 1>> : nullptr;
    case Arithmetic::f32:
      return strands == 1 ? &persistent_kernel<Pass<kCell, Arithmetic::f32, 1>> : nullptr;
  }
  return nullptr;
}

}  // namespace fastseq::recurrent
