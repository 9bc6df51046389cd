// Convolution by mma.sync, for every chip from 8.0 on: the same sums over the same tiles as
// conv_wgmma.cuh.
//
// All 8 warps copy (cp.async) and multiply. A step is one tap of 64 channels: its block of weights
// comes `kAhead` steps before it is read, and with a stage's first tap comes the stage's tile of
// the input. Warps are 4 in rows by 2 in columns, 32 rows by columns / 2 each; fragments come by
// ldmatrix, whose 8 rows of 16 bytes are 128 bytes in a row at any shift.
#pragma once

#include "conv_epilogue.cuh"

namespace resnet_fused::cuda {

constexpr int kMmaThreads = 256;
constexpr int kMmaRows = 128;
constexpr int kAhead = 3;

template <class T, int columns>
struct ConvMma {
  static constexpr int kWeightBytes = kPlanes * columns * 16;
  static constexpr int kBlocks = columns / 2 / 8;  // of 8 columns, in a warp

  const ConvArguments<T>& a;
  int column_tile, first_place;
  unsigned char* inputs;
  unsigned char* weights;

  DEVICE_INLINE explicit ConvMma(const ConvArguments<T>& arguments)
      : a(arguments),
        column_tile(static_cast<int>(blockIdx.x % arguments.column_tiles)),
        first_place(static_cast<int>(blockIdx.x / arguments.column_tiles) * kMmaRows),
        inputs(shared_memory()),
        weights(inputs + arguments.input_slots * kPlanes * arguments.plane) {}

  // A place in the order of steps.
  struct Step {
    int chunk = 0, phase = 0, tap = 0;  // tap counts over all phases
    int stage_slot = 0, weight_slot = 0;

    DEVICE_INLINE bool first_of_stage(const ConvGeometry& g) const {
      return tap == g.phase[phase].first_tap;
    }
    DEVICE_INLINE void next(const ConvArguments<T>& a) {
      const Phase& p = a.geometry.phase[phase];
      if (++weight_slot == a.weight_slots) weight_slot = 0;
      if (++tap < p.first_tap + p.taps) return;
      if (++stage_slot == a.input_slots) stage_slot = 0;
      if (++phase < a.geometry.phases) return;
      phase = tap = 0;
      ++chunk;
    }
  };

  DEVICE_INLINE void copy(const Step& step) const {
    const ConvGeometry& g = a.geometry;
    const int thread = threadIdx.x;
    if (step.first_of_stage(g)) {
      const int lane = thread % 32, plane = lane % kPlanes;
      const int within = step.chunk * kChunk + plane * kPlaneChannels;
      copy_places<kMmaThreads / 32>(
          a, g.phase[step.phase], first_place + g.least_shift, kMmaRows + g.span,
          a.first_channel(column_tile, columns) + within, within < a.block_in, thread / 32, lane,
          inputs + (step.stage_slot * kPlanes + plane) * a.plane);
    }
    const int64_t block =
        (int64_t{column_tile} * a.chunks + step.chunk) * g.taps + g.tap[step.tap].weight;
    const unsigned char* const from =
        reinterpret_cast<const unsigned char*>(a.weights) + block * kWeightBytes;
    unsigned char* const to = weights + step.weight_slot * kWeightBytes;
#pragma unroll
    for (int i = 0; i < kWeightBytes; i += kMmaThreads * 16)
      cp_async_16(to + i + thread * 16, from + i + thread * 16, true);
  }

  DEVICE_INLINE void run() const {
    const ConvGeometry& g = a.geometry;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / 2 * 32, column = warp % 2 * (columns / 2);
    const int steps = a.chunks * g.taps;
    float acc[2][4 * kBlocks] = {};
    Step copied, step;
    int ahead = 0;
    for (; ahead < kAhead; ++ahead) {
      if (ahead < steps) {
        copy(copied);
        copied.next(a);
      }
      cp_async_commit();
    }
    for (int i = 0; i < steps; ++i) {
      cp_async_wait<kAhead - 1>();
      sync_block();  // the step's data are there, and nobody reads the slots copied into next
      if (i + kAhead < steps) {
        copy(copied);
        copied.next(a);
      }
      cp_async_commit();
      const unsigned char* const x = inputs + step.stage_slot * kPlanes * a.plane +
                                     lane / 16 * a.plane +
                                     (row + lane % 16 + g.tap[step.tap].shift - g.least_shift) * 16;
      const unsigned char* const w = weights + step.weight_slot * kWeightBytes +
                                     lane / 8 % 2 * columns * 16 +
                                     (column + lane / 16 * 8 + lane % 8) * 16;
#pragma unroll
      for (int k = 0; k < kPlanes; k += 2) {
        uint32_t rows[2][4];
        ldmatrix_x4(rows[0], x + k * a.plane);
        ldmatrix_x4(rows[1], x + k * a.plane + 16 * 16);
#pragma unroll
        for (int n = 0; n < kBlocks; n += 2) {
          uint32_t both[4];
          ldmatrix_x4(both, w + k * columns * 16 + n * 8 * 16);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t b[2] = {both[2 * j], both[2 * j + 1]};
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply(acc[m], 4 * (n + j), rows[m], b);
          }
        }
      }
      step.next(a);
    }
    cp_async_wait<0>();
    store(acc, row, column, lane);
  }

 private:
  DEVICE_INLINE static void multiply(float (&acc)[4 * kBlocks], int first, const uint32_t (&x)[4],
                                     const uint32_t (&w)[2]) {
    float d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = acc[first + i];
    mma_16816(d, x, w, T());
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[first + i] = d[i];
  }

  DEVICE_INLINE void store(const float (&acc)[2][4 * kBlocks], int row, int column,
                           int lane) const {
    // Where the tile is, told anew: kept during the products, it would be spilled.
    const int block_index = shuffle(static_cast<int>(blockIdx.x), 0);
    const int column_tile = block_index % a.column_tiles;
    const int first_place = block_index / a.column_tiles * kMmaRows;
    EpilogueRows<T, 2, columns / 2 / 32, false> rows(a.out, column_tile * columns + column, lane);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t at = int64_t{first_place} + row + m * 16 + lane / 4 + j * 8;
        rows.pixel[m][j] = a.geometry.out_pixel(at);
      }
    }
    rows.store(acc);
  }
};

template <class T, int columns>
__global__ void __launch_bounds__(kMmaThreads, 2)
    conv_mma_kernel(const __grid_constant__ ConvArguments<T> arguments) {
  ConvMma<T, columns>(arguments).run();
}

}  // namespace resnet_fused::cuda
