// Lets the tests call the persistent recurrent kernels' entry points: fields in the order read
// here.
#include "../../csrc/cuda/recurrent.h"
#include "server.h"

namespace simt {
namespace {

using fastseq::recurrent::Arithmetic;
using fastseq::recurrent::Chip;
using fastseq::recurrent::Plan;
using fastseq::recurrent::Task;

Task read_task(Request& request, bool backward) {
  Task task;
  task.cell = static_cast<fastseq::Cell>(request.integer());
  task.arithmetic = static_cast<Arithmetic>(request.integer());
  task.batch = request.integer();
  task.hidden = request.integer();
  task.directions = static_cast<int>(request.integer());
  task.backward = backward;
  return task;
}

Plan read_plan(Request& request, const Task& task) {
  Chip chip;
  chip.multiprocessors = static_cast<int>(request.integer());
  chip.shared_bytes = static_cast<int>(request.integer());
  chip.max_cluster = static_cast<int>(request.integer());
  const int exchange = static_cast<int>(request.integer());
  const int blocks = static_cast<int>(request.integer());
  const int splits = static_cast<int>(request.integer());
  return fastseq::recurrent::choose(task, chip, exchange, blocks, splits);
}

// Of its exact size and full of poison.
std::vector<char> workspace_of(const Plan& plan) {
  return std::vector<char>(static_cast<size_t>(fastseq::recurrent::workspace_bytes(plan)), '\xff');
}

fastseq::Steps read_steps(Request& request) {
  fastseq::Steps steps;
  steps.data = request.pointer();
  steps.stride_t = request.integer();
  steps.stride_b = request.integer();
  return steps;
}

void read_common(Request& request, const Task& task, fastseq::Recurrent& problem) {
  using fastseq::DType;
  problem.cell = task.cell;
  problem.dtype = task.arithmetic == Arithmetic::f16    ? DType::f16
                  : task.arithmetic == Arithmetic::bf16 ? DType::bf16
                                                        : DType::f32;
  problem.batch = task.batch;
  problem.hidden = problem.state = task.hidden;
  problem.steps = request.integer();
  problem.reverse = request.integer() != 0;
  problem.h0 = request.pointer();
  problem.c0 = request.pointer();
  problem.weight_hh = request.pointer();
  problem.lengths = static_cast<const int64_t*>(request.pointer());
  problem.keep = request.pointer();
}

const char* forward(Request& request) {
  const Task task = read_task(request, false);
  const Plan plan = read_plan(request, task);
  fastseq::RecurrentForward problem;
  read_common(request, task, problem);
  problem.bias_hh = request.pointer();
  problem.gates_x = read_steps(request);
  problem.output = request.pointer();
  problem.h_n = request.pointer();
  problem.c_n = request.pointer();
  problem.gates = request.pointer();
  problem.cells = request.pointer();
  std::vector<char> memory = workspace_of(plan);
  return fastseq::recurrent_forward_cuda(problem, plan, task.arithmetic, memory.data(), nullptr);
}

const char* backward(Request& request) {
  const Task task = read_task(request, true);
  const Plan plan = read_plan(request, task);
  fastseq::RecurrentBackward problem;
  read_common(request, task, problem);
  problem.grad_output = read_steps(request);
  problem.grad_cells = read_steps(request);
  problem.grad_h_n = request.pointer();
  problem.grad_c_n = request.pointer();
  problem.output = request.pointer();
  problem.gates = request.pointer();
  problem.cells = request.pointer();
  problem.bptt = request.integer();
  problem.grad_clip = request.real();
  problem.grad_gates_x = request.pointer();
  problem.grad_gates_h = request.pointer();
  problem.grad_h0 = request.pointer();
  problem.grad_c0 = request.pointer();
  std::vector<char> memory = workspace_of(plan);
  return fastseq::recurrent_backward_cuda(problem, plan, task.arithmetic, memory.data(), nullptr);
}

// Figures of a plan, or its reason.
const char* plan(Request& request) {
  const bool is_backward = request.integer() != 0;
  const Task task = read_task(request, is_backward);
  const Plan plan = read_plan(request, task);
  if (plan.rejected != nullptr) return plan.rejected;
  const int64_t figures[] = {plan.blocks,
                             plan.groups,
                             plan.waves,
                             plan.rows,
                             plan.units,
                             plan.tiles,
                             plan.splits,
                             plan.chunks,
                             plan.split_chunks,
                             plan.threads,
                             plan.layout.bytes,
                             plan.weight_bytes,
                             static_cast<int64_t>(plan.exchange)};
  auto* to = static_cast<int64_t*>(request.pointer());
  for (const int64_t figure : figures) *to++ = figure;
  return nullptr;
}

}  // namespace

void add_functions(Functions& functions) {
  functions["forward"] = forward;
  functions["backward"] = backward;
  functions["plan"] = plan;
}

}  // namespace simt
