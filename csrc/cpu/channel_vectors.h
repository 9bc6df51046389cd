// One number per channel, as the kernels read it.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "../common/check.h"
#include "../common/layout.h"

namespace resnet_fused {

// With few channels a row is too short for a vector loop. An [outer][channels] array is also an
// [outer / k][k * channels] one, whose parameters are those of the channels k times over.
inline Extent folded(Extent extent, int64_t least_channels = 64) {
  while (extent.inner == 1 && extent.channels < least_channels && extent.outer % 2 == 0 &&
         extent.outer > 128) {
    extent.outer /= 2;
    extent.channels *= 2;
  }
  return extent;
}

// The first `channels` numbers are given; copies of them follow.
template <class A>
void repeat(std::vector<A>& values, int64_t channels) {
  for (size_t i = static_cast<size_t>(channels); i < values.size(); ++i)
    values[i] = values[i - channels];
}

// Contiguous numbers of an optional tensor, or nullptr.
template <class A>
class VectorArgument {
 public:
  VectorArgument(const char* op, const char* name, const std::optional<Tensor>& tensor,
                 const Tensor& input) {
    if (!tensor.has_value()) return;
    check_vector(op, name, *tensor, input);
    held_ = dense(*tensor, MemoryFormat::Contiguous);
    data_ = static_cast<const A*>(held_->const_data_ptr());
  }
  const A* data() const { return data_; }
  A operator()(int64_t i, A otherwise) const { return data_ == nullptr ? otherwise : data_[i]; }

 private:
  std::optional<Tensor> held_;
  const A* data_ = nullptr;
};

// (x - mean) * scale + bias is batch norm. Forward and backward derive these from the same rounded
// mean and var, so that the activation's mask is the same in both.
template <class A>
struct Normalization {
  std::vector<A> mean, scale, bias;
  std::vector<double> rstd;

  Normalization(const A* mean_data, const A* var_data, const VectorArgument<A>& weight_data,
                const VectorArgument<A>& bias_data, double eps, int64_t channels,
                const Extent& extent)
      : mean(extent.channels), scale(extent.channels), bias(extent.channels), rstd(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      rstd[c] = 1.0 / std::sqrt(static_cast<double>(var_data[c]) + eps);
      mean[c] = mean_data[c];
      scale[c] = static_cast<A>(rstd[c] * static_cast<double>(weight_data(c, A(1))));
      bias[c] = bias_data(c, A(0));
    }
    repeat(mean, channels);
    repeat(scale, channels);
    repeat(bias, channels);
  }
};

// mean(d) and mean(d * xhat) * rstd over `count` values, from the gradients of weight and bias.
template <class A>
struct MeanGradients {
  std::vector<A> grad, slope;

  MeanGradients(const A* grad_weight, const A* grad_bias, const Normalization<A>& n, int64_t count,
                const Extent& extent)
      : grad(extent.channels), slope(extent.channels) {
    const int64_t channels = static_cast<int64_t>(n.rstd.size());
    for (int64_t c = 0; c < channels; ++c) {
      grad[c] = static_cast<A>(static_cast<double>(grad_bias[c]) / static_cast<double>(count));
      slope[c] = static_cast<A>(static_cast<double>(grad_weight[c]) / static_cast<double>(count) *
                                n.rstd[c]);
    }
    repeat(grad, channels);
    repeat(slope, channels);
  }
};

}  // namespace resnet_fused
