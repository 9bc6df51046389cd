// 1 x 1 convolution by Strassen's products: what the launcher and the kernels agree on
// (strassen.cpp says the rest).
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv.h"
#include "kernel_types.h"

namespace resnet_fused {

constexpr int64_t kProducts = 7;
constexpr int64_t kFarWeights = int64_t(2) << 20;  // packed floats that a small L3 does not keep

struct StrassenTask {
  ConvArguments conv;
  const void* weight;  // [out_channels][channels], not packed
  int64_t weight_strides[2];
  const float* scale;  // [out_channels]

  int64_t half() const { return conv.shape.channels / 2; }  // channels of a block
  int64_t columns() const { return conv.shape.out_channels / 2; }
  int64_t panels() const { return columns() / kPanel; }  // pairs of panels, one of each half
  int64_t image_pixels() const { return conv.shape.out_height * conv.shape.out_width; }
  // Pairs of tiles of one image, if one has at most so many pixels.
  int64_t image_pairs(int64_t most) const { return (image_pixels() + most - 1) / most; }
  // Floats from row to row of a block; not a multiple of 4 KiB.
  int64_t row() const { return half() + 16; }
};

// Pairs of tiles [first, last), counted over all images, and of panels [begin, end). `workspace`
// holds the blocks of the former: kProducts * row() floats for each two pixels.
using StrassenKernel = void (*)(const StrassenTask& task, int64_t first, int64_t last,
                                int64_t begin, int64_t end, float* workspace);

constexpr const char* kStrassenTakes =
    "1 x 1 kernels without groups, a multiple of 32 channels in and of 64 out";
bool strassen_takes(int64_t out_channels, int64_t group_channels, int64_t groups);

// Packed weights: [pair of panels][product][channel of a half][32].
size_t strassen_packed_floats(int64_t out_channels, int64_t channels);
void strassen_pack(const double* weight, int64_t out_channels, int64_t channels, float* packed);
void strassen_run(const ConvArguments& conv, const void* weight, const int64_t* weight_strides,
                  const float* scale);

}  // namespace resnet_fused
