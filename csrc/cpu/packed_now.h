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

// Products that Winograd adds up at once, and at most half of the channels: the error of F(4 x 4)
// is 0.95 (512 channels) to 1.8 times (64) oneDNN's then, and 2.0 to 2.3 with all of them. A tile's
// errors agree, so that they show in a gradient that is a sum over pixels: a batch norm's bias has
// 1.4 times eager's error with 64 and 1.0 with 32, which makes the input's gradient 1 to 5 %
// slower.
constexpr int64_t kOutputPart = 64;
constexpr int64_t kGradPart = 32;

// output = conv(input, weight) + shift [+ residual]
class PackedNow {
 public:
  // `shift` may be null; `output_strides` as in ConvArguments.
  PackedNow(Algorithm algorithm, const ConvShape& shape, const WeightView& weight,
            const float* shift, bool is_bf16, int64_t longest_part,
            const int64_t* output_strides = nullptr);
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
