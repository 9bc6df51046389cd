// The first convolution of a network, of few channels (3, into 64), by mma.sync, NHWC.
//
// Eight channels make 16 bytes, which everything else here loads at once; of three, padded, five
// eighths of the products would be of zeros. But along a row of the image the S pixels of a window
// are S * C numbers one after another, so the sum runs over rows of the kernel, each rounded up to
// 8 numbers (7 * 3 = 21 to 24): a tile of the image lies in shared memory as it is, and a thread
// reads its two neighbouring numbers of an mma fragment straight from there. What is beyond a row's
// end belongs to the next pixel and may be NaN: it is cut off, not multiplied by zero.
//
// A block takes 16 x 16 outputs by 64 channels, a warp two of its rows. Weights come packed as
// fragments. Moved: the image (1.3 times, by the tiles' rims), and the output once where eager
// PyTorch moves it five times (convolution, batch norm and relu). cuDNN's convolution of 3 channels
// pads them first.
#pragma once

#include "conv_epilogue.cuh"

namespace resnet_fused::cuda {

constexpr int kStemTile = 16;
constexpr int kStemThreads = 256;
constexpr int kStemLines = 2;  // of outputs, 16 each, in a warp
constexpr int kStemColumns = 64;

template <class T>
struct StemArguments {
  const T* input;
  const uint32_t* weights;  // [column tile][step][column / 8][lane][2]
  ConvOutput<T> out;
  int images, height, width, out_height, out_width;
  int padding_h, padding_w;
  int tiles_x, tiles_y;
};

template <class T, int kernel_h, int kernel_w, int channels, int stride>
struct StemConv {
  static constexpr int kLine = kernel_w * channels;  // numbers of a window's row
  static constexpr int kEights = (kLine + 7) / 8;    // groups of 8 that it is rounded up to
  static constexpr int kSteps = (kernel_h * kEights + 1) / 2;  // of 16
  static constexpr int kTail = kLine - (kEights - 1) * 8;      // numbers in its last group
  static constexpr int kPixels = (kStemTile - 1) * stride + kernel_w;
  static constexpr int kLines = (kStemTile - 1) * stride + kernel_h;
  // Reads go up to 7 numbers beyond the last window; an even number keeps pairs aligned.
  static constexpr int kPitch = (kPixels * channels + 8) / 2 * 2;
  static constexpr bool kAligned = stride * channels % 2 == 0;
  static constexpr int kTileBytes = (kLines * kPitch * 2 + 15) / 16 * 16;
  static constexpr int kWeightWords = kSteps * kStemColumns / 8 * 32 * 2;
  static constexpr int kSharedBytes = kTileBytes + kWeightWords * 4;

  const StemArguments<T>& a;

  DEVICE_INLINE void run() const {
    T* const tile = reinterpret_cast<T*>(shared_memory());
    uint32_t* const weights = reinterpret_cast<uint32_t*>(shared_memory() + kTileBytes);
    const int thread = threadIdx.x, lane = thread % 32;
    const uint32_t* const from = a.weights + int64_t{blockIdx.y} * kWeightWords;
    for (int i = thread * 4; i < kWeightWords; i += kStemThreads * 4)
      cp_async_16(weights + i, from + i, true);
    cp_async_commit();

    const int tile_number = static_cast<int>(blockIdx.x), tiles = a.tiles_x * a.tiles_y;
    const int image = tile_number / tiles, within = tile_number - image * tiles;
    const int y0 = within / a.tiles_x * kStemTile, x0 = within % a.tiles_x * kStemTile;
    load(tile, a.input + int64_t{image} * a.height * a.width * channels, y0 * stride - a.padding_h,
         x0 * stride - a.padding_w);
    cp_async_wait<0>();
    sync_block();

    float acc[kStemLines][kStemColumns / 2] = {};
    const int first_row = thread / 32 * kStemLines;
    const uint32_t tail = tail_mask(lane % 4);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t x[kStemLines][4];
#pragma unroll
      for (int m = 0; m < kStemLines; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int group = 2 * step + half, line = group / kEights, part = group % kEights;
#pragma unroll
          for (int j = 0; j < 2; ++j) {  // rows g and g + 8 of the fragment
            uint32_t both = 0;
            if (line < kernel_h) {
              const int column = lane / 4 + 8 * j;
              both = numbers(tile + ((first_row + m) * stride + line) * kPitch +
                             column * stride * channels + part * 8 + lane % 4 * 2);
              if (part == kEights - 1) both &= tail;
            }
            x[m][2 * half + j] = both;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kStemColumns / 8; ++n) {
        const uint2 pair = *reinterpret_cast<const uint2*>(
            weights + ((step * (kStemColumns / 8) + n) * 32 + lane) * 2);
        const uint32_t w[2] = {pair.x, pair.y};
#pragma unroll
        for (int m = 0; m < kStemLines; ++m) {
          float d[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) d[i] = acc[m][4 * n + i];
          mma_16816(d, x[m], w, T());
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][4 * n + i] = d[i];
        }
      }
    }
    store(acc, image, y0 + first_row, x0, lane);
  }

 private:
  // The tile of the image from row y0 and column x0 on, zeros outside: a warp takes a line.
  DEVICE_INLINE void load(T* tile, const T* image, int y0, int x0) const {
    const int lane = threadIdx.x % 32;
    const int begin = x0 < 0 ? -x0 * channels : 0;
    const int end = (a.width - x0 < kPitch ? a.width - x0 : kPitch) * channels;
#pragma unroll 2
    for (int line = threadIdx.x / 32; line < kLines; line += kStemThreads / 32) {
      const int y = y0 + line;
      const bool inside = y >= 0 && y < a.height;
      const T* const from = image + (int64_t{y} * a.width + x0) * channels;
#pragma unroll
      for (int i = 0; i < kPitch; i += 32) {  // what is read and cut off is written, too
        const int number = i + lane;
        if (number < kPitch)
          tile[line * kPitch + number] =
              inside && number >= begin && number < end ? from[number] : rounded<T>(0.0f);
      }
    }
  }

  // Two neighbouring numbers.
  DEVICE_INLINE static uint32_t numbers(const T* at) {
    if (kAligned) return *reinterpret_cast<const uint32_t*>(at);
    const uint16_t* const bits = reinterpret_cast<const uint16_t*>(at);
    return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
  }

  // Of a row's last group, the numbers 2 q and 2 q + 1 that belong to it.
  DEVICE_INLINE static uint32_t tail_mask(int q) {
    if (2 * q + 1 < kTail) return 0xffffffffu;
    return 2 * q < kTail ? 0xffffu : 0u;
  }

  DEVICE_INLINE void store(const float (&acc)[kStemLines][kStemColumns / 2], int64_t image, int y0,
                           int x0, int lane) const {
    const int first_column = static_cast<int>(blockIdx.y) * kStemColumns;
    EpilogueRows<T, Behind::affine, kStemLines, kStemColumns / 32, false> rows(a.out, nullptr,
                                                                               first_column, lane);
    ChannelTotals<Behind::affine, kStemColumns / 32> totals;
#pragma unroll
    for (int m = 0; m < kStemLines; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int y = y0 + m, x = x0 + lane / 4 + 8 * j;
        const bool inside = y < a.out_height && x < a.out_width;
        const int pixel = (image * a.out_height + y) * a.out_width + x;
        rows.pixel[m][j] = inside ? pixel : -1;
      }
    }
    rows.store(acc, totals);
  }
};

template <class T, int kernel_h, int kernel_w, int channels, int stride>
__global__ void __launch_bounds__(kStemThreads, 2)
    stem_conv_kernel(const __grid_constant__ StemArguments<T> arguments) {
  StemConv<T, kernel_h, kernel_w, channels, stride>{arguments}.run();
}

}  // namespace resnet_fused::cuda
