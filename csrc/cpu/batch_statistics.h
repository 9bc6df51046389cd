// mean[c] and biased var[c] over everything but dimension 1, reading the data once from memory.
//
// Chan, Golub, LeVeque: "Algorithms for computing the sample variance", 1983. Per chunk: the mean,
// then the centred second moment while the chunk is still in cache; chunks are combined in double.
// E[x^2] - E[x]^2 would cancel: at mean/std = 1e4 no digit of a float variance survives it.
#pragma once

#include "chunks.h"
#include "../common/check.h"

namespace resnet_fused {

// Per chunk and channel.
struct PartialStatistics {
  const void* input;
  double* mean;
  double* deviation;  // sum of x - mean: what rounding left in the mean
  double* moment;     // sum of (x - mean)^2
};

// mean and var hold `channels` doubles; the extent's channels may be a multiple of that (see fold
// in channel_vectors.h).
void batch_statistics(const void* input, const Extent& extent, ScalarType dtype, int64_t channels,
                      double* mean, double* var);

}  // namespace resnet_fused
