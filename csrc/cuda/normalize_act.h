#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../common/check.h"

namespace resnet_fused::cuda {

// act((input - mean) / sqrt(var + eps) * weight + bias [+ residual])
Tensor normalize_act(const Tensor& input, const std::optional<Tensor>& residual, const Tensor& mean,
                     const Tensor& var, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& bias, double eps, const std::string& act,
                     double negative_slope);

}  // namespace resnet_fused::cuda
