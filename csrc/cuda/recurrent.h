// The persistent recurrent kernels: a layer in one direction, its weights on the chip throughout.
// They take no fp64, layer norm, zoneout or projection.
#pragma once

#include "recurrent_plan.h"

namespace fastseq {

// Launch what plan says (choose() of recurrent_plan.h, not rejected) on a stream; return null, or
// what went wrong. All tensors but those given with strides are contiguous. workspace has
// workspace_bytes(plan), aligned to 16.
const char* recurrent_forward_cuda(const RecurrentForward& problem, const recurrent::Plan& plan,
                                   recurrent::Arithmetic arithmetic, void* workspace, void* stream);
const char* recurrent_backward_cuda(const RecurrentBackward& problem, const recurrent::Plan& plan,
                                    recurrent::Arithmetic arithmetic, void* workspace,
                                    void* stream);

// The plan on a device, remembered; what does not run there is rejected.
recurrent::Plan recurrent_plan_cuda(const recurrent::Task& task, int device);

namespace recurrent {

// The kernel that runs a plan, or null.
const void* kernel_of(const Task& task, const Plan& plan);

// An instance of the kernels for a cell, in a file for each; columns is a tile's rows / 8. Null
// where there is none.
using ForwardKernel = void (*)(RecurrentForward, Plan, Copies, Workspace);
using BackwardKernel = void (*)(RecurrentBackward, Plan, Copies, Workspace);
ForwardKernel lstm_forward_kernel(Arithmetic arithmetic, int columns);
ForwardKernel gru_forward_kernel(Arithmetic arithmetic, int columns);
ForwardKernel rnn_forward_kernel(Arithmetic arithmetic, int columns);
BackwardKernel lstm_backward_kernel(Arithmetic arithmetic, int columns);
BackwardKernel gru_backward_kernel(Arithmetic arithmetic, int columns);
BackwardKernel rnn_backward_kernel(Arithmetic arithmetic, int columns);

}  // namespace recurrent
}  // namespace fastseq
