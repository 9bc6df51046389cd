// Types that kernels share with the code that launches them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/layout.h"

namespace resnet_fused {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Arithmetic and per-channel numbers are float64 for float64 data, else float32.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Columns of a packed panel of weights.
constexpr int kPanel = 32;

}  // namespace resnet_fused
