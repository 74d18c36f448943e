// The counter-based generator behind every dropout in fastseq.
//
// bits(seed, row, column) is a pure function, so a mask does not depend on tile shapes, thread
// counts or how a batch was split, and the backward pass draws it again instead of storing it.
// Two multiplications an element; a row key of 64 bits keeps two rows from sharing a shifted
// sequence. The same function stands in kernels/common.py (Triton) and fastseq/random.py (Python);
// tests hold the three together bit by bit.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTSEQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTSEQ_HOST_DEVICE inline
#endif

namespace fastseq::random {

// A 32-bit avalanche by two multiplications (constants: C. Wellons, "hash-prospector", 2018).
FASTSEQ_HOST_DEVICE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

struct RowKey {
  uint32_t first, second;
};

FASTSEQ_HOST_DEVICE RowKey row_key(uint64_t seed, uint64_t row) {
  const uint32_t first = mix(mix(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(row));
  const uint32_t second =
      mix(mix(first + static_cast<uint32_t>(seed >> 32)) ^ static_cast<uint32_t>(row >> 32));
  return {first, second};
}

FASTSEQ_HOST_DEVICE uint32_t bits(RowKey key, uint32_t column) {
  uint32_t x = column + key.first;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= key.second;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

}  // namespace fastseq::random
