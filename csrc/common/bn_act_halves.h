// bn_act and bn_act_backward as operators of one call, from the operators of their halves.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "check.h"

namespace resnet_fused {

// `statistics` and `normalize` are a backend's batch_statistics and normalize_act.
template <auto statistics, auto normalize>
std::tuple<Tensor, Tensor, Tensor> bn_act_of_halves(const Tensor& input,
                                                    const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, double eps,
                                                    const std::string& act, double negative_slope) {
  const auto [mean, var] = statistics(input);
  return {normalize(input, residual, mean, var, weight, bias, eps, act, negative_slope), mean, var};
}

// `sums` and `grad_input` are a backend's bn_act_backward_sums and bn_act_backward_input.
template <auto sums, auto grad_input>
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward_of_halves(
    const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& output, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
    const std::string& act, double negative_slope, bool has_residual) {
  const auto [grad_residual, grad_weight, grad_bias] =
      sums(grad_output, input, residual, output, mean, var, weight, bias, eps, act, negative_slope,
           has_residual);
  const int64_t channels = std::max<int64_t>(input.size(1), 1);
  return {grad_input(has_residual ? grad_residual : grad_output, input, mean, var, weight, bias,
                     grad_weight, grad_bias, eps, has_residual ? std::string("none") : act,
                     negative_slope, input.numel() / channels),
          grad_residual, grad_weight, grad_bias};
}

}  // namespace resnet_fused
