// LayerNorm and RMSNorm on CUDA: the entry points, without a CUDA header for plain C++ to include.
#pragma once

#include <cstdint>

#include "../layer_norm.h"

namespace fastseq {

// Why these kernels cannot serve, or null where they can. They take f32, f16 and bf16 in any mix
// and every row length; pass DType::f64 where any tensor has it.
const char* layer_norm_rejects_cuda(int64_t row_length, DType widest);

// How many partial rows the backward writes: the caller sets LayerNormBackward::partial_rows to
// this and partials to 2 * partial_rows * row_length floats, aligned to 16 bytes (needed only for a
// weight or bias gradient). A pure function, so that every call gives the same bits.
int64_t layer_norm_partial_rows_cuda(int64_t rows, int64_t row_length, int sm_count);

// Both enqueue on the stream (a cudaStream_t) of the current device and do not wait. They return
// null, or a static string that says what was wrong.
const char* layer_norm_forward_cuda(const LayerNormForward& problem, void* stream);
const char* layer_norm_backward_cuda(const LayerNormBackward& problem, void* stream);

}  // namespace fastseq
