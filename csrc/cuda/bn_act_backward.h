#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "../common/check.h"

namespace resnet_fused::cuda {

// The residual's gradient (empty without one), and those of weight and bias.
std::tuple<Tensor, Tensor, Tensor> bn_act_backward_sums(
    const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& output, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
    const std::string& act, double negative_slope, bool has_residual);

Tensor bn_act_backward_input(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                             const Tensor& var, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, const Tensor& grad_weight,
                             const Tensor& grad_bias, double eps, const std::string& act,
                             double negative_slope, int64_t count);

}  // namespace resnet_fused::cuda
