// The state of the blocks that run now; only the emulation's own files include this.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "fiber.h"
#include "races.h"
#include "simt.h"

namespace simt {

enum class State {
  runnable,
  polling,
  at_barrier,
  at_cluster_barrier,
  at_exchange,
  at_transfer,
  exited,
};

struct Block;
struct Group;
struct Thread;

struct Copy {
  void* to;
  const void* from;
  int bytes, valid_bytes;
};

// Under way into shared memory of another block.
struct Transfer {
  char* to;
  char value[16];
  size_t bytes;
  const uint64_t* barrier;
  Clock sender;
};

// A barrier that counts bytes: in its phase, whether some are expected yet, and what is missing.
struct TransferBarrier {
  unsigned phase = 0;
  bool expected = false;
  int64_t missing = 0;
  std::vector<Thread*> waiting;
  std::vector<Clock> released;
  Known known;  // when the last phase ended
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  State state = State::exited;
  Place place{};
  uint3 index{};
  int linear = 0;
  size_t urgency = 0;
  // What the thread brings to a warp exchange.
  unsigned mask = 0;
  void* brought = nullptr;
  Combine combine = nullptr;
  // Between its arrival at a barrier of the cluster and its wait: the round it arrived in.
  bool arrived = false;
  unsigned round = 0;
  int polls = 0;  // since it last did anything else
  Clock clock;
  std::vector<std::vector<Copy>> copies{1};  // committed groups, and the open one
};

// Memory from malloc, so that the sanitizer guards its ends, that blocks see only while it is open.
class Shared {
 public:
  explicit Shared(size_t bytes);
  Shared(Shared&& other) noexcept;
  Shared& operator=(Shared&&) = delete;
  ~Shared();
  void open(bool opened) const;
  bool contains(const void* pointer) const;
  char* data;
  size_t bytes;
};

struct Warp {
  std::vector<Thread*> runnable;
  // Where its threads arrived at the cluster's barrier, and in which round.
  Place arrival{};
  unsigned round = ~0u;
};

struct Cluster {
  std::vector<Block*> blocks;
  int threads = 0, arrived = 0;
  unsigned round = 0;
  std::vector<Thread*> waiting;
  std::vector<Clock> released;
  Known known;  // when the last round ended
};

struct Block {
  Group* group = nullptr;
  Cluster* cluster = nullptr;
  uint3 index{};
  unsigned rank = 0;
  Thread* const* threads = nullptr;
  int thread_count = 0, runnable = 0, exited = 0, at_barrier = 0;
  bool started = false;
  std::vector<Warp> warps;
  std::vector<size_t> order;  // the warps, most urgent first
  std::unique_ptr<Shared> dynamic;
  std::map<const void*, Shared> statics;

  bool runs() const { return started && exited < thread_count; }
};

struct Group {
  const std::function<void()>* kernel = nullptr;
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  std::vector<Thread*> threads, polling;
  std::vector<size_t> order;  // the blocks, most urgent first
  bool blocks_by_urgency = false, warps_by_urgency = false, threads_by_urgency = false;
  std::vector<Transfer> transfers;
  std::map<const uint64_t*, TransferBarrier> barriers;
  std::map<const void*, Known> flags;
  bool prompt_transfers = false;  // else only when nothing else can go on
  int exited = 0, idle_rounds = 0;
};

extern Thread* current;
extern Group group;

// Something happened that may let others go on.
void progress();
void wake(Thread& thread);
// Lets others run until someone wakes this thread, whose state says what it waits for.
void wait();
void deliver(const Transfer& transfer);
// Under the address sanitizer.
void read_row(void* to, const void* row, size_t bytes);

}  // namespace simt
