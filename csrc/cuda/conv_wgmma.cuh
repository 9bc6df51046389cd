// Convolution on Hopper: implicit GEMM by wgmma from a tile of the input that is loaded once.
//
//     y[q, k] = act(scale[k] * sum over taps and channels of x[q + shift(tap), c] w[k, c, tap] +
//     ...)
//
// over places q (conv_geometry.h). A block of threads is one warpgroup that loads and two that
// multiply, `parts` * 64 rows by `columns` outputs each; as many blocks as multiprocessors take
// tiles in turn. The two share a tile, or `alternate`: then each has its own, and multiplies while
// the other one stores, which needs all weights in shared memory, as both read them at different
// times. Three warps copy input tiles by cp.async (zeros where there is no pixel), one thread
// copies blocks of weights by bulk copies; mbarriers tell who may read and who may write. The nine
// taps of a 3x3 convolution read the same tile at nine starts: input is read from L2 (1 + span /
// rows) times instead of nine times, and neither an im2col matrix nor a tensor map exists.
//
// In training (Behind) a warp keeps what it knows of its channels from tile to tile, so a block
// must stay with its column tile: there are a multiple of `column_tiles` of them.
//
// Moved: input, weights, residual and output once each where the tiles of one input run together;
// eager PyTorch moves the output five times more (convolution, batch norm, add, relu).
#pragma once

#include "conv_epilogue.cuh"

namespace resnet_fused::cuda {

constexpr int kWarpgroup = 128;
constexpr int kInputThreads = 96;  // of the loading warpgroup; the fourth warp copies weights
constexpr int kWgmmaThreads = 3 * kWarpgroup;
constexpr int kMostInputSlots = 4, kMostWeightSlots = 16;

// Of a thread: a block has 168 for each, as they are given out at its start in eights, and who
// multiplies gets what loading leaves. More than there are would be waited for in vain.
template <Behind behind>
constexpr int kLoadRegisters = behind == Behind::gradient ? 72 : 88;
template <Behind behind>
constexpr int kMultiplyRegisters = (3 * 168 - kLoadRegisters<behind>) / 2;
static_assert(65536 / kWgmmaThreads / 8 * 8 == 168);
constexpr int kBarrierBytes = 1024;

// In front of the slots in shared memory.
struct ConvBarriers {
  Mbarrier input_full[kMostInputSlots], input_empty[kMostInputSlots];
  Mbarrier weight_full[kMostWeightSlots], weight_empty[kMostWeightSlots];
};
static_assert(sizeof(ConvBarriers) <= kBarrierBytes);

// The uses of a ring of slots, one after another: which slot, and which parity its barriers have.
struct Turn {
  int slots, slot = 0, parity = 0;

  DEVICE_INLINE explicit Turn(int n) : slots(n) {}
  DEVICE_INLINE void next() {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

// The stages of tiles in the order in which they are loaded. Each of `readers` has its own ring of
// input slots, and the tiles are theirs in turn. (In one ring a reader would have to pass over uses
// that are not its own, and whoever skips phases of an mbarrier mistakes one for another.)
template <int readers>
struct Stages {
  int ring, stages;  // slots of a ring, a power of two; stages of a tile
  int first = 0, stage = 0, reader = 0;

  DEVICE_INLINE int slot() const { return ((first + stage) & (ring - 1)) * readers + reader; }
  DEVICE_INLINE int parity() const { return (first + stage) / ring & 1; }
  DEVICE_INLINE void next() {
    if (++stage == stages) {
      stage = 0;
      if (++reader == readers) {
        reader = 0;
        first = (first + stages) & (2 * ring - 1);  // only the slot and the parity matter
      }
    }
  }
};

template <class T, Behind behind, int columns, int parts, bool alternate>
struct ConvWgmma {
  static constexpr int kRows = (alternate ? 1 : 2) * 64 * parts;
  static constexpr int kRings = alternate ? 2 : 1;  // of input slots
  static constexpr int kWeightBytes = kPlanes * columns * 16;
  static constexpr int kTableRows = 8;  // of a block: warps

  const ConvArguments<T>& a;
  ConvBarriers* barriers;
  float* norm;  // of the input, or behind
  unsigned char* inputs;
  unsigned char* weights;

  DEVICE_INLINE explicit ConvWgmma(const ConvArguments<T>& arguments)
      : a(arguments),
        barriers(reinterpret_cast<ConvBarriers*>(shared_memory())),
        norm(reinterpret_cast<float*>(shared_memory() + kBarrierBytes)),
        inputs(shared_memory() + kBarrierBytes + arguments.norm_bytes),
        weights(inputs + kRings * arguments.input_slots * kPlanes * arguments.plane) {}

  DEVICE_INLINE void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kRings * a.input_slots; ++i) {
        mbarrier_init(&barriers->input_full[i], kInputThreads);
        mbarrier_init(&barriers->input_empty[i], 2 / kRings);
      }
      for (int i = 0; i < a.weight_slots; ++i) {
        mbarrier_init(&barriers->weight_full[i], 1);
        mbarrier_init(&barriers->weight_empty[i], 2);
      }
      mbarrier_init_done();
    }
    a.template stage_norm<behind>(norm);
    sync_block();
  }

  // A stage of a tile, as a thread loads it.
  struct Load {
    const ConvArguments<T>& a;
    int plane;
    Stages<kRings> turn;
    int tile;
    int chunk = 0, phase = 0;
    int first, base;  // place and channel

    DEVICE_INLINE Load(const ConvArguments<T>& arguments, int thread)
        : a(arguments),
          plane(thread % kPlanes),
          turn{arguments.input_slots, arguments.chunks * arguments.geometry.phases},
          tile(blockIdx.x) {
      find_tile();
    }

    DEVICE_INLINE void next() {
      turn.next();
      if (++phase < a.geometry.phases) return;
      phase = 0;
      if (++chunk < a.chunks) return;
      chunk = 0;
      tile += gridDim.x;
      if (tile < a.tiles) find_tile();
    }

    DEVICE_INLINE InputPiece piece(unsigned char* inputs) const {
      const int within = chunk * kChunk<T> + plane * kPlaneChannels<T>;
      return {phase,
              first,
              kRows + a.geometry.span,
              base + within,
              within < a.block_in,
              inputs + (turn.slot() * kPlanes + plane) * a.plane};
    }

   private:
    DEVICE_INLINE void find_tile() {
      first = a.row_tile(tile) * kRows + a.geometry.least_shift;
      base = a.first_channel(a.column_tile(tile), columns);
    }
  };

  DEVICE_INLINE void load_inputs(int thread) const {
    const int lane = thread % 32, warp = thread / 32;
    Load load(a, thread), told = load;
    int untold = 0;  // slots whose copies are under way
    const auto tell = [&] {
      if (changes<T, behind>(a)) change_places<3, behind>(a, told.piece(inputs), warp, lane, norm);
      fence_async();
      mbarrier_arrive(&barriers->input_full[told.turn.slot()]);
      told.next();
      --untold;
    };
    for (; load.tile < a.tiles; load.next()) {
      Mbarrier* const empty = &barriers->input_empty[load.turn.slot()];
      const int free = load.turn.parity() ^ 1;
      // A warp goes one way, by its first lane: what is told may be changed, by all lanes together.
      if (untold > 0 && shuffle<int>(mbarrier_ready(empty, free), 0) == 0) {
        // Whoever is to empty the slot may be waiting for these.
        cp_async_wait<0>();
        while (untold > 0) tell();
      }
      mbarrier_wait(empty, free);
      copy_places<3>(a, load.piece(inputs), warp, lane);
      cp_async_commit();
      if (++untold > 2) {
        cp_async_wait<2>();
        tell();
      }
    }
    cp_async_wait<0>();
    while (untold > 0) tell();
  }

  DEVICE_INLINE void load_weights() const {
    const ConvGeometry& g = a.geometry;
    Turn turn(a.weight_slots);
    // Resident weights come once, those of all column tiles.
    const int begin = a.resident ? 0 : blockIdx.x, step = a.resident ? 1 : gridDim.x;
    const int end = a.resident ? a.column_tiles : a.tiles;
    for (int tile = begin; tile < end; tile += step) {
      const T* const first = a.weights + int64_t{a.column_tile(tile)} * a.chunks * g.taps *
                                             (kWeightBytes / static_cast<int>(sizeof(T)));
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        for (int tap = 0; tap < g.taps; ++tap) {
          Mbarrier* const full = &barriers->weight_full[turn.slot];
          mbarrier_wait(&barriers->weight_empty[turn.slot], turn.parity ^ 1);
          mbarrier_arrive_expect(full, kWeightBytes);
          const int64_t block = int64_t{chunk} * g.taps + g.tap[tap].weight;
          bulk_copy(weights + turn.slot * kWeightBytes,
                    first + block * (kWeightBytes / static_cast<int>(sizeof(T))), kWeightBytes,
                    full);
          turn.next();
        }
      }
    }
    // A block must not end before its copies have: some are of column tiles that it has none of.
    for (int i = 0; a.resident && i < a.weight_slots; ++i)
      mbarrier_wait(&barriers->weight_full[i], 0);
  }

  // One of the two warpgroups that multiply, `half` 0 or 1.
  DEVICE_INLINE void multiply(int half) const {
    const ConvGeometry& g = a.geometry;
    const int thread = threadIdx.x % kWarpgroup;
    const int first_row = alternate ? 0 : half * parts * 64;
    const int step = gridDim.x, begin = blockIdx.x + (alternate ? half * step : 0);
    Turn input(a.input_slots), weight(a.weight_slots);
    ChannelTotals<behind, columns / 32> totals;
    for (int tile = begin; tile < a.tiles; tile += kRings * step) {
      Rows output = rows_of(tile, first_row, thread);
      float acc[parts][columns / 2] = {};
      Mbarrier* done_input = nullptr;  // to be told once the products under way are done
      Mbarrier* done_weight = nullptr;
      if (a.resident) {
        weight = Turn(a.weight_slots);
        weight.slot = a.column_tile(tile) * a.chunks * g.taps;
      }
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        for (int phase = 0; phase < g.phases; ++phase) {
          const int slot = alternate ? 2 * input.slot + half : input.slot;
          mbarrier_wait(&barriers->input_full[slot], input.parity);
          const unsigned char* const rows =
              inputs + slot * kPlanes * a.plane + (first_row - g.least_shift) * 16;
          const int end = g.phase[phase].first_tap + g.phase[phase].taps;
          for (int tap = g.phase[phase].first_tap; tap < end; ++tap) {
            mbarrier_wait(&barriers->weight_full[weight.slot], weight.parity);
            const uint64_t x = matrix(rows + g.tap[tap].shift * 16, a.plane, 128);
            const uint64_t w = matrix(weights + weight.slot * kWeightBytes, columns * 16, 128);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kPlanes; k += 2) {
#pragma unroll
              for (int h = 0; h < parts; ++h) {
                wgmma(acc[h], matrix_at(x, h * 64 * 16 + k * a.plane),
                      matrix_at(w, k * columns * 16), true, T());
              }
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (thread == 0) release(done_input, done_weight);
            done_input = tap == end - 1 ? &barriers->input_empty[slot] : nullptr;
            done_weight = a.resident ? nullptr : &barriers->weight_empty[weight.slot];
            weight.next();
          }
          input.next();
        }
      }
      wgmma_wait<0>();
#pragma unroll
      for (int h = 0; h < parts; ++h) wgmma_hold(acc[h]);
      if (thread == 0) release(done_input, done_weight);
      output.store(acc, totals);
    }
    if (behind != Behind::affine) {
      const int block = blockIdx.x, row = a.row_tile(block) * kTableRows;
      totals.write(a.out, row + half * (kTableRows / 2) + thread / 32,
                   a.column_tile(block) * columns, thread % 32);
    }
  }

 private:
  DEVICE_INLINE static void release(Mbarrier* input, Mbarrier* weight) {
    if (input != nullptr) mbarrier_arrive(input);
    if (weight != nullptr) mbarrier_arrive(weight);
  }

  using Rows = EpilogueRows<T, behind, parts, columns / 32, (parts * sizeof(T) < 8)>;

  // The rows of a tile that a thread writes, with what they begin with.
  DEVICE_INLINE Rows rows_of(int tile, int first_row, int thread) const {
    const int row = a.row_tile(tile) * kRows + first_row + thread / 32 * 16 + thread % 32 / 4;
    Rows rows(a.out, norm, a.column_tile(tile) * columns, thread);
#pragma unroll
    for (int h = 0; h < parts; ++h) {
#pragma unroll
      for (int j = 0; j < 2; ++j) rows.pixel[h][j] = a.geometry.out_pixel(row + h * 64 + j * 8);
    }
    rows.begin();
    return rows;
  }
};

template <class T, Behind behind, int columns, int parts, bool alternate>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    conv_wgmma_kernel(const __grid_constant__ ConvArguments<T> arguments) {
#ifdef RESNET_FUSED_SM90
  const ConvWgmma<T, behind, columns, parts, alternate> conv(arguments);
  conv.init();
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    give_registers<kLoadRegisters<behind>>();
    if (threadIdx.x < kInputThreads) {
      conv.load_inputs(threadIdx.x);
    } else if (threadIdx.x == kInputThreads) {
      conv.load_weights();
    }
  } else {
    take_registers<kMultiplyRegisters<behind>>();
    conv.multiply(warpgroup - 1);
  }
#endif
}

}  // namespace resnet_fused::cuda
