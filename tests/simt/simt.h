// Runs CUDA kernels on the host, so that their logic can be tested without a GPU.
//
// A thread is a fiber. A group of blocks lives at once: one block, the blocks of a cluster, or all
// of a cooperative grid; groups run one after another in a random order. Inside a group the threads
// run in an order that depends on the seed alone, each until it meets another: at a barrier, a warp
// exchange, a flag or a fence. At each of three levels (which block, which of its warps, which of
// its threads) a group either mixes evenly or lets the most urgent run as far ahead of the rest as
// barriers allow; once in a while urgencies are drawn anew. So code that lacks a barrier it needs
// reads memory too early, or finds it already written over, under most seeds.
//
// Shared memory is fresh for every block, filled with bits that are NaN in every floating type, and
// allocated to its exact size, so that the address sanitizer sees an access past its end; so it
// does an access to another block's before that runs or once it has returned. An asynchronous copy
// or transfer poisons its destination at once and happens later. Global memory is whatever the host
// allocated.
//
// A thread that polls a flag lets others run until one writes a flag. When nothing but polls has
// happened for a thousand rounds, it is a deadlock.
//
// A fault (a barrier some threads never reach, or reach at different lines; an exchange with a lane
// that takes no part; threads that wait for ever) is printed as one line "simt: ..." and ends the
// process with kFaultStatus.
//
// Built for it (host.py), a program checks in place of the sanitizers that whatever touches the
// same memory is ordered by barriers, flags or transfers under any schedule (races.cpp).
//
// Stricter than the hardware: a barrier, of a cluster too, wants also the threads that have
// returned. Not modelled: memory ordering weaker than program order, warps in lockstep, timing,
// polling by plain loads (which would never end here).
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

// Of the thread that runs now.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorCooperativeLaunchTooLarge = 82,
  cudaErrorInvalidClusterSize = 912,
};

namespace simt {

constexpr int kWarp = 32;
constexpr int kFaultStatus = 86;

// Where in the kernel a thread waits.
struct Place {
  const char* file;
  int line;
};

// As a default argument of a default argument: the line that calls, which tells barriers apart.
inline Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

void set_seed(uint64_t seed);

// Launches.

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  dim3 cluster{};
  bool cooperative = false;
};

// What a kernel has been allowed on the current device beyond what every kernel may have.
struct Limits {
  size_t shared_bytes = 48 << 10;
  bool large_clusters = false;
};

Limits& limits_of(const void* kernel);

// GPUs; launches know one, of Hopper, and for its number ask none of these.
struct Device {
  int multiprocessors = 132, shared_bytes = 227 << 10, major = 9;
  int largest_cluster = 16;  // that finds room anywhere, whatever is allowed
  int occupancy_calls = 0;
};
inline Device devices[2];
inline int current_device = 0;
// How many blocks of such a size run on a multiprocessor at once.
size_t resident_blocks(size_t threads, size_t shared_bytes);
// What a Hopper GPU would say to the launch.
cudaError_t check_launch(const void* kernel, const Shape& shape);
void run_grid(const Shape& shape, const std::function<void()>& kernel);
inline cudaError_t last_error = cudaSuccess;

template <typename... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  Shape shape;

  template <typename... Arguments>
  void operator()(Arguments... arguments) const {
    const cudaError_t error = check_launch(reinterpret_cast<const void*>(kernel), shape);
    if (error != cudaSuccess) {
      last_error = error;
      return;
    }
    run_grid(shape, [&] { kernel(arguments...); });
  }
};

template <typename... Parameters>
Launch<Parameters...> make_launch(void (*kernel)(Parameters...), const Shape& shape) {
  return {kernel, shape};
}

// Threads that meet.

void sync_block(Place place);
void cluster_arrive(Place place);
void cluster_wait(Place place);
unsigned cluster_rank();
unsigned cluster_size();

// Every lane of the mask brings something; when all have come, the last combines it. A lane that
// does not exist or is not of the mask has brought null.
using Combine = void (*)(void* const (&brought)[kWarp], Place place);
void collective(unsigned mask, void* bring, Combine combine, Place place);
int lane();

// Every lane takes the value of its source lane.
uint64_t exchange(unsigned mask, uint64_t value, int source_lane, Place place);
void sync_warp(unsigned mask, Place place);
// The lanes whose predicate holds.
unsigned ballot(unsigned mask, bool predicate, Place place);

// A point where other threads may run; after a poll of memory, after a write others may poll.
void yield();
void poll(Place place);
void written();

// Before an atomic.
void order_atomic(const void* at);
unsigned load_acquire(const unsigned* flag, Place place);
void store_release(unsigned* flag, unsigned value);
void fetch_add(unsigned* flag, unsigned value);

// Memory.

void* dynamic_shared();
// One allocation a block for each tag.
void* static_shared(const void* tag, size_t bytes);
void* map_shared(void* pointer, unsigned rank);

// What is sent arrives in any order, at once or as late as can be, and is poison until then.
void transfer_init(uint64_t* barrier);
void transfer_expect(uint64_t* barrier, unsigned bytes);
void transfer_send(void* to, const void* value, size_t bytes, uint64_t* barrier, unsigned rank,
                   Place place);
void transfer_wait(const uint64_t* barrier, unsigned parity, Place place);

void copy_async(void* to, const void* from, int bytes, int valid_bytes, Place place);
void copy_commit();
void copy_wait(int pending_groups);

// Matrices, laid out over the lanes as csrc/cuda/mma.cuh says.

enum class Format { bf16, f16, tf32 };
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Format format, Place place);
void ldmatrix(uint32_t* to, int matrices, const void* row, bool transposed, Place place);
uint32_t to_tf32(float value);

}  // namespace simt

#define SIMT_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  ::simt::make_launch(kernel, ::simt::Shape{grid, block, shared_bytes})

// The lambda has a static of its own in every instance of a kernel template: the array's tag.
#define SIMT_SHARED(type, name)                                           \
  using name##_type = type;                                               \
  name##_type& name = *static_cast<name##_type*>(::simt::static_shared(   \
      [] { static const char tag = 0; return &tag; }(), sizeof(name##_type)))

#define SIMT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::simt::dynamic_shared())
