// The geometry of a two-dimensional pool, checked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"

namespace resnet_fused {

struct PoolShape {
  int64_t channels;
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// The largest kernel_size, stride or dilation: products of two stay small.
constexpr int64_t kMostPoolStep = (int64_t(1) << 15) - 1;

// `window` is kernel_size, stride, padding and dilation, two numbers each.
inline PoolShape pool_shape(const char* op, const Tensor& input,
                            const std::vector<int64_t>& window) {
  check_data(op, "input", input);
  check(input.dim() == 4, op, ": input must have 4 dimensions, got shape ",
        shape_text(input.sizes()));
  check(input.size(2) > 0 && input.size(3) > 0, op, ": input must have pixels, got shape ",
        shape_text(input.sizes()));
  check(window.size() == 8, op,
        ": kernel_size, stride, padding and dilation must have two numbers each");
  PoolShape shape{input.size(1), input.size(2), input.size(3), 0, 0, {}, {}, {}, {}};
  int64_t out[2];
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t k = window[i], s = window[2 + i], p = window[4 + i], d = window[6 + i];
    check(k > 0 && s > 0 && d > 0, op, ": kernel_size, stride and dilation must be positive");
    check(std::max({k, s, d}) <= kMostPoolStep, op,
          ": kernel_size, stride and dilation must be at most ", kMostPoolStep, ", got ",
          std::max({k, s, d}));
    check(p >= 0 && p <= k / 2, op, ": padding must be 0 to half of kernel_size, got ", p);
    shape.kernel[i] = k, shape.stride[i] = s, shape.padding[i] = p, shape.dilation[i] = d;
    const int64_t room = input.size(2 + i) + 2 * p - d * (k - 1) - 1;
    check(room >= 0, op, ": input is smaller than the window, got shape ",
          shape_text(input.sizes()));
    out[i] = room / s + 1;
  }
  shape.out_height = out[0], shape.out_width = out[1];
  return shape;
}

// Pixels of a window whose places are kept: a byte each.
constexpr int64_t kMostPositions = 255;

inline PoolShape positions_shape(const char* op, const Tensor& input,
                                 const std::vector<int64_t>& window) {
  const PoolShape shape = pool_shape(op, input, window);
  check(shape.kernel[0] <= kMostPositions / shape.kernel[1], op, ": window must have at most ",
        kMostPositions, " pixels, got ", shape.kernel[0], " x ", shape.kernel[1]);
  return shape;
}

// Kernel size, stride, padding and dilation in one list.
inline std::vector<int64_t> pool_window(const char* op, const std::vector<int64_t>& kernel_size,
                                        const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation) {
  std::vector<int64_t> window;
  for (const auto* pair : {&kernel_size, &stride, &padding, &dilation}) {
    check(pair->size() == 2, op,
          ": kernel_size, stride, padding and dilation must have two numbers each, got ",
          pair->size());
    window.insert(window.end(), pair->begin(), pair->end());
  }
  return window;
}

// A gradient of the pool's output, and where in its window each of that was found.
inline void check_pooled(const char* op, const Tensor& grad, const Tensor& positions,
                         const Tensor& input, const PoolShape& shape) {
  check_device(op, "grad", grad, input);
  check_device(op, "positions", positions, input);
  check(grad.scalar_type() == input.scalar_type() && positions.scalar_type() == ScalarType::Byte,
        op, ": grad must be ", dtype_name(input.scalar_type()), " and positions uint8, got ",
        dtype_name(grad.scalar_type()), " and ", dtype_name(positions.scalar_type()));
  check(same_shape(grad, positions) && grad.dim() == 4 && grad.size(0) == input.size(0) &&
            grad.size(1) == input.size(1) && grad.size(2) == shape.out_height &&
            grad.size(3) == shape.out_width,
        op, ": grad and positions must have the shape of the pool's output, got ",
        shape_text(grad.sizes()), " and ", shape_text(positions.sizes()));
}

}  // namespace resnet_fused
