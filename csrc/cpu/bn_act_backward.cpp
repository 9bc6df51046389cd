#include "bn_act_backward.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "isa.h"
#include "parallel.h"

#define KERNEL_HEADER "bn_act_backward_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {

void bn_act_backward_sums(const BnActBackward& arguments, const Extent& extent, ScalarType dtype,
                          Activation act, MaskFrom mask, int64_t channels, double* sum_grad,
                          double* sum_grad_deviation) {
  const Chunks chunks(extent);
  const int64_t partials = chunks.count * extent.channels;
  std::vector<double> storage(2 * partials);
  double* first = storage.data();
  double* second = first + partials;
  const auto kernel = RESNET_FUSED_CALL(backward_sums_kernel, dtype);
  torch::stable::parallel_for(0, chunks.units(), grain(chunks.unit_size()),
                              [&](int64_t begin, int64_t end) {
                                kernel(arguments, act, mask, chunks, first, second, begin, end);
                              });
  torch::stable::parallel_for(0, channels, grain(2 * partials / channels),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t c = begin; c < end; ++c)
                                  sum_grad[c] = sum_grad_deviation[c] = 0;
                                for (int64_t row = 0; row < partials; row += channels) {
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
  torch::stable::parallel_for(0, units, grain(unit_size), [&](int64_t begin, int64_t end) {
    kernel(arguments, act, extent, mean_grad, slope_grad, begin, end);
  });
}

}  // namespace resnet_fused
