#include "scratch.h"

#include <cstdlib>
#include <new>

namespace fastseq {
namespace {

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
  ~Block() { std::free(data); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local Block block;
  if (block.bytes < bytes) {
    std::free(block.data);
    block.bytes = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    block.data = std::aligned_alloc(64, rounded);
    if (block.data == nullptr) throw std::bad_alloc();
    block.bytes = rounded;
  }
  return block.data;
}

}  // namespace fastseq
