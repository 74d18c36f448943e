// Lets the tests call the persistent recurrent kernels' entry points: fields in the order read
// here.
#include "../../csrc/cuda/recurrent.h"
#include "server.h"
#include "simt.h"

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
  const int strands = static_cast<int>(request.integer());
  const int partners = static_cast<int>(request.integer());
  return fastseq::recurrent::choose(task, chip, exchange, blocks, splits, strands, partners);
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

void read_problem(Request& request, const Task& task, fastseq::RecurrentForward& problem) {
  read_common(request, task, problem);
  problem.bias_hh = request.pointer();
  problem.gates_x = read_steps(request);
  problem.output = request.pointer();
  problem.h_n = request.pointer();
  problem.c_n = request.pointer();
  problem.gates = request.pointer();
  problem.cells = request.pointer();
}

void read_problem(Request& request, const Task& task, fastseq::RecurrentBackward& problem) {
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
}

// A problem for each of the task's directions.
template <class Problem, class Run>
const char* run(Request& request, bool is_backward, Run run) {
  const Task task = read_task(request, is_backward);
  const Plan plan = read_plan(request, task);
  fastseq::recurrent::Directions<Problem> directions;
  for (int d = 0; d < task.directions; ++d) read_problem(request, task, directions.of[d]);
  std::vector<char> memory = workspace_of(plan);
  return run(directions, plan, task.arithmetic, memory.data(), nullptr);
}

const char* forward(Request& request) {
  return run<fastseq::RecurrentForward>(request, false, fastseq::recurrent_forward_cuda);
}

const char* backward(Request& request) {
  return run<fastseq::RecurrentBackward>(request, true, fastseq::recurrent_backward_cuda);
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
                             fastseq::recurrent::kRows,
                             plan.units,
                             plan.tiles,
                             plan.splits,
                             plan.chunks,
                             plan.split_chunks,
                             plan.threads,
                             plan.layout.bytes,
                             plan.weight_bytes,
                             static_cast<int64_t>(plan.exchange),
                             plan.strands,
                             plan.partners,
                             plan.at_once};
  auto* to = static_cast<int64_t*>(request.pointer());
  for (const int64_t figure : figures) *to++ = figure;
  return nullptr;
}

// Describes an emulated GPU: its number; multiprocessors, bytes of shared memory of a block, major
// version, largest cluster that finds room.
const char* device(Request& request) {
  Device& device = devices[request.integer()];
  device.multiprocessors = static_cast<int>(request.integer());
  device.shared_bytes = static_cast<int>(request.integer());
  device.major = static_cast<int>(request.integer());
  device.largest_cluster = static_cast<int>(request.integer());
  return nullptr;
}

// The plan on an emulated GPU, or its reason: exchange and blocks; how often the runtime has been
// asked about that GPU so far; the current one afterwards; bytes its kernel may have there, and
// has; partners; groups at once.
const char* plan_on_device(Request& request) {
  const bool is_backward = request.integer() != 0;
  const int number = static_cast<int>(request.integer());
  const Task task = read_task(request, is_backward);
  const Plan plan = fastseq::recurrent_plan_cuda(task, number);
  if (plan.rejected != nullptr) return plan.rejected;
  auto* to = static_cast<int64_t*>(request.pointer());
  to[0] = static_cast<int64_t>(plan.exchange);
  to[1] = plan.blocks;
  to[2] = devices[number].occupancy_calls;
  to[3] = current_device;
  current_device = number;
  to[4] = static_cast<int64_t>(limits_of(fastseq::recurrent::kernel_of(task, plan)).shared_bytes);
  current_device = static_cast<int>(to[3]);
  to[5] = plan.layout.bytes;
  to[6] = plan.partners;
  to[7] = plan.at_once;
  return nullptr;
}

}  // namespace

void add_functions(Functions& functions) {
  functions["forward"] = forward;
  functions["backward"] = backward;
  functions["plan"] = plan;
  functions["device"] = device;
  functions["plan_on_device"] = plan_on_device;
}

}  // namespace simt
