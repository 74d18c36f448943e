// Memory that a thread keeps between calls.
#pragma once

#include <cstddef>

namespace fastseq {

// At least that many bytes, aligned to 64, the calling thread's until its next call.
void* thread_scratch(size_t bytes);

}  // namespace fastseq
