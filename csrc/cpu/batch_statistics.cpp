#include "batch_statistics.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "isa.h"
#include "parallel.h"

#define KERNEL_HEADER "batch_statistics_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

// Chan's update in two steps: the mean of the means, then every chunk's distance from it. Written
// so that an infinite sample gives mean = Inf, var = NaN, as in PyTorch, not NaN for both.
void combine(const PartialStatistics& partial, const Chunks& chunks, int64_t channels,
             int64_t begin, int64_t end, double* mean, double* var) {
  const int64_t copies = chunks.extent.channels / channels;
  const double total = static_cast<double>(chunks.extent.outer * copies * chunks.extent.inner);
  for (int64_t c = begin; c < end; ++c) mean[c] = var[c] = 0;
  for (int64_t row = 0; row < chunks.count * copies; ++row) {
    const double length = static_cast<double>(chunks.length(row / copies));
    for (int64_t c = begin; c < end; ++c) {
      double& chunk_mean = partial.shift[row * channels + c];
      const double left = partial.deviation[row * channels + c];
      if (std::isfinite(left)) {
        chunk_mean += left / length;
        partial.moment[row * channels + c] -= left * left / length;
      }
      mean[c] += chunk_mean * length;
    }
  }
  for (int64_t c = begin; c < end; ++c) mean[c] /= total;
  for (int64_t row = 0; row < chunks.count * copies; ++row) {
    const double length = static_cast<double>(chunks.length(row / copies));
    for (int64_t c = begin; c < end; ++c) {
      const double distance = partial.shift[row * channels + c] - mean[c];
      var[c] += partial.moment[row * channels + c] + length * distance * distance;
    }
  }
  for (int64_t c = begin; c < end; ++c) var[c] /= total;
}

}  // namespace

void batch_statistics(const void* input, const Extent& extent, ScalarType dtype, int64_t channels,
                      double* mean, double* var) {
  const Chunks chunks(extent);
  const int64_t partials = chunks.count * extent.channels;
  std::vector<double> storage(3 * partials);
  const PartialStatistics partial{input, storage.data(), storage.data() + partials,
                                  storage.data() + 2 * partials};
  const auto kernel = RESNET_FUSED_CALL(partial_statistics_kernel, dtype);
  torch::stable::parallel_for(
      0, chunks.units(), grain(chunks.unit_size()),
      [&](int64_t begin, int64_t end) { kernel(partial, chunks, begin, end); });
  torch::stable::parallel_for(0, channels, grain(2 * partials / channels),
                              [&](int64_t begin, int64_t end) {
                                combine(partial, chunks, channels, begin, end, mean, var);
                              });
}

}  // namespace resnet_fused
