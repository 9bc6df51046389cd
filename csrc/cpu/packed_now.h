// Convolutions in training: with weights that are packed in the call, over some images at a time.
#pragma once

#include <string>
#include <vector>

#include "conv_algorithm.h"
#include "weight_view.h"
#include "workspace.h"

namespace resnet_fused {

// Whether weights are rounded to bfloat16 and multiplied in pairs.
bool multiplies_pairs(Algorithm algorithm, bool is_bf16);

// output = conv(input, weight) + shift [+ residual]
class PackedNow {
 public:
  // `shift` may be null; `output_strides` as in ConvArguments.
  PackedNow(Algorithm algorithm, const ConvShape& shape, const WeightView& weight,
            const float* shift, bool is_bf16, const int64_t* output_strides = nullptr);
  void run(const void* input, const void* residual, void* output, int64_t images) const;

 private:
  Algorithm algorithm_;
  ConvArguments arguments_;
  Workspace packed_;
  PlainWeight plain_;
};

// The gradient of a convolution's input, itself a convolution of the output's gradient: with the
// kernel turned, and for a stride s one with its own taps for each of the s x s pixels of the input
// that see the output differently.
class InputGrad {
 public:
  // `shape` is the forward convolution's. Dilation goes with stride 1 only.
  InputGrad(Algorithm algorithm, const ConvShape& shape, const WeightView& weight, bool is_bf16);
  void run(const void* grad, const void* residual, void* grad_input, int64_t images) const;

 private:
  struct Phase {
    int64_t y, x;                 // of its first pixel
    std::vector<PackedNow> conv;  // none where no output sees the pixels
  };
  void fill(const Phase& phase, const char* residual, char* output, int64_t images) const;

  ConvShape shape_;
  int64_t element_;
  std::vector<Phase> phases_;
};

}  // namespace resnet_fused
