// 3 x 3 convolution in many narrow groups (ResNeXt's 32 groups of 4, 8 and 16, and depthwise).
//
//     y[p][k] = act(sum_taps sum_i x[p * stride + tap][g c + i] w[k][i][tap] + shift[k] [+ r])
//
// with c channels a group, as many in as out. As matrix products these are too thin: oneDNN runs
// them at 20 % (c = 4) to 70 % (c = 16) of the peak. Here a vector holds 16 output channels, so
// 16 / c groups side by side; what they meet is the input vector with number i of each group in all
// lanes of the group, one permutation. Each serves the taps and output pixels of a row. Bytes: x
// (from cache, three times), the residual and y once.

#include "grouped_conv.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "workspace.h"

#define KERNEL_HEADER "grouped_conv_kernel.h"
#define RESNET_FUSED_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused {

bool grouped_takes(int64_t out_channels, int64_t group_channels, int64_t groups) {
  return out_channels == group_channels * groups && kGroupedLanes % group_channels == 0 &&
         out_channels % kGroupedLanes == 0;
}

// [16 output channels][row of the kernel][input channel of the group][column][16]
void grouped_pack(const double* weight, int64_t out_channels, int64_t group_channels,
                  float* packed) {
  for (int64_t k = 0; k < out_channels; ++k) {
    for (int64_t i = 0; i < group_channels; ++i) {
      for (int64_t r = 0; r < 3; ++r) {
        for (int64_t s = 0; s < 3; ++s) {
          const int64_t vector = ((k / kGroupedLanes * 3 + r) * group_channels + i) * 3 + s;
          packed[vector * kGroupedLanes + k % kGroupedLanes] =
              static_cast<float>(weight[(k * group_channels + i) * 9 + r * 3 + s]);
        }
      }
    }
  }
}

void grouped_run(const ConvArguments& conv) {
  const ConvShape& s = conv.shape;
  const Workspace workspace(static_cast<size_t>(s.channels));
  std::fill_n(workspace.data(), s.channels, 0.0f);
  const GroupedKernel kernel = RESNET_FUSED_CALL_BF16(grouped_kernel_for, conv);
  parallel_for(0, s.batch * s.out_height, grain(s.out_width * s.out_channels),
               [&](int64_t begin, int64_t end) { kernel(conv, begin, end, workspace.data()); });
}

}  // namespace resnet_fused
