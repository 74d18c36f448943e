// The arithmetic of one unit of a recurrent cell, forward and backward, on any device.
//
// V is a number or a vector of them; Math has tanh and sigmoid of it. Gates come before their
// activation, and go out activated: that is what the backward starts from.
#pragma once

#if defined(__CUDACC__) && !defined(FASTSEQ_HOST_DEVICE)
#define FASTSEQ_HOST_DEVICE __host__ __device__ __forceinline__
#elif !defined(FASTSEQ_HOST_DEVICE)
#define FASTSEQ_HOST_DEVICE inline
#endif

namespace fastseq::gates {

// c' = f c + i g; what remains, h = o tanh(c'), may have a norm in between.
template <class Math, class V>
FASTSEQ_HOST_DEVICE V lstm(V& i, V& f, V& g, V& o, V c) {
  i = Math::sigmoid(i);
  f = Math::sigmoid(f);
  g = Math::tanh(g);
  o = Math::sigmoid(o);
  return f * c + i * g;
}

// From the activated gates to the gradients of what they were before; grad_c is the gradient of c',
// that through h included, and becomes that of c. grad_o is the gradient of the activated o.
template <class Math, class V>
FASTSEQ_HOST_DEVICE void lstm_backward(V& i, V& f, V& g, V& o, V c, V grad_o, V& grad_c) {
  const V grad_i = grad_c * g * i * (1 - i);
  const V grad_f = grad_c * c * f * (1 - f);
  const V grad_g = grad_c * i * (1 - g * g);
  grad_c = grad_c * f;
  i = grad_i;
  f = grad_f;
  g = grad_g;
  o = grad_o * o * (1 - o);
}

// n = tanh(xn + r hn), h' = (1 - z) n + z h. On return r, z and n are activated.
template <class Math, class V>
FASTSEQ_HOST_DEVICE V gru(V& r, V& z, V& n, V hn, V h) {
  r = Math::sigmoid(r);
  z = Math::sigmoid(z);
  n = Math::tanh(n + r * hn);
  return n + z * (h - n);
}

// r, z, n become their gradients, hn that of the hidden part of n; returned is the direct part of
// the gradient of h.
template <class Math, class V>
FASTSEQ_HOST_DEVICE V gru_backward(V& r, V& z, V& n, V& hn, V h, V grad) {
  const V direct = grad * z;
  const V grad_n = grad * (1 - z) * (1 - n * n);
  const V grad_r = grad_n * hn * r * (1 - r);
  z = grad * (h - n) * z * (1 - z);
  hn = grad_n * r;
  r = grad_r;
  n = grad_n;
  return direct;
}

}  // namespace fastseq::gates
