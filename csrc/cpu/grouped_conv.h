// Grouped convolution: what the launcher and the kernels agree on (grouped_conv.cpp says the rest).
#pragma once

#include <cstdint>

#include "conv.h"
#include "kernel_types.h"

namespace resnet_fused {

constexpr int64_t kGroupedLanes = 16;  // channels computed together
constexpr const char* kGroupedWidths =
    "groups of 1, 2, 4, 8 or 16 channels, as many in as out, and a multiple of 16 in all";

// Rows [begin, end) of the output, counted over all images.
using GroupedKernel = void (*)(const ConvArguments& conv, int64_t begin, int64_t end,
                               const void* zeros);

// Why a convolution is not one of these kernels', or null.
const char* grouped_unfit(const ConvShape& shape);

// `weight` is [out_channels][channels / groups][3][3]; as many floats are written.
void grouped_pack(const double* weight, int64_t out_channels, int64_t group_channels,
                  float* packed);
void grouped_run(const ConvArguments& conv);

}  // namespace resnet_fused
