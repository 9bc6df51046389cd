// What both backward passes of a batch norm do for a channel: with the sums of the blocks, and from
// the gradients of weight and bias.
#pragma once

#include "channel_sums.cuh"
#include "norm.cuh"

namespace resnet_fused::cuda {

// What dx = scale * (g - numbers[3] - (x - mean) * numbers[4]) takes, after mean, scale and bias.
template <class A>
DEVICE_INLINE void input_numbers(const Norm<A>& norm, const A* grad_weight, const A* grad_bias,
                                 A count, int64_t channel, A (&numbers)[5]) {
  const A sum = grad_bias[channel], product = grad_weight[channel];
  const ChannelNorm<A> c = norm.of(channel);
  numbers[0] = c.mean, numbers[1] = c.scale, numbers[2] = c.bias;
  numbers[3] = sum / count;
  numbers[4] = product / count * c.rstd;
}

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
