// Products of small matrices by the 32 lanes of a warp on tensor cores: d += a b, accumulated in
// fp32. All lanes must call together; each holds a part of every matrix in its registers.
//
// With group = lane / 4 and quad = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16" and
// "... mma.m16n8k8"), a lane holds of
//
//   d [16, 8]    d[0], d[1]   row group,      columns 2 quad, 2 quad + 1
//                d[2], d[3]   row group + 8,  the same columns
//
//   16-bit elements, two in a register, the lower column (of a) or row (of b) in the lower half:
//   a [16, 16]   a[0]   row group,      columns 2 quad, 2 quad + 1
//                a[1]   row group + 8,  the same columns
//                a[2]   row group,      columns 2 quad + 8, 2 quad + 9
//                a[3]   row group + 8,  those columns
//   b [16, 8]    b[0]   rows 2 quad, 2 quad + 1,      column group
//                b[1]   rows 2 quad + 8, 2 quad + 9,  column group
//
//   tf32, fp32's bits of which the lower 13 are not read (to_tf32 rounds them away):
//   a [16, 8]    a[0]   row group,      column quad
//                a[1]   row group + 8,  column quad
//                a[2]   row group,      column quad + 4
//                a[3]   row group + 8,  column quad + 4
//   b [8, 8]     b[0]   row quad,      column group
//                b[1]   row quad + 4,  column group
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace fastseq {

// The 16-bit formats of a product, by which mma_m16n8k16 is chosen.
struct Bf16 {};
struct F16 {};

#ifdef __CUDACC__

#define FASTSEQ_MMA(instruction)                                                              \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], Bf16) {
  FASTSEQ_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], F16) {
  FASTSEQ_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  FASTSEQ_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef FASTSEQ_MMA

// To the nearest tf32, halves away from zero, as bits for a register of a product.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

#define FASTSEQ_LDMATRIX_4(instruction)                                    \
  asm volatile(instruction " {%0, %1, %2, %3}, [%4];"                      \
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])        \
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))) \
               : "memory")
#define FASTSEQ_LDMATRIX_2(instruction)                                    \
  asm volatile(instruction " {%0, %1}, [%2];"                              \
               : "=r"(to[0]), "=r"(to[1])                                  \
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))) \
               : "memory")

// Loads matrices of 8 rows of 8 16-bit elements from the block's own shared memory, one a register.
// Lanes 8 m to 8 m + 7 say where the rows of matrix m begin (16 bytes each, aligned to 16); to[m]
// gets columns 2 quad, 2 quad + 1 of row group: a part of a, or of b stored by columns. Transposed:
// rows 2 quad, 2 quad + 1 of column group. The two-matrix forms ignore what lanes 16 to 31 say.
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], const void* row) {
  FASTSEQ_LDMATRIX_4("ldmatrix.sync.aligned.m8n8.x4.shared.b16");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[2], const void* row) {
  FASTSEQ_LDMATRIX_2("ldmatrix.sync.aligned.m8n8.x2.shared.b16");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
  FASTSEQ_LDMATRIX_4("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[2], const void* row) {
  FASTSEQ_LDMATRIX_2("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16");
}

#undef FASTSEQ_LDMATRIX_4
#undef FASTSEQ_LDMATRIX_2

#else

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bf16,
                         simt::Place place = simt::here()) {
  simt::mma(d, a, b, simt::Format::bf16, place);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F16,
                         simt::Place place = simt::here()) {
  simt::mma(d, a, b, simt::Format::f16, place);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             simt::Place place = simt::here()) {
  simt::mma(d, a, b, simt::Format::tf32, place);
}

inline uint32_t to_tf32(float value) { return simt::to_tf32(value); }

template <int kMatrices>
void ldmatrix(uint32_t (&to)[kMatrices], const void* row, simt::Place place = simt::here()) {
  simt::ldmatrix(to, kMatrices, row, false, place);
}

template <int kMatrices>
void ldmatrix_transposed(uint32_t (&to)[kMatrices], const void* row,
                         simt::Place place = simt::here()) {
  simt::ldmatrix(to, kMatrices, row, true, place);
}

#endif

}  // namespace fastseq
