// Gradients of y = act(xhat * weight + bias [+ residual]), xhat = (x - mean) / sqrt(var + eps),
// with the batch's own mean and variance.
//
//     d           = grad_output * act'(.)                     (= grad_residual)
//     grad_bias   = sum d          grad_weight = sum d * xhat
//     grad_input  = weight * rstd * (d - mean(d) - xhat * mean(d * xhat))
//
// Two passes. Without a residual: read (g, x), then (g, x) again, write grad_input: 5 tensors.
// With one: read (g, x, output), write d, then read (d, x), write grad_input: 7 tensors.
// Eager: threshold_backward 3, batch_norm_backward 5, and a copy's worth for the sum of gradients.
#pragma once

#include <vector>

#include "../common/activation_name.h"
#include "chunks.h"

namespace resnet_fused {

// Where act' comes from.
enum class MaskFrom {
  input,     // the argument of act is recomputed; no residual
  output,    // `auxiliary` is the output of a piecewise linear act
  residual,  // `auxiliary` is the residual: the argument is recomputed with it
};

struct BnActBackward {
  const void* grad_output;
  const void* input;
  const void* auxiliary;
  void* grad_input;
  void* grad_residual;  // nullptr without a residual
  const void* mean;     // per channel of the extent, in the compute type
  const void* scale;    // weight * rstd
  const void* bias;
  double negative_slope;
};

// sum_grad[c] = sum d, sum_grad_deviation[c] = sum d * (x - mean); writes grad_residual. Over data
// that comes into being part by part, as BatchStatistics.
class BackwardSums {
 public:
  BackwardSums(const BnActBackward& arguments, const Extent& extent, ScalarType dtype,
               Activation act, MaskFrom mask, int64_t channels);
  void advance(int64_t rows);
  void finish(double* sum_grad, double* sum_grad_deviation);

 private:
  void run(int64_t units);

  BnActBackward arguments_;
  Chunks chunks_;
  ScalarType dtype_;
  Activation act_;
  MaskFrom mask_;
  int64_t channels_;
  std::vector<double> storage_;
  int64_t done_ = 0;
};

// grad_input = scale * (d - mean_grad - (x - mean) * slope_grad)
void bn_act_backward_input(const BnActBackward& arguments, const Extent& extent, ScalarType dtype,
                           Activation act, const void* mean_grad, const void* slope_grad);

}  // namespace resnet_fused
