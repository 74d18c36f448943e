// What standard C++ has no words for, so that a kernel file compiles with nvcc and, unchanged, with
// the C++ compiler against the host emulation in tests/simt: launches and shared memory; and
// launches that ask for more than a grid of independent blocks.
#pragma once

#include <cuda_runtime.h>

#include <mutex>

#ifdef __CUDACC__

// FASTSEQ_LAUNCH(kernel, grid, block, shared_bytes, stream)(arguments...); kernel is a function
// pointer, so that a table of template instances can name it.
#define FASTSEQ_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>

// FASTSEQ_SHARED(float[2][32], sums); declares an array that the block shares, uninitialised.
#define FASTSEQ_SHARED(type, name) __shared__::fastseq::SharedType<type> name

// FASTSEQ_DYNAMIC_SHARED(float, row); points at the shared memory whose size the launch gave.
#define FASTSEQ_DYNAMIC_SHARED(type, name)                      \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)

namespace fastseq {
template <typename T>
struct SharedTypeOf {
  using Type = T;
};
template <typename T>
using SharedType = typename SharedTypeOf<T>::Type;
}  // namespace fastseq

#else

#define FASTSEQ_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  SIMT_LAUNCH(kernel, grid, block, shared_bytes, stream)
#define FASTSEQ_SHARED(type, name) SIMT_SHARED(type, name)
#define FASTSEQ_DYNAMIC_SHARED(type, name) SIMT_DYNAMIC_SHARED(type, name)

#endif

namespace fastseq {

constexpr size_t kDefaultSharedBytes = 48 << 10;  // more has to be asked for
constexpr unsigned kPortableCluster = 8;          // and so do larger clusters

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;   // of dynamic shared memory
  unsigned cluster = 1;      // blocks along x that run at once and share memory
  bool cooperative = false;  // all blocks of the grid run at once, or the launch is an error
};

// Lets a kernel have so many bytes on the current device, and never fewer than it could have
// before: a launch with more may be on its way in another thread.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  if (bytes <= kDefaultSharedBytes) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || static_cast<size_t>(attributes.maxDynamicSharedSizeBytes) >= bytes)
    return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  if (error == cudaSuccess && shape.cluster > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // reported here, so not to the next who asks
  return error;
}

}  // namespace fastseq
