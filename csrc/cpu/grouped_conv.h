// Grouped convolution: what the launcher and the kernels agree on (grouped_conv.cpp says the rest).
#pragma once

#include <cstdint>

#include "conv.h"
#include "kernel_types.h"

namespace resnet_fused {

constexpr int64_t kGroupedLanes = 16;  // channels computed together
constexpr const char* kGroupedTakes =
    "3 x 3 kernels in groups of 1, 2, 4, 8 or 16 channels, as many in as out, and a multiple of 16 "
    "in all";
bool grouped_takes(int64_t out_channels, int64_t group_channels, int64_t groups);

// Rows [begin, end) of the output, counted over all images.
using GroupedKernel = void (*)(const ConvArguments& conv, int64_t begin, int64_t end,
                               const void* zeros);

// `weight` is [out_channels][channels / groups][3][3]; as many floats are written.
void grouped_pack(const double* weight, int64_t out_channels, int64_t group_channels,
                  float* packed);
void grouped_run(const ConvArguments& conv);

}  // namespace resnet_fused
