// What the lanes of a warp do together.
#include <cmath>

#include "group.h"
#include "include/cuda_bf16.h"
#include "include/cuda_fp16.h"

namespace simt {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Lets the exchange happen if all lanes of the mask have come to it.
void try_collective(Thread& arrived) {
  const Block& block = *arrived.block;
  const int first = arrived.linear / kWarp * kWarp;
  Thread* threads[kWarp] = {};
  void* brought[kWarp] = {};
  for (int l = 0; l < kWarp; ++l) {
    if ((arrived.mask >> l & 1) == 0 || first + l >= block.thread_count) continue;
    Thread& thread = *block.threads[first + l];
    if (thread.state != State::at_exchange) return;
    if (thread.mask != arrived.mask || thread.place.line != arrived.place.line ||
        thread.combine != arrived.combine) {
      fault("lanes of one warp meet in different exchanges: lane %d with mask %08x at %s:%d, lane "
            "%d with mask %08x at %s:%d", arrived.linear % kWarp, arrived.mask, arrived.place.file,
            arrived.place.line, l, thread.mask, thread.place.file, thread.place.line);
    }
    threads[l] = &thread;
    brought[l] = thread.brought;
  }
  arrived.combine(brought, arrived.place);
  for (Thread* thread : threads) {
    if (thread != nullptr) wake(*thread);
  }
}

struct Exchange {
  uint64_t value, result;
  int source_lane;
};

void combine_exchange(void* const (&brought)[kWarp], Place place) {
  for (int l = 0; l < kWarp; ++l) {
    if (brought[l] == nullptr) continue;
    Exchange& mine = *static_cast<Exchange*>(brought[l]);
    const int source = mine.source_lane;
    if (source < 0 || source >= kWarp || brought[source] == nullptr) {
      fault("lane %d reads lane %d, which takes no part in the exchange at %s:%d", l, source,
            place.file, place.line);
    }
    mine.result = static_cast<const Exchange*>(brought[source])->value;
  }
}

void combine_clocks(void* const (&brought)[kWarp], Place) {
  std::vector<Clock*> clocks;
  for (void* one : brought) {
    if (one != nullptr) clocks.push_back(static_cast<Clock*>(one));
  }
  meet(clocks);
}

struct Vote {
  bool predicate;
  unsigned result;
};

void combine_votes(void* const (&brought)[kWarp], Place) {
  unsigned result = 0;
  for (int l = 0; l < kWarp; ++l) {
    if (brought[l] != nullptr && static_cast<const Vote*>(brought[l])->predicate) {
      result |= 1u << l;
    }
  }
  for (void* one : brought) {
    if (one != nullptr) static_cast<Vote*>(one)->result = result;
  }
}

void require_whole_warp(void* const (&brought)[kWarp], const char* what, Place place) {
  for (const void* one : brought) {
    if (one == nullptr) fault("%s by a part of a warp at %s:%d", what, place.file, place.line);
  }
}

struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  Format format;
};

// Half of a register, or all of it.
float element(uint32_t bits, int half, Format format) {
  if (format == Format::tf32) return __uint_as_float(bits & 0xffffe000u);
  const auto short_bits = static_cast<unsigned short>(bits >> (16 * half));
  return format == Format::f16 ? __half2float(__ushort_as_half(short_bits))
                               : __bfloat162float(__ushort_as_bfloat16(short_bits));
}

// Sums in fp64 and rounds once; the hardware keeps fewer bits of each sum.
void combine_products(void* const (&brought)[kWarp], Place place) {
  require_whole_warp(brought, "a matrix product", place);
  const Format format = static_cast<const Product*>(brought[0])->format;
  const int packed = format == Format::tf32 ? 1 : 2;  // elements in a register
  const int depth = 8 * packed;
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const Product& product = *static_cast<const Product*>(brought[l]);
    const int group = l / 4, quad = l % 4;
    for (int half = 0; half < packed; ++half) {
      for (int part = 0; part < 2; ++part) {
        const int k = part * depth / 2 + quad * packed + half;
        a[group][k] = element(product.a[2 * part], half, format);
        a[group + 8][k] = element(product.a[2 * part + 1], half, format);
        b[k][group] = element(product.b[part], half, format);
      }
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    float* d = static_cast<const Product*>(brought[l])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      double sum = d[i];
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      d[i] = static_cast<float>(sum);
    }
  }
}

struct MatrixLoad {
  uint32_t* to;
  const void* row;
  int matrices;
  bool transposed;
};

void combine_loads(void* const (&brought)[kWarp], Place place) {
  require_whole_warp(brought, "a load of matrices", place);
  const int matrices = static_cast<const MatrixLoad*>(brought[0])->matrices;
  for (int m = 0; m < matrices; ++m) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const MatrixLoad& load = *static_cast<const MatrixLoad*>(brought[8 * m + row]);
      if (reinterpret_cast<uintptr_t>(load.row) % 16 != 0) {
        fault("a row of a matrix misaligned at %s:%d", place.file, place.line);
      }
      read_row(elements[row], load.row, sizeof(elements[row]));
    }
    for (int l = 0; l < kWarp; ++l) {
      const MatrixLoad& load = *static_cast<const MatrixLoad*>(brought[l]);
      const int group = l / 4, pair = l % 4 * 2;
      const uint32_t low = load.transposed ? elements[pair][group] : elements[group][pair];
      const uint32_t high = load.transposed ? elements[pair + 1][group] : elements[group][pair + 1];
      load.to[m] = low | high << 16;
    }
  }
}

}  // namespace

void collective(unsigned mask, void* bring, Combine combine, Place place) {
  Thread& self = *current;
  if ((mask >> lane() & 1) == 0) {
    fault("lane %d is not in the mask %08x of its exchange at %s:%d", lane(), mask, place.file,
          place.line);
  }
  progress();
  self.state = State::at_exchange;
  self.place = place;
  self.mask = mask;
  self.brought = bring;
  self.combine = combine;
  try_collective(self);
  wait();
}

int lane() { return current->linear % kWarp; }

uint64_t exchange(unsigned mask, uint64_t value, int source_lane, Place place) {
  Exchange mine{value, 0, source_lane};
  collective(mask, &mine, combine_exchange, place);
  return mine.result;
}

void sync_warp(unsigned mask, Place place) {
  collective(mask, &current->clock, combine_clocks, place);
}

unsigned ballot(unsigned mask, bool predicate, Place place) {
  Vote mine{predicate, 0};
  collective(mask, &mine, combine_votes, place);
  return mine.result;
}

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Format format,
         Place place) {
  Product mine{d, a, b, format};
  collective(kAllLanes, &mine, combine_products, place);
}

void ldmatrix(uint32_t* to, int matrices, const void* row, bool transposed, Place place) {
  MatrixLoad mine{to, row, matrices, transposed};
  if (lane() < 8 * matrices) access(row, 16, false, __builtin_return_address(0));
  collective(kAllLanes, &mine, combine_loads, place);
}

uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (std::isnan(value)) return 0x7fffffffu;
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace simt
