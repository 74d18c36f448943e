// What the matrix products of several families are made of. Included by files that are compiled
// once per instruction set.
#pragma once

#include "rows.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows whose sums stay in registers beside N vectors of weights and one of the row; 6 for 4
// vectors of AVX-512.
constexpr int most_rows(int vectors) {
  const int rows = (kRegisters - vectors - 1) / vectors;
  return rows > 8 ? 8 : rows;
}

#if defined(__AVX512F__)
// Rows become columns: 16 rows of 16, stride apart, to rows pitch apart.
inline void transpose(const float* from, int64_t stride, float* to, int64_t pitch) {
  // With a mask: the other form warns of what it leaves undefined, in GCC 12.
  constexpr __mmask16 kAll = 0xffff;
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = bit_cast<__m512>(load(from + i * stride));
  // Of four rows at a time, the same four columns of each 128 bits.
  for (int i = 0; i < 16; i += 4) {
    const __m512 x = _mm512_maskz_unpacklo_ps(kAll, a[i], a[i + 1]),
                 y = _mm512_maskz_unpackhi_ps(kAll, a[i], a[i + 1]);
    const __m512 z = _mm512_maskz_unpacklo_ps(kAll, a[i + 2], a[i + 3]);
    const __m512 w = _mm512_maskz_unpackhi_ps(kAll, a[i + 2], a[i + 3]);
    b[i] = _mm512_maskz_shuffle_ps(kAll, x, z, 0x44);
    b[i + 1] = _mm512_maskz_shuffle_ps(kAll, x, z, 0xee);
    b[i + 2] = _mm512_maskz_shuffle_ps(kAll, y, w, 0x44);
    b[i + 3] = _mm512_maskz_shuffle_ps(kAll, y, w, 0xee);
  }
  // And a 4 x 4 transposition of these parts.
  for (int i = 0; i < 4; ++i) {
    const __m512 x = _mm512_maskz_shuffle_f32x4(kAll, b[i], b[i + 4], 0x88);
    const __m512 y = _mm512_maskz_shuffle_f32x4(kAll, b[i], b[i + 4], 0xdd);
    const __m512 z = _mm512_maskz_shuffle_f32x4(kAll, b[i + 8], b[i + 12], 0x88);
    const __m512 w = _mm512_maskz_shuffle_f32x4(kAll, b[i + 8], b[i + 12], 0xdd);
    _mm512_storeu_ps(to + i * pitch, _mm512_maskz_shuffle_f32x4(kAll, x, z, 0x88));
    _mm512_storeu_ps(to + (i + 4) * pitch, _mm512_maskz_shuffle_f32x4(kAll, y, w, 0x88));
    _mm512_storeu_ps(to + (i + 8) * pitch, _mm512_maskz_shuffle_f32x4(kAll, x, z, 0xdd));
    _mm512_storeu_ps(to + (i + 12) * pitch, _mm512_maskz_shuffle_f32x4(kAll, y, w, 0xdd));
  }
}
#endif

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
// sum + the products of both halves of x and w. Rounds after each of them and flushes what is below
// the smallest normal number.
inline F32x add_pairs(F32x x, F32x w, F32x sum) {
  return bit_cast<F32x>(
      _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(x), bit_cast<__m512bh>(w)));
}
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace
}  // namespace fastseq::FASTSEQ_ISA
