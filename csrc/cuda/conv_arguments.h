// What the convolution kernels are given, and how shared memory is divided.
//
// Input and output are NHWC. A tile of the input, `rows + span` places by 64 channels, lies in
// shared memory as [channel / 8][place][channel % 8]; weights come packed as blocks of 64 channels
// of one tap and `columns` outputs, [column tile][chunk][tap][channel / 8][column][channel % 8]. So
// 8 rows of 8 numbers are 128 bytes in a row, which wgmma wants of a matrix without swizzle and
// ldmatrix reads without bank conflicts, and the next place is 16 bytes further on: a tap is a
// shift of the start.
//
// Groups: outputs in `block_out` neighbouring channels read the same `block_in`; a block is one
// group, or so many narrow ones that they fill a tile, with zeros among its weights.
#pragma once

#include <cstdint>

#include "conv_geometry.h"

namespace resnet_fused::cuda {

constexpr int kChunk = 64;         // channels that are multiplied at once,
constexpr int kPlanes = 8;         // in planes of
constexpr int kPlaneChannels = 8;  // channels, 16 bytes

// Piecewise linear activations: x < 0 becomes x * slope if `leaky`; then between low and high, each
// twice in a word in the output's dtype, where comparing is as exact as before rounding.
struct Clamp {
  bool leaky;
  float slope;
  uint32_t low, high;
};

// y = act(sum * scale + shift + residual)
template <class T>
struct ConvOutput {
  T* output;
  const T* residual;   // or nullptr, like the next two
  const float* scale;  // of each output channel
  const float* shift;
  int channels;
  Clamp act;
};

template <class T>
struct ConvArguments {
  const T* input;
  const T* weights;
  ConvOutput<T> out;
  ConvGeometry geometry;
  int block_in, block_out;
  int chunks;        // of a block's input channels
  int column_tiles;  // of all output channels
  int64_t tiles;
  int input_slots, weight_slots;  // of the pipelines in shared memory, of each ring
  bool resident;                  // all weights have a slot, and stay
  int plane;                      // bytes from one plane of an input tile to the next

  DEVICE_INLINE int first_channel(int column_tile, int columns) const {
    return column_tile * columns / block_out * block_in;
  }
};

// Copies a thread's plane of `places` places from `first` on to `to`, by `warps` warps: each finds
// 32 pixels, one a lane, and copies four at a time, eight lanes for the 128 bytes of each.
// `channel` is the plane's first, which is there if `valid`.
template <int warps, class T>
DEVICE_INLINE void copy_places(const ConvArguments<T>& a, const Phase& phase, int first, int places,
                               int channel, bool valid, int warp, int lane, unsigned char* to) {
  const T* const from = a.input + channel;
  for (int begin = warp * 32; begin < places; begin += warps * 32) {
    const int mine = begin + lane < places ? a.geometry.pixel(first + begin + lane, phase) : -1;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int place = begin + 4 * i + lane / 8, pixel = shuffle(mine, 4 * i + lane / 8);
      const bool there = valid && pixel >= 0;
      if (place < places)
        cp_async_16(to + place * 16,
                    there ? from + static_cast<int64_t>(pixel) * a.geometry.channels : a.input,
                    there);
    }
  }
}

// Bytes from plane to plane for so many places: 16 more than a multiple of 128, so that the 8
// planes' 16 bytes of one place, which are written together, lie in different banks.
inline int plane_bytes(int places) {
  const int bytes = places * 16;
  return (bytes - 16 + 127) / 128 * 128 + 16;
}

}  // namespace resnet_fused::cuda
