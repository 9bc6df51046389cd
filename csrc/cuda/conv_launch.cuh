// Starting the convolution kernels: what they are told, and how shared memory is shared out.
//
// An algorithm's name says the kernel and the tile, rows x columns, that weights are packed for:
// wgmma_256x64, pingpong_256x64 and others on compute capability 9.0 (conv_wgmma.cuh), mma_128x64
// and mma_128x128 from 8.0 on (conv_mma.cuh).
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "channel_sums.cuh"
#include "conv_call.h"
#include "conv_mma.cuh"
#include "conv_wgmma.cuh"
#include "pack_weights.h"

namespace resnet_fused::cuda {

constexpr int kSharedBytes = 227 * 1024;  // of a block, compute capability 9.0

inline const float* floats(const OptionalTensor& vector) {
  return static_cast<const float*>(pointer_to(vector));
}

template <class T>
ConvOutput<T> output_of(const ConvCall& call) {
  ConvOutput<T> out{};
  out.output = static_cast<T*>(call.output.mutable_data_ptr());
  out.residual = static_cast<const T*>(pointer_to(call.residual));
  out.scale = floats(call.scale);
  out.shift = floats(call.shift);
  out.channels = static_cast<int>(call.output.size(1));
  out.act = call.clamp;
  return out;
}

inline void check_packed(const ConvCall& call, int64_t numbers) {
  check(call.weights.numel() == numbers, call.op, ": weights must be packed for the algorithm, ",
        numbers, " numbers, got ", call.weights.numel());
}

// How many output channels read the same inputs; whole column tiles, or everything.
inline void set_blocks(const ConvCall& call, int columns, const ConvGeometry& g, int& block_in,
                       int& block_out) {
  const int out = g.out_channels / call.groups, in = g.channels / call.groups;
  const int groups = groups_together(call.groups, out, columns);
  check(groups > 0, call.op, ": groups must fill tiles of ", columns, " outputs, got ", call.groups,
        " groups of ", out);
  block_in = groups * in, block_out = groups * out;
}

template <class T, Behind behind>
ConvArguments<T> arguments_of(const ConvCall& call, int rows, int columns) {
  ConvArguments<T> a{};
  const Tensor& x = call.input;
  const auto size = [&](int d) { return static_cast<int>(x.size(d)); };
  check(make_geometry(size(0), size(1), size(2), size(3), static_cast<int>(call.output.size(1)),
                      call.options, a.geometry),
        call.op, ": the algorithm has no room for this convolution, input ", shape_text(x.sizes()));
  ConvGeometry& g = a.geometry;
  a.input = static_cast<const T*>(x.const_data_ptr());
  a.weights = static_cast<const T*>(call.weights.const_data_ptr());
  a.out = output_of<T>(call);
  set_blocks(call, columns, g, a.block_in, a.block_out);
  constexpr int each = kPlaneChannels<T>;
  check(a.block_in % each == 0 && g.channels % each == 0 && g.out_channels % 8 == 0, call.op,
        ": channels must be multiples of ", each, ", and outputs of 8, got ", g.channels, " and ",
        g.out_channels);
  a.chunks = (a.block_in + kChunk<T> - 1) / kChunk<T>;
  a.column_tiles = (g.out_channels + columns - 1) / columns;
  const int64_t tiles = (g.places + rows - 1) / rows * a.column_tiles;
  check(tiles < (int64_t{1} << 31) - (1 << 20), call.op, ": too many tiles, ", tiles);
  a.tiles = static_cast<int>(tiles);
  a.by_column_tiles = Divider(a.column_tiles);
  a.plane = plane_bytes(rows + g.span);
  check_packed(call, int64_t{a.column_tiles} * a.chunks * g.taps * columns * kChunk<T>);
  if (call.norm != nullptr) {
    const NormAct norm{call.norm->on_device<float>(), call.act, call.slope};
    if (behind == Behind::statistics) a.normalizes = true, a.before = norm;
    if (behind == Behind::gradient) {
      a.out.behind = norm;
      a.out.z = static_cast<const T*>(call.z->const_data_ptr());
    }
    a.norm_bytes = staged_norm_bytes(behind == Behind::gradient ? g.out_channels : g.channels);
  }
  return a;
}

// As many blocks as run at once, or tiles. Those that keep what they know of their channels stay
// with a column tile, and have a place for `rows` of it.
template <class T, Behind behind>
unsigned blocks_of(const ConvCall& call, ConvArguments<T>& a, int at_once, int rows) {
  if constexpr (behind == Behind::affine) {
    return static_cast<unsigned>(std::min(a.tiles, at_once));
  } else {
    const int below = std::min(a.tiles / a.column_tiles, std::max(1, at_once / a.column_tiles));
    a.out.total_rows = below * rows;
    call.totals.emplace(a.out.total_rows, a.out.channels, call.input);
    a.out.totals = call.totals->data();
    if (behind == Behind::statistics) {
      call.pixels = empty_vector(a.out.total_rows, ScalarType::Float, call.input);
      a.out.pixels = static_cast<float*>(call.pixels->mutable_data_ptr());
    }
    return static_cast<unsigned>(below * a.column_tiles);
  }
}

template <class T, Behind behind, int columns, int parts, bool alternate>
void run_wgmma(const ConvCall& call) {
  using Kernel = ConvWgmma<T, behind, columns, parts, alternate>;
  ConvArguments<T> a = arguments_of<T, behind>(call, Kernel::kRows, columns);
  const int input_bytes = Kernel::kRings * kPlanes * a.plane;
  const int blocks = a.column_tiles * a.chunks * a.geometry.taps;
  // Two input slots (one where a tile has one stage and its reader others beside it: a slot is
  // given back after the first products of the next stage), then weights, then more input slots.
  const int least = alternate && a.chunks * a.geometry.phases == 1 ? 1 : 2;
  const int weight_bytes = Kernel::kWeightBytes;
  const int room = kSharedBytes - kBarrierBytes - a.norm_bytes - least * input_bytes;
  check(room >= 2 * weight_bytes, call.op, ": images of ", a.geometry.width,
        " columns are too wide for the algorithm");
  const int fit = std::min(room / weight_bytes, kMostWeightSlots);
  a.resident = blocks <= fit;
  check(a.resident || !alternate, call.op, ": the algorithm has no room for all weights, ", blocks,
        " blocks");
  // One tap a stage needs as many slots of the one as of the other, nine of them more for weights.
  const int few = a.geometry.taps == 1 ? kMostInputSlots : 8;
  a.weight_slots = a.resident ? blocks : std::min(fit, few);
  const int left = room - a.weight_slots * weight_bytes;
  a.input_slots = least;
  while (2 * a.input_slots * Kernel::kRings <= kMostInputSlots &&
         a.input_slots * input_bytes <= left - (a.input_slots - least) * input_bytes)
    a.input_slots *= 2;
  const OnDeviceOf device(call.input);
  const unsigned grid = blocks_of<T, behind>(call, a, multiprocessors(), Kernel::kTableRows);
  device.launch(
      call.op, conv_wgmma_kernel<T, behind, columns, parts, alternate>, dim3(grid),
      dim3(kWgmmaThreads),
      kBarrierBytes + a.norm_bytes + a.input_slots * input_bytes + a.weight_slots * weight_bytes,
      a);
}

template <class T, Behind behind, int columns>
void run_mma(const ConvCall& call) {
  using Kernel = ConvMma<T, behind, columns>;
  ConvArguments<T> a = arguments_of<T, behind>(call, kMmaRows, columns);
  const ConvGeometry& g = a.geometry;
  int least = g.taps;  // of a stage
  for (int i = 0; i < g.phases; ++i) least = std::min(least, g.phase[i].taps);
  a.input_slots = 1 + (kAhead + least - 1) / least;
  a.weight_slots = kAhead + 1;
  const int bytes =
      a.norm_bytes + a.input_slots * kPlanes * a.plane + a.weight_slots * Kernel::kWeightBytes;
  check(bytes <= kSharedBytes, call.op, ": images of ", g.width,
        " columns are too wide for the algorithm");
  const OnDeviceOf device(call.input);
  const int at_once = behind == Behind::affine ? a.tiles : 2 * multiprocessors();
  const unsigned grid = blocks_of<T, behind>(call, a, at_once, Kernel::kTableRows);
  device.launch(call.op, conv_mma_kernel<T, behind, columns>, dim3(grid), dim3(kMmaThreads), bytes,
                a);
}

// A kernel by its name.
struct ConvAlgorithm {
  const char* name;
  int columns;
  void (*run)(const ConvCall&);
};

// Whether registers suffice for accumulators and what else is kept: rows of float32 residuals, and
// in training what is known of the channels.
template <class T, Behind behind, int columns, int parts, bool alternate>
constexpr ConvAlgorithm wgmma_algorithm(const char* name) {
  constexpr bool fits =
      parts * columns <= 128 || (behind == Behind::affine && sizeof(T) == 2) ||
      (behind != Behind::gradient && parts < 4 && (behind == Behind::affine || !alternate));
  if constexpr (fits) return {name, columns, run_wgmma<T, behind, columns, parts, alternate>};
  return {name, columns, nullptr};
}

template <class T, Behind behind, int columns>
constexpr ConvAlgorithm mma_algorithm(const char* name) {
  constexpr bool fits = behind == Behind::affine || columns == 64;
  if constexpr (fits) return {name, columns, run_mma<T, behind, columns>};
  return {name, columns, nullptr};
}

template <class T, Behind behind>
const ConvAlgorithm& find_algorithm(const char* op, const std::string& name) {
  static constexpr ConvAlgorithm known[] = {
      wgmma_algorithm<T, behind, 64, 2, false>("wgmma_256x64"),
      wgmma_algorithm<T, behind, 128, 2, false>("wgmma_256x128"),
      wgmma_algorithm<T, behind, 64, 1, false>("wgmma_128x64"),
      wgmma_algorithm<T, behind, 128, 1, false>("wgmma_128x128"),
      wgmma_algorithm<T, behind, 64, 4, true>("pingpong_256x64"),
      wgmma_algorithm<T, behind, 64, 2, true>("pingpong_128x64"),
      wgmma_algorithm<T, behind, 128, 2, true>("pingpong_128x128"),
      mma_algorithm<T, behind, 64>("mma_128x64"),
      mma_algorithm<T, behind, 128>("mma_128x128"),
  };
  for (const ConvAlgorithm& it : known) {
    if (name == it.name && it.run != nullptr) return it;
  }
  check(false, op, ": algorithm is unknown, got '", name, "'");
  return known[0];
}

}  // namespace resnet_fused::cuda
