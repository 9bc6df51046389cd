// A training step's weights, packed in the call that multiplies by them.
#pragma once

#include "conv_algorithm.h"
#include "weight_view.h"

namespace resnet_fused {

// Whether training packs weights for an algorithm, and so uses it.
bool packs_quickly(Algorithm algorithm, bool pairs);

// 32-bit words of packed weights; none for winograd4_late, which takes them where they are.
size_t quick_words(Algorithm algorithm, const WeightView& weight, bool pairs);

// Writes what algorithm_pack would (conv_algorithm.h): 16 numbers at a time, and transforms in
// float32 instead of float64.
void pack_weights(Algorithm algorithm, const WeightView& weight, int64_t stride, bool pairs,
                  void* packed);

}  // namespace resnet_fused
