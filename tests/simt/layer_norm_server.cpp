// Lets the tests call the layer-norm entry points: fields of the structs in the order of their
// declaration.
#include "../../csrc/cuda/layer_norm.h"

#include "server.h"

namespace simt {
namespace {

fastseq::Rows read_rows(Request& request) {
  fastseq::Rows rows;
  rows.data = request.pointer();
  rows.dtype = static_cast<fastseq::DType>(request.integer());
  rows.inner = request.integer();
  rows.stride_outer = request.integer();
  rows.stride_inner = request.integer();
  return rows;
}

fastseq::Vector read_vector(Request& request) {
  fastseq::Vector vector;
  vector.data = request.pointer();
  vector.dtype = static_cast<fastseq::DType>(request.integer());
  return vector;
}

fastseq::Dropout read_dropout(Request& request) {
  fastseq::Dropout dropout;
  dropout.seed = static_cast<const int64_t*>(request.pointer());
  dropout.threshold = static_cast<uint32_t>(request.integer());
  dropout.scale = static_cast<float>(request.real());
  return dropout;
}

const char* forward(Request& request) {
  fastseq::LayerNormForward problem;
  problem.rows = request.integer();
  problem.row_length = request.integer();
  problem.input = read_rows(request);
  problem.residual = read_rows(request);
  problem.weight = read_vector(request);
  problem.bias = read_vector(request);
  problem.dropout = read_dropout(request);
  problem.eps = request.real();
  problem.rms = request.integer() != 0;
  problem.output = read_rows(request);
  problem.new_residual = read_rows(request);
  problem.mean = read_vector(request);
  problem.rstd = read_vector(request);
  return fastseq::layer_norm_forward_cuda(problem, nullptr);
}

const char* backward(Request& request) {
  fastseq::LayerNormBackward problem;
  problem.rows = request.integer();
  problem.row_length = request.integer();
  problem.grad_output = read_rows(request);
  problem.grad_new_residual = read_rows(request);
  problem.x = read_rows(request);
  problem.weight = read_vector(request);
  problem.mean = read_vector(request);
  problem.rstd = read_vector(request);
  problem.dropout = read_dropout(request);
  problem.rms = request.integer() != 0;
  problem.grad_x = read_rows(request);
  problem.grad_input = read_rows(request);
  problem.grad_weight = read_vector(request);
  problem.grad_bias = read_vector(request);
  problem.partials = request.pointer();
  problem.partial_rows = request.integer();
  return fastseq::layer_norm_backward_cuda(problem, nullptr);
}

const char* partial_rows(Request& request) {
  const int64_t rows = request.integer();
  const int64_t row_length = request.integer();
  const int sm_count = static_cast<int>(request.integer());
  *static_cast<int64_t*>(request.pointer()) =
      fastseq::layer_norm_partial_rows_cuda(rows, row_length, sm_count);
  return nullptr;
}

}  // namespace

void add_functions(Functions& functions) {
  functions["layer_norm_forward"] = forward;
  functions["layer_norm_backward"] = backward;
  functions["layer_norm_partial_rows"] = partial_rows;
}

}  // namespace simt
