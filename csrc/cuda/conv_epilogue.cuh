// The end of a convolution tile: y = act(acc * scale + shift + residual), from accumulators as the
// matrix instructions leave them to 16-byte rows of channels.
//
// mma and wgmma give a thread of each row two neighbouring columns in eight, in four lanes side by
// side. Four such pairs of four lanes are a 4x4 matrix of registers; transposed among the lanes,
// each holds eight neighbouring columns, which is one access. The residual comes the same way back.
#pragma once

#include "conv_arguments.h"
#include "hardware.cuh"

namespace resnet_fused::cuda {

// Word w of lane q (of four) for word q of lane w.
DEVICE_INLINE void transpose_words(Bytes16& v, int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & bit) continue;
      uint32_t& first = v.words[low];
      uint32_t& second = v.words[low | bit];
      const uint32_t got = shuffle_xor(upper ? first : second, bit);
      (upper ? first : second) = got;
    }
  }
}

// Writes a thread's part of rows, 32 columns at a time.
template <class T>
struct Epilogue {
  const ConvOutput<T>& out;
  int first_column;
  int lane;  // of four

  // Scale and shift of the thread's columns in a block of 32.
  DEVICE_INLINE void vectors(int block, Pair (&scale)[4], Pair (&shift)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = first_column + 32 * block + 8 * i + 2 * lane;
      const bool inside = column < out.channels;
      scale[i] = inside && out.scale ? load_pair(out.scale + column) : Pair{1, 1};
      shift[i] = inside && out.shift ? load_pair(out.shift + column) : Pair{0, 0};
    }
  }

  // A block of a row: acc[4 * (column / 8) + offset] and the next are the thread's two columns of
  // eight. `pixel` is the output's, or -1. All threads of the warp have to come.
  template <int n>
  DEVICE_INLINE void row(const float (&acc)[n], int offset, int64_t pixel, int block,
                         const Pair (&scale)[4], const Pair (&shift)[4]) const {
    const int own = first_column + 32 * block + 8 * lane;  // after the exchange
    const bool writes = pixel >= 0 && own < out.channels;
    const int64_t place = pixel * out.channels + own;
    Bytes16 residual{};
    if (out.residual != nullptr) {
      if (writes) residual = load_once(out.residual + place);
      transpose_words(residual, lane);
    }
    Bytes16 y;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair r = unpair(residual.words[i], T());
      const float first = acc[4 * (4 * block + i) + offset];
      const float second = acc[4 * (4 * block + i) + offset + 1];
      y.words[i] = pair(out.act(first * scale[i].first + shift[i].first + r.first),
                        out.act(second * scale[i].second + shift[i].second + r.second), T());
    }
    transpose_words(y, lane);
    if (writes) *reinterpret_cast<Bytes16*>(out.output + place) = y;
  }
};

}  // namespace resnet_fused::cuda
