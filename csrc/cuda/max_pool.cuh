// What the kernels of max_pool.cu and train_pool.cu know of a pool's geometry.
#pragma once

#include "../common/pool_shape.h"
#include "channel_pass.cuh"

namespace resnet_fused::cuda {

// A pixel of [images][height][width], from its number.
struct Pixel {
  int64_t image;
  int y, x;
};

DEVICE_INLINE Pixel pixel_of(int64_t number, int64_t height, int64_t width) {
  const int64_t line = quotient(number, width), image = quotient(line, height);
  return {image, static_cast<int>(line - image * height), static_cast<int>(number - line * width)};
}

// For the pixels of an output's window that are inside the image, load(i, offset) and use(i,
// place): `place` is the pixel's in the window, `offset` that of its first channel in the input. Of
// a window of three by three all is loaded before anything is used, and i is the place; else i is
// 0.
template <int size, class Load, class Use>
DEVICE_INLINE void for_window(const PoolShape& s, const Pixel& output, const Load& load,
                              const Use& use) {
  const int64_t top = output.y * s.stride[0] - s.padding[0];
  const int64_t left = output.x * s.stride[1] - s.padding[1];
  const int64_t first = output.image * s.height;
  const auto at = [&](int row, int column, const auto& body) {
    const int64_t y = top + row * s.dilation[0], x = left + column * s.dilation[1];
    if (y >= 0 && y < s.height && x >= 0 && x < s.width)
      body(((first + y) * s.width + x) * s.channels);
  };
  if constexpr (size == 3) {
#pragma unroll
    for (int i = 0; i < 9; ++i) at(i / 3, i % 3, [&](int64_t offset) { load(i, offset); });
#pragma unroll
    for (int i = 0; i < 9; ++i) at(i / 3, i % 3, [&](int64_t) { use(i, i); });
  } else {
    for (int row = 0; row < s.kernel[0]; ++row) {
      for (int column = 0; column < s.kernel[1]; ++column) {
        at(row, column, [&](int64_t offset) {
          load(0, offset);
          use(0, row * static_cast<int>(s.kernel[1]) + column);
        });
      }
    }
  }
}

template <int size>
constexpr int kLoaded = size == 3 ? 9 : 1;

// The windows along one side that hold a pixel: from `first` to `last`, whose place in window w is
// place(w), negative for one between two dilated pixels.
struct Holders {
  int64_t first, last;
  int64_t behind, stride, dilation;

  DEVICE_INLINE Holders(const PoolShape& s, int side, int64_t windows, int64_t pixel)
      : behind(pixel + s.padding[side]), stride(s.stride[side]), dilation(s.dilation[side]) {
    const int64_t before = behind - dilation * (s.kernel[side] - 1);
    first = before > 0 ? quotient(before + stride - 1, stride) : 0;
    last = quotient(behind, stride);
    if (last >= windows) last = windows - 1;
  }
  DEVICE_INLINE int place(int64_t window) const {
    const int64_t from_start = behind - window * stride;
    if (dilation == 1) return static_cast<int>(from_start);
    const int64_t turns = quotient(from_start, dilation);
    return from_start == turns * dilation ? static_cast<int>(turns) : -1;
  }
};

// n places in windows, a byte each.
template <int n>
struct alignas(n) Places {
  uint8_t at[n];
};

template <int n>
DEVICE_INLINE void read_places(const uint8_t* from, int (&to)[n]) {
  const Places<n> places = *reinterpret_cast<const Places<n>*>(from);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = places.at[i];
}

template <int n>
DEVICE_INLINE void write_places(uint8_t* to, const int (&from)[n]) {
  Places<n> places;
#pragma unroll
  for (int i = 0; i < n; ++i) places.at[i] = static_cast<uint8_t>(from[i]);
  *reinterpret_cast<Places<n>*>(to) = places;
}

inline Extent pixels_of(const Tensor& images) {
  return {images.size(0) * images.size(2) * images.size(3), images.size(1), 1};
}

// Calls body(T(), n) for accesses to pixels.
template <class Body>
void with_pixels(const Tensor& x, std::initializer_list<const void*> pointers, const Body& body) {
  with_access(x.scalar_type(), pixels_of(x), pointers, [&](auto zero, auto n, auto planes) {
    if constexpr (!planes) body(zero, n);
  });
}

inline bool is_three_by_three(const PoolShape& s) {
  return s.kernel[0] == 3 && s.kernel[1] == 3;
}

}  // namespace resnet_fused::cuda
