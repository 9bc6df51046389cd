// The halves of bn_act that other operators are made of; what they compute is in ops/schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "../common/layout.h"

namespace resnet_fused {

Tensor normalize_act_op(const Tensor& input, const std::optional<Tensor>& residual,
                        const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, double eps, const std::string& act,
                        double negative_slope);

// The residual's gradient (empty without one), and those of weight and bias.
std::tuple<Tensor, Tensor, Tensor> bn_act_backward_sums(
    const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& output, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
    const std::string& act, double negative_slope, bool has_residual);

}  // namespace resnet_fused
