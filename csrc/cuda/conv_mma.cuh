// Convolution by mma.sync, for every chip from 8.0 on: the same sums over the same tiles as
// conv_wgmma.cuh.
//
// All 8 warps copy (cp.async) and multiply. A step is one tap of 64 channels: its block of weights
// comes `kAhead` steps before it is read, and with a stage's first tap comes the stage's tile of
// the input. Warps are 4 in rows by 2 in columns, 32 rows by columns / 2 each; fragments come by
// ldmatrix, whose 8 rows of 16 bytes are 128 bytes in a row at any shift.
//
// In evaluation a block has one tile. In training blocks go on, and stay with a column tile, so
// that a warp keeps what it knows of its channels.
#pragma once

#include "conv_epilogue.cuh"

namespace resnet_fused::cuda {

constexpr int kMmaThreads = 256;
constexpr int kMmaRows = 128;
constexpr int kAhead = 3;

template <class T, Behind behind, int columns>
struct ConvMma {
  static constexpr int kWeightBytes = kPlanes * columns * 16;
  static constexpr int kBlocks = columns / 2 / 8;  // of 8 columns, in a warp
  static constexpr int kWarps = kMmaThreads / 32;
  static constexpr int kTableRows = kWarps / 2;  // of a block: warps below each other

  using Totals = ChannelTotals<behind, columns / 2 / 32>;

  const ConvArguments<T>& a;
  int column_tile, first_place;
  float* norm;  // of the input, or behind
  unsigned char* inputs;
  unsigned char* weights;

  DEVICE_INLINE explicit ConvMma(const ConvArguments<T>& arguments)
      : a(arguments),
        column_tile(arguments.column_tile(blockIdx.x)),
        first_place(arguments.row_tile(blockIdx.x) * kMmaRows),
        norm(reinterpret_cast<float*>(shared_memory())),
        inputs(shared_memory() + arguments.norm_bytes),
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

  // What a thread copies of a stage's input.
  DEVICE_INLINE InputPiece piece(const Step& step) const {
    const int plane = threadIdx.x % kPlanes;
    const int within = step.chunk * kChunk<T> + plane * kPlaneChannels<T>;
    return {step.phase,
            first_place + a.geometry.least_shift,
            kMmaRows + a.geometry.span,
            a.first_channel(column_tile, columns) + within,
            within < a.block_in,
            inputs + (step.stage_slot * kPlanes + plane) * a.plane};
  }

  DEVICE_INLINE void copy(const Step& step) const {
    const ConvGeometry& g = a.geometry;
    const int thread = threadIdx.x;
    if (step.first_of_stage(g)) copy_places<kWarps>(a, piece(step), thread / 32, thread % 32);
    const int64_t block =
        (int64_t{column_tile} * a.chunks + step.chunk) * g.taps + g.tap[step.tap].weight;
    const unsigned char* const from =
        reinterpret_cast<const unsigned char*>(a.weights) + block * kWeightBytes;
    unsigned char* const to = weights + step.weight_slot * kWeightBytes;
#pragma unroll
    for (int i = 0; i < kWeightBytes; i += kMmaThreads * 16)
      cp_async_16(to + i + thread * 16, from + i + thread * 16, true);
  }

  DEVICE_INLINE void run() {
    Totals totals;
    if (behind == Behind::affine) return run_tile(totals);
    a.template stage_norm<behind>(norm);
    sync_block();
    const int step = static_cast<int>(gridDim.x) / a.column_tiles * kMmaRows;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, first_place += step) {
      run_tile(totals);
      sync_block();  // what was read is overwritten
    }
    const int warp = threadIdx.x / 32;
    const int row = a.row_tile(blockIdx.x) * kTableRows + warp / 2;
    totals.write(a.out, row, column_tile * columns + warp % 2 * (columns / 2), threadIdx.x % 32);
  }

 private:
  DEVICE_INLINE void run_tile(Totals& totals) const {
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
      if (changes<T, behind>(a) && step.first_of_stage(g))
        change_places<kWarps, behind>(a, piece(step), threadIdx.x / 32, lane, norm);
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
    store(acc, row, column, lane, totals);
  }

  DEVICE_INLINE static void multiply(float (&acc)[4 * kBlocks], int first, const uint32_t (&x)[4],
                                     const uint32_t (&w)[2]) {
    float d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = acc[first + i];
    if constexpr (sizeof(T) == 4) {
      mma_1688(d, x, w);
    } else {
      mma_16816(d, x, w, T());
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[first + i] = d[i];
  }

  DEVICE_INLINE void store(const float (&acc)[2][4 * kBlocks], int row, int column, int lane,
                           Totals& totals) const {
    // Where the tile is, told anew: kept during the products, it would be spilled.
    const int block_index = shuffle(static_cast<int>(blockIdx.x), 0);
    const int column_tile = a.column_tile(block_index);
    const int first = behind == Behind::affine ? a.row_tile(block_index) * kMmaRows : first_place;
    EpilogueRows<T, behind, 2, columns / 2 / 32, false> rows(a.out, norm,
                                                             column_tile * columns + column, lane);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = first + row + m * 16 + lane / 4 + j * 8;
        rows.pixel[m][j] = a.geometry.out_pixel(at);
      }
    }
    rows.store(acc, totals);
  }
};

template <class T, Behind behind, int columns>
__global__ void __launch_bounds__(kMmaThreads, 2)
    conv_mma_kernel(const __grid_constant__ ConvArguments<T> arguments) {
  ConvMma<T, behind, columns>(arguments).run();
}

}  // namespace resnet_fused::cuda
