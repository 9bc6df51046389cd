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

#include "../common/bn_act_halves.h"
#include "../common/strings.h"
#include "batch_statistics.h"
#include "bn_act_backward.h"
#include "channel_vectors.h"
#include "memory_pool.h"
#include "bn_act.h"
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
std::tuple<Tensor, Tensor> statistics(const Tensor& input) {
  if (input.numel() == 0) return {zero_vector(input), zero_vector(input)};
  const MemoryFormat format = suggested_format(input);
  const Tensor x = dense(input, format);
  const int64_t channels = input.size(1);
  std::vector<double> exact_mean(channels), exact_var(channels);
  // Longer rows for the sums: eight are read side by side, and the prefetcher wants to see streams.
  BatchStatistics(x.const_data_ptr(), folded(extent(x, format), 512), input.scalar_type(), channels)
      .finish(exact_mean.data(), exact_var.data());
  Tensor mean = empty_vector(channels, statistics_dtype(input));
  Tensor var = empty_vector(channels, statistics_dtype(input));
  std::copy(exact_mean.begin(), exact_mean.end(), static_cast<A*>(mean.mutable_data_ptr()));
  std::copy(exact_var.begin(), exact_var.end(), static_cast<A*>(var.mutable_data_ptr()));
  return {mean, var};
}

// A batch norm's vectors, checked.
template <class A>
struct Vectors {
  VectorArgument<A> mean, var, weight, bias;
  double eps;

  Vectors(const char* op, const Tensor& input, const Tensor& mean_tensor, const Tensor& var_tensor,
          const OptionalTensor& weight_tensor, const OptionalTensor& bias_tensor, double epsilon)
      : mean(op, "mean", mean_tensor, input),
        var(op, "var", var_tensor, input),
        weight(op, "weight", weight_tensor, input),
        bias(op, "bias", bias_tensor, input),
        eps(epsilon) {}
  Normalization<A> over(const Extent& shape, int64_t channels) const {
    return Normalization<A>(mean.data(), var.data(), weight, bias, eps, channels, shape);
  }
};

template <class A>
Tensor normalized(const Tensor& input, const OptionalTensor& residual, const Vectors<A>& vectors,
                  Activation act, double negative_slope) {
  const MemoryFormat format = suggested_format(input);
  Tensor output = pool_empty(input.sizes(), format, input.scalar_type());
  if (input.numel() == 0) return output;
  const Tensor x = dense(input, format);
  const Tensor r = residual ? dense(*residual, format) : x;
  const Extent shape = folded(extent(x, format));
  const Normalization<A> n = vectors.over(shape, input.size(1));
  normalize_act(
      {x.const_data_ptr(), residual ? r.const_data_ptr() : nullptr, output.mutable_data_ptr(),
       shape, n.mean.data(), n.scale.data(), n.bias.data(), negative_slope},
      input.scalar_type(), act);
  return output;
}

// Where the activation's mask comes from, and the tensor that tells it.
struct Mask {
  MaskFrom from = MaskFrom::input;
  OptionalTensor auxiliary;

  Mask(const char* op, Activation act, const std::string& name, double negative_slope,
       bool has_residual, const OptionalTensor& residual, const OptionalTensor& output) {
    if (!has_residual) return;
    const bool linear = is_piecewise_linear(act, negative_slope);
    const bool from_output = act == Activation::none || (linear && output.has_value());
    from = from_output ? MaskFrom::output : MaskFrom::residual;
    auxiliary = from_output ? output : residual;
    check(act == Activation::none || auxiliary.has_value(), op, ": ",
          linear ? "output or residual" : "residual", " must be given for ", name,
          " with a residual, got None");
  }
};

// The residual's gradient (empty without one), and those of weight and bias.
template <class A>
std::tuple<Tensor, Tensor, Tensor> sums(const Tensor& grad_output, const Tensor& input,
                                        const Mask& mask, const Vectors<A>& vectors, Activation act,
                                        double negative_slope) {
  const bool has_residual = mask.from != MaskFrom::input;
  const ScalarType dtype = input.scalar_type();
  const MemoryFormat format = suggested_format(input);
  Tensor grad_residual =
      has_residual ? pool_empty(input.sizes(), format, dtype) : empty_vector(0, dtype);
  if (input.numel() == 0) return {grad_residual, zero_vector(input), zero_vector(input)};

  const Tensor g = dense(grad_output, format), x = dense(input, format);
  // Without an activation the mask is not read; any pointer to as many elements serves.
  const Tensor a = mask.auxiliary ? dense(*mask.auxiliary, format) : g;
  const int64_t channels = input.size(1);
  const Extent shape = folded(extent(x, format));
  const Normalization<A> n = vectors.over(shape, channels);
  std::vector<double> sum_grad(channels), sum_grad_deviation(channels);
  BackwardSums({g.const_data_ptr(), x.const_data_ptr(), a.const_data_ptr(), nullptr,
                has_residual ? grad_residual.mutable_data_ptr() : nullptr, n.mean.data(),
                n.scale.data(), n.bias.data(), negative_slope},
               shape, dtype, act, mask.from, channels)
      .finish(sum_grad.data(), sum_grad_deviation.data());
  Tensor grad_weight = empty_vector(channels, statistics_dtype(input));
  Tensor grad_bias = empty_vector(channels, statistics_dtype(input));
  A* const grad_weight_data = static_cast<A*>(grad_weight.mutable_data_ptr());
  A* const grad_bias_data = static_cast<A*>(grad_bias.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    grad_bias_data[c] = static_cast<A>(sum_grad[c]);
    grad_weight_data[c] = static_cast<A>(sum_grad_deviation[c] * n.rstd[c]);
  }
  return {grad_residual, grad_weight, grad_bias};
}

template <class A>
Tensor grad_input(const char* op, const Tensor& grad_output, const Tensor& input,
                  const Vectors<A>& vectors, const Tensor& grad_weight, const Tensor& grad_bias,
                  Activation act, double negative_slope, int64_t count) {
  const VectorArgument<A> weight_data(op, "grad_weight", grad_weight, input),
      bias_data(op, "grad_bias", grad_bias, input);
  const MemoryFormat format = suggested_format(input);
  Tensor result = pool_empty(input.sizes(), format, input.scalar_type());
  if (input.numel() == 0) return result;
  const Tensor g = dense(grad_output, format), x = dense(input, format);
  const Extent shape = folded(extent(x, format));
  const Normalization<A> n = vectors.over(shape, input.size(1));
  const MeanGradients<A> means(weight_data.data(), bias_data.data(), n, count, shape);
  bn_act_backward_input(
      {g.const_data_ptr(), x.const_data_ptr(), g.const_data_ptr(), result.mutable_data_ptr(),
       nullptr, n.mean.data(), n.scale.data(), n.bias.data(), negative_slope},
      shape, input.scalar_type(), act, means.grad.data(), means.slope.data());
  return result;
}

bool is_double(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double;
}

std::tuple<Tensor, Tensor> batch_statistics(const Tensor& input) {
  check_data("batch_statistics", "input", input);
  return is_double(input) ? statistics<double>(input) : statistics<float>(input);
}

}  // namespace

Tensor normalize_act_op(const Tensor& input, const OptionalTensor& residual, const Tensor& mean,
                        const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                        double eps, const std::string& act, double negative_slope) {
  constexpr const char* op = "normalize_act";
  const Activation activation = parse_activation(op, act);
  check_data(op, "input", input);
  if (residual) check_like(op, "residual", *residual, input);
  if (is_double(input)) {
    const Vectors<double> vectors(op, input, mean, var, weight, bias, eps);
    return normalized(input, residual, vectors, activation, negative_slope);
  }
  const Vectors<float> vectors(op, input, mean, var, weight, bias, eps);
  return normalized(input, residual, vectors, activation, negative_slope);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_sums(
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
  check(has_residual || !residual, op, ": residual must be None where has_residual is false");
  const Mask mask(op, activation, act, negative_slope, has_residual, residual, output);
  if (is_double(input)) {
    const Vectors<double> vectors(op, input, mean, var, weight, bias, eps);
    return sums(grad_output, input, mask, vectors, activation, negative_slope);
  }
  const Vectors<float> vectors(op, input, mean, var, weight, bias, eps);
  return sums(grad_output, input, mask, vectors, activation, negative_slope);
}

namespace {

Tensor bn_act_backward_input_op(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                const Tensor& var, const OptionalTensor& weight,
                                const OptionalTensor& bias, const Tensor& grad_weight,
                                const Tensor& grad_bias, double eps, const std::string& act,
                                double negative_slope, int64_t count) {
  constexpr const char* op = "bn_act_backward_input";
  const Activation activation = parse_activation(op, act);
  check_data(op, "input", input);
  check_like(op, "grad_output", grad_output, input);
  check(count > 0 || input.numel() == 0, op, ": count must be positive, got ", count);
  if (is_double(input)) {
    const Vectors<double> vectors(op, input, mean, var, weight, bias, eps);
    return grad_input(op, grad_output, input, vectors, grad_weight, grad_bias, activation,
                      negative_slope, count);
  }
  const Vectors<float> vectors(op, input, mean, var, weight, bias, eps);
  return grad_input(op, grad_output, input, vectors, grad_weight, grad_bias, activation,
                    negative_slope, count);
}

constexpr auto bn_act = &bn_act_of_halves<&batch_statistics, &normalize_act_op>;
constexpr auto bn_act_backward =
    &bn_act_backward_of_halves<&bn_act_backward_sums, &bn_act_backward_input_op>;

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("bn_act", TORCH_BOX(resnet_fused::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(resnet_fused::bn_act_backward));
  m.impl("batch_statistics", TORCH_BOX(&resnet_fused::batch_statistics));
  m.impl("normalize_act", TORCH_BOX(&resnet_fused::normalize_act_op));
  m.impl("bn_act_backward_sums", TORCH_BOX(&resnet_fused::bn_act_backward_sums));
  m.impl("bn_act_backward_input", TORCH_BOX(&resnet_fused::bn_act_backward_input_op));
}
