// How blocks of one launch wait for one another and read one another's memory, and copies into
// shared memory that run beside the arithmetic. Clusters need sm_90; what is compiled for an older
// architecture traps, and launch() reports an error before that.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace fastseq {

#ifdef __CUDACC__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTSEQ_CLUSTER(...) __trap()
constexpr bool kHasClusters = false;
#else
#define FASTSEQ_CLUSTER(...) __VA_ARGS__
constexpr bool kHasClusters = true;
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t peer_address(const void* pointer, unsigned rank) {
  uint32_t address = 0;
  FASTSEQ_CLUSTER(
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)),
          "r"(rank)));
  return address;
}

// The cluster's barrier in two halves: what a thread wrote before it arrives, other blocks' shared
// memory included, every thread of the cluster can read after its wait. All threads of all blocks
// take part, a warp's together, each wait between two arrivals.
__device__ __forceinline__ void cluster_arrive() {
  FASTSEQ_CLUSTER(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"));
}

__device__ __forceinline__ void cluster_wait() {
  FASTSEQ_CLUSTER(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"));
}

__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// Of this block in its cluster, and how many blocks that has; 0 and 1 in a launch without clusters.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
  FASTSEQ_CLUSTER(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return rank;
}

__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
  FASTSEQ_CLUSTER(asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size)));
  return size;
}

// Where the block of that rank in the cluster has what this block has at pointer, which must lie in
// this block's shared memory. To be read and written as any pointer, after a barrier of the cluster
// has shown that the block runs, and before one that lets it end.
template <typename T>
__device__ __forceinline__ T* map_shared(T* pointer, unsigned rank) {
  T* mapped = pointer;
  FASTSEQ_CLUSTER(asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank)));
  return mapped;
}

// What a block sends into shared memory of another of its cluster without waiting, and how the
// other knows that it is there: a barrier beside the data counts its bytes. Each phase of the
// barrier one thread of the block that receives says how many bytes it expects, in any order with
// the sends; phases are numbered from 0 and told apart by their parity. Sent are 4, 8 or 16 bytes,
// aligned to that; to and barrier are this block's addresses of what lies at the same place in the
// other. For an exchange this is cheaper than a barrier of the cluster, whose release waits until
// all the thread wrote, global memory included, is visible to the whole GPU.
//
// One thread initialises; a barrier of the cluster has to follow before anyone sends.
__device__ __forceinline__ void transfer_init(uint64_t* barrier) {
  FASTSEQ_CLUSTER(asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
      "fence.mbarrier_init.release.cluster;" : : "r"(shared_address(barrier)) : "memory"));
}

__device__ __forceinline__ void transfer_expect(uint64_t* barrier, unsigned bytes) {
  FASTSEQ_CLUSTER(asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(shared_address(barrier)),
      "r"(bytes) : "memory"));
}

template <typename T>
__device__ __forceinline__ void transfer_send(T* to, const T& value, uint64_t* barrier,
                                              unsigned rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
  [[maybe_unused]] const uint32_t data = peer_address(to, rank), flag = peer_address(barrier, rank);
  if constexpr (sizeof(T) == 4) {
    FASTSEQ_CLUSTER(asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" : : "r"(data),
        "r"(words[0]), "r"(flag) : "memory"));
  } else if constexpr (sizeof(T) == 8) {
    FASTSEQ_CLUSTER(
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, "
                     "[%3];" : : "r"(data),
                     "r"(words[0]), "r"(words[1]), "r"(flag) : "memory"));
  } else {
    FASTSEQ_CLUSTER(asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, "
        "%3, %4}, [%5];" : : "r"(data),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(flag) : "memory"));
  }
}

// Until the phase of that parity is over; what was sent in it can then be read by this thread.
__device__ __forceinline__ void transfer_wait(const uint64_t* barrier, unsigned parity) {
  [[maybe_unused]] uint32_t over = 0;
  FASTSEQ_CLUSTER(do {
    asm volatile(
        "{\n\t.reg .pred over;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, over;\n\t}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (over == 0));
}

#undef FASTSEQ_CLUSTER

// Flags in global memory, through which blocks of one grid see one another's writes. A release
// makes visible what its thread wrote before, and what others of its block wrote before a barrier
// between them and it; the load that sees it lets its thread, and those behind a barrier after it,
// read that.
__device__ __forceinline__ unsigned load_acquire(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(unsigned* flag, unsigned value) {
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ void red_release_add(unsigned* flag, unsigned value) {
  asm volatile("red.release.gpu.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Starts to copy kBytes (16, 8 or 4) from global into shared memory, both aligned to it. Only the
// first valid_bytes are read, zeros are written for the rest. They are there for this thread once
// it has committed and waited, for others after a barrier behind that.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid_bytes = kBytes) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4);
  const uint32_t address = shared_address(to);
  if constexpr (kBytes == 16) {  // bypasses L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
                 "n"(kBytes), "r"(valid_bytes)
                 : "memory");
  }
}

// Ends a group of copies; copy_wait waits for all groups but the kPending last ones.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

constexpr bool kHasClusters = true;

inline void cluster_arrive(simt::Place place = simt::here()) { simt::cluster_arrive(place); }
inline void cluster_wait(simt::Place place = simt::here()) { simt::cluster_wait(place); }
inline void cluster_barrier(simt::Place place = simt::here()) {
  simt::cluster_arrive(place);
  simt::cluster_wait(place);
}
inline unsigned cluster_rank() { return simt::cluster_rank(); }
inline unsigned cluster_size() { return simt::cluster_size(); }

template <typename T>
T* map_shared(T* pointer, unsigned rank) {
  return static_cast<T*>(simt::map_shared(pointer, rank));
}

inline void transfer_init(uint64_t* barrier) { simt::transfer_init(barrier); }
inline void transfer_expect(uint64_t* barrier, unsigned bytes) {
  simt::transfer_expect(barrier, bytes);
}
template <typename T>
void transfer_send(T* to, const T& value, uint64_t* barrier, unsigned rank,
                   simt::Place place = simt::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  simt::transfer_send(to, &value, sizeof(T), barrier, rank, place);
}
inline void transfer_wait(const uint64_t* barrier, unsigned parity,
                          simt::Place place = simt::here()) {
  simt::transfer_wait(barrier, parity, place);
}

inline unsigned load_acquire(const unsigned* flag, simt::Place place = simt::here()) {
  return simt::load_acquire(flag, place);
}
inline void store_release(unsigned* flag, unsigned value) { simt::store_release(flag, value); }
inline void red_release_add(unsigned* flag, unsigned value) { simt::fetch_add(flag, value); }

template <int kBytes>
void copy_async(void* to, const void* from, int valid_bytes = kBytes,
                simt::Place place = simt::here()) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4);
  simt::copy_async(to, from, kBytes, valid_bytes, place);
}

inline void copy_commit() { simt::copy_commit(); }

template <int kPending>
void copy_wait() {
  simt::copy_wait(kPending);
}

#endif

// A barrier of all blocks of a cooperative grid, in two halves, with a counter in global memory
// that starts at zero: what any thread wrote before its block arrives, every thread can read after
// its block has waited. The n-th barrier waits for arrivals = n * blocks. Differences of counts
// stay below 2^31, so the counter may wrap.
__device__ __forceinline__ void grid_arrive(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0) red_release_add(counter, 1);
}

__device__ __forceinline__ void grid_wait(const unsigned* counter, unsigned arrivals) {
  if (threadIdx.x == 0) {
    while (static_cast<int>(load_acquire(counter) - arrivals) < 0) {
    }
  }
  __syncthreads();
}

}  // namespace fastseq
