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
  const uint32_t n = static_cast<uint32_t>(number), w = static_cast<uint32_t>(width);
  const uint32_t line = n / w, image = line / static_cast<uint32_t>(height);
  return {image, static_cast<int>(line - image * static_cast<uint32_t>(height)),
          static_cast<int>(n - line * w)};
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
  int first, last;
  int behind, stride, dilation;

  DEVICE_INLINE Holders(const PoolShape& s, int side, int64_t windows, int pixel)
      : behind(pixel + static_cast<int>(s.padding[side])),
        stride(static_cast<int>(s.stride[side])),
        dilation(static_cast<int>(s.dilation[side])) {
    const int before = behind - dilation * static_cast<int>(s.kernel[side] - 1);
    first = before > 0 ? (before + stride - 1) / stride : 0;
    last = behind / stride;
    if (last >= windows) last = static_cast<int>(windows) - 1;
  }
  DEVICE_INLINE int place(int window) const {
    const int from_start = behind - window * stride;
    if (dilation == 1) return from_start;
    const int turns = from_start / dilation;
    return from_start == turns * dilation ? turns : -1;
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

// Adds up what the windows that chose a pixel have, for the channels of a thread, in their order.
template <class T, int n>
DEVICE_INLINE void gather(const T* grad, const uint8_t* positions, const PoolShape& s,
                          const Pixel& pixel, int64_t channel, compute_t<T> (&sums)[n]) {
  const Holders rows(s, 0, s.out_height, pixel.y), columns(s, 1, s.out_width, pixel.x);
  for (int i = rows.first; i <= rows.last; ++i) {
    const int row = rows.place(i);
    if (row < 0) continue;
    for (int j = columns.first; j <= columns.last; ++j) {
      const int column = columns.place(j);
      if (column < 0) continue;
      const int wanted = row * static_cast<int>(s.kernel[1]) + column;
      const int64_t at =
          ((pixel.image * s.out_height + i) * s.out_width + j) * s.channels + channel;
      compute_t<T> g[n];
      int found[n];
      widen<T, n>(load<T, n>(grad + at), g);
      read_places<n>(positions + at, found);
#pragma unroll
      for (int k = 0; k < n; ++k) sums[k] += found[k] == wanted ? g[k] : compute_t<T>(0);
    }
  }
}

// The kernels count pixels in 32 bits, and those of a side in 31.
inline void check_sides(const char* op, const Tensor& input, const PoolShape& s) {
  const int64_t pixels = std::max(s.height * s.width, s.out_height * s.out_width);
  check(input.size(0) == 0 || pixels < (int64_t(1) << 32) / input.size(0), op,
        ": input and output must have fewer than 2^32 pixels, got shape ",
        shape_text(input.sizes()));
  constexpr int64_t most = int64_t(1) << 29;
  check(std::max(s.height, s.width) <= most, op, ": input has too many pixels in a row, got ",
        s.height, " x ", s.width);
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
