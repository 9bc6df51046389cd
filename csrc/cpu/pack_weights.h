// A training step's weights, packed in the call that multiplies by them.
#pragma once

#include "conv_algorithm.h"
#include "weight_view.h"

namespace resnet_fused {

// Writes what algorithm_pack would (conv_algorithm.h), for direct and winograd4 in float32: 16
// numbers at a time instead of one in float64.
void pack_weights(Algorithm algorithm, const WeightView& weight, int64_t stride, float* packed);

}  // namespace resnet_fused
