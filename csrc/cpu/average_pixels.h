#pragma once

#include <cstdint>

#include "../common/check.h"

namespace resnet_fused {

// Units [begin, end), counted over all images: kAverageChannels channels of one image, the last
// unit of an image fewer. `input` is [images][height][width][channels], `output`
// [images][channels].
using AveragePixelsKernel = void (*)(const void* input, void* output, int64_t channels,
                                     int64_t height, int64_t width, int64_t begin, int64_t end);

constexpr int64_t kAverageChannels = 64;

}  // namespace resnet_fused
