// Division by a number that is known when a kernel starts.
#pragma once

#include <cstdint>

#include "hardware.cuh"

namespace resnet_fused::cuda {

// n / divisor for 0 <= n < 2^31, as a product. Granlund and Montgomery, "Division by Invariant
// Integers using Multiplication" (1994), figure 4.1.
struct Divider {
  uint32_t divisor = 1, factor = 1, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    factor = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }

  DEVICE_INLINE uint32_t operator()(uint32_t n) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> 32) + n) >> shift;
  }
};

}  // namespace resnet_fused::cuda
