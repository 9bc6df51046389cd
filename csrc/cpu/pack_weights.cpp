#include "pack_weights.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "direct_conv.h"
#include "isa.h"
#include "winograd.h"

#define KERNEL_HEADER "pack_weights_kernel.h"
#define RESNET_FUSED_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

constexpr int64_t kPart = 64;  // channels: 72 KB of taps, which L2 holds
constexpr int64_t kF4 = 6;     // weights along a line of F(4 x 4), of which smaller tiles use some

int64_t largest_tile(Algorithm algorithm) {
  return algorithm == Algorithm::winograd2 ? 2 : algorithm == Algorithm::winograd3 ? 3 : 4;
}

// Which of F(4 x 4)'s weights along a line a smaller tile has: its finite points, infinity and,
// with stride 2, the odd inputs'.
std::vector<int64_t> weights_along(int64_t largest, int64_t stride) {
  std::vector<int64_t> along;
  for (int64_t i = 0; i < (stride == 2 ? largest : largest + 1); ++i) along.push_back(i);
  along.push_back(stride == 2 ? kF4 - 2 : kF4 - 1);
  if (stride == 2) along.push_back(kF4 - 1);
  return along;
}

}  // namespace

bool packs_quickly(Algorithm algorithm, bool pairs) {
  if (algorithm == Algorithm::winograd4 || algorithm == Algorithm::winograd4_late) return !pairs;
  return algorithm == Algorithm::direct ||
         (pairs && (algorithm == Algorithm::winograd2 || algorithm == Algorithm::winograd3));
}

size_t quick_words(Algorithm algorithm, const WeightView& w, bool pairs) {
  if (algorithm == Algorithm::winograd4_late) return 0;
  if (algorithm == Algorithm::direct) {
    return direct_packed_words(w.outputs, w.inputs, w.kernel, 1, pairs);
  }
  const int64_t words = pairs ? (w.inputs + 1) / 2 : w.inputs;
  return winograd_packed_words(w.outputs, words, 1, largest_tile(algorithm), false);
}

void pack_weights(Algorithm algorithm, const WeightView& w, int64_t stride, bool pairs,
                  void* packed) {
  const bool transforms = algorithm != Algorithm::direct;
  const int64_t panels = (w.outputs + kPanel - 1) / kPanel;
  const int64_t parts = (w.inputs + kPart - 1) / kPart;
  const std::vector<int64_t> along =
      transforms ? weights_along(largest_tile(algorithm), stride) : std::vector<int64_t>();
  const int64_t side = static_cast<int64_t>(along.size());
  const bool windows = !transforms && direct_has_windows(w.inputs, pairs);  // rows are matrices
  const int64_t matrices = transforms ? side * side : windows ? w.kernel[0] : w.taps();
  const int64_t inputs = windows ? w.kernel[1] * w.inputs : w.inputs;
  const int64_t words = pairs ? (inputs + 1) / 2 : inputs;
  const int64_t taps = transforms ? kPart * 9 * kPanel : 0;
  const int64_t made = pairs ? kPart * kPanel * (transforms ? kF4 * kF4 : w.taps()) : 0;
  const auto gather = RESNET_FUSED_CALL(gather_panel_kernel);
  const auto transform = RESNET_FUSED_CALL(transform_panel_kernel);
  const auto pair = RESNET_FUSED_CALL_BF16(pack_pairs_kernel);
  torch::stable::parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(taps + made);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / parts, first = i % parts * kPart;
      const PanelPart part{0, panel, first, std::min(kPart, w.inputs - first)};
      float* const to = static_cast<float*>(packed) + panel * matrices * words * kPanel;
      float* const matrix = pairs ? scratch.data() + taps : to + first * kPanel;
      const int64_t slice = (windows ? inputs : pairs ? kPart : words) * kPanel;
      if (transforms) {
        transform(w, part, stride, slice, scratch.data(), matrix);
      } else {
        gather(w, part, {kPanel, windows ? w.inputs * kPanel : slice}, matrix);
      }
      for (int64_t m = 0; pairs && m < matrices; ++m) {
        const int64_t from = transforms ? along[m / side] * kF4 + along[m % side] : m;
        pair(matrix + from * slice, windows ? inputs : part.channels,
             reinterpret_cast<bf16*>(to + (m * words + first / 2) * kPanel));
      }
    }
  });
}

}  // namespace resnet_fused
