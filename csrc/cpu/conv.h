// A convolution as the CPU kernels see it. Data are [N][H][W][C], channels innermost.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/activation_name.h"
#include "kernel_types.h"

namespace resnet_fused {

struct ConvShape {
  int64_t batch, channels, height, width;       // of the input
  int64_t out_channels, out_height, out_width;  // of the output
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_out_channels() const { return out_channels / groups; }
};

// The largest kernel, stride, padding and dilation, and how far apart a kernel's first and last
// taps may be: direct convolution copies what a row of outputs reads. resnet_fused/conv_choice.py
// leaves all else to PyTorch.
constexpr int64_t kMostStep = (int64_t(1) << 15) - 1;
constexpr int64_t kMostReach = 256;

// One side of a convolution with input, output channels and kernel known; returns its outputs.
inline int64_t set_side(const char* op, ConvShape& s, int side, int64_t stride, int64_t padding,
                        int64_t dilation) {
  const int64_t size = side == 0 ? s.height : s.width, kernel = s.kernel[side];
  check(stride > 0 && dilation > 0 && padding >= 0, op,
        ": stride and dilation must be positive and padding not negative, got ", stride, ", ",
        dilation, " and ", padding);
  check(std::max({kernel, stride, padding, dilation}) <= kMostStep, op,
        ": kernel, stride, padding and dilation must be at most ", kMostStep, ", got ",
        std::max({kernel, stride, padding, dilation}));
  const int64_t reach = dilation * (kernel - 1);
  check(reach <= kMostReach, op, ": the kernel must reach at most ", kMostReach, " pixels, got ",
        reach);
  s.stride[side] = stride, s.padding[side] = padding, s.dilation[side] = dilation;
  const int64_t room = size + 2 * padding - reach;
  check(size > 0 && room >= 1, op, ": input is smaller than the kernel, got ", s.height, " x ",
        s.width, " pixels");
  return (room - 1) / stride + 1;
}

// Data are float32 or bfloat16. Packed weights are 32-bit words: float32, or pairs of bfloat16
// numbers of consecutive channels, beside bfloat16 data only.
struct ConvArguments {
  ConvShape shape;
  const void* input;
  const float* packed;   // words, as the algorithm's pack function wrote them, the scale folded in
  const float* shift;    // [out_channels]
  const void* residual;  // like output, or null
  void* output;
  Activation act;
  float negative_slope;
  bool is_bf16;          // the data
  bool pairs;            // the packed weights
  int64_t longest_part;  // products that Winograd adds up at once, since the error of a sum grows
                         // with them; 0 for all
  // From image to image, row to row and pixel to pixel of the output, in pixels; zeros: dense. Only
  // direct convolution takes others.
  int64_t output_strides[3];

  int64_t per_word() const { return pairs ? 2 : 1; }
  int64_t group_words() const { return (shape.group_channels() + per_word() - 1) / per_word(); }
};

// The weight as the model has it, for outputs that are computed again by the definition.
struct PlainWeight {
  const void* data;
  bool is_bf16;
  int64_t strides[4];
  const float* scale;  // [out_channels], or null
};

// A packed weight: float32, or a number of a pair.
inline void write_packed(float* words, int64_t word, double value) {
  words[word] = static_cast<float>(value);
}
inline void write_packed(bf16* numbers, int64_t index, double value) {
  const float rounded = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  numbers[index].bits =
      static_cast<uint16_t>(is_nan ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace resnet_fused
