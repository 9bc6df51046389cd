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

  // Where the thread's part of an output pixel begins, or -1 for no pixel.
  DEVICE_INLINE int64_t place(int64_t pixel) const {
    return pixel < 0 ? -1 : pixel * out.channels + column;
  }

  DEVICE_INLINE void vectors(int block, float (&scale)[8], float (&shift)[8]) const {
    const int from = column + 32 * block;
    const bool inside = from < out.channels;
    load_eight(inside ? out.scale : nullptr, from, 1.0f, scale);
    load_eight(inside ? out.shift : nullptr, from, 0.0f, shift);
  }

  // A block of the row at `place`: acc[4 * (4 * block + i) + offset] and the next are channels
  // 2 i and 2 i + 1 of the eight.
  template <int n>
  DEVICE_INLINE void row(const float (&acc)[n], int offset, int64_t place, int block,
                         const float (&scale)[8], const float (&shift)[8]) const {
    if (place < 0 || column + 32 * block >= out.channels) return;
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      y[i] = acc[4 * (4 * block + i / 2) + offset + i % 2] * scale[i] + shift[i];
    if (out.residual != nullptr) {
      const Bytes16 residual = load_once(out.residual + place + 32 * block);
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
    *reinterpret_cast<Bytes16*>(out.output + place + 32 * block) = packed;
  }

 private:
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

}  // namespace resnet_fused::cuda
