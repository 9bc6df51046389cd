// The end of a convolution tile, from accumulators as the matrix instructions leave them to 16
// bytes of channels a thread: what Behind says.
//
// Of each row mma and wgmma give a thread two neighbouring columns in eight, to four lanes side by
// side. Weights are packed so that in 32 columns number 8 i + 2 q + e is output channel 8 q + 2 i +
// e (pack_weights.cu): then lane q of four holds eight neighbouring channels, one access, and
// nothing has to change lanes.
//
// What training wants of each channel a warp adds up over all its tiles. Of a block of 32 columns
// every lane keeps one: eight lanes hold sums of the same eight columns, and halve them between
// each other three times. Statistics are sums of distances from an origin, the mean of the warp's
// first tile, so that nothing cancels however large the mean.
#pragma once

#include "conv_arguments.h"
#include "hardware.cuh"

namespace resnet_fused::cuda {

// What a warp knows of the channels of its columns: of each block of 32, the lane's own.
template <Behind behind, int blocks>
struct ChannelTotals {
  float first[blocks] = {};   // sum of d = z - origin, or of g
  float second[blocks] = {};  // sum of d * d, or of g * (z - mean)
  float origin[blocks] = {};
  float pixels = 0;

  // The lane that keeps the i-th of eight channels, of those that have it.
  DEVICE_INLINE static int keeper(int i, int lane) {
    return (i & 4) * 4 + (i & 2) * 4 + (i & 1) * 4 + lane % 4;
  }

  template <class T>
  DEVICE_INLINE void write(const ConvOutput<T>& out, int row, int first_column, int lane) const {
    const int own = (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4;
    const int channel = first_column + 8 * (lane % 4) + own;
#pragma unroll
    for (int b = 0; b < blocks; ++b) {
      if (channel + 32 * b >= out.channels) continue;
      double sum = first[b], other = second[b];
      if (behind == Behind::statistics && pixels > 0) {
        const double rest = sum / pixels;
        other -= sum * rest;
        sum = origin[b] + rest;
      }
      double* const to = out.totals + int64_t{row} * out.channels + channel + 32 * b;
      to[0] = sum;
      to[int64_t{out.total_rows} * out.channels] = other;
    }
    if (behind == Behind::statistics && channel == 0) out.pixels[row] = pixels;
  }
};

// Half of n numbers goes to the lane whose number differs in the bits of `mask`, which gives the
// other half; each is added to one's own.
template <int n>
DEVICE_INLINE void halve(float (&sums)[8], int lane, int mask) {
  const bool upper = (lane & mask) != 0;
#pragma unroll
  for (int i = 0; i < n / 2; ++i) {
    const int j = i + n / 2;
    const float theirs = shuffle_xor(upper ? sums[i] : sums[j], mask);
    sums[i] = (upper ? sums[j] : sums[i]) + theirs;
  }
}

// Of the eight sums of each lane, those of the warp: every lane has the one that it keeps.
DEVICE_INLINE float add_lanes(float (&sums)[8], int lane) {
  halve<8>(sums, lane, 16);
  halve<4>(sums, lane, 8);
  halve<2>(sums, lane, 4);
  return sums[0];
}

// A thread's eight channels in each block of 32, from `column` on.
template <class T, Behind behind>
struct Epilogue {
  const ConvOutput<T>& out;
  const float* staged;  // of the batch norm behind
  int column;

  // Of the pixels of a block, a thread's own.
  struct Sums {
    float origin[8];
    float first[8] = {}, second[8] = {};
  };

  DEVICE_INLINE Epilogue(const ConvOutput<T>& output, const float* staged_norm, int first_column,
                         int lane)
      : out(output), staged(staged_norm), column(first_column + 8 * (lane % 4)) {}

  // What a channel is multiplied by, in evaluation, and shifted.
  struct Affine {
    float scale[8], shift[8];

    DEVICE_INLINE Affine(const Epilogue& e, int block) {
      const int from = e.column + 32 * block;
      const bool inside = from < e.out.channels;
      if constexpr (behind == Behind::affine)
        load_vector(inside ? e.out.scale : nullptr, from, 1.0f, scale);
      load_vector(inside ? e.out.shift : nullptr, from, 0.0f, shift);
    }
  };
  struct OfNorm : StagedNorm<8> {
    DEVICE_INLINE OfNorm(const Epilogue& e, int block)
        : StagedNorm<8>(e.staged, e.out.channels,
                        e.column + 32 * block < e.out.channels ? e.column + 32 * block : 0) {}
  };
  using Vectors = std::conditional_t<behind == Behind::gradient, OfNorm, Affine>;

  // A block of a tensor's pixel, or nothing for -1: asked for long before it is used, as memory is
  // far.
  DEVICE_INLINE Eight<T> read(const T* from, int pixel, int block) const {
    if (from == nullptr || !is_there(pixel, block)) return {};
    return load_eight(from + place(pixel, block));
  }

  // A block of an output pixel: acc[4 * (4 * block + i) + offset] and the next are channels
  // 2 i and 2 i + 1 of the eight.
  template <int n>
  DEVICE_INLINE void row(const float (&acc)[n], int offset, int pixel, int block, const Vectors& v,
                         const Eight<T>& residual, const Eight<T>& z, Sums& sums) const {
    if (!is_there(pixel, block)) return;
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float sum = acc[4 * (4 * block + i / 2) + offset + i % 2];
      if constexpr (behind == Behind::affine) {
        y[i] = sum * v.scale[i] + v.shift[i];
      } else if constexpr (behind == Behind::statistics) {
        y[i] = sum + v.shift[i];
      } else {
        y[i] = sum;
      }
    }
    if (behind != Behind::statistics && out.residual != nullptr) {
      float r[8];
      widen_eight(residual, r);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += r[i];
    }
    if (behind == Behind::affine && out.act.leaky) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = y[i] < 0.0f ? y[i] * out.act.slope : y[i];
    }
    Eight<T> packed = narrow_eight<T>(y);
    if constexpr (behind == Behind::affine) {
      constexpr int words = 2 * static_cast<int>(sizeof(T));
#pragma unroll
      for (int i = 0; i < words; ++i) {
        uint32_t& word = packed.part[i / 4].words[i % 4];
        word = clamp(word, out.act.low, out.act.high, T());
      }
    }
    *reinterpret_cast<Eight<T>*>(out.output + place(pixel, block)) = packed;
    if constexpr (behind != Behind::affine) {
      widen_eight(packed, y);  // as they are stored
      add(y, v, z, sums);
    }
  }

 private:
  DEVICE_INLINE void add(float (&y)[8], const Vectors& v, const Eight<T>& z, Sums& sums) const {
    if constexpr (behind == Behind::statistics) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float d = y[i] - sums.origin[i];
        sums.first[i] += d;
        sums.second[i] += d * d;
      }
    } else {
      float x[8], argument[8];
      widen_eight(z, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) argument[i] = normalized(x[i], v.mean[i], v.scale[i], v.bias[i]);
      activate_backward<Act::linear>(y, argument, out.behind.act, out.behind.slope);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums.first[i] += y[i];
        sums.second[i] += y[i] * (x[i] - v.mean[i]);
      }
    }
  }

  DEVICE_INLINE int64_t place(int pixel, int block) const {
    return static_cast<int64_t>(pixel) * out.channels + (column + 32 * block);
  }
  DEVICE_INLINE bool is_there(int pixel, int block) const {
    return pixel >= 0 && column + 32 * block < out.channels;
  }

  DEVICE_INLINE static void load_vector(const float* from, int at, float otherwise,
                                        float (&to)[8]) {
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

// The rows of a thread's accumulators, two in each of `parts` tiles of matrix instructions. What a
// block reads is loaded while the one before is stored, if registers suffice for two (`ahead`);
// else before it, or part by part where that is twice as much.
template <class T, Behind behind, int parts, int blocks, bool ahead>
struct EpilogueRows {
  using Of = Epilogue<T, behind>;
  using Totals = ChannelTotals<behind, blocks>;
  static constexpr bool kGradient = behind == Behind::gradient;

  struct Read {
    Eight<T> residual, z;
  };

  Of epilogue;
  int lane;
  int pixel[parts][2];  // of the output, or -1
  Read read[parts][2];  // of the block that comes next

  DEVICE_INLINE EpilogueRows(const ConvOutput<T>& out, const float* staged, int first_column,
                             int thread)
      : epilogue(out, staged, first_column, thread), lane(thread % 32) {}

  DEVICE_INLINE void load_part(int block, int h) {
    if constexpr (behind != Behind::statistics) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        read[h][j].residual = epilogue.read(epilogue.out.residual, pixel[h][j], block);
        if (kGradient) read[h][j].z = epilogue.read(epilogue.out.z, pixel[h][j], block);
      }
    }
  }
  DEVICE_INLINE void load(int block) {
#pragma unroll
    for (int h = 0; h < parts; ++h) load_part(block, h);
  }

  // Before the products, once the pixels are known.
  DEVICE_INLINE void begin() {
    if (ahead) load(0);
  }

  template <int n>
  DEVICE_INLINE void store(const float (&acc)[parts][n], Totals& totals) {
    int first_pass = 1;
    float pixels = 0;
    if constexpr (behind == Behind::statistics) {
#pragma unroll
      for (int h = 0; h < parts; ++h) pixels += (pixel[h][0] >= 0) + (pixel[h][1] >= 0);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) pixels += shuffle_xor(pixels, mask);
      if (totals.pixels == 0) first_pass = 0;
      totals.pixels += pixels;
    }
#pragma unroll
    for (int block = 0; block < blocks; ++block) {
      if (!ahead && !kGradient) load(block);
      Read now[parts][2];
#pragma unroll
      for (int h = 0; h < parts; ++h) now[h][0] = read[h][0], now[h][1] = read[h][1];
      if (ahead && block + 1 < blocks) load(block + 1);
      const typename Of::Vectors vectors(epilogue, block);
      // A warp that has no origin yet goes through its first tile twice.
#pragma unroll 1
      for (int pass = first_pass; pass < 2; ++pass) {
        typename Of::Sums sums;
        if constexpr (behind == Behind::statistics) {
#pragma unroll
          for (int i = 0; i < 8; ++i)
            sums.origin[i] = shuffle(totals.origin[block], Totals::keeper(i, lane));
        }
#pragma unroll
        for (int h = 0; h < parts; ++h) {
          if (!ahead && kGradient) {
            load_part(block, h);
            now[h][0] = read[h][0], now[h][1] = read[h][1];
          }
#pragma unroll
          for (int j = 0; j < 2; ++j)
            epilogue.row(acc[h], 2 * j, pixel[h][j], block, vectors, now[h][j].residual,
                         now[h][j].z, sums);
        }
        if constexpr (behind != Behind::affine) {
          const float first = add_lanes(sums.first, lane), second = add_lanes(sums.second, lane);
          if (pass == 0) {
            const float mean = to_float(rounded<T>(first / pixels));
            totals.origin[block] = mean - mean == 0 ? mean : 0;  // not NaN or infinite
          } else {
            totals.first[block] += first;
            totals.second[block] += second;
          }
        }
      }
    }
  }
};

}  // namespace resnet_fused::cuda
