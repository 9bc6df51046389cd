// Max-pooling for inference: y[n,oh,ow,c] = max over the window of x, channels_last, NaN wins.
//
// Reads x once, writes y once. Eager also finds and writes an int64 index for every output, twice
// the bytes of the output itself.

#include "max_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "../common/layout.h"
#include "isa.h"
#include "memory_pool.h"
#include "parallel.h"

#define KERNEL_HEADER "max_pool_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

constexpr const char* op = "_max_pool2d";

Tensor max_pool2d(const Tensor& input, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  check_data(op, "input", input);
  check(input.dim() == 4, op, ": input must have 4 dimensions, got shape ",
        shape_text(input.sizes()));
  check(input.scalar_type() != ScalarType::Half, op, ": input must not be float16");
  PoolShape shape{input.size(1), input.size(2), input.size(3), 0, 0, {}, {}, {}, {}};
  std::array<int64_t, 2> out;
  for (size_t i = 0; i < 2; ++i) {
    check(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 &&
              dilation.size() == 2,
          op, ": kernel_size, stride, padding and dilation must have two numbers each");
    const int64_t k = kernel_size[i], s = stride[i], p = padding[i], d = dilation[i];
    check(k > 0 && s > 0 && d > 0, op, ": kernel_size, stride and dilation must be positive");
    check(p >= 0 && 2 * p <= k, op, ": padding must be 0 to half of kernel_size, got ", p);
    shape.kernel[i] = k, shape.stride[i] = s, shape.padding[i] = p, shape.dilation[i] = d;
    const int64_t room = input.size(2 + i) + 2 * p - d * (k - 1) - 1;
    check(room >= 0, op, ": input is smaller than the window, got shape ",
          shape_text(input.sizes()));
    out[i] = room / s + 1;
  }
  shape.out_height = out[0], shape.out_width = out[1];
  const Tensor x = dense(input, MemoryFormat::ChannelsLast);
  const std::array<int64_t, 4> sizes{input.size(0), shape.channels, out[0], out[1]};
  Tensor output = pool_empty({sizes.data(), 4}, MemoryFormat::ChannelsLast, input.scalar_type());
  if (output.numel() == 0) return output;
  const void* from = x.const_data_ptr();
  void* to = output.mutable_data_ptr();
  const auto kernel = RESNET_FUSED_CALL(max_pool_kernel, input.scalar_type());
  torch::stable::parallel_for(
      0, sizes[0] * out[0], grain(out[1] * shape.channels),
      [&](int64_t begin, int64_t end) { kernel(from, to, shape, begin, end); });
  return output;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "_max_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_max_pool2d", TORCH_BOX(&resnet_fused::max_pool2d));
}
