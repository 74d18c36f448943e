// What the emulation reads and writes for a kernel: this file is compiled with the sanitizers.
#include <cstdlib>
#include <cstring>

#include "group.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace simt {
namespace {

constexpr int kPoison = 0xff;

Shared& static_of(Block& block, const void* tag, size_t bytes) {
  const auto [found, created] = block.statics.try_emplace(tag, bytes);
  if (created) found->second.open(block.runs());
  return found->second;
}

bool in_shared(const Block& block, const void* pointer) {
  if (block.dynamic->contains(pointer)) return true;
  for (const auto& [tag, memory] : block.statics) {
    if (memory.contains(pointer)) return true;
  }
  return false;
}

TransferBarrier& barrier_at(const uint64_t* barrier) {
  const auto found = group.barriers.find(barrier);
  if (found == group.barriers.end()) fault("a transfer's barrier that nobody has initialised");
  return found->second;
}

void end_phase(TransferBarrier& state) {
  if (!state.expected || state.missing != 0) return;
  state.expected = false;
  ++state.phase;
  if (check_races) {
    if (state.known != nullptr) state.released.push_back({state.known, 0, 0});
    state.known = merge(state.released);
  }
  state.released.clear();
  for (Thread* thread : state.waiting) wake(*thread);
  state.waiting.clear();
}

void release_flag(const void* flag) {
  Known& known = group.flags[flag];
  std::vector<Clock> released{release(current->clock)};
  if (known != nullptr) released.push_back({known, 0, 0});
  known = merge(released);
}

}  // namespace

Shared::Shared(size_t bytes) : data(static_cast<char*>(std::malloc(bytes))), bytes(bytes) {
  std::memset(data, kPoison, bytes);
  watch(data, bytes, true);
}

Shared::Shared(Shared&& other) noexcept
    : data(std::exchange(other.data, nullptr)), bytes(other.bytes) {}

Shared::~Shared() {
  if (data == nullptr) return;
  open(true);
  watch(data, bytes, false);
  std::free(data);
}

void Shared::open(bool opened) const {
  if (opened) {
    ASAN_UNPOISON_MEMORY_REGION(data, bytes);
  } else {
    ASAN_POISON_MEMORY_REGION(data, bytes);
  }
}

bool Shared::contains(const void* pointer) const {
  return pointer >= data && pointer < data + bytes;
}

void* dynamic_shared() { return current->block->dynamic->data; }

void* static_shared(const void* tag, size_t bytes) {
  return static_of(*current->block, tag, bytes).data;
}

void* map_shared(void* pointer, unsigned rank) {
  Block& block = *current->block;
  if (rank >= block.cluster->blocks.size()) {
    fault("shared memory of rank %u in a cluster of %zu blocks", rank,
          block.cluster->blocks.size());
  }
  Block& peer = *block.cluster->blocks[rank];
  if (block.dynamic->contains(pointer)) {
    return peer.dynamic->data + (static_cast<char*>(pointer) - block.dynamic->data);
  }
  for (const auto& [tag, memory] : block.statics) {
    if (!memory.contains(pointer)) continue;
    return static_of(peer, tag, memory.bytes).data + (static_cast<char*>(pointer) - memory.data);
  }
  fault("map_shared of an address outside the block's shared memory");
}

unsigned load_acquire(const unsigned* flag, Place place) {
  poll(place);
  acquire(current->clock, group.flags[flag]);
  return *flag;
}

void order_atomic(const void* at) {
  acquire(current->clock, group.flags[at]);
  release_flag(at);
}

void store_release(unsigned* flag, unsigned value) {
  release_flag(flag);
  *flag = value;
  written();
}

void fetch_add(unsigned* flag, unsigned value) {
  release_flag(flag);
  *flag += value;
  written();
}

void read_row(void* to, const void* row, size_t bytes) { std::memcpy(to, row, bytes); }

void transfer_init(uint64_t* barrier) {
  if (!in_shared(*current->block, barrier)) fault("a transfer's barrier outside shared memory");
  *barrier = 0;
  group.barriers[barrier] = {};
}

void copy_async(void* to, const void* from, int bytes, int valid_bytes, Place place) {
  const auto misaligned = [&](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) != 0;
  };
  if (misaligned(to) || (valid_bytes > 0 && misaligned(from))) {
    fault("misaligned asynchronous copy of %d bytes at %s:%d", bytes, place.file, place.line);
  }
  if (valid_bytes < 0 || valid_bytes > bytes) {
    fault("%d of %d bytes to copy at %s:%d", valid_bytes, bytes, place.file, place.line);
  }
  if (!in_shared(*current->block, to)) {
    fault("asynchronous copy to what is not the block's shared memory at %s:%d", place.file,
          place.line);
  }
  access(to, static_cast<size_t>(bytes), true, __builtin_return_address(0));
  std::memset(to, kPoison, static_cast<size_t>(bytes));
  current->copies.back().push_back({to, from, bytes, valid_bytes});
}

void copy_commit() { current->copies.emplace_back(); }

void copy_wait(int pending_groups) {
  const void* const where = __builtin_return_address(0);
  std::vector<std::vector<Copy>>& groups = current->copies;
  const size_t kept = static_cast<size_t>(pending_groups) + 1;
  if (groups.size() > kept) {
    const auto end = groups.end() - static_cast<ptrdiff_t>(kept);
    for (auto copies = groups.begin(); copies != end; ++copies) {
      for (const Copy& copy : *copies) {
        access(copy.from, static_cast<size_t>(copy.valid_bytes), false, where);
        access(copy.to, static_cast<size_t>(copy.bytes), true, where);
        std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid_bytes));
      }
    }
    groups.erase(groups.begin(), end);
  }
  yield();
}

void transfer_expect(uint64_t* barrier, unsigned bytes) {
  TransferBarrier& state = barrier_at(barrier);
  if (state.expected) fault("a transfer's bytes are expected twice in one phase");
  state.expected = true;
  state.missing += bytes;
  state.released.push_back(release(current->clock));
  end_phase(state);
  progress();
  yield();
}

void transfer_send(void* to, const void* value, size_t bytes, uint64_t* barrier, unsigned rank,
                   Place place) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) {
    fault("misaligned transfer of %zu bytes at %s:%d", bytes, place.file, place.line);
  }
  Transfer transfer{static_cast<char*>(map_shared(to, rank)), {}, bytes,
                    static_cast<uint64_t*>(map_shared(barrier, rank)), {}};
  std::memcpy(transfer.value, value, bytes);
  access(transfer.to, bytes, true, __builtin_return_address(0));
  transfer.sender = release(current->clock);
  std::memset(transfer.to, kPoison, bytes);
  group.transfers.push_back(transfer);
  progress();
  yield();
}

void deliver(const Transfer& transfer) {
  std::memcpy(transfer.to, transfer.value, transfer.bytes);
  TransferBarrier& state = barrier_at(transfer.barrier);
  state.missing -= static_cast<int64_t>(transfer.bytes);
  state.released.push_back(transfer.sender);
  end_phase(state);
}

void transfer_wait(const uint64_t* barrier, unsigned parity, Place place) {
  TransferBarrier& state = barrier_at(barrier);
  progress();
  if (state.phase % 2 != parity) {
    yield();
  } else {
    current->state = State::at_transfer;
    current->place = place;
    state.waiting.push_back(current);
    wait();
  }
  acquire(current->clock, state.known);
}

}  // namespace simt
