#include "batch_statistics.h"

#include <vector>

#include "isa.h"
#include "parallel.h"

#define KERNEL_HEADER "batch_statistics_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

// Chan's update in two steps: the mean of the means, then every chunk's distance from it. An
// infinite sample gives mean = Inf and var = NaN, as in PyTorch.
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
      chunk_mean += left / length;
      partial.moment[row * channels + c] -= left * left / length;
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

BatchStatistics::BatchStatistics(const void* input, const Extent& extent, ScalarType dtype,
                                 int64_t channels)
    : chunks_(extent), dtype_(dtype), channels_(channels) {
  const int64_t partials = chunks_.count * extent.channels;
  storage_.resize(3 * partials);
  partial_ = {input, storage_.data(), storage_.data() + partials, storage_.data() + 2 * partials};
}

void BatchStatistics::run(int64_t units) {
  const auto kernel = RESNET_FUSED_CALL(partial_statistics_kernel, dtype_);
  parallel_for(done_, units, grain(chunks_.unit_size()),
               [&](int64_t begin, int64_t end) { kernel(partial_, chunks_, begin, end); });
  done_ = units;
}

void BatchStatistics::advance(int64_t rows) {
  if (rows / chunks_.size > done_) run(rows / chunks_.size);
}

void BatchStatistics::finish(double* mean, double* var) {
  if (chunks_.units() > done_) run(chunks_.units());
  const int64_t partials = chunks_.count * chunks_.extent.channels;
  parallel_for(0, channels_, grain(2 * partials / channels_), [&](int64_t begin, int64_t end) {
    combine(partial_, chunks_, channels_, begin, end, mean, var);
  });
}

}  // namespace resnet_fused
