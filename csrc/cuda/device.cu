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

}  // namespace fastseq
