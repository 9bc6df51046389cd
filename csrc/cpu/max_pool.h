#pragma once

#include <cstdint>

#include "../common/pool_shape.h"

namespace resnet_fused {

inline void check_has_kernel(const char* op, const Tensor& input) {
  check(input.size(1) > 0, op, ": input must have channels, got shape ", shape_text(input.sizes()));
  check(input.scalar_type() != ScalarType::Half, op, ": input must not be float16");
}

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
