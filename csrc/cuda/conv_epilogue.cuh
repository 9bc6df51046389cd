// The end of a convolution tile: y = act(acc * scale + shift + residual), from accumulators as the
// matrix instructions leave them to 16 bytes of channels a thread.
//
// Of each row mma and wgmma give a thread two neighbouring columns in eight, to four lanes side by
// side. Weights are packed so that in 32 columns number 8 i + 2 q + e is output channel 8 q + 2 i +
// e (resnet_fused/backends/cuda_conv.py): then lane q of four holds eight neighbouring channels,
// one access, and nothing has to change lanes.
#pragma once

#include "conv_arguments.h"
#include "hardware.cuh"

namespace resnet_fused::cuda {

// A thread's eight channels in each block of 32, from `column` on.
template <class T>
struct Epilogue {
  const ConvOutput<T>& out;
  int column;

  DEVICE_INLINE Epilogue(const ConvOutput<T>& output, int first_column, int lane)
      : out(output), column(first_column + 8 * (lane % 4)) {}

  DEVICE_INLINE void vectors(int block, float (&scale)[8], float (&shift)[8]) const {
    const int from = column + 32 * block;
    const bool inside = from < out.channels;
    load_eight(inside ? out.scale : nullptr, from, 1.0f, scale);
    load_eight(inside ? out.shift : nullptr, from, 0.0f, shift);
  }

  // A block of the residual's pixel, or nothing for -1: asked for long before it is added, as
  // memory is far.
  DEVICE_INLINE Bytes16 residual(int pixel, int block) const {
    if (out.residual == nullptr || !is_there(pixel, block)) return {};
    return load_once(out.residual + place(pixel, block));
  }

  // A block of an output pixel: acc[4 * (4 * block + i) + offset] and the next are channels
  // 2 i and 2 i + 1 of the eight.
  template <int n>
  DEVICE_INLINE void row(const float (&acc)[n], int offset, int pixel, int block,
                         const float (&scale)[8], const float (&shift)[8],
                         const Bytes16& residual) const {
    if (!is_there(pixel, block)) return;
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      y[i] = acc[4 * (4 * block + i / 2) + offset + i % 2] * scale[i] + shift[i];
    if (out.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Pair r = unpair(residual.words[i], T());
        y[2 * i] += r.first;
        y[2 * i + 1] += r.second;
      }
    }
    if (out.act.leaky) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = y[i] < 0.0f ? y[i] * out.act.slope : y[i];
    }
    Bytes16 packed;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed.words[i] = clamp(pair(y[2 * i], y[2 * i + 1], T()), out.act.low, out.act.high, T());
    *reinterpret_cast<Bytes16*>(out.output + place(pixel, block)) = packed;
  }

 private:
  DEVICE_INLINE int64_t place(int pixel, int block) const {
    return static_cast<int64_t>(pixel) * out.channels + (column + 32 * block);
  }
  DEVICE_INLINE bool is_there(int pixel, int block) const {
    return pixel >= 0 && column + 32 * block < out.channels;
  }

  DEVICE_INLINE static void load_eight(const float* from, int at, float otherwise, float (&to)[8]) {
    if (from == nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = otherwise;
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const Pair both = load_pair(from + at + i);
      to[i] = both.first;
      to[i + 1] = both.second;
    }
  }
};

// The rows of a thread's accumulators, two in each of `parts` tiles of matrix instructions. A
// block's residual is loaded while the one before is stored, if registers suffice for two
// (`ahead`).
template <class T, int parts, int blocks, bool ahead>
struct EpilogueRows {
  Epilogue<T> epilogue;
  int pixel[parts][2];         // of the output, or -1
  Bytes16 residual[parts][2];  // of the block that comes next

  DEVICE_INLINE EpilogueRows(const ConvOutput<T>& out, int first_column, int lane)
      : epilogue(out, first_column, lane) {}

  DEVICE_INLINE void load(int block) {
#pragma unroll
    for (int h = 0; h < parts; ++h) {
#pragma unroll
      for (int j = 0; j < 2; ++j) residual[h][j] = epilogue.residual(pixel[h][j], block);
    }
  }

  // Before the products, once the pixels are known.
  DEVICE_INLINE void begin() {
    if (ahead) load(0);
  }

  template <int n>
  DEVICE_INLINE void store(const float (&acc)[parts][n]) {
#pragma unroll
    for (int block = 0; block < blocks; ++block) {
      if (!ahead) load(block);
      Bytes16 now[parts][2];
#pragma unroll
      for (int h = 0; h < parts; ++h) now[h][0] = residual[h][0], now[h][1] = residual[h][1];
      if (ahead && block + 1 < blocks) load(block + 1);
      float scale[8], shift[8];
      epilogue.vectors(block, scale, shift);
#pragma unroll
      for (int h = 0; h < parts; ++h) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          epilogue.row(acc[h], 2 * j, pixel[h][j], block, scale, shift, now[h][j]);
      }
    }
  }
};

}  // namespace resnet_fused::cuda
