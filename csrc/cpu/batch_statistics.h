// mean[c] and biased var[c] over everything but dimension 1, reading the data once.
//
// E[x^2] - E[x]^2 cancels: at mean/std = 1e4 no digit of a float variance survives it. So each
// chunk's sums are taken of x - shift, where shift is the mean of the chunk's first 64th. By
// Cauchy-Schwarz |shift - mean| <= 8 std of the chunk, whatever the data: the subtraction sum (x -
// shift)^2 - n (mean - shift)^2 loses at most 6 bits, and none to speak of when the sample is fair.
// Chunks are combined in double by Chan's formula. Chan, Golub, LeVeque: "Algorithms for computing
// the sample variance", 1983.
#pragma once

#include <vector>

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

// The statistics of data that comes into being part by part, each part read while it is in cache.
// The extent's channels may be a multiple of `channels` (see folded in channel_vectors.h).
class BatchStatistics {
 public:
  BatchStatistics(const void* input, const Extent& extent, ScalarType dtype, int64_t channels);
  // The first `rows` rows of the extent are there (inner == 1 only).
  void advance(int64_t rows);
  // The rest; mean and var hold `channels` doubles.
  void finish(double* mean, double* var);

 private:
  void run(int64_t units);

  Chunks chunks_;
  ScalarType dtype_;
  int64_t channels_;
  std::vector<double> storage_;
  PartialStatistics partial_;
  int64_t done_ = 0;
};

}  // namespace resnet_fused
