// What conv_bn_act is called with, checked before PyTorch's own convolution sees it: oneDNN's reads
// a bias as if it had no gaps and a residual as if it had the output's shape, and nobody asks
// whether a storage still holds what the strides reach.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "../common/check.h"

namespace resnet_fused {
namespace {

constexpr const char* op = "conv_bn_act";
constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // oneDNN counts in 32 bits

using OptionalTensor = std::optional<Tensor>;

// Stride, padding and dilation are two numbers each.
std::array<int64_t, 4> output_sizes(const Tensor& input, const Tensor& weight,
                                    const std::vector<int64_t>& stride,
                                    const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& dilation) {
  check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
        ": stride, padding and dilation must have two numbers each, got ", stride.size(), ", ",
        padding.size(), " and ", dilation.size());
  std::array<int64_t, 4> sizes{input.size(0), weight.size(0), 0, 0};
  for (size_t i = 0; i < 2; ++i) {
    const int64_t s = stride[i], p = padding[i], d = dilation[i];
    check(s > 0 && d > 0 && p >= 0 && s <= kMost && d <= kMost && p <= kMost, op,
          ": stride and dilation must be positive and padding not negative, all below 2^31, got ",
          s, ", ", d, " and ", p);
    const int64_t size = input.size(2 + i), kernel = weight.size(2 + i);
    check(size <= kMost && kernel <= kMost, op, ": input and weight must be smaller than 2^31");
    const int64_t room = size + 2 * p - d * (kernel - 1);
    check(room >= 1, op, ": input is smaller than the kernel, got shapes ",
          shape_text(input.sizes()), " and ", shape_text(weight.sizes()));
    sizes[2 + i] = (room - 1) / s + 1;
  }
  return sizes;
}

void check_conv(const Tensor& input, const Tensor& weight, const OptionalTensor& scale,
                const OptionalTensor& shift, const OptionalTensor& residual,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, int64_t groups) {
  check_data(op, "input", input);
  check_device(op, "weight", weight, input);
  check(input.dim() == 4 && weight.dim() == 4, op,
        ": input and weight must have 4 dimensions, got shapes ", shape_text(input.sizes()),
        " and ", shape_text(weight.sizes()));
  check(weight.scalar_type() == input.scalar_type(), op, ": weight must have the dtype of input, ",
        dtype_name(input.scalar_type()), ", got ", dtype_name(weight.scalar_type()));
  check(weight.numel() > 0, op, ": weight must not be empty, got shape ",
        shape_text(weight.sizes()));
  check(groups > 0 && weight.size(0) % groups == 0, op, ": groups must divide weight's ",
        weight.size(0), " output channels, got ", groups);
  check(input.size(1) % groups == 0 && input.size(1) / groups == weight.size(1), op,
        ": input must have as many channels as weight in ", groups, " groups, got shapes ",
        shape_text(input.sizes()), " and ", shape_text(weight.sizes()));
  const std::array<int64_t, 4> sizes = output_sizes(input, weight, stride, padding, dilation);
  const ScalarType vector_dtype =
      input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto check_channels = [&](const char* name, const OptionalTensor& vector) {
    if (!vector) return;
    check_device(op, name, *vector, input);
    check(
        vector->scalar_type() == vector_dtype && vector->dim() == 1 && vector->size(0) == sizes[1],
        op, ": ", name, " must be ", dtype_name(vector_dtype), " of shape [", sizes[1],
        "], one number per output channel, got ", dtype_name(vector->scalar_type()), " ",
        shape_text(vector->sizes()));
  };
  check_channels("scale", scale);
  check_channels("shift", shift);
  if (!residual) return;
  check_device(op, "residual", *residual, input);
  const auto shape = residual->sizes();
  check(residual->scalar_type() == input.scalar_type() && shape.size() == 4 &&
            std::equal(sizes.begin(), sizes.end(), shape.data()),
        op, ": residual must have the output's shape and dtype, ", dtype_name(input.scalar_type()),
        " ", shape_text({sizes.data(), 4}), ", got ", dtype_name(residual->scalar_type()), " ",
        shape_text(shape));
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "_check_conv(Tensor input, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
      "int[] stride, int[] padding, int[] dilation, int groups) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_check_conv", TORCH_BOX(&resnet_fused::check_conv));
}
