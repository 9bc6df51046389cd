// Global average pooling: y[n, c] = mean over h, w of x[n, c, h, w], channels_last. Reads x once.

#include "average_pixels.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "../common/layout.h"
#include "isa.h"
#include "memory_pool.h"
#include "parallel.h"

#define KERNEL_HEADER "average_pixels_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

constexpr const char* op = "_average_pixels";

Tensor average_pixels(const Tensor& input) {
  check(
      input.is_cpu() && input.dim() == 4 && input.numel() > 0 &&
          (input.scalar_type() == ScalarType::Float || input.scalar_type() == ScalarType::BFloat16),
      op, ": input must be a float32 or bfloat16 CPU tensor with 4 dimensions and not empty, got ",
      dtype_name(input.scalar_type()), " ", shape_text(input.sizes()));
  check_memory(op, "input", input);
  const Tensor x = dense(input, MemoryFormat::ChannelsLast);
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const std::array<int64_t, 4> sizes{images, channels, 1, 1};
  Tensor output = pool_empty({sizes.data(), 4}, MemoryFormat::ChannelsLast, input.scalar_type());
  const void* from = x.const_data_ptr();
  void* to = output.mutable_data_ptr();
  const auto kernel = RESNET_FUSED_CALL(average_pixels_kernel, input.scalar_type());
  const int64_t units = (channels + kAverageChannels - 1) / kAverageChannels;
  parallel_for(
      0, images * units, grain(height * width * kAverageChannels),
      [&](int64_t begin, int64_t end) { kernel(from, to, channels, height, width, begin, end); });
  return output;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("_average_pixels(Tensor input) -> Tensor");  // (N, C, H, W) -> (N, C, 1, 1)
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_average_pixels", TORCH_BOX(&resnet_fused::average_pixels));
}
