#include "pack_weights.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "direct_conv.h"
#include "isa.h"
#include "parallel.h"
#include "winograd.h"

#define KERNEL_HEADER "pack_weights_kernel.h"
#define RESNET_FUSED_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

constexpr int64_t kF4 = 6;  // weights along a line of F(4 x 4), of which smaller tiles use some

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
  if (is_winograd(algorithm)) return pairs == (largest_tile(algorithm) < 4);
  return algorithm == Algorithm::direct;
}

size_t quick_words(Algorithm algorithm, const WeightView& w, bool pairs) {
  if (is_late(algorithm)) return 0;
  if (algorithm == Algorithm::direct) {
    return direct_packed_words(w.outputs, w.inputs, w.kernel, 1, pairs);
  }
  const int64_t words = pairs ? (w.inputs + 1) / 2 : w.inputs;
  return winograd_packed_words(w.outputs, words, 1, largest_tile(algorithm), false);
}

void pack_weights(Algorithm algorithm, const WeightView& w, int64_t stride, bool pairs,
                  void* packed) {
  PackTask task{w, algorithm != Algorithm::direct, stride, pairs, false, {}, 0};
  task.windows = !task.transforms && direct_has_windows(w.inputs, pairs);
  task.words = pairs ? (task.inputs() + 1) / 2 : task.inputs();
  if (task.transforms) {
    const std::vector<int64_t> along = weights_along(largest_tile(algorithm), stride);
    for (const int64_t y : along) {
      for (const int64_t x : along) task.sources.push_back(y * kF4 + x);
    }
  } else {
    task.sources.resize(static_cast<size_t>(task.windows ? w.kernel[0] : w.taps()));
    std::iota(task.sources.begin(), task.sources.end(), 0);
  }
  const int64_t panels = (w.outputs + kPanel - 1) / kPanel;
  const int64_t parts = (w.inputs + PackTask::kPackPart - 1) / PackTask::kPackPart;
  const int64_t panel_floats = static_cast<int64_t>(task.sources.size()) * task.words * kPanel;
  const PackKernel kernel = RESNET_FUSED_CALL_BF16(pack_kernel);
  parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(task.scratch())]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / parts, first = i % parts * PackTask::kPackPart;
      kernel(task, {0, panel, first, std::min(PackTask::kPackPart, w.inputs - first)},
             scratch.get(), static_cast<float*>(packed) + panel * panel_floats);
    }
  });
}

}  // namespace resnet_fused
