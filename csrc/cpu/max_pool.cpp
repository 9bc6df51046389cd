// Max-pooling: y[n,oh,ow,c] = max over the window of x, channels_last, NaN wins.
//
// Reads x once, writes y once, and in training a byte for every output, its place in the window.
// Eager writes an int64 index for every output, twice the bytes of the output itself.

#include "max_pool.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "../common/layout.h"
#include "isa.h"
#include "memory_pool.h"
#include "parallel.h"

#define KERNEL_HEADER "max_pool_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {

void max_pool(const void* input, void* output, uint8_t* positions, const PoolShape& shape,
              int64_t images, ScalarType dtype) {
  const auto kernel = RESNET_FUSED_CALL(max_pool_kernel, dtype, positions != nullptr);
  parallel_for(
      0, images * shape.out_height, grain(shape.out_width * shape.channels),
      [&](int64_t begin, int64_t end) { kernel(input, output, positions, shape, begin, end); });
}

void read_found(const void* input, const uint8_t* positions, void* output, const PoolShape& shape,
                int64_t images, ScalarType dtype) {
  const auto kernel = RESNET_FUSED_CALL(read_found_kernel, dtype);
  parallel_for(
      0, images * shape.out_height, grain(shape.out_width * shape.channels),
      [&](int64_t begin, int64_t end) { kernel(input, positions, output, shape, begin, end); });
}

void max_unpool(const void* grad, const uint8_t* positions, void* grad_input,
                const PoolShape& shape, int64_t images, ScalarType dtype) {
  const auto kernel = RESNET_FUSED_CALL(max_unpool_kernel, dtype);
  parallel_for(
      0, images * shape.height, grain(shape.width * shape.channels),
      [&](int64_t begin, int64_t end) { kernel(grad, positions, grad_input, shape, begin, end); });
}

namespace {

Tensor max_pool2d(const Tensor& input, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  constexpr const char* op = "_max_pool2d";
  const PoolShape shape =
      pool_shape(op, input, pool_window(op, kernel_size, stride, padding, dilation));
  check_has_kernel(op, input);
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
  check_has_kernel(op, input);
  check_pooled(op, grad, positions, input, shape);
  const Tensor g = dense(grad, MemoryFormat::ChannelsLast);
  const Tensor p = dense(positions, MemoryFormat::ChannelsLast);
  Tensor result = pool_empty(input.sizes(), MemoryFormat::ChannelsLast, input.scalar_type());
  max_unpool(g.const_data_ptr(), static_cast<const uint8_t*>(p.const_data_ptr()),
             result.mutable_data_ptr(), shape, input.size(0), input.scalar_type());
  return result;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_max_pool2d", TORCH_BOX(&resnet_fused::max_pool2d));
  m.impl("_max_unpool", TORCH_BOX(&resnet_fused::max_unpool2d));
}
