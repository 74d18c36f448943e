// The persistent recurrent kernels: a layer in one direction or both, its weights on the chip
// throughout. They take no fp64, layer norm, zoneout or projection.
#pragma once

#include "recurrent_plan.h"

namespace fastseq {

// Launch what plan says (choose() of recurrent_plan.h, not rejected) on a stream, for as many
// directions as it has; return null, or what went wrong. All tensors but those given with strides
// are contiguous. workspace has workspace_bytes(plan), aligned to 16.
const char* recurrent_forward_cuda(const recurrent::Directions<RecurrentForward>& directions,
                                   const recurrent::Plan& plan, recurrent::Arithmetic arithmetic,
                                   void* workspace, void* stream);
const char* recurrent_backward_cuda(const recurrent::Directions<RecurrentBackward>& directions,
                                    const recurrent::Plan& plan, recurrent::Arithmetic arithmetic,
                                    void* workspace, void* stream);

// The plan on a device, remembered; what does not run there is rejected.
recurrent::Plan recurrent_plan_cuda(const recurrent::Task& task, int device);

namespace recurrent {

// The kernel that runs a plan, or null.
const void* kernel_of(const Task& task, const Plan& plan);

// An instance of the kernels for a cell, in a file for each, that takes so many strands. Null where
// there is none.
using ForwardKernel = void (*)(Directions<RecurrentForward>, Plan, Copies, Workspace);
using BackwardKernel = void (*)(Directions<RecurrentBackward>, Plan, Copies, Workspace);
ForwardKernel lstm_forward_kernel(Arithmetic arithmetic, int strands);
ForwardKernel gru_forward_kernel(Arithmetic arithmetic, int strands);
ForwardKernel rnn_forward_kernel(Arithmetic arithmetic, int strands);
BackwardKernel lstm_backward_kernel(Arithmetic arithmetic, int strands);
BackwardKernel gru_backward_kernel(Arithmetic arithmetic, int strands);
BackwardKernel rnn_backward_kernel(Arithmetic arithmetic, int strands);

}  // namespace recurrent
}  // namespace fastseq
