#include "pack_weights.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "isa.h"
#include "winograd.h"

#define KERNEL_HEADER "pack_weights_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

constexpr int64_t kPart = 64;  // channels: 72 KB of taps, which L2 holds

}  // namespace

void pack_weights(Algorithm algorithm, const WeightView& w, int64_t stride, float* packed) {
  const int64_t panels = (w.outputs + kPanel - 1) / kPanel;
  const int64_t parts = (w.inputs + kPart - 1) / kPart;
  const int64_t taps = w.taps(), numbers = algorithm == Algorithm::winograd4 ? 36 : taps;
  const auto gather = RESNET_FUSED_CALL(gather_panel_kernel);
  const auto transform = RESNET_FUSED_CALL(transform_panel_kernel);
  torch::stable::parallel_for(0, w.groups * panels * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(algorithm == Algorithm::winograd4 ? kPart * 9 * kPanel : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = i / parts, first = i % parts * kPart;
      const PanelPart part{index / panels, index % panels, first,
                           std::min(kPart, w.inputs - first)};
      float* const to = packed + index * w.inputs * numbers * kPanel;
      if (algorithm == Algorithm::winograd4) {
        transform(w, part, stride, w.inputs * kPanel, scratch.data(), to + first * kPanel);
      } else {
        gather(w, part, {kPanel, w.inputs * kPanel}, to + first * kPanel);
      }
    }
  });
}

}  // namespace resnet_fused
