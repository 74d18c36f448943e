// Registers the C++ ops: torch.ops.fastseq_C.*, private to fastseq/ops.
#include <Python.h>

#include "bindings/additive_attention.h"
#include "bindings/attention.h"
#include "bindings/cross_entropy.h"
#include "bindings/embedding.h"
#include "bindings/feed_forward.h"
#include "bindings/layer_norm.h"
#include "bindings/recurrent.h"
#include "bindings/rotary_embedding.h"
#include "bindings/softmax.h"

namespace fastseq {
namespace {

std::string cpu_instruction_set() { return instruction_set().name; }

std::string cuda_architectures() {
#ifdef FASTSEQ_CUDA
  return FASTSEQ_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

}  // namespace
}  // namespace fastseq

STABLE_TORCH_LIBRARY(fastseq_C, m) {
  m.def("cpu_instruction_set() -> str");
  m.def("cuda_architectures() -> str");
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor(a!) output, Tensor(b!) "
      "lse, Tensor? bias, Tensor? mask, Tensor? slopes, Tensor? sinks, Tensor? seed, float scale, "
      "float softcap, int threshold, float keep_scale, int[] geometry) -> bool");
  m.def(
      "attention_backward(Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
      "Tensor grad_output, Tensor? grad_lse, Tensor? delta, bool whole, Tensor(a!) grad_query, "
      "Tensor(b!) "
      "grad_key, Tensor(c!) grad_value, Tensor(d!)? grad_bias, Tensor? bias, Tensor? mask, Tensor? "
      "slopes, Tensor? seed, float scale, float softcap, int threshold, float keep_scale, int[] "
      "geometry) -> bool");
  m.def(
      "attention_decode(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, "
      "Tensor? slopes, Tensor? sinks, Tensor? key_lengths, float scale, float softcap, int left, "
      "int right, bool bottom_right, int split) -> (Tensor, Tensor)");
  m.def(
      "layer_norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? "
      "seed, "
      "int row_length, float eps, bool rms, int threshold, float scale, ScalarType output_dtype, "
      "ScalarType residual_dtype) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor? grad_new_residual, Tensor x, Tensor? "
      "weight, "
      "Tensor? bias, Tensor mean, Tensor rstd, Tensor? seed, int row_length, int threshold, "
      "float scale, ScalarType input_dtype, int wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
      "int reduction, float label_smoothing, float softcap, float z_loss, bool every_lse, "
      "ScalarType loss_dtype) -> (Tensor, Tensor, Tensor, Tensor, int)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, "
      "Tensor? weight, Tensor maximum, Tensor log_sum, Tensor denominator, int ignore_index, "
      "float label_smoothing, float softcap, float z_loss) -> Tensor");
  m.def("sample(Tensor logits, Tensor seed, int first_row, float temperature) -> Tensor");
  m.def(
      "softmax_forward(Tensor input, int length, int inner, bool log, ScalarType output_dtype) -> "
      "Tensor");
  m.def(
      "masked_softmax_forward(Tensor input, Tensor? mask, int length, float scale, int queries, "
      "int causal_offset, ScalarType output_dtype) -> Tensor");
  m.def(
      "softmax_backward(Tensor grad_output, Tensor output, int length, int inner, bool log, "
      "bool masked, float scale, ScalarType input_dtype) -> Tensor");
  m.def(
      "rotary_embedding(Tensor input, Tensor cos, Tensor sin, Tensor? positions, int offset, "
      "int length, int entry, bool interleaved, bool inverse) -> Tensor");
  m.def(
      "feed_forward_forward(Tensor hidden, Tensor? bias, Tensor? seed, int activation, "
      "int threshold, float scale) -> Tensor");
  m.def(
      "feed_forward_backward(Tensor grad, Tensor hidden, Tensor? bias, Tensor? seed, "
      "int activation, int threshold, float scale, int wanted) -> (Tensor, Tensor, Tensor)");
  m.def(
      "embedding_forward(Tensor token, Tensor position, Tensor? segment, Tensor ids, Tensor? "
      "positions, Tensor? segments, int offset, int length, float scale, Tensor? seed, "
      "int threshold, float keep_scale) -> (Tensor, int, int)");
  m.def(
      "embedding_backward(Tensor grad, Tensor? keys, int offset, int length, int rows, int skip, "
      "float scale, Tensor? seed, int threshold, float keep_scale) -> Tensor");
  m.def("additive_attention_scores(Tensor query, Tensor key, Tensor weight) -> Tensor");
  m.def(
      "additive_attention_gradients(Tensor grad_scores, Tensor query, Tensor key, Tensor weight) "
      "-> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "recurrent_forward(Tensor gates_x, Tensor h0, Tensor? c0, Tensor weight_hh, Tensor? bias_hh, "
      "Tensor? weight_hr, Tensor? norm_hh, Tensor? norm_c, Tensor? bias_c, Tensor? lengths, "
      "Tensor? seed, Tensor? keep, int cell, bool reverse, float zoneout_h, float zoneout_c, "
      "int threshold_h, int threshold_c, float eps, bool save, bool tf32) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "recurrent_backward(Tensor gates, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_cells, Tensor output, Tensor cells, Tensor normalized, Tensor statistics, "
      "Tensor h0, Tensor? c0, Tensor weight_hh, Tensor? weight_hr, Tensor? norm_hh, "
      "Tensor? norm_c, Tensor? bias_c, Tensor? lengths, Tensor? seed, Tensor? keep, int cell, "
      "bool reverse, float zoneout_h, float zoneout_c, int threshold_h, int threshold_c, int bptt, "
      "float grad_clip, bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "recurrent_input_gates(Tensor input, Tensor weight_ih, Tensor? bias_ih, Tensor? bias_hh) -> "
      "Tensor");
  m.def(
      "recurrent_gradients(Tensor grad_gates_x, Tensor grad_gates_h, Tensor input, "
      "Tensor weight_ih, Tensor output, Tensor h0, bool reverse, int wanted) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "recurrent_bidirectional_forward(Tensor[] gates_x, Tensor[] h0, Tensor[] c0, "
      "Tensor[] weight_hh, Tensor[] bias_hh, Tensor[] keep, Tensor? lengths, int cell, bool save, "
      "bool tf32) -> Tensor[]");
  m.def(
      "recurrent_bidirectional_backward(Tensor[] gates, Tensor[] grad_output, Tensor[] grad_h_n, "
      "Tensor[] grad_c_n, Tensor[] grad_cells, Tensor[] output, Tensor[] cells, Tensor[] h0, "
      "Tensor[] c0, Tensor[] weight_hh, Tensor[] keep, Tensor? lengths, int cell, float grad_clip, "
      "bool tf32) -> Tensor[]");
  m.def(
      "recurrent_plan(int cell, ScalarType dtype, bool tf32, int batch, int hidden, bool backward, "
      "int directions, int device, int[] chip) -> str");
  m.def(
      "recurrent_cell_forward(Tensor gates_x, Tensor gates_h, Tensor h, Tensor? c, int cell, "
      "bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "recurrent_cell_backward(Tensor saved, Tensor? grad_h, Tensor? grad_c, Tensor cells, "
      "Tensor h, Tensor? c, int cell) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&fastseq::cpu_instruction_set));
  m.impl("cuda_architectures", TORCH_BOX(&fastseq::cuda_architectures));
  m.impl("recurrent_plan", TORCH_BOX(&fastseq::recurrent_plan));
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_C, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastseq::attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&fastseq::attention_backward_cpu));
  m.impl("attention_decode", TORCH_BOX(&fastseq::attention_decode_cpu));
  m.impl("layer_norm_forward", TORCH_BOX(&fastseq::layer_norm_forward_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&fastseq::layer_norm_backward_cpu));
  m.impl("cross_entropy_forward", TORCH_BOX(&fastseq::cross_entropy_forward_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastseq::cross_entropy_backward_cpu));
  m.impl("sample", TORCH_BOX(&fastseq::sample_cpu));
  m.impl("softmax_forward", TORCH_BOX(&fastseq::softmax_forward_cpu));
  m.impl("masked_softmax_forward", TORCH_BOX(&fastseq::masked_softmax_forward_cpu));
  m.impl("softmax_backward", TORCH_BOX(&fastseq::softmax_backward_cpu));
  m.impl("rotary_embedding", TORCH_BOX(&fastseq::rotary_embedding_cpu));
  m.impl("feed_forward_forward", TORCH_BOX(&fastseq::feed_forward_forward_cpu));
  m.impl("feed_forward_backward", TORCH_BOX(&fastseq::feed_forward_backward_cpu));
  m.impl("embedding_forward", TORCH_BOX(&fastseq::embedding_forward_cpu));
  m.impl("embedding_backward", TORCH_BOX(&fastseq::embedding_backward_cpu));
  m.impl("additive_attention_scores", TORCH_BOX(&fastseq::additive_attention_scores_cpu));
  m.impl("additive_attention_gradients", TORCH_BOX(&fastseq::additive_attention_gradients_cpu));
  m.impl("recurrent_forward", TORCH_BOX(&fastseq::recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&fastseq::recurrent_backward));
  m.impl("recurrent_bidirectional_forward", TORCH_BOX(&fastseq::recurrent_bidirectional_forward));
  m.impl("recurrent_bidirectional_backward", TORCH_BOX(&fastseq::recurrent_bidirectional_backward));
  m.impl("recurrent_input_gates", TORCH_BOX(&fastseq::recurrent_input_gates_cpu));
  m.impl("recurrent_gradients", TORCH_BOX(&fastseq::recurrent_gradients_cpu));
  m.impl("recurrent_cell_forward", TORCH_BOX(&fastseq::recurrent_cell_forward_cpu));
  m.impl("recurrent_cell_backward", TORCH_BOX(&fastseq::recurrent_cell_backward_cpu));
}

#ifdef FASTSEQ_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastseq_C, CUDA, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fastseq::layer_norm_forward_cuda_op));
  m.impl("layer_norm_backward", TORCH_BOX(&fastseq::layer_norm_backward_cuda_op));
  m.impl("recurrent_forward", TORCH_BOX(&fastseq::recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&fastseq::recurrent_backward));
  m.impl("recurrent_bidirectional_forward", TORCH_BOX(&fastseq::recurrent_bidirectional_forward));
  m.impl("recurrent_bidirectional_backward", TORCH_BOX(&fastseq::recurrent_bidirectional_backward));
}
#endif

// Importing fastseq._C is loading it; there is nothing in it for Python.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
