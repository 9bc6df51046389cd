// A convolution in training with the batch norms before and behind it (train_conv.cpp says the
// rest).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/layout.h"

namespace resnet_fused {

// z = conv(a, weight) + bias, and the mean and biased variance of its channels. `before` is empty
// where a is the input, else the mean, variance, weight and bias (empty for none) of a =
// act(bn(x)).
std::tuple<Tensor, Tensor, Tensor> train_conv(
    const Tensor& input, const std::vector<Tensor>& before, double eps, const std::string& act,
    double negative_slope, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& geometry, const std::string& algorithm);

// The gradients of a (plus `residual`) and of the weight, and for a = act(bn(x)) those of that
// batch norm's weight and bias; empty what "none" computes, and the weight's if it is not finite.
// `after` is empty where grad is that of z, else it is that of act(bn(z)) and these end with the
// gradients of weight and bias, over `count` values.
std::tuple<Tensor, Tensor, Tensor, Tensor> train_conv_backward(
    const Tensor& grad, const std::optional<Tensor>& output, const std::vector<Tensor>& after,
    double after_eps, const std::string& after_act, double after_slope, int64_t count,
    const std::optional<Tensor>& positions, const std::vector<int64_t>& window, const Tensor& input,
    const std::vector<Tensor>& before, double before_eps, const std::string& before_act,
    double before_slope, const Tensor& weight, const std::vector<int64_t>& geometry,
    const std::optional<Tensor>& residual, const std::string& input_algorithm,
    const std::string& weight_algorithm);

}  // namespace resnet_fused
