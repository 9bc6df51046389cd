// One panel's weights as an algorithm packs them.
// Included inside the namespace of one instruction set (for_each_isa.h).

#include "vectors.h"
#include "gather_weights.h"
#include "winograd_weights.h"

#if RESNET_FUSED_BF16_INSTRUCTIONS
// [channel][32] floats, `count` of them, to [pair of channels][32] words; an odd last one is paired
// with zeros.
inline void pack_pairs(const float* rows, int64_t count, float* to) {
  for (int64_t c = 0; c < count; c += 2) {
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const float* const row = rows + c * kPanel + lane;
      const Vector second = c + 1 < count ? load(row + kPanel) : Vector{};
      store_pairs(to + c / 2 * kPanel + lane, load(row), second);
    }
  }
}
#else
inline void pack_pairs(const float*, int64_t, float*) {}  // never called: nothing multiplies pairs
#endif

// Rows of 32 of one matrix, from channel `first` on.
inline void store_rows(const PackTask& task, const float* rows, int64_t first, int64_t count,
                       float* matrix) {
  if (task.pairs) {
    pack_pairs(rows, count, matrix + first / 2 * kPanel);
  } else {
    std::memcpy(matrix + first * kPanel, rows, static_cast<size_t>(count) * kPanel * sizeof(float));
  }
}

// Some channels of a panel.
inline void pack_part(const PackTask& task, const PanelPart& part, float* scratch, float* packed) {
  const int64_t matrices = static_cast<int64_t>(task.sources.size()), step = task.words * kPanel;
  if (!task.transforms) {
    const int64_t slice = task.windows ? task.inputs() * kPanel
                          : task.pairs ? PackTask::kPackPart * kPanel
                                       : step;
    const PanelSteps steps{kPanel, task.windows ? task.view.inputs * kPanel : slice};
    gather_panel(task.view, part, steps, task.pairs ? scratch : packed + part.first * kPanel);
    for (int64_t m = 0; task.pairs && m < matrices; ++m) {
      const int64_t count = task.windows ? task.inputs() : part.channels;
      store_rows(task, scratch + m * slice, part.first, count, packed + m * step);
    }
    return;
  }
  gather_panel(task.view, part, {9 * kPanel, kPanel}, scratch);
  // A few channels at a time, since the matrices may lie so that the same rows of all of them fall
  // into one cache set.
  constexpr int64_t kFew = 4, kSlice = kFew * kPanel + 16;
  float weights[36 * kSlice];
  for (int64_t c = 0; c < part.channels; c += kFew) {
    const int64_t count = part.channels - c < kFew ? part.channels - c : kFew;
    const float* const taps = scratch + c * 9 * kPanel;
    if (task.stride == 2) {
      transform_weights<2>(taps, count, kSlice, weights);
    } else {
      transform_weights<1>(taps, count, kSlice, weights);
    }
    for (int64_t m = 0; m < matrices; ++m) {
      store_rows(task, weights + task.sources[static_cast<size_t>(m)] * kSlice, part.first + c,
                 count, packed + m * step);
    }
  }
}

inline PackKernel pack_kernel() {
  return &pack_part;
}
