// Attention on the CPU: many queries in tiles, few against a cache of keys.
#include "attention.h"

#include "attention_backward.h"
#include "attention_decode.h"
#include "attention_forward.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// Calls f with the memory type and whether the products are of pairs of it.
template <class F>
inline void with_product(DType dtype, F f) {
  with_type<float>(dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    f(type, std::integral_constant < bool, kHasPairs&& std::is_same_v < M, bf16 >> {});
  });
}

void forward(const Attention& args, int64_t begin, int64_t end) {
  with_product(args.dtype, [&](auto* type, auto pairs) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = begin; task < end; ++task)
      forward_task<decltype(pairs)::value, M>(args, task);
  });
}

void backward(const Attention& args, int64_t begin, int64_t end) {
  with_product(args.dtype, [&](auto* type, auto pairs) {
    using M = std::remove_pointer_t<decltype(type)>;
    for (int64_t task = begin; task < end; ++task)
      backward_task<decltype(pairs)::value, M>(args, task);
  });
}

void delta(const Attention& args, int64_t begin, int64_t end) {
  with_type<float>(args.dtype, [&](auto* type) {
    delta_rows<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}

void grad_query(const Attention& args, int64_t begin, int64_t end) {
  with_type<float>(args.dtype, [&](auto* type) {
    grad_query_rows<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}

int64_t pitch(int64_t head_dim) { return Panels(head_dim).pitch(); }

}  // namespace

extern const AttentionCpu attention{forward,      backward, delta,  grad_query, pitch,
                                    kTaskQueries, kTile,    decode, merge};

}  // namespace fastseq::FASTSEQ_ISA
