// The persistent kernels of the GRU: see recurrent_kernel.cuh.
#include "recurrent_instances.cuh"

namespace fastseq::recurrent {

ForwardKernel gru_forward_kernel(Arithmetic arithmetic, int strands) {
  return instance<Cell::gru, Forward>(arithmetic, strands);
}

BackwardKernel gru_backward_kernel(Arithmetic arithmetic, int strands) {
  return instance<Cell::gru, Backward>(arithmetic, strands);
}

}  // namespace fastseq::recurrent
