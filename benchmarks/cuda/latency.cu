// How long this chip waits: one line of JSON for each pattern and size, {"what", "threads",
// "blocks", "cluster", "nanoseconds"} of a step, or {..., "error"} where it cannot run. Compiled
// and run by benchmarks/latency.py.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>

#include "latency.cuh"

namespace fastseq::latency {
namespace {

__global__ void cooperative_sync(int steps, unsigned* memory) {
  const auto grid = cooperative_groups::this_grid();
  for (int i = 0; i < steps; ++i) grid.sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) memory[1] = static_cast<unsigned>(steps);
}

constexpr Pattern kCooperative = {"cooperative grid sync", cooperative_sync, false, true};
constexpr int kSteps = 2048, kTries = 7, kLaunches = 512;

struct Size {
  unsigned threads, blocks, cluster;
};

struct Bench {
  cudaDeviceProp chip{};
  unsigned* memory = nullptr;
  cudaEvent_t begin{}, end{};

  cudaError_t prepare() {
    int device = 0, clusters = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&chip, device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
    }
    has_clusters = clusters != 0;
    if (error == cudaSuccess) error = cudaMalloc(&memory, 2 * sizeof(unsigned));
    if (error == cudaSuccess) error = cudaEventCreate(&begin);
    if (error == cudaSuccess) error = cudaEventCreate(&end);
    return error;
  }

  bool has_clusters = false;

  // Milliseconds of `launches` in a row, each of so many steps.
  cudaError_t run(const Pattern& pattern, const Size& size, int steps, int launches, float* taken) {
    cudaError_t error = cudaMemset(memory, 0, 2 * sizeof(unsigned));
    if (error == cudaSuccess) error = cudaEventRecord(begin);
    const LaunchShape shape = {dim3(size.blocks), dim3(size.threads), 0, size.cluster,
                               pattern.cooperative};
    for (int i = 0; i < launches && error == cudaSuccess; ++i) {
      error = launch(pattern.kernel, shape, nullptr, steps, memory);
    }
    if (error == cudaSuccess) error = cudaEventRecord(end);
    if (error == cudaSuccess) error = cudaEventSynchronize(end);
    if (error == cudaSuccess) error = cudaEventElapsedTime(taken, begin, end);
    return error;
  }

  // Why it cannot run here, or null; nanoseconds of a step.
  const char* measure(const Pattern& pattern, const Size& size, double* nanoseconds) {
    if (pattern.clusters && !has_clusters) return "this chip has no clusters";
    if (pattern.clusters && !fits(pattern, size)) return "no room for a cluster of that size";
    const bool launching = pattern.kernel == nothing;
    float few = 0.0f, many = 0.0f, least_few = 1e30f, least_many = 1e30f;
    for (int i = 0; i < kTries; ++i) {  // what twice as many take beyond half of them: no launch
      const cudaError_t errors[] = {
          launching ? run(pattern, size, 1, kLaunches, &few) : run(pattern, size, kSteps, 1, &few),
          launching ? run(pattern, size, 1, 2 * kLaunches, &many)
                    : run(pattern, size, 2 * kSteps, 1, &many)};
      for (const cudaError_t error : errors) {
        if (error != cudaSuccess) return cudaGetErrorString(error);
      }
      least_few = std::min(least_few, few);
      least_many = std::min(least_many, many);
    }
    unsigned result = 0;
    const cudaError_t error =
        cudaMemcpy(&result, memory + 1, sizeof(result), cudaMemcpyDeviceToHost);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (result != (launching ? 1u : 2u * kSteps)) return "a wrong result";
    *nanoseconds = (least_many - least_few) * 1e6 / (launching ? kLaunches : kSteps);
    return nullptr;
  }

  bool fits(const Pattern& pattern, const Size& size) const {
    if (size.cluster > kPortableCluster &&
        cudaFuncSetAttribute(pattern.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
            cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(size.blocks);
    config.blockDim = dim3(size.threads);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(
        &clusters, reinterpret_cast<const void*>(pattern.kernel), &config);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && clusters >= 1;
  }

  void report(const Pattern& pattern, const Size& size) {
    double nanoseconds = 0.0;
    const char* error = measure(pattern, size, &nanoseconds);
    std::printf("{\"what\": \"%s\", \"threads\": %u, \"blocks\": %u, \"cluster\": %u, ",
                pattern.name, size.threads, size.blocks, size.cluster);
    if (error != nullptr) {
      std::printf("\"error\": \"%s\"}\n", error);
    } else {
      std::printf("\"nanoseconds\": %.1f}\n", nanoseconds);
    }
    std::fflush(stdout);
  }
};

int main() {
  Bench bench;
  const cudaError_t error = bench.prepare();
  if (error != cudaSuccess) {
    std::printf("{\"what\": \"device\", \"error\": \"%s\"}\n", cudaGetErrorString(error));
    return 1;
  }
  const auto whole = static_cast<unsigned>(bench.chip.multiProcessorCount);
  for (const unsigned threads : {128u, 512u}) {
    for (const Pattern& pattern : kPatterns) {
      if (pattern.clusters) {
        for (const unsigned cluster : {2u, 4u, 8u, 16u}) {
          bench.report(pattern, {threads, cluster, cluster});
        }
      } else if (pattern.cooperative && pattern.kernel != nothing) {
        for (const unsigned blocks : {16u, 64u, whole}) {
          bench.report(pattern, {threads, blocks, 1});
          bench.report(kCooperative, {threads, blocks, 1});
        }
      } else {
        bench.report(pattern, {threads, whole, 1});
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace fastseq::latency

int main() { return fastseq::latency::main(); }
