#pragma once

#include <cstdint>

namespace resnet_fused {

// Units a thread takes at least, so that it has as many elements as at::internal::GRAIN_SIZE.
inline int64_t grain(int64_t unit_size) {
  constexpr int64_t kGrainSize = 32768;
  return unit_size >= kGrainSize ? 1 : (kGrainSize + unit_size - 1) / unit_size;
}

}  // namespace resnet_fused
