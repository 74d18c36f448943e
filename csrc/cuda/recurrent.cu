// Launches the persistent recurrent kernels.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.cuh"
#include "recurrent.h"

namespace fastseq {
namespace recurrent {
namespace {

ForwardKernel forward_kernel(Cell cell, Arithmetic arithmetic, int strands) {
  if (cell == Cell::lstm) return lstm_forward_kernel(arithmetic, strands);
  if (cell == Cell::gru) return gru_forward_kernel(arithmetic, strands);
  return rnn_forward_kernel(arithmetic, strands);
}

BackwardKernel backward_kernel(Cell cell, Arithmetic arithmetic, int strands) {
  if (cell == Cell::lstm) return lstm_backward_kernel(arithmetic, strands);
  if (cell == Cell::gru) return gru_backward_kernel(arithmetic, strands);
  return rnn_backward_kernel(arithmetic, strands);
}

// Whether everything that is copied in pieces of 16 bytes begins and goes on at multiples of that.
struct Alignment {
  int64_t element;
  uint64_t bits = 0;

  void add(const void* data) { bits |= reinterpret_cast<uintptr_t>(data); }
  void add(const Steps& steps, int64_t bytes) {
    if (steps.data == nullptr) return;
    add(steps.data);
    bits |= static_cast<uint64_t>(steps.stride_t * bytes) |
            static_cast<uint64_t>(steps.stride_b * bytes);
  }
  bool wide(int64_t hidden) const { return ((bits | uint64_t(hidden * element)) & 15) == 0; }
};

bool is_wide(const RecurrentForward& a, Arithmetic arithmetic) {
  Alignment alignment{element_bytes(arithmetic)};
  alignment.add(a.gates_x, alignment.element);
  alignment.add(a.weight_hh);
  for (const void* data : {a.output, a.gates, a.cells}) alignment.add(data);
  return alignment.wide(a.hidden);
}

bool is_wide(const RecurrentBackward& a, Arithmetic arithmetic) {
  Alignment alignment{element_bytes(arithmetic)};
  alignment.add(a.grad_output, alignment.element);
  alignment.add(a.grad_cells, 4);
  for (const void* data : {a.output, a.gates, a.cells}) alignment.add(data);
  for (const void* data : {a.grad_gates_x, a.grad_gates_h}) alignment.add(data);
  return alignment.wide(a.hidden);
}

const char* check(const Recurrent& a, const Plan& plan, Arithmetic arithmetic) {
  if (plan.rejected != nullptr) return plan.rejected;
  const DType dtype = arithmetic == Arithmetic::f16    ? DType::f16
                      : arithmetic == Arithmetic::bf16 ? DType::bf16
                                                       : DType::f32;
  if (a.dtype != dtype) return "recurrent: the dtype is not the arithmetic's";
  if (a.steps <= 0 || a.steps > 0x7fffffff) return "recurrent: between 1 and 2^31 - 1 steps";
  if (a.norm_hh != nullptr || a.norm_c != nullptr) return "recurrent: no layer norm";
  if (a.zoneout_h != 0 || a.zoneout_c != 0) return "recurrent: no zoneout";
  if (a.weight_hr != nullptr || a.state != a.hidden) return "recurrent: no projection";
  return nullptr;
}

template <class Problem>
const char* check(const Directions<Problem>& directions, const Plan& plan, Arithmetic arithmetic) {
  const Recurrent& first = directions.of[0];
  for (int d = 0; d < plan.directions; ++d) {
    const Recurrent& a = directions.of[d];
    if (const char* reason = check(a, plan, arithmetic)) return reason;
    if (a.cell != first.cell || a.steps != first.steps || a.batch != first.batch ||
        a.hidden != first.hidden)
      return "recurrent: directions that run at once are of one shape and one batch";
  }
  return nullptr;
}

template <class Kernel, class Problem>
const char* run(Kernel kernel, const Directions<Problem>& directions, const Plan& plan,
                Arithmetic arithmetic, void* memory, void* stream_handle) {
  if (kernel == nullptr) return "recurrent: no kernel of so many rows";
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const bool is_grid = plan.exchange == Exchange::grid;
  if (is_grid && memory == nullptr) return "recurrent: a grid needs a workspace";
  LaunchShape shape;
  shape.block = dim3(static_cast<unsigned>(plan.threads));
  shape.shared_bytes = static_cast<size_t>(plan.layout.bytes);
  shape.cluster =
      static_cast<unsigned>(plan.exchange == Exchange::cluster ? plan.blocks : plan.partners);
  shape.cooperative = is_grid;
  bool wide = true;
  for (int d = 0; d < plan.directions; ++d) wide = wide && is_wide(directions.of[d], arithmetic);
  const Copies copies = share_out(plan.units, wide);
  const int groups = plan.groups * plan.directions;
  // What is not a grid is launched at once, and runs as there is room.
  const int each = is_grid ? plan.at_once : groups;
  const size_t count_bytes = is_grid ? size_t{4} * kCountStride * plan.at_once : 0;
  Workspace workspace;
  workspace.counts = static_cast<unsigned*>(memory);
  workspace.states = static_cast<char*>(memory) + count_bytes;
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < groups && error == cudaSuccess; first += each) {
    workspace.first_group = first;
    const int teams = std::min(each, groups - first) / plan.strands;
    shape.grid = dim3(static_cast<unsigned>(teams * plan.blocks));
    if (is_grid) error = cudaMemsetAsync(workspace.counts, 0, count_bytes, stream);
    if (error == cudaSuccess)
      error = launch(kernel, shape, stream, directions, plan, copies, workspace);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const void* kernel_of(const Task& task, const Plan& plan) {
  const int strands = plan.strands;
  return task.backward
             ? reinterpret_cast<const void*>(backward_kernel(task.cell, task.arithmetic, strands))
             : reinterpret_cast<const void*>(forward_kernel(task.cell, task.arithmetic, strands));
}

}  // namespace recurrent

const char* recurrent_forward_cuda(const recurrent::Directions<RecurrentForward>& directions,
                                   const recurrent::Plan& plan, recurrent::Arithmetic arithmetic,
                                   void* workspace, void* stream) {
  using namespace recurrent;
  if (const char* reason = check(directions, plan, arithmetic)) return reason;
  return run(forward_kernel(directions.of[0].cell, arithmetic, plan.strands), directions, plan,
             arithmetic, workspace, stream);
}

const char* recurrent_backward_cuda(const recurrent::Directions<RecurrentBackward>& directions,
                                    const recurrent::Plan& plan, recurrent::Arithmetic arithmetic,
                                    void* workspace, void* stream) {
  using namespace recurrent;
  if (const char* reason = check(directions, plan, arithmetic)) return reason;
  return run(backward_kernel(directions.of[0].cell, arithmetic, plan.strands), directions, plan,
             arithmetic, workspace, stream);
}

}  // namespace fastseq
