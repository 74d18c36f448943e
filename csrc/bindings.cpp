// Registers the C++ ops: torch.ops.fastseq_C.*, private to fastseq/ops. The one file that knows torch.
#include "tensors.h"
#include <torch/csrc/stable/accelerator.h>

#include <Python.h>

#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/layer_norm.h"

#ifdef FASTSEQ_CUDA
#include "cuda/device.h"
#include "cuda/layer_norm.h"
// The one symbol of libtorch_cuda. Weak: in a CPU build of torch it stays null, and no CUDA tensor can
// reach the code that calls it.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace fastseq {
namespace {

// ---- the CPU's instruction set --------------------------------------------------------------------

struct InstructionSet {
  const char* name;
  const LayerNormCpu* layer_norm;
};

// The widest the machine has; FASTSEQ_CPU_ISA=avx512|avx2|generic asks for less (tests do).
const InstructionSet& instruction_set() {
  static const InstructionSet chosen = [] {
    const char* variable = std::getenv("FASTSEQ_CPU_ISA");
    const std::string asked = variable == nullptr ? "" : variable;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && (asked.empty() || asked == "avx512_bf16"))
      return InstructionSet{"avx512_bf16", &avx512_bf16::layer_norm};
    if (avx512 && (asked.empty() || asked == "avx512"))
      return InstructionSet{"avx512", &avx512::layer_norm};
    if (avx2 && asked != "generic") return InstructionSet{"avx2", &avx2::layer_norm};
#endif
    return InstructionSet{"generic", &generic::layer_norm};
  }();
  return chosen;
}

std::string cpu_instruction_set() { return instruction_set().name; }

std::string cuda_architectures() {
#ifdef FASTSEQ_CUDA
  return FASTSEQ_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

// ---- layer_norm -----------------------------------------------------------------------------------

// Whether a tensor is so large that a core's share of the cache would not hold it for its reader. A
// constant: what the system reports is a socket's cache, and in virtual machines often not even that.
bool past_cache(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size()) >= 16 << 20;
}

// [0, count) in ranges of at least grain on torch's threads; a small problem on this one.
template <class F>
void parallel(int64_t count, int64_t grain, const F& range) {
  if (count <= grain) return range(0, count);
  torch::stable::parallel_for(0, count, grain, range);
}

// Rows that are worth a task of their own.
int64_t grain(int64_t row_length) { return 1 + 32768 / row_length; }

Dropout dropout_of(const std::optional<Tensor>& seed, int64_t threshold, double scale) {
  Dropout dropout;
  if (seed) dropout.seed = static_cast<const int64_t*>(seed->data_ptr());
  dropout.threshold = static_cast<uint32_t>(threshold);
  dropout.scale = static_cast<float>(scale);
  return dropout;
}

using torch::headeronly::ScalarType;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Allocates what the op returns, fills in the problem, and has launch solve it: the same for the CPU
// and CUDA. Outputs are laid out as the fake in fastseq/ops/layer_norm.py says.
template <class Launch>
Tensors4 forward(const Tensor& input, const std::optional<Tensor>& residual,
                 const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& seed, int64_t row_length, double eps, bool rms,
                 int64_t threshold, double scale, ScalarType output_dtype, ScalarType residual_dtype,
                 Launch launch) {
  const std::vector<int64_t> sizes = sizes_of(input);
  const ScalarType statistics = statistics_type(input);
  LayerNormForward problem;
  problem.rows = input.numel() / row_length;
  const Tensor output = empty(sizes, output_dtype, input);
  const Tensor new_residual =
      empty(residual ? sizes : std::vector<int64_t>{0}, residual_dtype, input);
  const Tensor mean = empty({rms ? 0 : problem.rows}, statistics, input);
  const Tensor rstd = empty({problem.rows}, statistics, input);

  problem.row_length = row_length;
  problem.input = rows_of(input, row_length);
  problem.residual = rows_of(residual, row_length);
  problem.weight = vector_of(weight);
  problem.bias = vector_of(bias);
  problem.dropout = dropout_of(seed, threshold, scale);
  problem.eps = eps;
  problem.rms = rms;
  problem.output = rows_of(output, row_length);
  problem.new_residual = rows_of(new_residual, row_length);
  problem.mean = vector_of(mean);
  problem.rstd = vector_of(rstd);
  problem.past_cache = past_cache(output);
  if (problem.rows > 0) launch(problem);
  return {output, new_residual, mean, rstd};
}

enum Wanted : int64_t { kGradX = 1, kGradInput = 2, kGradWeight = 4, kGradBias = 8 };

template <class Launch>
Tensors4 backward(const Tensor& grad_output, const std::optional<Tensor>& grad_new_residual,
                  const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd,
                  const std::optional<Tensor>& seed, int64_t row_length, int64_t threshold,
                  double scale, ScalarType input_dtype, int64_t wanted, Launch launch) {
  const std::vector<int64_t> none{0};
  const std::vector<int64_t> sizes = sizes_of(x);
  const auto parameter = [&](const std::optional<Tensor>& like, bool want) {
    return like && want ? empty(sizes_of(*like), like->scalar_type(), x)
                        : empty(none, x.scalar_type(), x);
  };
  const Tensor grad_x = empty(wanted & kGradX ? sizes : none, x.scalar_type(), x);
  const Tensor grad_input = empty(wanted & kGradInput ? sizes : none, input_dtype, x);
  const Tensor grad_weight = parameter(weight, wanted & kGradWeight);
  const Tensor grad_bias = parameter(bias, wanted & kGradBias);

  LayerNormBackward problem;
  problem.rows = rstd.numel();
  problem.row_length = row_length;
  problem.grad_output = rows_of(grad_output, row_length);
  problem.grad_new_residual = rows_of(grad_new_residual, row_length);
  problem.x = rows_of(x, row_length);
  problem.weight = vector_of(weight);
  problem.mean = vector_of(mean);
  problem.rstd = vector_of(rstd);
  problem.dropout = dropout_of(seed, threshold, scale);
  problem.rms = mean.numel() == 0;
  problem.grad_x = rows_of(grad_x, row_length);
  problem.grad_input = rows_of(grad_input, row_length);
  problem.grad_weight = vector_of(grad_weight);
  problem.grad_bias = vector_of(grad_bias);
  problem.past_cache = past_cache(grad_x);
  launch(problem);
  return {grad_x, grad_input, grad_weight, grad_bias};
}

Tensors4 layer_norm_forward_cpu(Tensor input, std::optional<Tensor> residual,
                                std::optional<Tensor> weight, std::optional<Tensor> bias,
                                std::optional<Tensor> seed, int64_t row_length, double eps, bool rms,
                                int64_t threshold, double scale, ScalarType output_dtype,
                                ScalarType residual_dtype) {
  return forward(input, residual, weight, bias, seed, row_length, eps, rms, threshold, scale,
                 output_dtype, residual_dtype, [&](const LayerNormForward& problem) {
                   const LayerNormCpu& kernels = *instruction_set().layer_norm;
                   parallel(problem.rows, grain(row_length),
                                               [&](int64_t begin, int64_t end) {
                                                 kernels.forward(problem, begin, end);
                                               });
                 });
}

Tensors4 layer_norm_backward_cpu(Tensor grad_output, std::optional<Tensor> grad_new_residual, Tensor x,
                                 std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor mean,
                                 Tensor rstd, std::optional<Tensor> seed, int64_t row_length,
                                 int64_t threshold, double scale, ScalarType input_dtype,
                                 int64_t wanted) {
  return backward(
      grad_output, grad_new_residual, x, weight, bias, mean, rstd, seed, row_length, threshold, scale,
      input_dtype, wanted, [&](LayerNormBackward& problem) {
        const LayerNormCpu& kernels = *instruction_set().layer_norm;
        problem.partial_rows = layer_norm_partial_rows(problem.rows);
        const Tensor partials =
            empty({2, problem.partial_rows, row_length}, statistics_type(x), x);
        problem.partials = partials.data_ptr();
        const int64_t rows_each = problem.rows / problem.partial_rows + 1;
        parallel(
            problem.partial_rows, 1 + grain(row_length) / rows_each,
            [&](int64_t begin, int64_t end) { kernels.backward(problem, begin, end); });
        parallel(
            row_length, 1 + 32768 / problem.partial_rows,
            [&](int64_t begin, int64_t end) { kernels.finish(problem, begin, end); });
      });
}

#ifdef FASTSEQ_CUDA

// The device of a tensor made current, and torch's stream on it.
struct CudaCall {
  explicit CudaCall(const Tensor& tensor)
      : device(tensor.get_device_index()), guard(static_cast<int32_t>(device)) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }
  void check(const char* name, const char* error) const {
    STD_TORCH_CHECK(error == nullptr, "fastseq ", name, " on CUDA: ", error);
  }
  const int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

Tensors4 layer_norm_forward_cuda_op(Tensor input, std::optional<Tensor> residual,
                                    std::optional<Tensor> weight, std::optional<Tensor> bias,
                                    std::optional<Tensor> seed, int64_t row_length, double eps,
                                    bool rms, int64_t threshold, double scale,
                                    ScalarType output_dtype, ScalarType residual_dtype) {
  const CudaCall call(input);
  return forward(input, residual, weight, bias, seed, row_length, eps, rms, threshold, scale,
                 output_dtype, residual_dtype, [&](const LayerNormForward& problem) {
                   call.check("layer_norm", layer_norm_forward_cuda(problem, call.stream));
                 });
}

Tensors4 layer_norm_backward_cuda_op(Tensor grad_output, std::optional<Tensor> grad_new_residual,
                                     Tensor x, std::optional<Tensor> weight,
                                     std::optional<Tensor> bias, Tensor mean, Tensor rstd,
                                     std::optional<Tensor> seed, int64_t row_length,
                                     int64_t threshold, double scale, ScalarType input_dtype,
                                     int64_t wanted) {
  const CudaCall call(x);
  return backward(
      grad_output, grad_new_residual, x, weight, bias, mean, rstd, seed, row_length, threshold, scale,
      input_dtype, wanted, [&](LayerNormBackward& problem) {
        problem.partial_rows = layer_norm_partial_rows_cuda(problem.rows, row_length,
                                                            multiprocessor_count_cuda(call.device));
        // Freed to torch's allocator on return: it hands the memory to later work of this stream.
        const Tensor partials = empty({2, problem.partial_rows, row_length}, ScalarType::Float, x);
        problem.partials = partials.data_ptr();
        call.check("layer_norm backward", layer_norm_backward_cuda(problem, call.stream));
      });
}

#endif

}  // namespace
}  // namespace fastseq

STABLE_TORCH_LIBRARY(fastseq_C, m) {
  m.def("cpu_instruction_set() -> str");
  m.def("cuda_architectures() -> str");
  m.def(
      "layer_norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
      "int row_length, float eps, bool rms, int threshold, float scale, ScalarType output_dtype, "
      "ScalarType residual_dtype) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor? grad_new_residual, Tensor x, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor rstd, Tensor? seed, int row_length, int threshold, "
      "float scale, ScalarType input_dtype, int wanted) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&fastseq::cpu_instruction_set));
  m.impl("cuda_architectures", TORCH_BOX(&fastseq::cuda_architectures));
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_C, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fastseq::layer_norm_forward_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&fastseq::layer_norm_backward_cpu));
}

#ifdef FASTSEQ_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastseq_C, CUDA, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fastseq::layer_norm_forward_cuda_op));
  m.impl("layer_norm_backward", TORCH_BOX(&fastseq::layer_norm_backward_cuda_op));
}
#endif

// Importing fastseq._C is loading it; there is nothing in it for Python.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C",    nullptr, -1,     nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
