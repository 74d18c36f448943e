// What standard C++ has no words for, so that a kernel file compiles with nvcc and, unchanged, with
// the C++ compiler against the host emulation in tests/simt: launches and shared memory.
#pragma once

#include <cuda_runtime.h>

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
