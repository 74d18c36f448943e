// The persistent kernels of the RNN: see recurrent_kernel.cuh.
#include "recurrent_instances.cuh"

namespace fastseq::recurrent {

ForwardKernel rnn_forward_kernel(Arithmetic arithmetic, int strands) {
  return instance<Cell::tanh, Forward>(arithmetic, strands);
}

BackwardKernel rnn_backward_kernel(Arithmetic arithmetic, int strands) {
  return instance<Cell::tanh, Backward>(arithmetic, strands);
}

}  // namespace fastseq::recurrent
