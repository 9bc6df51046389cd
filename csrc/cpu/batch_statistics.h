// mean[c] and biased var[c] over everything but dimension 1, reading the data once.
//
// E[x^2] - E[x]^2 cancels: at mean/std = 1e4 no digit of a float variance survives it. So each
// chunk's sums are taken of x - shift, where shift is the mean of the chunk's first 64th. By
// Cauchy-Schwarz |shift - mean| <= 8 std of the chunk, whatever the data: the subtraction sum (x -
// shift)^2 - n (mean - shift)^2 loses at most 6 bits, and none to speak of when the sample is fair.
// Chunks are combined in double by Chan's formula. Chan, Golub, LeVeque: "Algorithms for computing
// the sample variance", 1983.
#pragma once

#include "chunks.h"
#include "../common/check.h"

namespace resnet_fused {

// Per chunk and channel.
struct PartialStatistics {
  const void* input;
  double* shift;
  double* deviation;  // sum of x - shift
  double* moment;     // sum of (x - shift)^2
};

// mean and var hold `channels` doubles; the extent's channels may be a multiple of that (see fold
// in channel_vectors.h).
void batch_statistics(const void* input, const Extent& extent, ScalarType dtype, int64_t channels,
                      double* mean, double* var);

}  // namespace resnet_fused
