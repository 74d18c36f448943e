// The problem a cross-entropy kernel solves, on any device.
//
//   z     = logits, or softcap * tanh(logits / softcap)
//   lse   = log(sum(exp(z))) = maximum + log_sum
//   loss  = w[t] * ((1 - smoothing) * (lse - z[t]) + z_loss * lse^2)
//           + smoothing / classes * sum over c of w[c] * (lse - z[c])
//   mean  = sum of losses / sum of w[t]
//
// for a row with target t and class weights w (1 where there are none); 0 for a row whose target is
// ignore_index. Statistics and arithmetic are fp32 (fp64 where the logits are fp64).
#pragma once

#include "types.h"

namespace fastseq {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };  // torch's numbers

struct CrossEntropy {
  int64_t rows = 0, classes = 0;
  Rows logits;
  const int64_t* target = nullptr;  // [rows]
  Vector weight;                    // [classes]; may be absent
  double weight_sum = 0;            // of all classes; classes without weight
  int64_t ignore_index = -100;
  double smoothing = 0, softcap = 0, z_loss = 0;  // softcap 0: none
  // lse lies in two parts: their sum, rounded, would cost exp(z - lse) digits where logits are
  // large.
  Vector maximum, log_sum;  // [rows], fp32 or fp64
};

struct CrossEntropyForward : CrossEntropy {
  int64_t reduction = kMean;
  bool every_lse = false;         // of ignored rows too; else these are not read
  double* row_losses = nullptr;   // [rows], scratch
  double* row_weights = nullptr;  // [rows], scratch: w[t], 0 where ignored
  Vector loss;                    // [rows], or one element
  Vector denominator;             // one element: the sum of w[t]; only with kMean
};

//   grad_logits[c] = g * (w[t] * (1 - smoothing + 2 * z_loss * lse) + smoothing / classes * sum(w))
//                    * p[c] - g * (smoothing / classes * w[c] + (1 - smoothing) * w[t] * [c = t])
//                    + grad_lse * p[c],     p[c] = exp(z[c] - lse), g = grad_loss / denominator
//
// times 1 - (z[c] / softcap)^2 with a softcap.
struct CrossEntropyBackward : CrossEntropy {
  Vector grad_loss;              // [rows], or one element for all
  int64_t grad_loss_stride = 0;  // 1 or 0
  Vector grad_lse;               // [rows]; may be absent
  Vector denominator;            // one element; absent: 1
  Rows grad_logits;
  bool past_cache = false;  // the gradient is larger than the cache (CPU)
};

// A class for every row, drawn with the probabilities softmax(logits / temperature): the first of
// the largest of logits / temperature - log(E), E an exponential variable of (seed, row, class). -1
// for a row without a logit above -Inf.
struct Sample {
  int64_t rows = 0, classes = 0;
  Rows logits;  // fp32, fp16 or bf16
  const int64_t* seed = nullptr;
  int64_t first_row = 0;  // the number of row 0
  double temperature = 1;
  int64_t* tokens = nullptr;  // [rows]
};

}  // namespace fastseq
