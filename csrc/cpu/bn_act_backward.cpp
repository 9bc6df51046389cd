#include "bn_act_backward.h"

#include <vector>

#include "isa.h"
#include "parallel.h"

#define KERNEL_HEADER "bn_act_backward_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {

BackwardSums::BackwardSums(const BnActBackward& arguments, const Extent& extent, ScalarType dtype,
                           Activation act, MaskFrom mask, int64_t channels)
    : arguments_(arguments),
      chunks_(extent),
      dtype_(dtype),
      act_(act),
      mask_(mask),
      channels_(channels),
      storage_(static_cast<size_t>(2 * chunks_.count * extent.channels)) {}

void BackwardSums::run(int64_t units) {
  double* const first = storage_.data();
  double* const second = first + storage_.size() / 2;
  const auto kernel = RESNET_FUSED_CALL(backward_sums_kernel, dtype_);
  parallel_for(done_, units, grain(chunks_.unit_size()), [&](int64_t begin, int64_t end) {
    kernel(arguments_, act_, mask_, chunks_, first, second, begin, end);
  });
  done_ = units;
}

void BackwardSums::advance(int64_t rows) {
  if (rows / chunks_.size > done_) run(rows / chunks_.size);
}

void BackwardSums::finish(double* sum_grad, double* sum_grad_deviation) {
  if (chunks_.units() > done_) run(chunks_.units());
  const int64_t partials = static_cast<int64_t>(storage_.size() / 2);
  const double* const first = storage_.data();
  const double* const second = first + partials;
  parallel_for(0, channels_, grain(2 * partials / channels_), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) sum_grad[c] = sum_grad_deviation[c] = 0;
    for (int64_t row = 0; row < partials; row += channels_) {
      for (int64_t c = begin; c < end; ++c) {
        sum_grad[c] += first[row + c];
        sum_grad_deviation[c] += second[row + c];
      }
    }
  });
}

void bn_act_backward_input(const BnActBackward& arguments, const Extent& extent, ScalarType dtype,
                           Activation act, const void* mean_grad, const void* slope_grad) {
  const auto kernel = RESNET_FUSED_CALL(backward_input_kernel, dtype);
  const int64_t units = extent.inner == 1 ? extent.outer : extent.outer * extent.channels;
  const int64_t unit_size = extent.inner == 1 ? extent.channels : extent.inner;
  parallel_for(0, units, grain(unit_size), [&](int64_t begin, int64_t end) {
    kernel(arguments, act, extent, mean_grad, slope_grad, begin, end);
  });
}

}  // namespace resnet_fused
