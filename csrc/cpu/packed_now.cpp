#include "packed_now.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "pack_weights.h"
#include "parallel.h"

namespace resnet_fused {
namespace {

// The taps of one dimension that pixel `phase` (of `stride`) sees, the last one first, and how far
// before the pixel's own place in the output the first of them reads.
struct Taps {
  int64_t count, last, padding;

  Taps(int64_t phase, int64_t kernel, int64_t stride, int64_t pad) {
    const int64_t first = (phase + pad) % stride;
    count = first < kernel ? (kernel - 1 - first) / stride + 1 : 0;
    last = first + (count - 1) * stride;
    padding = -(phase + pad - last) / stride;
  }
};

}  // namespace

bool multiplies_pairs(Algorithm algorithm, bool is_bf16) {
  return is_bf16 && (!is_winograd(algorithm) || largest_tile(algorithm) < 4);
}

PackedNow::PackedNow(Algorithm algorithm, const ConvShape& shape, const WeightView& w,
                     const float* shift, bool is_bf16, int64_t longest_part,
                     const int64_t* output_strides)
    : algorithm_(algorithm), arguments_{} {
  arguments_.pairs = multiplies_pairs(algorithm, is_bf16);
  const size_t words = quick_words(algorithm, w, arguments_.pairs);
  packed_ = Workspace(words + static_cast<size_t>(w.outputs));
  if (words > 0) pack_weights(algorithm, w, shape.stride[0], arguments_.pairs, packed_.data());
  float* const own_shift = packed_.data() + words;
  for (int64_t i = 0; i < w.outputs; ++i) own_shift[i] = shift == nullptr ? 0.0f : shift[i];
  arguments_.shape = shape;
  arguments_.packed = words > 0 ? packed_.data() : nullptr;
  arguments_.shift = own_shift;
  arguments_.act = Activation::none;
  arguments_.is_bf16 = is_bf16;
  arguments_.longest_part = is_bf16 ? 0 : longest_part;
  if (output_strides != nullptr) std::copy_n(output_strides, 3, arguments_.output_strides);
  plain_ = {
      w.data, false, {w.output_stride, w.input_stride, w.tap_stride[0], w.tap_stride[1]}, nullptr};
}

void PackedNow::run(const void* input, const void* residual, void* output, int64_t images) const {
  ConvArguments arguments = arguments_;
  const ConvShape& s = arguments.shape;
  arguments.shape.batch = images;
  arguments.input = input, arguments.residual = residual, arguments.output = output;
  const int64_t strides[4] = {s.height * s.width * s.channels, 1, s.width * s.channels, s.channels};
  algorithm_run(algorithm_, arguments, strides, plain_);
}

InputGrad::InputGrad(Algorithm algorithm, const ConvShape& s, const WeightView& w, bool is_bf16)
    : shape_(s), element_(is_bf16 ? 2 : 4) {
  ConvShape grad = s;
  grad.channels = s.out_channels, grad.out_channels = s.channels;
  grad.height = s.out_height, grad.width = s.out_width;
  if (s.stride[0] == 1 && s.stride[1] == 1) {
    grad.out_height = s.height, grad.out_width = s.width;
    for (int i = 0; i < 2; ++i) grad.padding[i] = s.dilation[i] * (s.kernel[i] - 1) - s.padding[i];
    phases_.push_back({0, 0, {}});
    phases_.back().conv.emplace_back(algorithm, grad, w.turned(), nullptr, is_bf16, kGradPart);
    return;
  }
  const int64_t strides[3] = {s.height * s.width, s.stride[0] * s.width, s.stride[1]};
  for (int64_t y = 0; y < std::min(s.stride[0], s.height); ++y) {
    for (int64_t x = 0; x < std::min(s.stride[1], s.width); ++x) {
      const Taps rows(y, s.kernel[0], s.stride[0], s.padding[0]);
      const Taps columns(x, s.kernel[1], s.stride[1], s.padding[1]);
      phases_.push_back({y, x, {}});
      if (rows.count == 0 || columns.count == 0) continue;
      WeightView view = w.turned();
      view.data = w.data + rows.last * w.tap_stride[0] + columns.last * w.tap_stride[1];
      view.kernel[0] = rows.count, view.kernel[1] = columns.count;
      view.tap_stride[0] *= s.stride[0], view.tap_stride[1] *= s.stride[1];
      ConvShape part = grad;
      part.kernel[0] = rows.count, part.kernel[1] = columns.count;
      part.stride[0] = part.stride[1] = 1;
      part.padding[0] = rows.padding, part.padding[1] = columns.padding;
      part.out_height = (s.height - y + s.stride[0] - 1) / s.stride[0];
      part.out_width = (s.width - x + s.stride[1] - 1) / s.stride[1];
      phases_.back().conv.emplace_back(Algorithm::direct, part, view, nullptr, is_bf16, kGradPart,
                                       strides);
    }
  }
}

void InputGrad::run(const void* grad, const void* residual, void* grad_input,
                    int64_t images) const {
  for (const Phase& phase : phases_) {
    const int64_t offset = (phase.y * shape_.width + phase.x) * shape_.channels * element_;
    const char* const r = static_cast<const char*>(residual);
    char* const to = static_cast<char*>(grad_input) + offset;
    if (phase.conv.empty()) {
      fill(phase, r == nullptr ? nullptr : r + offset, to, images);
    } else {
      phase.conv[0].run(grad, r == nullptr ? nullptr : r + offset, to, images);
    }
  }
}

void InputGrad::fill(const Phase& phase, const char* residual, char* output, int64_t images) const {
  const int64_t rows = (shape_.height - phase.y + shape_.stride[0] - 1) / shape_.stride[0];
  const size_t bytes = static_cast<size_t>(shape_.channels * element_);
  parallel_for(0, images * rows, grain(shape_.width * shape_.channels),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   const int64_t y = row % rows * shape_.stride[0];
                   const int64_t line = (row / rows * shape_.height + y) * shape_.width;
                   for (int64_t x = 0; phase.x + x < shape_.width; x += shape_.stride[1]) {
                     const int64_t at = (line + x) * shape_.channels * element_;
                     if (residual == nullptr) {
                       std::memset(output + at, 0, bytes);
                     } else {
                       std::memcpy(output + at, residual + at, bytes);
                     }
                   }
                 }
               });
}

}  // namespace resnet_fused
