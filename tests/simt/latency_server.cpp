// Lets a test run the latency benchmark's kernels: pattern, threads, blocks, cluster, steps; the
// buffer is the kernels' memory.
#include "../../benchmarks/cuda/latency.cuh"
#include "server.h"

namespace simt {
namespace {

const char* run(Request& request) {
  auto* const memory = static_cast<unsigned*>(request.pointer());
  const auto& pattern = fastseq::latency::kPatterns[request.integer()];
  fastseq::LaunchShape shape;
  shape.block = dim3(static_cast<unsigned>(request.integer()));
  shape.grid = dim3(static_cast<unsigned>(request.integer()));
  shape.cluster = static_cast<unsigned>(request.integer());
  shape.cooperative = pattern.cooperative;
  const auto steps = static_cast<int>(request.integer());
  const cudaError_t error = fastseq::launch(pattern.kernel, shape, nullptr, steps, memory);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

void add_functions(Functions& functions) { functions["run"] = run; }

}  // namespace simt
