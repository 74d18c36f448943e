// What the host needs to know of the current device.
#pragma once

namespace fastseq {

// The number of streaming multiprocessors of a device.
int multiprocessor_count_cuda(int device);

}  // namespace fastseq
