// Convolution with packed weights: the operators behind which the library's own algorithms stand.
//
//     y = act(conv(x, w * scale) + shift [+ residual])      float32, fixed statistics, no gradient
//
// `_pack_conv` folds and packs once, `_packed_conv` runs. `algorithm` is winograd4, winograd2
// (winograd.cpp) or direct (direct_conv.cpp).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>
#include <vector>

#include "channel_vectors.h"
#include "direct_conv.h"
#include "memory_pool.h"
#include "winograd.h"

namespace resnet_fused {
namespace {

enum class Algorithm { winograd4, winograd2, direct };

Algorithm parse_algorithm(const char* op, const std::string& name) {
  if (name == "winograd4") return Algorithm::winograd4;
  if (name == "winograd2") return Algorithm::winograd2;
  check(name == "direct", op, ": algorithm must be winograd4, winograd2 or direct, got '", name,
        "'");
  return Algorithm::direct;
}

int64_t largest_tile(Algorithm algorithm) {
  return algorithm == Algorithm::winograd4 ? 4 : 2;
}

void check_weight(const char* op, const Tensor& weight, int64_t groups, Algorithm algorithm) {
  check(weight.is_cpu() && weight.dim() == 4, op,
        ": weight must be a CPU tensor with 4 dimensions, got shape ", shape_text(weight.sizes()));
  check(weight.numel() > 0, op, ": weight must not be empty, got shape ",
        shape_text(weight.sizes()));
  check(groups > 0 && weight.size(0) % groups == 0, op, ": groups must divide weight's ",
        weight.size(0), " output channels, got ", groups);
  check(algorithm == Algorithm::direct || (weight.size(2) == 3 && weight.size(3) == 3), op,
        ": Winograd takes 3 x 3 kernels, got shape ", shape_text(weight.sizes()));
}

size_t packed_size(const Tensor& weight, int64_t groups, Algorithm algorithm) {
  if (algorithm == Algorithm::direct) {
    return direct_packed_size(weight.size(0), weight.size(1), weight.size(2) * weight.size(3),
                              groups);
  }
  return winograd_packed_size(weight.size(0), weight.size(1), groups, largest_tile(algorithm));
}

Tensor pack_conv(const Tensor& weight, int64_t groups, const std::string& algorithm_name) {
  constexpr const char* op = "_pack_conv";
  const Algorithm algorithm = parse_algorithm(op, algorithm_name);
  check_weight(op, weight, groups, algorithm);
  check(weight.scalar_type() == ScalarType::Double, op,
        ": weight must be float64, so that folding rounds once, got ",
        dtype_name(weight.scalar_type()));
  const Tensor w = dense(weight, MemoryFormat::Contiguous);
  const double* data = static_cast<const double*>(w.const_data_ptr());
  const int64_t size = static_cast<int64_t>(packed_size(weight, groups, algorithm));
  Tensor packed = pool_empty({&size, 1}, MemoryFormat::Contiguous, ScalarType::Float);
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  if (algorithm == Algorithm::direct) {
    direct_pack(data, w.size(0), w.size(1), w.size(2) * w.size(3), groups, to);
  } else {
    winograd_pack(data, w.size(0), w.size(1), groups, largest_tile(algorithm), to);
  }
  return packed;
}

ConvShape conv_shape(const char* op, const Tensor& input, const Tensor& weight,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation, int64_t groups) {
  check(input.is_cpu() && input.dim() == 4 && input.scalar_type() == ScalarType::Float, op,
        ": input must be a float32 CPU tensor with 4 dimensions, got ",
        dtype_name(input.scalar_type()), " ", shape_text(input.sizes()));
  check(input.size(1) == weight.size(1) * groups, op, ": input must have ",
        weight.size(1) * groups, " channels, got shape ", shape_text(input.sizes()));
  check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
        ": stride, padding and dilation must have two numbers each");
  ConvShape shape{};
  shape.batch = input.size(0), shape.channels = input.size(1);
  shape.height = input.size(2), shape.width = input.size(3);
  shape.out_channels = weight.size(0), shape.groups = groups;
  int64_t out[2];
  for (int64_t i = 0; i < 2; ++i) {
    check(stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0, op,
          ": stride and dilation must be positive and padding not negative");
    shape.kernel[i] = weight.size(2 + i);
    shape.stride[i] = stride[i], shape.padding[i] = padding[i], shape.dilation[i] = dilation[i];
    const int64_t room = input.size(2 + i) + 2 * padding[i] - dilation[i] * (shape.kernel[i] - 1);
    check(room >= 1, op, ": input is smaller than the kernel, got shape ",
          shape_text(input.sizes()));
    out[i] = (room - 1) / stride[i] + 1;
  }
  shape.out_height = out[0], shape.out_width = out[1];
  return shape;
}

Tensor packed_conv(const Tensor& input, const Tensor& packed, const Tensor& weight,
                   const std::optional<Tensor>& scale, const Tensor& shift,
                   const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                   int64_t groups, const std::string& algorithm_name, const std::string& act,
                   double negative_slope) {
  constexpr const char* op = "_packed_conv";
  const Algorithm algorithm = parse_algorithm(op, algorithm_name);
  check_weight(op, weight, groups, algorithm);
  check(weight.scalar_type() == ScalarType::Float, op, ": weight must be float32, got ",
        dtype_name(weight.scalar_type()));
  const ConvShape shape = conv_shape(op, input, weight, stride, padding, dilation, groups);
  check(packed.is_cpu() && packed.scalar_type() == ScalarType::Float && packed.dim() == 1 &&
            packed.size(0) == static_cast<int64_t>(packed_size(weight, groups, algorithm)),
        op, ": packed must be what _pack_conv made of weight for ", algorithm_name, ", got ",
        dtype_name(packed.scalar_type()), " ", shape_text(packed.sizes()));
  const std::array<int64_t, 4> sizes{shape.batch, shape.out_channels, shape.out_height,
                                     shape.out_width};
  Tensor output = pool_empty({sizes.data(), 4}, MemoryFormat::ChannelsLast, ScalarType::Float);
  const VectorArgument<float> shifts(op, "shift", shift, output);
  const VectorArgument<float> scales(op, "scale", scale, output);
  if (residual) check_like(op, "residual", *residual, output);
  if (output.numel() == 0) return output;

  const Tensor r = residual ? dense(*residual, MemoryFormat::ChannelsLast) : output;
  ConvArguments arguments{shape,
                          nullptr,
                          static_cast<const float*>(packed.const_data_ptr()),
                          shifts.data(),
                          residual ? static_cast<const float*>(r.const_data_ptr()) : nullptr,
                          static_cast<float*>(output.mutable_data_ptr()),
                          parse_activation(op, act),
                          static_cast<float>(negative_slope)};
  if (algorithm == Algorithm::direct) {
    arguments.input = static_cast<const float*>(input.const_data_ptr());
    direct_run(arguments, input.strides().data());
    return output;
  }
  check(stride[0] == 1 && stride[1] == 1 && dilation[0] == 1 && dilation[1] == 1, op,
        ": Winograd takes stride 1 and dilation 1");
  const Tensor x = dense(input, MemoryFormat::ChannelsLast);
  arguments.input = static_cast<const float*>(x.const_data_ptr());
  winograd_run(arguments, static_cast<const float*>(weight.const_data_ptr()),
               weight.strides().data(), scales.data(), largest_tile(algorithm));
  return output;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("_pack_conv(Tensor weight, int groups, str algorithm) -> Tensor");
  m.def(
      "_packed_conv(Tensor input, Tensor packed, Tensor weight, Tensor? scale, Tensor shift, "
      "Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, int groups, "
      "str algorithm, str act, float negative_slope) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_pack_conv", TORCH_BOX(&resnet_fused::pack_conv));
  m.impl("_packed_conv", TORCH_BOX(&resnet_fused::packed_conv));
}
