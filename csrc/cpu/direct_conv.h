// Direct convolution: what the launcher and the kernels agree on (direct_conv.cpp says the rest).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "conv.h"
#include "kernel_types.h"

namespace resnet_fused {

constexpr int64_t kCacheLine = 64;  // bytes

// Equally spaced pixels of one output row, as many as half a tile of the GEMM kernel.
struct PixelRun {
  int64_t input;  // offset of its first row of A, in words
  int64_t pixel;  // its first output pixel, as the output lies
  int64_t length;
};

// Output rows of one image, or pixels of one row: what is computed from one band.
struct Place {
  int64_t image, y, x;  // first output row and pixel
  int64_t height, width;
};

struct DirectTask {
  ConvArguments conv;
  int64_t input_strides[4];  // of (N, C, H, W), in numbers of the input
  bool copies;               // the input is read through a band in the workspace
  bool windows;              // the band has a row of the kernel's inputs for each output pixel
  bool overlap;              // these lie over one another, as in the image
  int64_t band_channels;     // words from pixel to pixel of the band, of one group
  int64_t unit_height;       // most output rows and pixels of a Place
  int64_t unit_width;
  std::vector<int64_t> segments;  // where the taps lie, relative to the first one
  int64_t depth;                  // words in a row, from each segment
  int64_t longest_chain;          // words added up at once; a longer sum has several parts
  const DirectTask* apart;        // with overlap: the same without, for numbers that are not finite

  int64_t output_stride(int i) const {
    const int64_t dense[3] = {conv.shape.out_height * conv.shape.out_width, conv.shape.out_width,
                              1};
    return conv.output_strides[2] == 0 ? dense[i] : conv.output_strides[i];
  }
  int64_t panels() const { return (conv.shape.group_out_channels() + kPanel - 1) / kPanel; }
  int64_t panel_size() const { return static_cast<int64_t>(segments.size()) * depth * kPanel; }
  // A 1 x 1 kernel copies only the pixels it reads.
  int64_t step(int i) const { return conv.shape.kernel[i] == 1 ? conv.shape.stride[i] : 1; }
  int64_t band_size(int i, int64_t outputs) const {
    const ConvShape& s = conv.shape;
    return (outputs - 1) * (s.stride[i] / step(i)) + (s.kernel[i] - 1) * s.dilation[i] + 1;
  }
  int64_t band_row() const {
    // The last pair of a window may end in the next pixel's first number.
    if (overlap) return (band_size(1, unit_width) * conv.shape.group_channels() + 2) / 2;
    return (windows ? unit_width : band_size(1, unit_width)) * band_channels;
  }
  // One row of the input as it is, from which windows are cut, and room on both of its sides.
  int64_t line() const {
    const int64_t row = band_size(1, unit_width) * conv.shape.group_channels();
    return windows && !overlap ? row + 2 * kCacheLine / int64_t{sizeof(float)} : 0;
  }
  int64_t band() const { return copies ? band_size(0, unit_height) * band_row() + line() : 0; }
  int64_t most_runs() const { return unit_height * (unit_width / 3 + 1); }
};

// One place, panels [begin, end) of one group; `band` holds task.band() words, `runs`
// task.most_runs().
using DirectKernel = void (*)(const DirectTask& task, const Place& place, int64_t group,
                              int64_t begin, int64_t end, float* band, PixelRun* runs);

// Few channels that do not come in pairs are paired along a row of the kernel.
inline bool direct_has_windows(int64_t group_channels, bool pairs) {
  return pairs && group_channels % 2 == 1 && group_channels < 16;
}

// Packed weights: [group][panel of 32 outputs][tap][channel or pair][32] words; with windows
// [group][panel][row of the kernel][pair][32].
size_t direct_packed_words(int64_t out_channels, int64_t group_channels, const int64_t* kernel,
                           int64_t groups, bool pairs);
void direct_pack(const double* weight, int64_t out_channels, int64_t channels,
                 const int64_t* kernel, int64_t groups, bool pairs, void* packed);
void direct_run(const ConvArguments& conv, const int64_t* input_strides);

}  // namespace resnet_fused
