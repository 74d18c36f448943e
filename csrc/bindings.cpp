// Registers the C++ ops: torch.ops.fastseq_C.*, private to fastseq/ops. The one file that knows torch.
#include "tensors.h"

#include <Python.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/layer_norm.h"

#ifdef FASTSEQ_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

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

// Whether a tensor is so large that the last-level cache would not hold it for its reader.
bool past_cache(const Tensor& tensor) {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  static const int64_t found = 0;
#endif
  const int64_t cache = found > 0 ? found : 32 << 20;
  return 2 * tensor.numel() * static_cast<int64_t>(tensor.element_size()) >= cache;
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

LayerNormForward forward_args(const Tensor& input, const std::optional<Tensor>& residual,
                              const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& seed, const Tensor& output,
                              const Tensor& new_residual, const Tensor& mean, const Tensor& rstd,
                              int64_t row_length, double eps, bool rms, int64_t threshold,
                              double scale) {
  LayerNormForward args;
  args.rows = rstd.numel();
  args.row_length = row_length;
  args.input = rows_of(input, row_length);
  args.residual = rows_of(residual, row_length);
  args.weight = vector_of(weight);
  args.bias = vector_of(bias);
  args.dropout = dropout_of(seed, threshold, scale);
  args.eps = eps;
  args.rms = rms;
  args.output = rows_of(output, row_length);
  args.new_residual = rows_of(new_residual, row_length);
  args.mean = vector_of(mean);
  args.rstd = vector_of(rstd);
  return args;
}

LayerNormBackward backward_args(const Tensor& grad_output,
                                const std::optional<Tensor>& grad_new_residual, const Tensor& x,
                                const std::optional<Tensor>& weight, const Tensor& mean,
                                const Tensor& rstd, const std::optional<Tensor>& seed,
                                const Tensor& grad_x, const Tensor& grad_input,
                                const Tensor& grad_weight, const Tensor& grad_bias,
                                int64_t row_length, int64_t threshold, double scale) {
  LayerNormBackward args;
  args.rows = rstd.numel();
  args.row_length = row_length;
  args.grad_output = rows_of(grad_output, row_length);
  args.grad_new_residual = rows_of(grad_new_residual, row_length);
  args.x = rows_of(x, row_length);
  args.weight = vector_of(weight);
  args.mean = vector_of(mean);
  args.rstd = vector_of(rstd);
  args.dropout = dropout_of(seed, threshold, scale);
  args.rms = mean.numel() == 0;
  args.grad_x = rows_of(grad_x, row_length);
  args.grad_input = rows_of(grad_input, row_length);
  args.grad_weight = vector_of(grad_weight);
  args.grad_bias = vector_of(grad_bias);
  return args;
}

void layer_norm_forward_cpu(Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight,
                            std::optional<Tensor> bias, std::optional<Tensor> seed, Tensor output,
                            Tensor new_residual, Tensor mean, Tensor rstd, int64_t row_length,
                            double eps, bool rms, int64_t threshold, double scale) {
  LayerNormForward args =
      forward_args(input, residual, weight, bias, seed, output, new_residual, mean, rstd, row_length,
                   eps, rms, threshold, scale);
  args.past_cache = past_cache(output);
  const LayerNormCpu& kernels = *instruction_set().layer_norm;
  torch::stable::parallel_for(
      0, args.rows, grain(row_length),
      [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
}

void layer_norm_backward_cpu(Tensor grad_output, std::optional<Tensor> grad_new_residual, Tensor x,
                             std::optional<Tensor> weight, Tensor mean, Tensor rstd,
                             std::optional<Tensor> seed, Tensor grad_x, Tensor grad_input,
                             Tensor grad_weight, Tensor grad_bias, int64_t row_length,
                             int64_t threshold, double scale) {
  LayerNormBackward args =
      backward_args(grad_output, grad_new_residual, x, weight, mean, rstd, seed, grad_x, grad_input,
                    grad_weight, grad_bias, row_length, threshold, scale);
  const LayerNormCpu& kernels = *instruction_set().layer_norm;
  args.past_cache = past_cache(grad_x);
  args.partial_rows = layer_norm_partial_rows(args.rows);
  // Doubles whatever the compute type: twice the room of floats, never too small.
  std::vector<double> partials(static_cast<size_t>(2 * args.partial_rows * row_length));
  args.partials = partials.data();
  const int64_t rows_per_partial = (args.rows + args.partial_rows - 1) / args.partial_rows;
  torch::stable::parallel_for(
      0, args.partial_rows, 1 + grain(row_length) / rows_per_partial,
      [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
  torch::stable::parallel_for(
      0, row_length, 1 + 32768 / args.partial_rows,
      [&](int64_t begin, int64_t end) { kernels.finish(args, begin, end); });
}

}  // namespace
}  // namespace fastseq

STABLE_TORCH_LIBRARY(fastseq_C, m) {
  m.def("cpu_instruction_set() -> str");
  m.def("cuda_architectures() -> str");
  m.def(
      "layer_norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
      "Tensor(a!) output, Tensor(b!) new_residual, Tensor(c!) mean, Tensor(d!) rstd, "
      "int row_length, float eps, bool rms, int threshold, float scale) -> ()");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor? grad_new_residual, Tensor x, Tensor? weight, "
      "Tensor mean, Tensor rstd, Tensor? seed, Tensor(a!) grad_x, Tensor(b!) grad_input, "
      "Tensor(c!) grad_weight, Tensor(d!) grad_bias, int row_length, int threshold, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&fastseq::cpu_instruction_set));
  m.impl("cuda_architectures", TORCH_BOX(&fastseq::cuda_architectures));
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_C, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fastseq::layer_norm_forward_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&fastseq::layer_norm_backward_cpu));
}

// Importing fastseq._C is loading it; there is nothing in it for Python.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C",    nullptr, -1,     nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
