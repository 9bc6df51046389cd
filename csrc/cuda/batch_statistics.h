#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../common/check.h"

namespace resnet_fused::cuda {

// Mean and biased variance of each channel.
std::tuple<Tensor, Tensor> batch_statistics(const Tensor& input);

}  // namespace resnet_fused::cuda
