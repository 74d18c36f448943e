// Which thread runs when.
#include "simt.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "group.h"

namespace simt {
namespace {

constexpr int kIdleRounds = 1000;
constexpr int kPolls = 2;      // before a thread that polls lets all others go first
constexpr int kRedraw = 1024;  // switches, on average, after which urgencies are drawn anew

uint64_t random_state;
std::vector<std::unique_ptr<Thread>> pool;  // kept from group to group: stacks are costly
Thread host;                                // stands for the caller of run_grid

uint64_t random_bits() {
  uint64_t x = random_state += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

size_t random_below(size_t bound) { return (random_bits() >> 32) * bound >> 32; }
bool coin() { return random_below(2) == 0; }

// A random order of [0, count).
std::vector<size_t> permutation(size_t count) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) {
    order[i] = i;
    std::swap(order[i], order[random_below(i + 1)]);
  }
  return order;
}

void switch_to(Thread& next) {
  Thread& self = *current;
  if (&next == &self) return;
  current = &next;
  threadIdx = next.index;
  if (next.block != nullptr) blockIdx = next.block->index;
  switch_fiber(&self == &host ? host_fiber : self.fiber,
               &next == &host ? host_fiber : next.fiber);
}

const char* wait_name(State state) {
  switch (state) {
    case State::polling: return "poll memory";
    case State::at_barrier: return "wait at __syncthreads";
    case State::at_cluster_barrier: return "wait at the cluster's barrier";
    case State::at_exchange: return "wait at a warp exchange";
    case State::at_transfer: return "wait for a transfer";
    default: return "run";
  }
}

[[noreturn]] void deadlock() {
  std::map<std::string, int> groups;
  for (const Thread* thread : group.threads) {
    char text[256] = "have returned";
    if (thread->state != State::exited) {
      std::snprintf(text, sizeof(text), "%s %s:%d", wait_name(thread->state), thread->place.file,
                    thread->place.line);
    }
    ++groups[text];
  }
  std::string description;
  for (const auto& [text, count] : groups) {
    if (!description.empty()) description += ", ";
    description += std::to_string(count) + " threads " + text;
  }
  const uint3& first = group.blocks[0].index;
  const std::string more =
      group.blocks.size() == 1 ? "" : " and " + std::to_string(group.blocks.size() - 1) + " more";
  fault("deadlock in block (%u, %u, %u)%s: %s", first.x, first.y, first.z, more.c_str(),
        description.c_str());
}

// The most urgent of those that can run, or a random one; there must be one.
template <typename CanRun>
size_t pick(const std::vector<size_t>& order, bool by_urgency, CanRun can_run) {
  const size_t count = order.size();
  for (size_t i = by_urgency ? 0 : random_below(count);; i = i + 1 == count ? 0 : i + 1) {
    if (can_run(order[i])) return order[i];
  }
}

void deliver_one() {
  std::vector<Transfer>& all = group.transfers;
  const size_t chosen = random_below(all.size());
  const Transfer transfer = all[chosen];
  all[chosen] = all.back();
  all.pop_back();
  deliver(transfer);
}

Thread& take_next() {
  const bool redraw = random_below(kRedraw) == 0;
  if (redraw) group.order = permutation(group.blocks.size());
  Block& block = group.blocks[pick(group.order, group.blocks_by_urgency,
                                   [](size_t b) { return group.blocks[b].runnable > 0; })];
  if (redraw) block.order = permutation(block.warps.size());
  Warp& warp = block.warps[pick(block.order, group.warps_by_urgency,
                                [&](size_t w) { return !block.warps[w].runnable.empty(); })];
  size_t chosen = 0;
  if (group.threads_by_urgency) {
    for (size_t i = 1; i < warp.runnable.size(); ++i) {
      if (warp.runnable[i]->urgency < warp.runnable[chosen]->urgency) chosen = i;
    }
  } else {
    chosen = random_below(warp.runnable.size());
  }
  Thread& next = *warp.runnable[chosen];
  warp.runnable[chosen] = warp.runnable.back();
  warp.runnable.pop_back();
  --block.runnable;
  return next;
}

bool any_can_run() {
  for (const Block& block : group.blocks) {
    if (block.runnable > 0) return true;
  }
  return false;
}

void wake_polling() {
  for (Thread* thread : group.polling) wake(*thread);
  group.polling.clear();
}

// A fiber outlives its thread: in the next group it runs another.
void thread_main() {
  fiber_started();
  for (;;) {
    Block& block = *current->block;
    if (!block.started) {
      block.started = true;
      block.dynamic->open(true);
      for (const auto& [tag, memory] : block.statics) memory.open(true);
    }
    (*group.kernel)();
    current->state = State::exited;
    ++group.exited;
    if (++block.exited == block.thread_count) {
      block.dynamic->open(false);
      for (const auto& [tag, memory] : block.statics) memory.open(false);
    }
    progress();
    wait();
  }
}

uint3 unravel(size_t linear, const dim3& size) {
  return {static_cast<unsigned>(linear % size.x), static_cast<unsigned>(linear / size.x % size.y),
          static_cast<unsigned>(linear / size.x / size.y)};
}

size_t volume(const dim3& size) { return size_t{size.x} * size.y * size.z; }

void start_block(Block& block, size_t first_thread, size_t shared_bytes) {
  block.group = &group;
  block.thread_count = static_cast<int>(volume(blockDim));
  block.threads = &group.threads[first_thread];
  block.warps.resize(static_cast<size_t>((block.thread_count + kWarp - 1) / kWarp));
  block.order = permutation(block.warps.size());
  block.dynamic = std::make_unique<Shared>(shared_bytes);
  block.dynamic->open(false);
  for (int i = 0; i < block.thread_count; ++i) {
    Thread& thread = *block.threads[i];
    thread.block = &block;
    thread.linear = i;
    thread.index = unravel(static_cast<size_t>(i), blockDim);
    thread.urgency = random_bits();
    thread.arrived = false;
    thread.polls = 0;
    thread.copies.assign(1, {});
    wake(thread);
  }
}

// Runs the clusters of the given numbers at once.
void run_group(const Shape& shape, const std::vector<size_t>& numbers,
               const std::function<void()>& kernel) {
  const dim3 clusters(shape.grid.x / shape.cluster.x, shape.grid.y / shape.cluster.y,
                      shape.grid.z / shape.cluster.z);
  const size_t threads = volume(shape.block);
  const size_t size = volume(shape.cluster);
  const size_t blocks = numbers.size() * size;
  group = {};
  group.kernel = &kernel;
  group.blocks.resize(blocks);
  group.clusters.resize(numbers.size());
  group.order = permutation(blocks);
  group.blocks_by_urgency = coin();
  group.warps_by_urgency = coin();
  group.threads_by_urgency = coin();
  group.prompt_transfers = coin();
  while (pool.size() < blocks * threads) {
    pool.push_back(std::make_unique<Thread>());
    make_fiber(pool.back()->fiber, thread_main, pool.size());
  }
  for (size_t i = 0; i < blocks * threads; ++i) group.threads.push_back(pool[i].get());
  for (size_t c = 0; c < numbers.size(); ++c) {
    Cluster& cluster = group.clusters[c];
    cluster.threads = static_cast<int>(size * threads);
    const uint3 corner = unravel(numbers[c], clusters);
    for (size_t rank = 0; rank < size; ++rank) {
      Block& block = group.blocks[c * size + rank];
      const uint3 inside = unravel(rank, shape.cluster);
      block.index = {corner.x * shape.cluster.x + inside.x, corner.y * shape.cluster.y + inside.y,
                     corner.z * shape.cluster.z + inside.z};
      block.rank = static_cast<unsigned>(rank);
      block.cluster = &cluster;
      cluster.blocks.push_back(&block);
      start_block(block, (c * size + rank) * threads, shape.shared_bytes);
    }
  }
  std::vector<Clock*> clocks;
  for (Thread* thread : group.threads) clocks.push_back(&thread->clock);
  start_clocks(clocks.size(), clocks);
  wait();
  for (const auto& [address, barrier] : group.barriers) {
    if (barrier.missing < 0) {
      fault("transfers brought %lld bytes more than expected",
            static_cast<long long>(-barrier.missing));
    }
  }
  group = {};
}

}  // namespace

Thread* current = &host;
Group group;

void fault(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("simt: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::fflush(nullptr);
  std::_Exit(kFaultStatus);
}

void set_seed(uint64_t seed) { random_state = seed; }

void progress() {
  group.idle_rounds = 0;
  current->polls = 0;
}

void wake(Thread& thread) {
  thread.state = State::runnable;
  Block& block = *thread.block;
  block.warps[static_cast<size_t>(thread.linear / kWarp)].runnable.push_back(&thread);
  ++block.runnable;
}

void wait() {
  if (group.prompt_transfers && !group.transfers.empty() && coin()) deliver_one();
  while (!group.transfers.empty() && !any_can_run()) deliver_one();
  if (!any_can_run()) {
    if (group.exited == static_cast<int>(group.threads.size())) {
      switch_to(host);
      return;
    }
    if (group.polling.empty() || ++group.idle_rounds > kIdleRounds) deadlock();
    wake_polling();
  }
  switch_to(take_next());
}

void yield() {
  wake(*current);
  wait();
}

void poll(Place place) {
  if (++current->polls <= kPolls) return yield();
  current->state = State::polling;
  current->place = place;
  group.polling.push_back(current);
  wait();
}

void written() {
  progress();
  wake_polling();
  yield();
}

void run_grid(const Shape& shape, const std::function<void()>& kernel) {
  blockDim = shape.block;
  gridDim = shape.grid;
  const size_t count = volume(shape.grid) / volume(shape.cluster);
  if (shape.cooperative) {
    std::vector<size_t> all(count);
    for (size_t i = 0; i < count; ++i) all[i] = i;
    run_group(shape, all, kernel);
  } else {
    for (const size_t cluster : permutation(count)) run_group(shape, {cluster}, kernel);
  }
}

}  // namespace simt
