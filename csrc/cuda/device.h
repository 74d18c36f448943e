// What the host needs to know of the current device.
#pragma once

namespace fastseq {

// The number of streaming multiprocessors of a device.
int multiprocessor_count_cuda(int device);

// What a block can have: bytes of shared memory, and blocks in its cluster (1: no clusters).
struct BlockLimits {
  int shared_bytes, cluster;
};
BlockLimits block_limits_cuda(int device);

}  // namespace fastseq
