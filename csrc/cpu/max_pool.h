#pragma once

#include <cstdint>
#include <vector>

#include "../common/check.h"

namespace resnet_fused {

struct PoolShape {
  int64_t channels;
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// `window` is kernel_size, stride, padding and dilation, two numbers each.
PoolShape pool_shape(const char* op, const Tensor& input, const std::vector<int64_t>& window);
// The same where it is kept which of a window's pixels its largest value was found at.
PoolShape positions_shape(const char* op, const Tensor& input, const std::vector<int64_t>& window);

constexpr int64_t kMostPositions = 255;  // pixels of such a window

// Data are [N][H][W][C]. `positions`, if not null, are where in its window each output was found,
// kernel[1] * row + column; of several the first, as in eager PyTorch.
void max_pool(const void* input, void* output, uint8_t* positions, const PoolShape& shape,
              int64_t images, ScalarType dtype);

// Another tensor of the input's shape, read where each output was found.
void read_found(const void* input, const uint8_t* positions, void* output, const PoolShape& shape,
                int64_t images, ScalarType dtype);

// The gradient of the input: zero but where a window found its largest value.
void max_unpool(const void* grad, const uint8_t* positions, void* grad_input,
                const PoolShape& shape, int64_t images, ScalarType dtype);

// Rows [begin, end) of the output, counted over all images.
using MaxPoolKernel = void (*)(const void* input, void* output, uint8_t* positions,
                               const PoolShape& shape, int64_t begin, int64_t end);
using ReadFoundKernel = void (*)(const void* input, const uint8_t* positions, void* output,
                                 const PoolShape& shape, int64_t begin, int64_t end);
// Rows [begin, end) of the input.
using MaxUnpoolKernel = void (*)(const void* grad, const uint8_t* positions, void* grad_input,
                                 const PoolShape& shape, int64_t begin, int64_t end);

}  // namespace resnet_fused
