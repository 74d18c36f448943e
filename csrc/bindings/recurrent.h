// The ops of the recurrent family: outputs allocated, the problem filled in, a kernel launched.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../cpu/instruction_set.h"
#include "../cuda/recurrent_plan.h"
#include "common.h"

#ifdef FASTSEQ_CUDA
#include "../cuda/recurrent.h"
#endif

namespace fastseq {
namespace {

using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using MaybeTensor = std::optional<Tensor>;

const void* data_of(const MaybeTensor& tensor) {
  return tensor && tensor->numel() > 0 ? tensor->data_ptr() : nullptr;
}

void* output_of(const Tensor& tensor) { return tensor.numel() > 0 ? tensor.data_ptr() : nullptr; }

// [T, B, n] whose n are contiguous.
Steps steps_of(const MaybeTensor& tensor) {
  Steps steps;
  if (!tensor || tensor->numel() == 0) return steps;
  STD_TORCH_CHECK(tensor->dim() == 3 && (tensor->size(2) == 1 || tensor->stride(2) == 1),
                  "steps come as [T, B, n] with contiguous n");
  steps.data = tensor->data_ptr();
  steps.stride_t = tensor->stride(0);
  steps.stride_b = tensor->stride(1);
  return steps;
}

// What a single step has, too.
void fill_states(Recurrent& problem, int64_t cell, int64_t steps, int64_t hidden, const Tensor& h0,
                 const MaybeTensor& c0) {
  problem.cell = static_cast<Cell>(cell);
  problem.dtype = dtype_of(h0);
  problem.steps = steps;
  problem.batch = h0.size(0);
  problem.hidden = hidden;
  problem.state = h0.size(1);
  problem.h0 = h0.data_ptr();
  problem.c0 = data_of(c0);
}

// What forward and backward read of a layer in one direction; threshold and probability of zoneout
// for h and c.
struct Given {
  int64_t cell;
  const Tensor& h0;
  const MaybeTensor &c0, &weight_hh, &bias_hh, &weight_hr, &norm_hh, &norm_c, &bias_c;
  const MaybeTensor &lengths, &seed, &keep;
  bool reverse = false;
  double zoneout_h = 0, zoneout_c = 0;
  int64_t threshold_h = 0, threshold_c = 0;
};
const MaybeTensor absent;

void fill_layer(Recurrent& problem, const Given& given, int64_t steps, int64_t hidden) {
  fill_states(problem, given.cell, steps, hidden, given.h0, given.c0);
  problem.reverse = given.reverse;
  problem.weight_hh = data_of(given.weight_hh);
  problem.bias_hh = data_of(given.bias_hh);
  problem.weight_hr = data_of(given.weight_hr);
  problem.norm_hh = data_of(given.norm_hh);
  problem.norm_c = data_of(given.norm_c);
  problem.bias_c = data_of(given.bias_c);
  problem.lengths = static_cast<const int64_t*>(data_of(given.lengths));
  problem.seed = static_cast<const int64_t*>(data_of(given.seed));
  problem.keep = data_of(given.keep);
  problem.zoneout_h = given.zoneout_h;
  problem.zoneout_c = given.zoneout_c;
  problem.threshold_h = static_cast<uint32_t>(given.threshold_h);
  problem.threshold_c = static_cast<uint32_t>(given.threshold_c);
}

// Multiplications from which a team is quicker: of a step, whose share has to outlast the meeting
// after it, and of all of them, which have to outlast waking the threads up. Measured on two cores
// of an EPYC: 128 steps of 128 units take 0.65 of the time, 24 steps 1.5, 24 of 256 units 0.65.
constexpr int64_t kTeamStep = 1 << 15, kTeamWork = 1 << 22;

// Calls that have no team after one whose threads waited for each other: cores are short.
constexpr int kCallsAlone = 64;
std::atomic<int> calls_alone{0};

// Packs the weights, if there are any, and has the rows run: rows(begin, end) by ranges, or all of
// them by a team.
template <class Rows, class Members>
void run_recurrent(Recurrent& problem, bool backward, const Tensor& like, Rows rows,
                   Members members) {
  if (problem.hidden == 0) return;  // no units, nothing to write
  const RecurrentCpu& kernels = *instruction_set().recurrent;
  const auto aligned = [](const Tensor& tensor) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(tensor.data_ptr()) + 63) / 64 * 64);
  };
  const int64_t gates = gates_of(problem.cell) * problem.hidden;
  int64_t work = 16 * gates;  // of a row
  MaybeTensor packed;
  if (problem.weight_hh != nullptr) {
    packed = empty({kernels.packed_bytes(problem, backward) + 64}, ScalarType::Char, like);
    problem.packed = aligned(*packed);
    kernels.pack(problem, backward);
    work = problem.steps * gates * problem.state;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = std::min(threads, kernels.most_members(problem, backward));
    if (most > 1 && problem.batch < threads && problem.batch > 0 && problem.steps > 1 &&
        problem.batch * gates * problem.state >= kTeamStep && problem.batch * work >= kTeamWork &&
        calls_alone.fetch_sub(1, std::memory_order_relaxed) <= 0) {
      calls_alone.store(0, std::memory_order_relaxed);
      const int64_t bytes = kernels.team_bytes(problem, backward);
      const Tensor scratch = empty({bytes + 64}, ScalarType::Char, like);
      std::memset(scratch.data_ptr(), 0, static_cast<size_t>(bytes + 64));
      Meeting meeting;
      // A step's share, at a nanosecond each where the weights come from memory; and a wake-up.
      const int64_t patience = problem.batch * gates * problem.state / most + 100000;
      torch::stable::parallel_for(0, most, 1, [&](int64_t begin, int64_t end) {
        Team team{begin, end, most, &meeting, aligned(scratch), patience};
        if (team.gather()) members(team);
      });
      // (One range, of a pool without threads to spare, did not gather.)
      if (meeting.state != 0 && !meeting.was_quick())
        calls_alone.store(kCallsAlone, std::memory_order_relaxed);
      return;
    }
  }
  parallel(problem.batch, 1 + 65536 / work, rows);
}

// ---- persistent CUDA kernels --------------------------------------------------------------------

recurrent::Arithmetic arithmetic_of(DType dtype, bool tf32) {
  if (dtype == DType::f16) return recurrent::Arithmetic::f16;
  if (dtype == DType::bf16) return recurrent::Arithmetic::bf16;
  return tf32 ? recurrent::Arithmetic::tf32 : recurrent::Arithmetic::f32;
}

// What plan the problem gets on a chip given as multiprocessors, bytes of shared memory of a block
// and blocks of a cluster, or on a device (an empty chip): "key=value ..." in the order of the
// fields, or "rejected: " and the reason.
std::string recurrent_plan(int64_t cell, ScalarType dtype, bool tf32, int64_t batch, int64_t hidden,
                           bool backward, int64_t directions, int64_t device,
                           std::vector<int64_t> chip) {
  const DType type = dtype == ScalarType::Half       ? DType::f16
                     : dtype == ScalarType::BFloat16 ? DType::bf16
                                                     : DType::f32;
  const recurrent::Task task{
      static_cast<Cell>(cell),     arithmetic_of(type, tf32), batch, hidden, backward,
      static_cast<int>(directions)};
  recurrent::Plan plan;
  if (chip.size() == 3) {
    plan = recurrent::choose(
        task, {static_cast<int>(chip[0]), static_cast<int>(chip[1]), static_cast<int>(chip[2])});
  } else {
#ifdef FASTSEQ_CUDA
    plan = recurrent_plan_cuda(task, static_cast<int>(device));
#else
    static_cast<void>(device);
    return "rejected: built without nvcc";
#endif
  }
  if (plan.rejected != nullptr) return std::string("rejected: ") + plan.rejected;
  std::string text = plan.exchange == recurrent::Exchange::block     ? "exchange=block"
                     : plan.exchange == recurrent::Exchange::cluster ? "exchange=cluster"
                                                                     : "exchange=grid";
  const auto add = [&](const char* name, int64_t value) {
    text += std::string(" ") + name + "=" + std::to_string(value);
  };
  add("blocks", plan.blocks);
  add("groups", plan.groups);
  add("directions", plan.directions);
  add("at_once", plan.at_once);
  add("waves", plan.waves);
  add("rows", recurrent::kRows);
  add("strands", plan.strands);
  add("partners", plan.partners);
  add("units", plan.units);
  add("tiles", plan.tiles);
  add("splits", plan.splits);
  add("chunks", plan.chunks);
  add("split_chunks", plan.split_chunks);
  add("threads", plan.threads);
  add("shared_bytes", plan.layout.bytes);
  add("weight_bytes", plan.weight_bytes);
  add("held_bytes", plan.held_bytes);
  add("issue_cycles", static_cast<int64_t>(plan.costs.issue));
  add("shared_cycles", static_cast<int64_t>(plan.costs.shared));
  add("step_cycles", static_cast<int64_t>(plan.costs.step));
  return text;
}

#ifdef FASTSEQ_CUDA

const char* launch(const recurrent::Directions<RecurrentForward>& directions,
                   const recurrent::Plan& plan, recurrent::Arithmetic arithmetic, void* workspace,
                   void* stream) {
  return recurrent_forward_cuda(directions, plan, arithmetic, workspace, stream);
}

const char* launch(const recurrent::Directions<RecurrentBackward>& directions,
                   const recurrent::Plan& plan, recurrent::Arithmetic arithmetic, void* workspace,
                   void* stream) {
  return recurrent_backward_cuda(directions, plan, arithmetic, workspace, stream);
}

// Plans the problems of one direction or two for the device and launches them.
template <class Problem>
void run_persistent(const recurrent::Directions<Problem>& directions, int count, const Tensor& like,
                    bool tf32) {
  constexpr bool kBackward = std::is_same_v<Problem, RecurrentBackward>;
  const CudaCall call(like);
  const Problem& first = directions.of[0];
  const recurrent::Arithmetic arithmetic = arithmetic_of(first.dtype, tf32);
  const recurrent::Plan plan = recurrent_plan_cuda(
      {first.cell, arithmetic, first.batch, first.hidden, kBackward, count}, call.device);
  // Freed to torch's allocator on return: it hands the memory to later work of this stream.
  const Tensor workspace = empty({recurrent::workspace_bytes(plan)}, ScalarType::Char, like);
  call.check(kBackward ? "recurrent backward" : "recurrent",
             launch(directions, plan, arithmetic, workspace.data_ptr(), call.stream));
}

#endif

// ---- a layer in one direction -------------------------------------------------------------------

// Has the kernels of the tensors' device solve the problem.
void solve(RecurrentForward& problem, const Tensor& like, [[maybe_unused]] bool tf32) {
#ifdef FASTSEQ_CUDA
  if (like.is_cuda()) return run_persistent<RecurrentForward>({{problem, {}}}, 1, like, tf32);
#endif
  const RecurrentCpu& kernels = *instruction_set().recurrent;
  run_recurrent(
      problem, false, like,
      [&](int64_t begin, int64_t end) { kernels.forward(problem, begin, end); },
      [&](const Team& team) { kernels.forward_team(problem, team); });
}

void solve(RecurrentBackward& problem, const Tensor& like, [[maybe_unused]] bool tf32) {
#ifdef FASTSEQ_CUDA
  if (like.is_cuda()) return run_persistent<RecurrentBackward>({{problem, {}}}, 1, like, tf32);
#endif
  const RecurrentCpu& kernels = *instruction_set().recurrent;
  run_recurrent(
      problem, true, like,
      [&](int64_t begin, int64_t end) { kernels.backward(problem, begin, end); },
      [&](const Team& team) { kernels.backward_team(problem, team); });
}

// Side by side on a GPU.
template <class Problem>
void solve_both(recurrent::Directions<Problem>& directions, const Tensor& like, bool tf32) {
#ifdef FASTSEQ_CUDA
  if (like.is_cuda()) return run_persistent(directions, 2, like, tf32);
#endif
  for (Problem& problem : directions.of) solve(problem, like, tf32);
}

// Allocates what the forward returns and fills in its problem.
Tensors7 prepare(RecurrentForward& problem, const Tensor& gates_x, const Given& given, double eps,
                 bool save) {
  const Cell kind = static_cast<Cell>(given.cell);
  const Tensor& h0 = given.h0;
  const int64_t steps = gates_x.size(0), batch = gates_x.size(1);
  const int64_t hidden = gates_x.size(2) / gates_of(kind), state = h0.size(1);
  const bool lstm = kind == Cell::lstm, norm = given.norm_hh.has_value();
  const ScalarType dtype = h0.scalar_type(), compute = statistics_type(h0);
  const std::vector<int64_t> none{0};
  const auto saved = [&](bool present, int64_t size, ScalarType type) {
    return empty(present ? std::vector<int64_t>{steps, batch, size} : none, type, h0);
  };
  const Tensor output = saved(true, state, dtype);
  const Tensor h_n = empty({batch, state}, dtype, h0);
  const Tensor c_n = empty(lstm ? std::vector<int64_t>{batch, hidden} : none, dtype, h0);
  const Tensor cells = saved(lstm && save, hidden, compute);
  const Tensor gates = saved(save, saved_of(kind) * hidden, dtype);
  const Tensor normalized = saved(save && norm, gates_x.size(2), dtype);
  const Tensor statistics = saved(save && norm, 3, compute);
  fill_layer(problem, given, steps, hidden);
  problem.eps = eps;
  problem.gates_x = steps_of(gates_x);
  problem.output = output_of(output);
  problem.h_n = output_of(h_n);
  problem.c_n = output_of(c_n);
  problem.cells = output_of(cells);
  problem.gates = output_of(gates);
  problem.normalized = output_of(normalized);
  problem.statistics = output_of(statistics);
  return {output, h_n, c_n, cells, gates, normalized, statistics};
}

// What the forward left and what its results' gradients are.
struct Left {
  const Tensor& gates;
  const MaybeTensor &grad_output, &grad_h_n, &grad_c_n, &grad_cells;
  const Tensor &output, &cells, &normalized, &statistics;
};

// As for the forward; its bias is not read.
Tensors6 prepare(RecurrentBackward& problem, const Left& left, const Given& given, int64_t bptt,
                 double grad_clip) {
  const Cell kind = static_cast<Cell>(given.cell);
  const Tensor& h0 = given.h0;
  const int64_t steps = left.gates.size(0), batch = left.gates.size(1), state = h0.size(1);
  const int64_t hidden = left.gates.size(2) / saved_of(kind), width = gates_of(kind) * hidden;
  const bool norm = given.norm_hh.has_value();
  const ScalarType dtype = h0.scalar_type();
  const std::vector<int64_t> none{0};
  const auto made = [&](bool present, int64_t size) {
    return empty(present ? std::vector<int64_t>{steps, batch, size} : none, dtype, h0);
  };
  const Tensor grad_gates_x = made(true, width);
  const Tensor grad_gates_h = made(norm || kind == Cell::gru, width);
  const Tensor grad_h0 = empty({batch, state}, dtype, h0);
  const Tensor grad_c0 = empty(given.c0 ? std::vector<int64_t>{batch, hidden} : none, dtype, h0);
  const Tensor grad_projected = made(given.weight_hr.has_value(), state);
  const Tensor grad_rows = empty(norm ? std::vector<int64_t>{batch, 2 * (width + hidden)} : none,
                                 statistics_type(h0), h0);
  fill_layer(problem, given, steps, hidden);
  problem.grad_output = steps_of(left.grad_output);
  problem.grad_h_n = data_of(left.grad_h_n);
  problem.grad_c_n = data_of(left.grad_c_n);
  problem.grad_cells = steps_of(left.grad_cells);
  problem.output = left.output.data_ptr();
  problem.gates = left.gates.data_ptr();
  problem.cells = data_of(left.cells);
  problem.normalized = data_of(left.normalized);
  problem.statistics = data_of(left.statistics);
  problem.bptt = bptt;
  problem.grad_clip = grad_clip;
  problem.grad_gates_x = output_of(grad_gates_x);
  problem.grad_gates_h = output_of(grad_gates_h);
  problem.grad_h0 = output_of(grad_h0);
  problem.grad_c0 = output_of(grad_c0);
  problem.grad_projected = output_of(grad_projected);
  problem.grad_rows = output_of(grad_rows);
  return {grad_gates_x, grad_gates_h, grad_h0, grad_c0, grad_projected, grad_rows};
}

Tensors7 recurrent_forward(Tensor gates_x, Tensor h0, MaybeTensor c0, Tensor weight_hh,
                           MaybeTensor bias_hh, MaybeTensor weight_hr, MaybeTensor norm_hh,
                           MaybeTensor norm_c, MaybeTensor bias_c, MaybeTensor lengths,
                           MaybeTensor seed, MaybeTensor keep, int64_t cell, bool reverse,
                           double zoneout_h, double zoneout_c, int64_t threshold_h,
                           int64_t threshold_c, double eps, bool save, bool tf32) {
  const MaybeTensor weight = weight_hh;
  const Given given{cell,    h0,        c0,        weight,      bias_hh,    weight_hr,
                    norm_hh, norm_c,    bias_c,    lengths,     seed,       keep,
                    reverse, zoneout_h, zoneout_c, threshold_h, threshold_c};
  RecurrentForward problem;
  const Tensors7 made = prepare(problem, gates_x, given, eps, save);
  solve(problem, h0, tf32);
  return made;
}

Tensors6 recurrent_backward(Tensor gates, MaybeTensor grad_output, MaybeTensor grad_h_n,
                            MaybeTensor grad_c_n, MaybeTensor grad_cells, Tensor output,
                            Tensor cells, Tensor normalized, Tensor statistics, Tensor h0,
                            MaybeTensor c0, Tensor weight_hh, MaybeTensor weight_hr,
                            MaybeTensor norm_hh, MaybeTensor norm_c, MaybeTensor bias_c,
                            MaybeTensor lengths, MaybeTensor seed, MaybeTensor keep, int64_t cell,
                            bool reverse, double zoneout_h, double zoneout_c, int64_t threshold_h,
                            int64_t threshold_c, int64_t bptt, double grad_clip, bool tf32) {
  const MaybeTensor weight = weight_hh;
  const Given given{cell,    h0,        c0,        weight,      absent,     weight_hr,
                    norm_hh, norm_c,    bias_c,    lengths,     seed,       keep,
                    reverse, zoneout_h, zoneout_c, threshold_h, threshold_c};
  const Left left{gates,  grad_output, grad_h_n,   grad_c_n,  grad_cells,
                  output, cells,       normalized, statistics};
  RecurrentBackward problem;
  const Tensors6 made = prepare(problem, left, given, bptt, grad_clip);
  solve(problem, h0, tf32);
  return made;
}

// ---- both directions of a layer at once: of each argument two, or none --------------------------

MaybeTensor of_direction(const std::vector<Tensor>& tensors, size_t direction) {
  return tensors.empty() ? MaybeTensor{} : MaybeTensor{tensors[direction]};
}

// output, h_n, c_n, cells and gates of the first direction, and of the second.
std::vector<Tensor> recurrent_bidirectional_forward(std::vector<Tensor> gates_x,
                                                    std::vector<Tensor> h0, std::vector<Tensor> c0,
                                                    std::vector<Tensor> weight_hh,
                                                    std::vector<Tensor> bias_hh,
                                                    std::vector<Tensor> keep, MaybeTensor lengths,
                                                    int64_t cell, bool save, bool tf32) {
  recurrent::Directions<RecurrentForward> directions;
  std::vector<Tensor> made;
  for (size_t d = 0; d < 2; ++d) {
    const MaybeTensor c = of_direction(c0, d), bias = of_direction(bias_hh, d);
    const MaybeTensor weight = weight_hh[d], kept = of_direction(keep, d);
    const Given given{cell,   h0[d],  c,       weight, bias, absent, absent,
                      absent, absent, lengths, absent, kept, d == 1};
    const auto [output, h_n, c_n, cells, gates, normalized, statistics] =
        prepare(directions.of[d], gates_x[d], given, 0, save);
    made.insert(made.end(), {output, h_n, c_n, cells, gates});
  }
  solve_both(directions, h0[0], tf32);
  return made;
}

// grad_gates_x, grad_gates_h, grad_h0 and grad_c0 of the first direction, and of the second.
// Gradients of a result of which there are none come as an empty list; an empty tensor is one's.
std::vector<Tensor> recurrent_bidirectional_backward(
    std::vector<Tensor> gates, std::vector<Tensor> grad_output, std::vector<Tensor> grad_h_n,
    std::vector<Tensor> grad_c_n, std::vector<Tensor> grad_cells, std::vector<Tensor> output,
    std::vector<Tensor> cells, std::vector<Tensor> h0, std::vector<Tensor> c0,
    std::vector<Tensor> weight_hh, std::vector<Tensor> keep, MaybeTensor lengths, int64_t cell,
    double grad_clip, bool tf32) {
  recurrent::Directions<RecurrentBackward> directions;
  std::vector<Tensor> made;
  for (size_t d = 0; d < 2; ++d) {
    const MaybeTensor c = of_direction(c0, d), weight = weight_hh[d];
    const MaybeTensor kept = of_direction(keep, d), by_output = of_direction(grad_output, d);
    const MaybeTensor by_h = of_direction(grad_h_n, d), by_c = of_direction(grad_c_n, d);
    const MaybeTensor by_cells = of_direction(grad_cells, d);
    const Given given{cell,   h0[d],  c,       weight, absent, absent, absent,
                      absent, absent, lengths, absent, kept,   d == 1};
    const Left left{gates[d],  by_output, by_h,     by_c,    by_cells,
                    output[d], cells[d],  cells[d], cells[d]};
    const auto [grad_gates_x, grad_gates_h, grad_h0, grad_c0, projected, rows] =
        prepare(directions.of[d], left, given, 0, grad_clip);
    made.insert(made.end(), {grad_gates_x, grad_gates_h, grad_h0, grad_c0});
  }
  solve_both(directions, h0[0], tf32);
  return made;
}

// ---- the products around the loop, of small layers ----------------------------------------------

// Multiplications, 0.1 ms of them, that are worth a thread: where cores are short, waiting for one
// that was not there in time costs more than all the rest of a small layer.
constexpr int64_t kProductWork = 1 << 22;

const float* floats(const MaybeTensor& tensor) {
  return static_cast<const float*>(data_of(tensor));
}
float* made_floats(const Tensor& tensor) { return static_cast<float*>(output_of(tensor)); }

// [T, B, GH]: the input's gates with both biases.
Tensor recurrent_input_gates_cpu(Tensor input, Tensor weight_ih, MaybeTensor bias_ih,
                                 MaybeTensor bias_hh) {
  const RecurrentCpu& kernels = *instruction_set().recurrent;
  RecurrentProducts problem;
  problem.features = input.size(2);
  problem.gates = weight_ih.size(0);
  problem.input = floats(input);
  problem.weight_ih = floats(weight_ih);
  problem.bias_ih = floats(bias_ih);
  problem.bias_hh = floats(bias_hh);
  const Tensor gates_x =
      empty({input.size(0), input.size(1), problem.gates}, ScalarType::Float, input);
  const Tensor packed = empty({kernels.products_bytes(problem)}, ScalarType::Char, input);
  problem.packed = static_cast<float*>(packed.data_ptr());
  problem.gates_x = made_floats(gates_x);
  kernels.pack_products(problem);
  const int64_t rows = input.size(0) * input.size(1);
  parallel(rows, 1 + kProductWork / (1 + problem.features * problem.gates),
           [&](int64_t begin, int64_t end) { kernels.input_gates(problem, begin, end); });
  return gates_x;
}

// Of what a layer is made of, from those of its gates: input 1, weight_ih 2, weight_hh 4, bias_ih
// 8, bias_hh 16 of wanted; an empty tensor for what is not.
Tensors5 recurrent_gradients_cpu(Tensor grad_gates_x, Tensor grad_gates_h, Tensor input,
                                 Tensor weight_ih, Tensor output, Tensor h0, bool reverse,
                                 int64_t wanted) {
  const RecurrentCpu& kernels = *instruction_set().recurrent;
  RecurrentProducts problem;
  problem.steps = input.size(0);
  problem.batch = input.size(1);
  problem.features = input.size(2);
  problem.gates = weight_ih.size(0);
  problem.state = h0.size(1);
  problem.reverse = reverse;
  problem.input = floats(input);
  problem.weight_ih = floats(weight_ih);
  problem.output = floats(output);
  problem.h0 = floats(h0);
  problem.grad_gates_x = floats(grad_gates_x);
  problem.grad_gates_h = floats(grad_gates_h);
  const std::vector<int64_t> none{0}, bias{problem.gates};
  const auto made = [&](int64_t which, const std::vector<int64_t>& sizes) {
    return empty((wanted & which) != 0 ? sizes : none, ScalarType::Float, input);
  };
  const Tensor grad_input = made(1, {problem.steps, problem.batch, problem.features});
  const Tensor grad_weight_ih = made(2, {problem.gates, problem.features});
  const Tensor grad_weight_hh = made(4, {problem.gates, problem.state});
  const Tensor grad_bias_ih = made(8, bias), grad_bias_hh = made(16, bias);
  problem.grad_input = made_floats(grad_input);
  problem.grad_weight_ih = made_floats(grad_weight_ih);
  problem.grad_weight_hh = made_floats(grad_weight_hh);
  problem.grad_bias_ih = made_floats(grad_bias_ih);
  problem.grad_bias_hh = made_floats(grad_bias_hh);
  // One task for all threads: parts in the order of rows of the weights, then of the input.
  const int64_t rows = problem.steps * problem.batch, parts = 16;
  const int64_t work = rows * problem.gates * (2 * problem.features + problem.state);
  parallel(parts, work < 2 * kProductWork ? parts : 1, [&](int64_t begin, int64_t end) {
    const auto cut = [&](int64_t count, int64_t part) { return count * part / parts; };
    kernels.weight_gradients(problem, cut(problem.gates, begin), cut(problem.gates, end));
    if (problem.grad_input != nullptr)
      kernels.input_gradient(problem, cut(rows, begin), cut(rows, end));
  });
  return {grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh};
}

// ---- one step, from both halves of the gates ----------------------------------------------------

Tensors4 recurrent_cell_forward_cpu(Tensor gates_x, Tensor gates_h, Tensor h, MaybeTensor c,
                                    int64_t cell, bool save) {
  RecurrentForward problem;
  const Cell kind = static_cast<Cell>(cell);
  const int64_t batch = h.size(0), hidden = h.size(1);
  const std::vector<int64_t> none{0}, sizes{batch, hidden};
  const Tensor h_new = empty(sizes, h.scalar_type(), h);
  const Tensor c_new = empty(c ? sizes : none, h.scalar_type(), h);
  const Tensor cells = empty(c && save ? sizes : none, statistics_type(h), h);
  const Tensor saved =
      empty(save ? std::vector<int64_t>{batch, saved_of(kind) * hidden} : none, h.scalar_type(), h);
  // What the kernel stores as h_n is its output: there is but one step.
  const Tensor output = empty(sizes, h.scalar_type(), h);
  fill_states(problem, cell, 1, hidden, h, c);
  problem.gates_x = {gates_x.data_ptr(), 0, gates_x.stride(0)};
  problem.gates_h = gates_h.data_ptr();
  problem.output = output_of(output);
  problem.h_n = output_of(h_new);
  problem.c_n = output_of(c_new);
  problem.cells = output_of(cells);
  problem.gates = output_of(saved);
  solve(problem, h, false);
  return {h_new, c_new, cells, saved};
}

Tensors4 recurrent_cell_backward_cpu(Tensor saved, MaybeTensor grad_h, MaybeTensor grad_c,
                                     Tensor cells, Tensor h, MaybeTensor c, int64_t cell) {
  RecurrentBackward problem;
  const Cell kind = static_cast<Cell>(cell);
  const int64_t batch = h.size(0), hidden = h.size(1), width = gates_of(kind) * hidden;
  const std::vector<int64_t> none{0}, gate_sizes{batch, width};
  const ScalarType dtype = h.scalar_type();
  const Tensor grad_gates_x = empty(gate_sizes, dtype, h);
  const Tensor grad_gates_h = empty(kind == Cell::gru ? gate_sizes : none, dtype, h);
  const Tensor grad_h_old = empty({batch, hidden}, dtype, h);
  const Tensor grad_c_old = empty(c ? std::vector<int64_t>{batch, hidden} : none, dtype, h);
  fill_states(problem, cell, 1, hidden, h, c);
  problem.grad_h_n = data_of(grad_h);
  problem.grad_c_n = data_of(grad_c);
  problem.gates = saved.data_ptr();
  problem.cells = data_of(cells);
  problem.grad_gates_x = output_of(grad_gates_x);
  problem.grad_gates_h = output_of(grad_gates_h);
  problem.grad_h0 = output_of(grad_h_old);
  problem.grad_c0 = output_of(grad_c_old);
  solve(problem, h, false);
  return {grad_gates_x, grad_gates_h, grad_h_old, grad_c_old};
}

}  // namespace
}  // namespace fastseq
