// What a launch may ask for: the limits of a Hopper GPU.
#include <algorithm>
#include <map>

#include "simt.h"

namespace simt {
namespace {

constexpr size_t kBlockSharedBytes = 227 << 10;
constexpr size_t kSharedBytes = 228 << 10;  // of a multiprocessor
constexpr size_t kReservedBytes = 1 << 10;  // of each block, by the system
constexpr size_t kThreads = 2048;           // of a multiprocessor
constexpr size_t kBlocks = 32;              // of a multiprocessor
constexpr size_t kMultiprocessors = 132;

}  // namespace

Limits& limits_of(const void* kernel) {
  static std::map<std::pair<int, const void*>, Limits> limits;
  return limits[{current_device, kernel}];
}

size_t resident_blocks(size_t threads, size_t shared_bytes) {
  const size_t warps = (threads + kWarp - 1) / kWarp;
  return std::min(
      {kBlocks, kThreads / kWarp / warps, kSharedBytes / (shared_bytes + kReservedBytes)});
}

cudaError_t check_launch(const void* kernel, const Shape& shape) {
  const Limits& limits = limits_of(kernel);
  const auto volume = [](const dim3& size) { return uint64_t{size.x} * size.y * size.z; };
  const uint64_t threads = volume(shape.block), blocks = volume(shape.grid);
  if (threads == 0 || threads > 1024 || blocks == 0) return cudaErrorInvalidConfiguration;
  if (shape.grid.x > 0x7fffffffu || shape.grid.y > 65535 || shape.grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shape.shared_bytes > std::min(limits.shared_bytes, kBlockSharedBytes)) {
    return cudaErrorInvalidValue;
  }
  const uint64_t cluster = volume(shape.cluster);
  if (cluster == 0 || cluster > (limits.large_clusters ? 16u : 8u) ||
      shape.grid.x % shape.cluster.x != 0 || shape.grid.y % shape.cluster.y != 0 ||
      shape.grid.z % shape.cluster.z != 0) {
    return cudaErrorInvalidClusterSize;
  }
  const size_t resident = resident_blocks(static_cast<size_t>(threads), shape.shared_bytes);
  if (shape.cooperative && blocks > resident * kMultiprocessors) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace simt
