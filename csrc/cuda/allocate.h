// Fresh memory for operators, from torch's allocator.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../common/check.h"
#include "../common/layout.h"

namespace resnet_fused::cuda {

// float64 beside float64 data, else float32: the dtype of what is per channel.
inline ScalarType statistics_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(IntHeaderOnlyArrayRef sizes, MemoryFormat format, ScalarType dtype,
                    const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor empty_vector(int64_t size, ScalarType dtype, const Tensor& like) {
  return empty({&size, 1}, MemoryFormat::Contiguous, dtype, like);
}

// Of one number per channel.
inline Tensor empty_channels(const Tensor& input) {
  return empty_vector(input.size(1), statistics_dtype(input), input);
}

inline Tensor zero_channels(const Tensor& input) {
  Tensor zeros = empty_channels(input);
  return torch::stable::zero_(zeros);
}

}  // namespace resnet_fused::cuda
