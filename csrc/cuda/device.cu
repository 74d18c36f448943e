#include <cuda_runtime.h>

#include "device.h"

namespace fastseq {

int multiprocessor_count_cuda(int device) {
  constexpr int kRemembered = 64;
  static int counts[kRemembered] = {};  // a race writes the same number twice
  int count = device < kRemembered ? counts[device] : 0;
  if (count == 0) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
      count = 1;
    if (device < kRemembered) counts[device] = count;
  }
  return count;
}

BlockLimits block_limits_cuda(int device) {
  int shared_bytes = 0, major = 0;
  if (cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
    return {48 << 10, 1};
  // Clusters came with Hopper; 8 blocks are what every such chip takes, its data-centre chips and
  // Blackwell's (9 and 10) take 16.
  return {shared_bytes, major < 9 ? 1 : major <= 10 ? 16 : 8};
}

}  // namespace fastseq
