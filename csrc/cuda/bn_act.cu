// Training-mode batch norm + residual + activation, and its gradients, as operators of one call.
//
//     y = act((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] [+ residual])
//
// The kernels are those of the halves: batch_statistics.cu and normalize_act.cu, two passes that
// move 3 [4] tensors where eager PyTorch's operators move 6 [9]; backward bn_act_backward.cu.
// Ioffe, Szegedy: "Batch Normalization", arXiv:1502.03167.
//
// An empty batch gives an empty output, zero mean and variance and zero gradients.

#include "../common/bn_act_halves.h"
#include "batch_statistics.h"
#include "bn_act_backward.h"
#include "normalize_act.h"
#include "operator.h"

namespace resnet_fused::cuda {
namespace {

constexpr auto bn_act = &bn_act_of_halves<&batch_statistics, &normalize_act>;
constexpr auto bn_act_backward =
    &bn_act_backward_of_halves<&bn_act_backward_sums, &bn_act_backward_input>;

}  // namespace
}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("bn_act", TORCH_BOX(resnet_fused::cuda::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(resnet_fused::cuda::bn_act_backward));
}
