// The persistent kernels of the LSTM: see recurrent_kernel.cuh.
#include "recurrent_instances.cuh"

namespace fastseq::recurrent {

ForwardKernel lstm_forward_kernel(Arithmetic arithmetic, int strands) {
  return instance<Cell::lstm, Forward>(arithmetic, strands);
}

BackwardKernel lstm_backward_kernel(Arithmetic arithmetic, int strands) {
  return instance<Cell::lstm, Backward>(arithmetic, strands);
}

}  // namespace fastseq::recurrent
