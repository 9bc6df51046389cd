// Training-mode batch norm + residual + activation, and its gradients.
//
//     y = act((x - mean[c]) * rstd[c] * weight[c] + bias[c] [+ residual])
//
// Data is dense, in the layout of `input`. Bytes, in tensors: forward reads x, then x [and
// residual], and writes y: 3 [4]. Eager batch_norm reads x three times (mean, var, normalize) and
// writes, add reads two and writes, relu reads and writes: 6 [9]. Backward: see bn_act_backward.h.
// Ioffe, Szegedy: "Batch Normalization", arXiv:1502.03167.
//
// An empty batch gives an empty output, zero mean and variance and zero gradients; PyTorch's
// native_batch_norm raises there, and its backward divides by zero.

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "batch_statistics.h"
#include "bn_act_backward.h"
#include "channel_vectors.h"
#include "memory_pool.h"
#include "normalize_act.h"

namespace resnet_fused {
namespace {

using OptionalTensor = std::optional<Tensor>;

ScalarType statistics_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty_vector(int64_t size, ScalarType dtype) {
  return pool_empty(IntHeaderOnlyArrayRef(&size, 1), MemoryFormat::Contiguous, dtype);
}

Tensor zero_vector(const Tensor& input) {
  Tensor zeros = empty_vector(input.size(1), statistics_dtype(input));
  return torch::stable::zero_(zeros);
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> forward(const char* op, const Tensor& input,
                                           const OptionalTensor& residual,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           double eps, Activation act, double negative_slope) {
  const VectorArgument<A> weight_data(op, "weight", weight, input),
      bias_data(op, "bias", bias, input);
  const MemoryFormat format = suggested_format(input);
  Tensor output = pool_empty(input.sizes(), format, input.scalar_type());
  if (input.numel() == 0) return {output, zero_vector(input), zero_vector(input)};

  const Tensor x = dense(input, format);
  const Tensor r = residual ? dense(*residual, format) : x;
  const int64_t channels = input.size(1);
  const Extent shape = folded(extent(x, format));
  Tensor mean = empty_vector(channels, statistics_dtype(input));
  Tensor var = empty_vector(channels, statistics_dtype(input));
  A* mean_data = static_cast<A*>(mean.mutable_data_ptr());
  A* var_data = static_cast<A*>(var.mutable_data_ptr());

  std::vector<double> exact_mean(channels), exact_var(channels);
  // Longer rows for the sums: eight are read side by side, and the prefetcher wants to see streams.
  batch_statistics(x.const_data_ptr(), folded(shape, 512), input.scalar_type(), channels,
                   exact_mean.data(), exact_var.data());
  for (int64_t c = 0; c < channels; ++c) {
    mean_data[c] = static_cast<A>(exact_mean[c]);
    var_data[c] = static_cast<A>(exact_var[c]);
  }
  const Normalization<A> n(mean_data, var_data, weight_data, bias_data, eps, channels, shape);
  normalize_act(
      {x.const_data_ptr(), residual ? r.const_data_ptr() : nullptr, output.mutable_data_ptr(),
       shape, n.mean.data(), n.scale.data(), n.bias.data(), negative_slope},
      input.scalar_type(), act);
  return {output, mean, var};
}

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const char* op, const Tensor& grad_output, const Tensor& input, const OptionalTensor& auxiliary,
    MaskFrom mask, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, Activation act, double negative_slope) {
  const VectorArgument<A> mean_data(op, "mean", mean, input), var_data(op, "var", var, input);
  const VectorArgument<A> weight_data(op, "weight", weight, input),
      bias_data(op, "bias", bias, input);
  const bool has_residual = mask != MaskFrom::input;
  const ScalarType dtype = input.scalar_type();
  const MemoryFormat format = suggested_format(input);
  Tensor grad_input = pool_empty(input.sizes(), format, dtype);
  Tensor grad_residual =
      has_residual ? pool_empty(input.sizes(), format, dtype) : empty_vector(0, dtype);
  if (input.numel() == 0)
    return {grad_input, grad_residual, zero_vector(input), zero_vector(input)};

  const Tensor g = dense(grad_output, format), x = dense(input, format);
  // Without an activation the mask is not read; any pointer to as many elements serves.
  const Tensor a = auxiliary ? dense(*auxiliary, format) : g;
  const int64_t channels = input.size(1);
  const Extent shape = folded(extent(x, format));
  const Normalization<A> n(mean_data.data(), var_data.data(), weight_data, bias_data, eps, channels,
                           shape);
  BnActBackward arguments{g.const_data_ptr(),
                          x.const_data_ptr(),
                          a.const_data_ptr(),
                          grad_input.mutable_data_ptr(),
                          has_residual ? grad_residual.mutable_data_ptr() : nullptr,
                          n.mean.data(),
                          n.scale.data(),
                          n.bias.data(),
                          negative_slope};
  std::vector<double> sum_grad(channels), sum_grad_deviation(channels);
  bn_act_backward_sums(arguments, shape, dtype, act, mask, channels, sum_grad.data(),
                       sum_grad_deviation.data());

  Tensor grad_weight = empty_vector(channels, statistics_dtype(input));
  Tensor grad_bias = empty_vector(channels, statistics_dtype(input));
  A* grad_weight_data = static_cast<A*>(grad_weight.mutable_data_ptr());
  A* grad_bias_data = static_cast<A*>(grad_bias.mutable_data_ptr());
  std::vector<A> mean_grad(shape.channels), slope_grad(shape.channels);
  const double count = static_cast<double>(x.numel() / channels);
  for (int64_t c = 0; c < channels; ++c) {
    grad_bias_data[c] = static_cast<A>(sum_grad[c]);
    grad_weight_data[c] = static_cast<A>(sum_grad_deviation[c] * n.rstd[c]);
    mean_grad[c] = static_cast<A>(sum_grad[c] / count);
    slope_grad[c] = static_cast<A>(sum_grad_deviation[c] / count * n.rstd[c] * n.rstd[c]);
  }
  repeat(mean_grad, channels);
  repeat(slope_grad, channels);
  if (has_residual) {
    arguments.grad_output = arguments.grad_residual;
    act = Activation::none;
  }
  bn_act_backward_input(arguments, shape, dtype, act, mean_grad.data(), slope_grad.data());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> bn_act(const Tensor& input, const OptionalTensor& residual,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          double eps, const std::string& act,
                                          double negative_slope) {
  constexpr const char* op = "bn_act";
  const Activation activation = parse_activation(op, act);
  check_data(op, "input", input);
  if (residual) check_like(op, "residual", *residual, input);
  const auto run = input.scalar_type() == ScalarType::Double ? &forward<double> : &forward<float>;
  return run(op, input, residual, weight, bias, eps, activation, negative_slope);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& residual,
    const OptionalTensor& output, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const std::string& act,
    double negative_slope, bool has_residual) {
  constexpr const char* op = "bn_act_backward";
  const Activation activation = parse_activation(op, act);
  check_data(op, "input", input);
  check_like(op, "grad_output", grad_output, input);
  if (residual) check_like(op, "residual", *residual, input);
  if (output) check_like(op, "output", *output, input);

  MaskFrom mask = MaskFrom::input;
  OptionalTensor auxiliary;
  if (has_residual) {
    const bool from_output =
        activation == Activation::none ||
        (is_piecewise_linear(activation, negative_slope) && output.has_value());
    mask = from_output ? MaskFrom::output : MaskFrom::residual;
    auxiliary = from_output ? output : residual;
    check(activation == Activation::none || auxiliary.has_value(), op, ": ",
          is_piecewise_linear(activation, negative_slope) ? "output or residual" : "residual",
          " must be given for ", act, " with a residual, got None");
  }
  const auto run = input.scalar_type() == ScalarType::Double ? &backward<double> : &backward<float>;
  return run(op, grad_output, input, auxiliary, mask, mean, var, weight, bias, eps, activation,
             negative_slope);
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("bn_act", TORCH_BOX(&resnet_fused::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&resnet_fused::bn_act_backward));
}
