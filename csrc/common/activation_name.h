// The operators' `act` argument.
#pragma once

#include <string>

#include "check.h"

namespace resnet_fused {

enum class Activation { none, relu, relu6, leaky_relu, silu, hardswish, gelu };

inline Activation parse_activation(const char* op, const std::string& name) {
  static constexpr const char* names[] = {"none", "relu",      "relu6", "leaky_relu",
                                          "silu", "hardswish", "gelu"};
  for (int i = 0; i < 7; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  check(false, op, ": act must be none, relu, relu6, leaky_relu, silu, hardswish or gelu, got '",
        name, "'");
  return Activation::none;
}

// act'(x) can be told from act(x) alone.
inline bool is_piecewise_linear(Activation act, double negative_slope) {
  return act == Activation::none || act == Activation::relu || act == Activation::relu6 ||
         (act == Activation::leaky_relu && negative_slope >= 0);
}

}  // namespace resnet_fused
