// A convolution as the CPU kernels see it. Data are [N][H][W][C], channels innermost.
#pragma once

#include <cstdint>

#include "../common/activation_name.h"

namespace resnet_fused {

struct ConvShape {
  int64_t batch, channels, height, width;       // of the input
  int64_t out_channels, out_height, out_width;  // of the output
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_out_channels() const { return out_channels / groups; }
};

struct ConvArguments {
  ConvShape shape;
  const float* input;
  const float* packed;    // as the algorithm's pack function wrote it, the scale folded in
  const float* shift;     // [out_channels]
  const float* residual;  // like output, or null
  float* output;
  Activation act;
  float negative_slope;
};

}  // namespace resnet_fused
