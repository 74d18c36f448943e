// The persistent kernels of the LSTM: see recurrent_kernel.cuh.
#include "recurrent_instances.cuh"

namespace fastseq::recurrent {

ForwardKernel lstm_forward_kernel(Arithmetic arithmetic, int columns) {
  return instance<Cell::lstm, Forward>(arithmetic, columns);
}

BackwardKernel lstm_backward_kernel(Arithmetic arithmetic, int columns) {
  return instance<Cell::lstm, Backward>(arithmetic, columns);
}

}  // namespace fastseq::recurrent
