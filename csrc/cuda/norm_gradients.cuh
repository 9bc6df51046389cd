// What is left of a batch norm's backward sums when every block has written its own.
#pragma once

#include "channel_sums.cuh"
#include "norm.cuh"

namespace resnet_fused::cuda {
namespace {

// The gradients of bias and weight from sum(g) and sum(g * (x - mean)).
template <class A>
__global__ void combine_gradients_kernel(const double* partial, int chunks, int64_t channels,
                                         Norm<A> norm, A* grad_weight, A* grad_bias) {
  const int64_t channel = combined_channel();
  const double var = channel < channels ? norm.var[channel] : A(0);  // under way beside the sums
  double sum, product;
  if (!combine_sums(partial, chunks, channels, sum, product)) return;
  grad_bias[channel] = static_cast<A>(sum);
  grad_weight[channel] = static_cast<A>(product / std::sqrt(var + static_cast<double>(norm.eps)));
}

}  // namespace
}  // namespace resnet_fused::cuda
