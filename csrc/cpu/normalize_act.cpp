#include "normalize_act.h"

#include "isa.h"
#include "parallel.h"

#define KERNEL_HEADER "normalize_act_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {

void normalize_act(const NormalizeAct& arguments, ScalarType dtype, Activation act) {
  const auto kernel = RESNET_FUSED_CALL(normalize_act_kernel, dtype);
  const Extent& extent = arguments.extent;
  const int64_t units = extent.inner == 1 ? extent.outer : extent.outer * extent.channels;
  const int64_t unit_size = extent.inner == 1 ? extent.channels : extent.inner;
  parallel_for(0, units, grain(unit_size),
               [&](int64_t begin, int64_t end) { kernel(arguments, act, begin, end); });
}

}  // namespace resnet_fused
