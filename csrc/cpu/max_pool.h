#pragma once

#include <cstdint>

#include "../common/check.h"

namespace resnet_fused {

struct PoolShape {
  int64_t channels;
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// Rows [begin, end) of the output, counted over all images; data are [N][H][W][C].
using MaxPoolKernel = void (*)(const void* input, void* output, const PoolShape& shape,
                               int64_t begin, int64_t end);

}  // namespace resnet_fused
