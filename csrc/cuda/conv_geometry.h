// Where a convolution's pixels lie when images are one long line, for kernels that keep a tile of
// the input in shared memory and read it once for every tap.
//
// Pixel (image n, row y, column x) has place q = (n * rows + y) * pitch + x. Between the rows and
// between the images lie places without a pixel, whose data are 0, so that a tap (r, s) of the
// output at q reads the input at q + shift, whatever q is: out of the image means one of those
// places. Neighbouring rows share them, so that 3x3 with padding 1 needs one column more than the
// image has, and one row. A tile of outputs is any run of places; outputs of places without a
// pixel are computed and dropped.
//
// With a stride, the input is as many smaller images as there are residues (phases): tap (r, s)
// reads that of (r - padding) mod stride, at a shift of its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "divider.h"

namespace resnet_fused::cuda {

constexpr int kMostTaps = 49;       // 7x7
constexpr int kMostPhases = 4;      // stride 2
constexpr int kMostSpan = 1 << 11;  // of 64 channels they fill shared memory, 128 bytes a place

struct Tap {
  int shift;
  int weight;  // r * kernel_w + s, the place among the weights
};

// The taps of one residue of the stride, which lie next to each other.
struct Phase {
  int first_tap, taps;
  int row, column;  // of the residue
};

struct ConvGeometry {
  int images, channels, height, width;  // of the input
  int out_channels, out_height, out_width;
  int stride_h, stride_w;
  int pitch, rows;        // of a line of places, and of an image
  int places;             // of all outputs
  int least_shift, span;  // of all taps: shifts lie in [least_shift, least_shift + span]
  int phases;
  Phase phase[kMostPhases];
  int taps;
  Tap tap[kMostTaps];
  Divider by_pitch, by_image;
  bool bare;  // places are pixels, of the input and of the output

  // The input pixel at a place, n * H * W + y * W + x, or -1; without a branch but for `bare`.
  DEVICE_INLINE int pixel(int place, const Phase& p) const {
    if (bare) return place < places ? place : -1;
    const int at = place < 0 ? 0 : place;
    const int n = static_cast<int>(by_image(at));
    const int within = at - n * static_cast<int>(by_image.divisor);
    const int row = static_cast<int>(by_pitch(within));
    const int y = row * stride_h + p.row;
    const int x = (within - row * pitch) * stride_w + p.column;
    const bool there = (place >= 0) & (n < images) & (y < height) & (x < width);
    return there ? (n * height + y) * width + x : -1;
  }

  // The same for the output.
  DEVICE_INLINE int out_pixel(int place) const {
    if (bare) return place < places ? place : -1;
    const int n = static_cast<int>(by_image(place));
    const int within = place - n * static_cast<int>(by_image.divisor);
    const int y = static_cast<int>(by_pitch(within)), x = within - y * pitch;
    const bool there = (place < places) & (y < out_height) & (x < out_width);
    return there ? (n * out_height + y) * out_width + x : -1;
  }
};

// What a convolution is called with.
struct ConvOptions {
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

inline int floor_div(int a, int b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

// One dimension of the geometry: how far apart lines of `size` (input) and `out_size` have to be.
// The last tap reaches no further than the next line's first, as out_size is what fits.
inline int line_pitch(int size, int out_size, int stride, int padding) {
  const int widest = (size + stride - 1) / stride;  // of the smaller images
  return std::max(out_size, widest - floor_div(-padding, stride));
}

// False where the kernels have no room for it: too many taps or places, or taps too
// far apart.
inline bool make_geometry(int images, int channels, int height, int width, int out_channels,
                          const ConvOptions& o, ConvGeometry& g) {
  const int taps = o.kernel_h * o.kernel_w;
  if (taps > kMostTaps || o.stride_h * o.stride_w > kMostPhases) return false;
  g.images = images, g.channels = channels, g.height = height, g.width = width;
  g.out_channels = out_channels;
  g.out_height = (height + 2 * o.padding_h - o.dilation_h * (o.kernel_h - 1) - 1) / o.stride_h + 1;
  g.out_width = (width + 2 * o.padding_w - o.dilation_w * (o.kernel_w - 1) - 1) / o.stride_w + 1;
  g.stride_h = o.stride_h, g.stride_w = o.stride_w;
  g.pitch = line_pitch(width, g.out_width, o.stride_w, o.padding_w);
  g.rows = line_pitch(height, g.out_height, o.stride_h, o.padding_h);
  g.by_pitch = Divider(g.pitch);
  const int64_t image = int64_t{g.pitch} * g.rows;
  if (images * image >= (int64_t{1} << 31) - (1 << 20)) return false;
  g.places = static_cast<int>(images * image);
  g.by_image = Divider(static_cast<uint32_t>(image));
  g.phases = g.taps = 0;
  int least = 1 << 30, most = -(1 << 30);
  for (int fh = 0; fh < o.stride_h; ++fh) {
    for (int fw = 0; fw < o.stride_w; ++fw) {
      Phase p{g.taps, 0, fh, fw};
      for (int tap = 0; tap < taps; ++tap) {
        const int down = tap / o.kernel_w * o.dilation_h - o.padding_h;
        const int right = tap % o.kernel_w * o.dilation_w - o.padding_w;
        const int y = floor_div(down, o.stride_h), x = floor_div(right, o.stride_w);
        if (down - y * o.stride_h != fh || right - x * o.stride_w != fw) continue;
        const int shift = y * g.pitch + x;
        g.tap[g.taps++] = {shift, tap};
        least = std::min(least, shift);
        most = std::max(most, shift);
        ++p.taps;
      }
      if (p.taps > 0) g.phase[g.phases++] = p;
    }
  }
  if (int64_t{most} - least > kMostSpan) return false;
  g.least_shift = least;
  g.span = most - least;
  g.bare = taps == 1 && o.stride_h * o.stride_w == 1 && g.pitch == width && g.rows == height &&
           g.out_width == width && g.out_height == height && least == 0;
  return true;
}

}  // namespace resnet_fused::cuda
