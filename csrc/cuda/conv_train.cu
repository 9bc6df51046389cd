// A convolution in training, NHWC, float16 and bfloat16, with what batch norm wants of it.
//
//     forward:   z = conv(a) + bias, and the mean and the biased variance of z's channels
//     input:     the gradient of a (plus a residual), and of bn's weight and bias
//
// where a = act(bn(input)), or the input itself. Forward normalises what it has loaded and gathers
// the statistics from what it stores: 2 passes over activations where normalise, convolve, gather
// make 5. The gradient of a, for stride 1 and one group, is the same product with the kernel
// turned, and gathers sum(g) and sum(g * xhat), g = da * act'(.), as it stores da: 3 passes for 4.
// The kernels are those of evaluation (conv_launch.cuh); a second, small one adds up what their
// warps have found. Fixed orders and no atomics: the same bits every time on the same chip.
// Activations are those of straight lines: none, relu, relu6 and leaky_relu.

#include <string>
#include <tuple>
#include <vector>

#include "../common/layout.h"
#include "conv_launch.cuh"
#include "norm_gradients.cuh"
#include "operator.h"

namespace resnet_fused::cuda {
namespace {

Activation linear_activation(const char* op, const std::string& name) {
  const Activation act = parse_activation(op, name);
  check(act <= Activation::leaky_relu, op, ": act must be none, relu, relu6 or leaky_relu, got '",
        name, "'");
  return act;
}

// From mean and squared distances of each row's pixels; the distances of the means count as well.
__global__ void combine_moments_kernel(const double* totals, int rows, int64_t channels,
                                       const float* pixels, double count, float* mean, float* var) {
  const int64_t channel = combined_channel();
  const double* const means = totals + channel;
  const double* const squares = means + rows * channels;
  const double first = channel < channels ? means[0] : 0.0;
  const double origin = first - first == 0 ? first : 0.0;  // not where it is NaN or infinite
  double sum, square;
  const auto part = [&](int row, double& a, double& b) {
    const double n = pixels[row], apart = means[row * channels] - origin;
    a += n * apart;
    b += squares[row * channels] + n * apart * apart;
  };
  if (!combine_parts(rows, channels, part, sum, square)) return;
  const double rest = sum / count, spread = square / count - rest * rest;
  mean[channel] = static_cast<float>(origin + rest);
  var[channel] = static_cast<float>(spread < 0 ? 0 : spread);
}

// Packs the weight and convolves.
template <Behind behind>
void run(ConvCall& call, const Tensor& weight, bool turned, const std::string& algorithm) {
  const auto with = [&](auto zero) {
    const ConvAlgorithm& found = find_algorithm<decltype(zero), behind>(call.op, algorithm);
    call.weights = pack_weights(weight, call.groups, found.columns, turned);
    found.run(call);
  };
  if (call.input.scalar_type() == ScalarType::Half) {
    with(half());
  } else {
    with(bfloat16());
  }
}

void check_weight(const char* op, const Tensor& weight, const Tensor& input) {
  check(weight.dim() == 4 && weight.scalar_type() == input.scalar_type(), op,
        ": weight must have 4 dimensions (K, C / groups, R, S) and input's dtype, got shape ",
        shape_text(weight.sizes()), ", ", dtype_name(weight.scalar_type()));
  check_device(op, "weight", weight, input);
}

std::tuple<Tensor, Tensor, Tensor> train_conv(const Tensor& input,
                                              const std::vector<Tensor>& vectors, double eps,
                                              const std::string& act, double negative_slope,
                                              const Tensor& weight, const OptionalTensor& bias,
                                              const std::vector<int64_t>& geometry, int64_t groups,
                                              const std::string& algorithm) {
  constexpr const char* op = "_cuda_train_conv";
  check_data(op, "input", input);
  check_weight(op, weight, input);
  check(geometry.size() == 6, op, ": geometry must have 6 numbers, got ", geometry.size());
  std::vector<int64_t> all{weight.size(2), weight.size(3)};
  all.insert(all.end(), geometry.begin(), geometry.end());
  ConvCall call = conv_call(op, input, weight.size(0), all, groups);
  check(weight.size(1) * groups == input.size(1), op, ": weight must have input's ", input.size(1),
        " channels in ", groups, " groups, got shape ", shape_text(weight.sizes()));
  const NormVectors norm = norm_vectors(op, input, vectors, eps);
  if (!vectors.empty()) call.norm = &norm;
  call.act = linear_activation(op, act);
  call.slope = static_cast<float>(negative_slope);
  call.shift = conv_vector(op, "bias", bias, call.output);
  if (call.output.numel() == 0)
    return {call.output, zero_channels(call.output), zero_channels(call.output)};
  run<Behind::statistics>(call, weight, false, algorithm);
  Tensor mean = empty_channels(call.output), var = empty_channels(call.output);
  const double count = static_cast<double>(call.output.numel() / call.output.size(1));
  call.totals->launch(OnDeviceOf(input), op, combine_moments_kernel,
                      static_cast<const float*>(call.pixels->const_data_ptr()), count,
                      static_cast<float*>(mean.mutable_data_ptr()),
                      static_cast<float*>(var.mutable_data_ptr()));
  return {call.output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> train_conv_input(const Tensor& grad, const Tensor& z,
                                                    const std::vector<Tensor>& vectors, double eps,
                                                    const std::string& act, double negative_slope,
                                                    const Tensor& weight,
                                                    const OptionalTensor& residual,
                                                    const std::vector<int64_t>& geometry,
                                                    const std::string& algorithm) {
  constexpr const char* op = "_cuda_train_conv_input";
  check_data(op, "grad", grad);
  check_weight(op, weight, grad);
  check(geometry.size() == 6 && geometry[0] == 1 && geometry[1] == 1, op,
        ": geometry must have 6 numbers, of stride 1");
  // The kernel turned: what was padded less is padded more.
  std::vector<int64_t> turned{weight.size(2), weight.size(3), 1, 1};
  for (int i = 0; i < 2; ++i) {
    check(geometry[4 + i] > 0 && geometry[4 + i] < 1 << 15 && geometry[2 + i] >= 0, op,
          ": dilation must be from 1 to 32767 and padding not negative, got ", geometry[4 + i],
          " and ", geometry[2 + i]);
    turned.push_back(geometry[4 + i] * (weight.size(2 + i) - 1) - geometry[2 + i]);
    check(turned.back() >= 0, op, ": padding must be less than the dilated kernel, got ",
          geometry[2 + i]);
  }
  turned.insert(turned.end(), geometry.begin() + 4, geometry.end());
  ConvCall call = conv_call(op, grad, weight.size(1), turned, 1);
  check(weight.size(0) == grad.size(1), op, ": weight must have grad's ", grad.size(1),
        " output channels, got shape ", shape_text(weight.sizes()));
  call.z = conv_image(op, "z", z, call.output);
  call.residual = conv_image(op, "residual", residual, call.output);
  check(vectors.size() == 4, op, ": vectors must be mean, var, weight and bias, got ",
        vectors.size());
  const NormVectors norm = norm_vectors(op, call.output, vectors, eps);
  call.norm = &norm;
  call.act = linear_activation(op, act);
  call.slope = static_cast<float>(negative_slope);
  if (call.output.numel() == 0)
    return {call.output, zero_channels(call.output), zero_channels(call.output)};
  run<Behind::gradient>(call, weight, true, algorithm);
  Tensor grad_weight = empty_channels(call.output), grad_bias = empty_channels(call.output);
  call.totals->launch(OnDeviceOf(grad), op, combine_gradients_kernel<float>,
                      norm.on_device<float>(), static_cast<float*>(grad_weight.mutable_data_ptr()),
                      static_cast<float*>(grad_bias.mutable_data_ptr()));
  return {call.output, grad_weight, grad_bias};
}

}  // namespace
}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("_cuda_train_conv", TORCH_BOX(&resnet_fused::cuda::train_conv));
  m.impl("_cuda_train_conv_input", TORCH_BOX(&resnet_fused::cuda::train_conv_input));
}
