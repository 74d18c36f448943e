// The plan of a problem on a device that is there.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "device.h"
#include "launch.cuh"
#include "recurrent.h"

namespace fastseq {
namespace {

using recurrent::Chip;
using recurrent::Exchange;
using recurrent::Plan;
using recurrent::Task;

// How many groups of the plan run at once, by the runtime's own account; 0: none.
int groups_that_run(const Task& task, const Plan& plan, const Chip& chip) {
  const void* const kernel = recurrent::kernel_of(task, plan);
  if (kernel == nullptr) return 0;
  const int cluster = plan.exchange == Exchange::cluster ? plan.blocks : plan.partners;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.layout.bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  cudaError_t error = allow_shared(kernel, config.dynamicSmemBytes);
  if (cluster > 1) {
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    count = count * cluster / plan.blocks;
  } else {
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, plan.threads,
                                                            config.dynamicSmemBytes);
    count = count * chip.multiprocessors / plan.blocks;
  }
  if (error != cudaSuccess) cudaGetLastError();  // answered here, so not to the next who asks
  return error == cudaSuccess ? count : 0;
}

// What is asked and allowed of a kernel is so of the current device.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = device;
    cudaSetDevice(device);
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

// Chips differ in how many multiprocessors they have together, and a slice of one has fewer: where
// no cluster of the size finds room, smaller ones are tried, then a grid. All of a grid's launch
// has to run at once: its groups are what the runtime has room for.
Plan plan_on(const Task& task, int device) {
  const OnDevice current(device);
  const BlockLimits limits = block_limits_cuda(device);
  Chip chip{multiprocessor_count_cuda(device), limits.shared_bytes, limits.cluster};
  for (;;) {
    Plan plan = recurrent::choose(task, chip);
    if (plan.rejected != nullptr) return plan;
    const int groups = groups_that_run(task, plan, chip) * plan.strands;
    if (groups > 0) {
      if (plan.exchange == Exchange::grid && groups < plan.at_once)
        recurrent::set_at_once(plan, groups);
      return plan;
    }
    const int cluster = plan.exchange == Exchange::cluster ? plan.blocks : plan.partners;
    if (cluster == 1) return recurrent::rejected("the device has no room for the kernel's blocks");
    chip.max_cluster = cluster / 2;
  }
}

}  // namespace

Plan recurrent_plan_cuda(const Task& task, int device) {
  using Key = std::tuple<int, Cell, recurrent::Arithmetic, int64_t, int64_t, bool, int>;
  static std::mutex mutex;
  static std::map<Key, Plan> plans;
  const Key key{device,      task.cell,     task.arithmetic, task.batch,
                task.hidden, task.backward, task.directions};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() > 4096) plans.clear();  // batches of every size
  return plans[key] = plan_on(task, device);
}

}  // namespace fastseq
