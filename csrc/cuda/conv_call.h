// What the operators that convolve are called with, checked.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "allocate.h"
#include "channel_sums.cuh"
#include "conv_arguments.h"

namespace resnet_fused::cuda {

struct ConvCall {
  const char* op;
  Tensor input, weights, output;
  OptionalTensor scale, shift, residual;
  ConvOptions options;
  int groups;
  Clamp clamp{};  // of evaluation
  // Of training: a batch norm and an activation before, or behind with what it read.
  const NormVectors* norm = nullptr;
  Activation act = Activation::none;
  float slope = 0;
  OptionalTensor z;
  mutable std::optional<PartialSums> totals;  // where the kernel leaves them,
  mutable OptionalTensor pixels;              // and of how many pixels
};

// The tensor itself where accesses of 16 bytes can read it, else a copy.
inline Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

inline OptionalTensor conv_vector(const char* op, const char* name, const OptionalTensor& vector,
                                  const Tensor& output) {
  const OptionalTensor checked = checked_vector(op, name, vector, output);
  return checked ? OptionalTensor(aligned(*checked)) : std::nullopt;
}

inline OptionalTensor conv_image(const char* op, const char* name, const OptionalTensor& image,
                                 const Tensor& output) {
  if (!image) return std::nullopt;
  check_like(op, name, *image, output);
  return aligned(dense(*image, MemoryFormat::ChannelsLast));
}

// A call with input and output; `geometry` is kernel, stride, padding and dilation, two numbers
// each.
inline ConvCall conv_call(const char* op, const Tensor& input, int64_t out_channels,
                          const std::vector<int64_t>& geometry, int64_t groups,
                          bool float32 = false) {
  check(is_here(input) && input.dim() == 4, op, ": input must have 4 dimensions (N, C, H, W) on ",
        kDeviceName, ", got shape ", shape_text(input.sizes()));
  const ScalarType dtype = input.scalar_type();
  const bool known = dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                     (dtype == ScalarType::Float && float32);
  check(known, op, ": input must be ", float32 ? "float32, " : "", "float16 or bfloat16, got ",
        dtype_name(dtype));
  check_memory(op, "input", input);
  check(is_dense(input, MemoryFormat::ChannelsLast) ||
            suggested_format(input) == MemoryFormat::ChannelsLast,
        op, ": input must be channels_last");
  check(geometry.size() == 8, op, ": geometry must have 8 numbers, got ", geometry.size());
  int numbers[8];
  for (int i = 0; i < 8; ++i) {
    const int64_t least = i == 4 || i == 5 ? 0 : 1;
    check(geometry[i] >= least && geometry[i] < 1 << 15, op, ": geometry must be kernel, stride, ",
          "padding and dilation, two numbers each, got ", geometry[i]);
    numbers[i] = static_cast<int>(geometry[i]);
  }
  const ConvOptions o{numbers[0], numbers[1], numbers[2], numbers[3],
                      numbers[4], numbers[5], numbers[6], numbers[7]};
  check(out_channels > 0 && out_channels < 1 << 24 && groups > 0 && out_channels % groups == 0 &&
            input.size(1) % groups == 0 && input.size(1) < 1 << 24,
        op, ": out_channels and input's channels must be multiples of groups, got ", out_channels,
        ", ", input.size(1), " and ", groups);
  const int64_t height = (input.size(2) + 2 * o.padding_h - o.dilation_h * (o.kernel_h - 1) - 1);
  const int64_t width = (input.size(3) + 2 * o.padding_w - o.dilation_w * (o.kernel_w - 1) - 1);
  check(height >= 0 && width >= 0 && input.size(1) > 0, op,
        ": the kernel must fit the padded image, input ", shape_text(input.sizes()));
  const std::vector<int64_t> size{input.size(0), out_channels, height / o.stride_h + 1,
                                  width / o.stride_w + 1};
  int64_t pixels = size[0] * size[2] * size[3];
  pixels = std::max(pixels, input.size(0) * input.size(2) * input.size(3));
  check(pixels < (int64_t{1} << 31) - (1 << 20), op, ": too many pixels, input ",
        shape_text(input.sizes()));
  ConvCall call{};
  call.op = op;
  call.input = aligned(dense(input, MemoryFormat::ChannelsLast));
  call.output = empty({size.data(), size.size()}, MemoryFormat::ChannelsLast, dtype, input);
  call.options = o;
  call.groups = static_cast<int>(groups);
  return call;
}

}  // namespace resnet_fused::cuda
