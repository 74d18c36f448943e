// What the bindings of every family share: threads, streams, and how a problem is read from
// arguments.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <tuple>

#include "../tensors.h"

#ifdef FASTSEQ_CUDA
#include "../cuda/device.h"
// The one symbol of libtorch_cuda. Weak: in a CPU build of torch it stays null, and no CUDA tensor
// can reach the code that calls it.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace fastseq {
namespace {

using torch::headeronly::ScalarType;

// Whether a tensor is so large that a core's share of the cache would not hold it for its reader. A
// constant: what the system reports is a socket's cache, and in virtual machines often not even
// that.
bool past_cache(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size()) >= 8 << 20;
}

// [0, count) in ranges of at least grain on torch's threads; a small problem on this one.
template <class F>
void parallel(int64_t count, int64_t grain, const F& range) {
  if (count <= grain) return range(0, count);
  torch::stable::parallel_for(0, count, grain, range);
}

// Rows that are worth a task of their own.
[[maybe_unused]] int64_t grain(int64_t row_length) { return 1 + 32768 / row_length; }

Dropout dropout_of(const std::optional<Tensor>& seed, int64_t threshold, double scale) {
  Dropout dropout;
  if (seed) dropout.seed = static_cast<const int64_t*>(seed->data_ptr());
  dropout.threshold = static_cast<uint32_t>(threshold);
  dropout.scale = scale;
  return dropout;
}

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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

#endif

}  // namespace
}  // namespace fastseq
