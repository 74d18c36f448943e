// Runs CUDA kernels on the host, so that their logic can be tested without a GPU.
//
// A thread is a fiber. Blocks run one after another in a random order; inside a block the fibers
// run in a random order too, each until it waits at a barrier or a warp exchange. Half of the
// blocks mix their warps evenly; in the others each warp runs as far ahead of the less urgent ones
// as barriers let it. So code that lacks a barrier it needs reads shared memory too early, or finds
// it already written over, under most seeds. The order depends on the seed alone.
//
// Shared memory is fresh for every block, filled with bits that are NaN in every floating type, and
// allocated to its exact size, so that the address sanitizer sees an access past its end; global
// memory is whatever the host allocated.
//
// A fault (a barrier some threads never reach, or reach at different lines; an exchange with a lane
// that takes no part) is printed as one line "simt: ..." and ends the process with kFaultStatus.
//
// Not modelled: memory ordering weaker than program order, warps in lockstep, timing. Room to grow:
// a Block owns its fibers and its shared memory, so a cluster or a cooperative grid is several live
// Blocks under one scheduler, and a matrix fragment is one more exchange among the lanes of a warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr int kWarp = 32;
constexpr int kFaultStatus = 86;

// Where in the kernel a thread waits.
struct Place {
  const char* file;
  int line;
};

// Of the thread that runs now.
inline uint3 thread_index{}, block_index{};
inline dim3 block_size{}, grid_size{};

[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

void set_seed(uint64_t seed);
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

void sync_block(Place place);

// Every lane of the mask brings a value and takes that of its source lane, once all have come.
uint64_t exchange(unsigned mask, uint64_t value, int source_lane, Place place);
int lane();

void* dynamic_shared();
// One allocation a block for each tag.
void* static_shared(const void* tag, size_t bytes);

template <typename... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  dim3 grid, block;
  size_t shared_bytes;

  template <typename... Arguments>
  void operator()(Arguments... arguments) const {
    run_grid(grid, block, shared_bytes, [&] { kernel(arguments...); });
  }
};

template <typename... Parameters>
Launch<Parameters...> make_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                  size_t shared_bytes) {
  return {kernel, grid, block, shared_bytes};
}

}  // namespace simt

#define SIMT_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  ::simt::make_launch(kernel, grid, block, shared_bytes)

// The lambda has a static of its own in every instance of a kernel template: the array's tag.
#define SIMT_SHARED(type, name)                                           \
  using name##_type = type;                                               \
  name##_type& name = *static_cast<name##_type*>(::simt::static_shared(   \
      [] { static const char tag = 0; return &tag; }(), sizeof(name##_type)))

#define SIMT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::simt::dynamic_shared())
