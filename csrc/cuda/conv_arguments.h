// What the convolution kernels are given, and how shared memory is divided.
//
// Input and output are NHWC. A tile of the input, `rows + span` places by 64 channels, lies in
// shared memory as [channel / 8][place][channel % 8]; weights come packed as blocks of 64 channels
// of one tap and `columns` outputs, [column tile][chunk][tap][channel / 8][column][channel % 8]. So
// 8 rows of 8 numbers are 128 bytes in a row, which wgmma wants of a matrix without swizzle and
// ldmatrix reads without bank conflicts, and the next place is 16 bytes further on: a tap is a
// shift of the start.
//
// float32 is multiplied as TF32 and has half the channels in as many bytes. Weights are packed
// rounded, and the input is rounded where it has been copied to: the chip would cut bits off, which
// makes everything too small.
//
// In training what is convolved may be act(bn(input)). Whoever copied 16 bytes changes them once
// they have arrived, before anybody else reads them: memory is no further away than without, and
// outside of the image stays 0.
//
// Groups: outputs in `block_out` neighbouring channels read the same `block_in`; a block is one
// group, or so many narrow ones that they fill a tile, with zeros among its weights.
#pragma once

#include <cstdint>

#include "activation.cuh"
#include "conv_geometry.h"
#include "norm.cuh"
#include "numbers.cuh"

namespace resnet_fused::cuda {

constexpr int kPlanes = 8;  // of 16 bytes, that are multiplied at once:
template <class T>
constexpr int kPlaneChannels = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kChunk = kPlanes * kPlaneChannels<T>;

// Piecewise linear activations: x < 0 becomes x * slope if `leaky`; then between low and high,
// which fill a word in the output's dtype, where comparing is as exact as before rounding.
struct Clamp {
  bool leaky;
  float slope;
  uint32_t low, high;
};

// A batch norm's mean, scale and bias of all channels, [3][channels], for all threads of a block
// once they have met.
DEVICE_INLINE void stage_norm(const Norm<float>& norm, int channels, float* to) {
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    const ChannelNorm<float> of = norm.of(c);
    to[c] = of.mean, to[channels + c] = of.scale, to[2 * channels + c] = of.bias;
  }
}

// Of n neighbouring channels.
template <int n>
struct StagedNorm {
  float mean[n], scale[n], bias[n];

  DEVICE_INLINE StagedNorm(const float* staged, int channels, int channel) {
    read_shared<float, n>(staged + channel, mean);
    read_shared<float, n>(staged + channels + channel, scale);
    read_shared<float, n>(staged + 2 * channels + channel, bias);
  }
};

inline int staged_norm_bytes(int channels) {
  return (3 * 4 * channels + 127) / 128 * 128;
}

// What follows the products.
enum class Behind {
  affine,      // evaluation: y = act(sum * scale + shift + residual)
  statistics,  // training's forward: y = sum + shift, and mean and squares of each channel
  gradient,    // of a = act(bn(z)): y = sum + residual, and the sums of that batch norm's gradients
};

// What a batch norm and an activation make of a tensor.
struct NormAct {
  Norm<float> norm;
  Activation act;
  float slope;
};

template <class T>
struct ConvOutput {
  T* output;
  const T* residual;   // or nullptr, like the next two
  const float* scale;  // of each output channel
  const float* shift;
  int channels;
  Clamp act;
  // For `gradient`, of each output channel.
  const T* z;
  NormAct behind;
  // From every warp of rows two numbers for each channel, [2][rows][channels]: the mean and the
  // squared distances from it of so many pixels, [rows]; or sum(g) and sum(g * (z - mean)).
  double* totals;
  int total_rows;
  float* pixels;
};

template <class T>
struct ConvArguments {
  const T* input;
  const T* weights;
  bool normalizes;  // with `before`
  NormAct before;
  ConvOutput<T> out;
  ConvGeometry geometry;
  int block_in, block_out;
  int chunks;        // of a block's input channels
  int column_tiles;  // of all output channels
  int tiles;
  Divider by_column_tiles;
  int input_slots, weight_slots;  // of the pipelines in shared memory, of each ring
  bool resident;                  // all weights have a slot, and stay
  int plane;                      // bytes from one plane of an input tile to the next
  int norm_bytes;                 // of a batch norm's numbers in shared memory

  // Where there is a batch norm, before or behind.
  template <Behind behind>
  DEVICE_INLINE void stage_norm(float* to) const {
    if (behind == Behind::statistics && normalizes)
      cuda::stage_norm(before.norm, geometry.channels, to);
    if (behind == Behind::gradient) cuda::stage_norm(out.behind.norm, out.channels, to);
  }
  // A tile's row and column of tiles.
  DEVICE_INLINE int row_tile(int tile) const { return static_cast<int>(by_column_tiles(tile)); }
  DEVICE_INLINE int column_tile(int tile) const { return tile - row_tile(tile) * column_tiles; }

  DEVICE_INLINE int first_channel(int column_tile, int columns) const {
    return column_tile * columns / block_out * block_in;
  }
};

// A piece of the input on its way to shared memory.
struct InputPiece {
  int phase, first, places;
  int channel;  // the first of a thread's plane,
  bool valid;   // which is there
  unsigned char* to;
};

// Visits a piece's places by `warps` warps: each finds 32 pixels, one a lane, and visits four at a
// time, eight lanes (planes) each, `unroll` times in a row. Calls body(place, pixel, there), pixel
// 0 where it is not there; of places, 32 at a time, some lie behind the last. Without branches: a
// loading warp does little else, and copies behind branches are not joined to whole lines.
template <int warps, int unroll, class T, class Body>
DEVICE_INLINE void for_places(const ConvArguments<T>& a, const InputPiece& piece, int warp,
                              int lane, const Body& body) {
  const Phase& phase = a.geometry.phase[piece.phase];
  for (int begin = warp * 32; begin < piece.places; begin += warps * 32) {
    const int found = a.geometry.pixel(piece.first + begin + lane, phase);
    const int mine = begin + lane < piece.places ? found : -1;
#pragma unroll unroll
    for (int i = 0; i < 8; ++i) {
      const int pixel = shuffle(mine, 4 * i + lane / 8);
      body(begin + 4 * i + lane / 8, pixel < 0 ? 0 : pixel, (pixel >= 0) & piece.valid);
    }
  }
}

template <int warps, class T>
DEVICE_INLINE void copy_places(const ConvArguments<T>& a, const InputPiece& piece, int warp,
                               int lane) {
  const unsigned char* const from = reinterpret_cast<const unsigned char*>(a.input + piece.channel);
  const uint32_t pitch = a.geometry.channels * static_cast<uint32_t>(sizeof(T));
  // Warps that multiply as well have fewer registers to spare.
  for_places<warps, (warps < 4 ? 8 : 4)>(
      a, piece, warp, lane, [&](int place, int pixel, bool there) {
        cp_async_16(piece.to + place * 16, from + uint64_t{static_cast<uint32_t>(pixel)} * pitch,
                    there);
      });
}

// Calls change(v) with the numbers of every place, of those that the same thread copied, which have
// arrived; where there is no pixel they stay 0.
template <int warps, class T, class Change>
DEVICE_INLINE void change_places(const ConvArguments<T>& a, const InputPiece& piece, int warp,
                                 int lane, const Change& change) {
  constexpr int n = kPlaneChannels<T>;
  for_places<warps, 2>(a, piece, warp, lane, [&](int place, int, bool there) {
    Bytes16* const at = reinterpret_cast<Bytes16*>(piece.to + place * 16);
    const Bytes16 raw = *at;  // else read byte by byte
    float v[n];
    widen<T, n>(raw, v);
    change(v);
    Bytes16 changed = narrow<T, n>(v);
#pragma unroll
    for (uint32_t& word : changed.words) word = there ? word : 0;
    *at = changed;
  });
}

// Whether what is copied has to be changed before it is multiplied.
template <class T, Behind behind>
DEVICE_INLINE bool changes(const ConvArguments<T>& a) {
  return sizeof(T) == 4 || (behind == Behind::statistics && a.normalizes);
}

// act(bn(.)) in training, or rounded to TF32.
template <int warps, Behind behind, class T>
DEVICE_INLINE void change_places(const ConvArguments<T>& a, const InputPiece& piece, int warp,
                                 int lane, const float* staged) {
  constexpr int n = kPlaneChannels<T>;
  if constexpr (sizeof(T) == 4) {
    static_assert(behind == Behind::affine);
    change_places<warps>(a, piece, warp, lane, [](float (&v)[n]) {
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] = round_tf32(v[i]);
    });
  } else if constexpr (behind == Behind::statistics) {
    const StagedNorm<n> norm(staged, a.geometry.channels, piece.valid ? piece.channel : 0);
    change_places<warps>(a, piece, warp, lane, [&](float (&v)[n]) {
#pragma unroll
      for (int i = 0; i < n; ++i)
        v[i] = normalized(v[i], norm.mean[i], norm.scale[i], norm.bias[i]);
      activate<Act::linear>(v, a.before.act, a.before.slope);
    });
  }
}

// Bytes from plane to plane for so many places, 32 of which are visited at a time: 16 more than a
// multiple of 128, so that the 8 planes' 16 bytes of one place, which are written together, lie in
// different banks.
inline int plane_bytes(int places) {
  return (places + 31) / 32 * 512 + 16;
}

}  // namespace resnet_fused::cuda
