// The activations of common/activation.h on a GPU, for several values at once.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/activation_name.h"
#include "hardware.cuh"

namespace resnet_fused::cuda {

DEVICE_INLINE float exp_(float x) {
  return expf(x);
}
DEVICE_INLINE double exp_(double x) {
  return exp(x);
}
DEVICE_INLINE float erf_(float x) {
  return erff(x);
}
DEVICE_INLINE double erf_(double x) {
  return erf(x);
}

#include "../common/activation.h"

// What a kernel is compiled for: the two that residual networks are made of; what is made of
// straight lines; and all. The last two ask once for each thread's numbers.
enum class Act { none, relu, linear, any };

template <Act kind, class Body>
DEVICE_INLINE void with_activation(Activation act, const Body& body) {
  if constexpr (kind == Act::none) {
    body(None());
  } else if constexpr (kind == Act::relu) {
    body(Relu());
  } else {
    switch (act) {
      case Activation::none: return body(None());
      case Activation::relu: return body(Relu());
      case Activation::relu6: return body(Relu6());
      case Activation::leaky_relu: return body(LeakyRelu());
      default: break;
    }
    if constexpr (kind == Act::any) {
      switch (act) {
        case Activation::silu: return body(Silu());
        case Activation::hardswish: return body(Hardswish());
        case Activation::gelu: return body(Gelu());
        default: break;
      }
    }
  }
}

// v = act(v)
template <Act kind, class A, int n>
DEVICE_INLINE void activate(A (&v)[n], Activation act, A slope) {
  with_activation<kind>(act, [&](auto function) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = decltype(function)::forward(v[i], slope);
  });
}

// g = g * act'(argument)
template <Act kind, class A, int n>
DEVICE_INLINE void activate_backward(A (&g)[n], const A (&argument)[n], Activation act, A slope) {
  with_activation<kind>(act, [&](auto function) {
#pragma unroll
    for (int i = 0; i < n; ++i) g[i] = decltype(function)::backward(g[i], argument[i], slope);
  });
}

// --- on the host ----------------------------------------------------------------------------

// Calls body(kind), kind a constant. Only accesses of 16 bytes to rows have a kernel for each
// activation.
template <int n, bool planes, class Body>
void with_kind(Activation act, const Body& body) {
  using Any = std::integral_constant<Act, Act::any>;
  if constexpr (n > 1 && !planes) {
    switch (act) {
      case Activation::none: return body(std::integral_constant<Act, Act::none>());
      case Activation::relu: return body(std::integral_constant<Act, Act::relu>());
      default: return body(Any());
    }
  } else {
    body(Any());
  }
}

}  // namespace resnet_fused::cuda
