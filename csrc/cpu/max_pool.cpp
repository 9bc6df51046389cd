// Max-pooling: y[n,oh,ow,c] = max over the window of x, channels_last, NaN wins.
//
// Reads x once, writes y once, and in training a byte for every output, its place in the window.
// Eager writes an int64 index for every output, twice the bytes of the output itself.

#include "max_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../common/layout.h"
#include "isa.h"
#include "memory_pool.h"
#include "parallel.h"

#define KERNEL_HEADER "max_pool_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {

PoolShape pool_shape(const char* op, const Tensor& input, const std::vector<int64_t>& window) {
  check_data(op, "input", input);
  check(input.dim() == 4, op, ": input must have 4 dimensions, got shape ",
        shape_text(input.sizes()));
  check(input.scalar_type() != ScalarType::Half, op, ": input must not be float16");
  check(window.size() == 8, op,
        ": kernel_size, stride, padding and dilation must have two numbers each");
  PoolShape shape{input.size(1), input.size(2), input.size(3), 0, 0, {}, {}, {}, {}};
  int64_t out[2];
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t k = window[i], s = window[2 + i], p = window[4 + i], d = window[6 + i];
    check(k > 0 && s > 0 && d > 0, op, ": kernel_size, stride and dilation must be positive");
    check(p >= 0 && 2 * p <= k, op, ": padding must be 0 to half of kernel_size, got ", p);
    shape.kernel[i] = k, shape.stride[i] = s, shape.padding[i] = p, shape.dilation[i] = d;
    const int64_t room = input.size(2 + i) + 2 * p - d * (k - 1) - 1;
    check(room >= 0, op, ": input is smaller than the window, got shape ",
          shape_text(input.sizes()));
    out[i] = room / s + 1;
  }
  shape.out_height = out[0], shape.out_width = out[1];
  return shape;
}

PoolShape positions_shape(const char* op, const Tensor& input, const std::vector<int64_t>& window) {
  const PoolShape shape = pool_shape(op, input, window);
  check(shape.kernel[0] <= kMostPositions / shape.kernel[1], op, ": window must have at most ",
        kMostPositions, " pixels, got ", shape.kernel[0], " x ", shape.kernel[1]);
  return shape;
}

void max_pool(const void* input, void* output, uint8_t* positions, const PoolShape& shape,
              int64_t images, ScalarType dtype) {
  const auto kernel = RESNET_FUSED_CALL(max_pool_kernel, dtype, positions != nullptr);
  torch::stable::parallel_for(
      0, images * shape.out_height, grain(shape.out_width * shape.channels),
      [&](int64_t begin, int64_t end) { kernel(input, output, positions, shape, begin, end); });
}

void read_found(const void* input, const uint8_t* positions, void* output, const PoolShape& shape,
                int64_t images, ScalarType dtype) {
  const auto kernel = RESNET_FUSED_CALL(read_found_kernel, dtype);
  torch::stable::parallel_for(
      0, images * shape.out_height, grain(shape.out_width * shape.channels),
      [&](int64_t begin, int64_t end) { kernel(input, positions, output, shape, begin, end); });
}

void max_unpool(const void* grad, const uint8_t* positions, void* grad_input,
                const PoolShape& shape, int64_t images, ScalarType dtype) {
  const auto kernel = RESNET_FUSED_CALL(max_unpool_kernel, dtype);
  torch::stable::parallel_for(
      0, images * shape.height, grain(shape.width * shape.channels),
      [&](int64_t begin, int64_t end) { kernel(grad, positions, grad_input, shape, begin, end); });
}

namespace {

Tensor max_pool2d(const Tensor& input, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  std::vector<int64_t> window;
  for (const auto* pair : {&kernel_size, &stride, &padding, &dilation}) {
    window.insert(window.end(), pair->begin(), pair->end());
  }
  const PoolShape shape = pool_shape("_max_pool2d", input, window);
  const Tensor x = dense(input, MemoryFormat::ChannelsLast);
  const int64_t sizes[4] = {input.size(0), shape.channels, shape.out_height, shape.out_width};
  Tensor output = pool_empty({sizes, 4}, MemoryFormat::ChannelsLast, input.scalar_type());
  if (output.numel() == 0) return output;
  max_pool(x.const_data_ptr(), output.mutable_data_ptr(), nullptr, shape, sizes[0],
           input.scalar_type());
  return output;
}

Tensor max_unpool2d(const Tensor& grad, const Tensor& positions, const Tensor& input,
                    const std::vector<int64_t>& window) {
  constexpr const char* op = "_max_unpool";
  const PoolShape shape = positions_shape(op, input, window);
  check(grad.scalar_type() == input.scalar_type() && same_shape(grad, positions) &&
            grad.size(0) == input.size(0) && grad.size(1) == input.size(1) &&
            grad.size(2) == shape.out_height && grad.size(3) == shape.out_width,
        op, ": grad and positions must have the shape of the pool's output, got ",
        shape_text(grad.sizes()), " and ", shape_text(positions.sizes()));
  const Tensor g = dense(grad, MemoryFormat::ChannelsLast);
  const Tensor p = dense(positions, MemoryFormat::ChannelsLast);
  Tensor result = pool_empty(input.sizes(), MemoryFormat::ChannelsLast, input.scalar_type());
  max_unpool(g.const_data_ptr(), static_cast<const uint8_t*>(p.const_data_ptr()),
             result.mutable_data_ptr(), shape, input.size(0), input.scalar_type());
  return result;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "_max_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
  // The gradient of `input`, which is read for its shape only.
  m.def("_max_unpool(Tensor grad, Tensor positions, Tensor input, int[] window) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_max_pool2d", TORCH_BOX(&resnet_fused::max_pool2d));
  m.impl("_max_unpool", TORCH_BOX(&resnet_fused::max_unpool2d));
}
