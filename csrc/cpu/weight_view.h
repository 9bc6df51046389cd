// A convolution's weights where the model has them, in whatever order.
#pragma once

#include <cstdint>

#include "../common/check.h"
#include "conv.h"

namespace resnet_fused {

// Strides are in numbers and may be negative.
struct WeightView {
  const float* data;                // group 0, output 0, input 0, tap (0, 0)
  int64_t groups, outputs, inputs;  // outputs and inputs of one group
  int64_t kernel[2];
  int64_t group_stride, output_stride, input_stride;
  int64_t tap_stride[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }

  // The convolution whose output is this one's gradient of its input, for stride 1: outputs and
  // inputs change places and the kernel is turned by 180 degrees.
  WeightView turned() const {
    WeightView w = *this;
    w.data += (kernel[0] - 1) * tap_stride[0] + (kernel[1] - 1) * tap_stride[1];
    w.outputs = inputs, w.inputs = outputs;
    w.output_stride = input_stride, w.input_stride = output_stride;
    w.tap_stride[0] = -tap_stride[0], w.tap_stride[1] = -tap_stride[1];
    return w;
  }
};

// Channels [first, first + channels) of one panel of 32 outputs.
struct PanelPart {
  int64_t group, panel;
  int64_t first, channels;
};

// From a packed channel to the next, and from tap to tap, in floats.
struct PanelSteps {
  int64_t channel, tap;
};

// A float32 weight as `shape`'s convolution has it.
inline WeightView view_plain(const PlainWeight& plain, const ConvShape& shape) {
  const int64_t* const stride = plain.strides;
  return {static_cast<const float*>(plain.data),
          shape.groups,
          shape.group_out_channels(),
          shape.group_channels(),
          {shape.kernel[0], shape.kernel[1]},
          shape.group_out_channels() * stride[0],
          stride[0],
          stride[1],
          {stride[2], stride[3]}};
}

// [K][C / groups][R][S], float32
inline WeightView view_weight(const Tensor& weight, int64_t groups) {
  const auto stride = weight.strides();
  const int64_t outputs = weight.size(0) / groups;
  return {static_cast<const float*>(weight.const_data_ptr()),
          groups,
          outputs,
          weight.size(1),
          {weight.size(2), weight.size(3)},
          outputs * stride[0],
          stride[0],
          stride[1],
          {stride[2], stride[3]}};
}

}  // namespace resnet_fused
