// y = act((x - mean[c]) * scale[c] + bias[c] [+ residual]), one pass over dense data.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../common/activation_name.h"
#include "../common/layout.h"

namespace resnet_fused {

// mean, scale and bias hold `extent.channels` numbers of the compute type (kernel_types.h).
struct NormalizeAct {
  const void* input;
  const void* residual;  // or nullptr
  void* output;
  Extent extent;
  const void* mean;
  const void* scale;
  const void* bias;
  double negative_slope;
};

void normalize_act(const NormalizeAct& arguments, ScalarType dtype, Activation act);

}  // namespace resnet_fused
