#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../common/check.h"

namespace resnet_fused::cuda {

// How many groups of so many outputs share a tile's inputs, so that they fill whole column tiles
// or are all there are; 0 where tiles would cut groups.
inline int groups_together(int groups, int outputs, int columns) {
  int together = 1;
  while (together < groups && together * outputs % columns != 0) ++together;
  return groups % together == 0 ? together : 0;
}

// The weight (K, C / groups, R, S) as the convolutions with tiles of `columns` outputs read it;
// `turned`, that of the convolution that makes the input's gradient.
Tensor pack_weights(const Tensor& weight, int64_t groups, int64_t columns, bool turned);

}  // namespace resnet_fused::cuda
