// Training-mode batch norm + residual + activation, and its gradients, as operators of one call.
//
//     y = act((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] [+ residual])
//
// The kernels are those of the halves: batch_statistics.cu and normalize_act.cu, two passes that
// move 3 [4] tensors where eager PyTorch's operators move 6 [9]; backward bn_act_backward.cu.
// Ioffe, Szegedy: "Batch Normalization", arXiv:1502.03167.
//
// An empty batch gives an empty output, zero mean and variance and zero gradients.

#include <algorithm>

#include "batch_statistics.h"
#include "bn_act_backward.h"
#include "normalize_act.h"
#include "operator.h"

namespace resnet_fused::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> bn_act(const Tensor& input, const OptionalTensor& residual,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          double eps, const std::string& act,
                                          double negative_slope) {
  const auto [mean, var] = batch_statistics(input);
  return {normalize_act(input, residual, mean, var, weight, bias, eps, act, negative_slope), mean,
          var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& residual,
    const OptionalTensor& output, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const std::string& act,
    double negative_slope, bool has_residual) {
  const auto [grad_residual, grad_weight, grad_bias] =
      bn_act_backward_sums(grad_output, input, residual, output, mean, var, weight, bias, eps, act,
                           negative_slope, has_residual);
  const int64_t channels = std::max<int64_t>(input.size(1), 1);
  return {
      bn_act_backward_input(has_residual ? grad_residual : grad_output, input, mean, var, weight,
                            bias, grad_weight, grad_bias, eps, has_residual ? "none" : act,
                            negative_slope, input.numel() / channels),
      grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("bn_act", TORCH_BOX(&resnet_fused::cuda::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&resnet_fused::cuda::bn_act_backward));
}
