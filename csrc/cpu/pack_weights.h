// A training step's weights, packed in the call that multiplies by them.
#pragma once

#include <vector>

#include "conv_algorithm.h"
#include "weight_view.h"

namespace resnet_fused {

// Whether training packs weights for an algorithm, and so uses it.
bool packs_quickly(Algorithm algorithm, bool pairs);

// 32-bit words of packed weights; none for those that take them where they are.
size_t quick_words(Algorithm algorithm, const WeightView& weight, bool pairs);

// Writes what algorithm_pack would (conv_algorithm.h): 16 numbers at a time, and transforms in
// float32 instead of float64.
void pack_weights(Algorithm algorithm, const WeightView& weight, int64_t stride, bool pairs,
                  void* packed);

// What the launcher and the kernels agree on. A packed matrix is [words][32], one a weight or tap.
struct PackTask {
  WeightView view;
  bool transforms;  // to Winograd's weights
  int64_t stride;
  bool pairs;
  bool windows;                  // a matrix has all taps of a row of the kernel
  std::vector<int64_t> sources;  // for each matrix which weight of F(4 x 4), or which tap or row
  int64_t words;

  int64_t inputs() const { return windows ? view.kernel[1] * view.inputs : view.inputs; }
  // Floats that one part needs meanwhile.
  int64_t scratch() const { return transforms || pairs ? kPackPart * view.taps() * kPanel : 0; }

  static constexpr int64_t kPackPart = 64;  // channels of a part: 72 KB of a 3 x 3 kernel's taps
};
using PackKernel = void (*)(const PackTask& task, const PanelPart& part, float* scratch,
                            float* packed);

}  // namespace resnet_fused
