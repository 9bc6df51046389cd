// y = act(conv(x) * scale[k] + shift[k] + residual) in one kernel, NHWC, float16 and bfloat16.
//
// `algorithm` names the kernel and the tile, rows x columns, that `weights` were packed for
// (resnet_fused/backends/cuda_conv.py): wgmma_256x64, pingpong_256x64 and others on compute
// capability 9.0 (conv_wgmma.cuh), mma_128x64 and mma_128x128 from 8.0 on (conv_mma.cuh),
// stem_16x16 for three channels (stem_conv.cuh). What none of them takes is PyTorch's convolution
// and one pass (_finish_conv_).

#include <algorithm>
#include <string>
#include <vector>

#include "../common/activation_name.h"
#include "../common/layout.h"
#include "conv_mma.cuh"
#include "conv_wgmma.cuh"
#include "operator.h"
#include "pack_weights.h"
#include "stem_conv.cuh"

namespace resnet_fused::cuda {
namespace {

constexpr const char* op = "_cuda_conv";
constexpr int kSharedBytes = 227 * 1024;  // of a block, compute capability 9.0

struct Call {
  Tensor input, weights, output;
  std::optional<Tensor> scale, shift, residual;
  ConvOptions options;
  int groups;
  Clamp act;
};

Clamp clamp_of(const std::string& name, double slope, ScalarType dtype) {
  const bool in_half = dtype == ScalarType::Half;  // else bfloat16; twice their bits, by IEEE 754
  const uint32_t infinity = in_half ? 0x7c007c00u : 0x7f807f80u;
  const uint32_t less = infinity | 0x80008000u, six = in_half ? 0x46004600u : 0x40c040c0u;
  switch (parse_activation(op, name)) {
    case Activation::none: return {false, 0.0f, less, infinity};
    case Activation::relu: return {false, 0.0f, 0, infinity};
    case Activation::relu6: return {false, 0.0f, 0, six};
    case Activation::leaky_relu: return {true, static_cast<float>(slope), less, infinity};
    default: break;
  }
  check(false, op, ": act must be none, relu, relu6 or leaky_relu, got '", name, "'");
  return {};
}

template <class T>
ConvOutput<T> output_of(const Call& call) {
  const auto vector = [](const std::optional<Tensor>& v) {
    return v ? static_cast<const float*>(v->const_data_ptr()) : nullptr;
  };
  return {static_cast<T*>(call.output.mutable_data_ptr()),
          call.residual ? static_cast<const T*>(call.residual->const_data_ptr()) : nullptr,
          vector(call.scale),
          vector(call.shift),
          static_cast<int>(call.output.size(1)),
          call.act};
}

// The tensor itself where accesses of 16 bytes can read it, else a copy.
Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

void check_packed(const Call& call, int64_t numbers) {
  check(call.weights.numel() == numbers, op, ": weights must be packed for the algorithm, ",
        numbers, " numbers, got ", call.weights.numel());
}

// How many output channels read the same inputs; whole column tiles, or everything.
void set_blocks(const Call& call, int columns, ConvGeometry& g, int& block_in, int& block_out) {
  const int out = g.out_channels / call.groups, in = g.channels / call.groups;
  const int groups = groups_together(call.groups, out, columns);
  check(groups > 0, op, ": groups must fill tiles of ", columns, " outputs, got ", call.groups,
        " groups of ", out);
  block_in = groups * in, block_out = groups * out;
}

template <class T>
ConvArguments<T> arguments_of(const Call& call, int rows, int columns) {
  ConvArguments<T> a{};
  const Tensor& x = call.input;
  const auto size = [&](int d) { return static_cast<int>(x.size(d)); };
  check(make_geometry(size(0), size(1), size(2), size(3), static_cast<int>(call.output.size(1)),
                      call.options, a.geometry),
        op, ": the algorithm has no room for this convolution, input ", shape_text(x.sizes()));
  ConvGeometry& g = a.geometry;
  a.input = static_cast<const T*>(x.const_data_ptr());
  a.weights = static_cast<const T*>(call.weights.const_data_ptr());
  a.out = output_of<T>(call);
  set_blocks(call, columns, g, a.block_in, a.block_out);
  check(a.block_in % kPlaneChannels == 0 && g.channels % kPlaneChannels == 0 &&
            g.out_channels % kPlaneChannels == 0,
        op, ": channels must be multiples of 8, got ", g.channels, " and ", g.out_channels);
  a.chunks = (a.block_in + kChunk - 1) / kChunk;
  a.column_tiles = (g.out_channels + columns - 1) / columns;
  a.tiles = (g.places + rows - 1) / rows * a.column_tiles;
  a.plane = plane_bytes(rows + g.span);
  check_packed(call, int64_t{a.column_tiles} * a.chunks * g.taps * columns * kChunk);
  return a;
}

template <class T, int columns, int parts, bool alternate>
void run_wgmma(const Call& call) {
  using Kernel = ConvWgmma<T, columns, parts, alternate>;
  ConvArguments<T> a = arguments_of<T>(call, Kernel::kRows, columns);
  const int input_bytes = Kernel::kRings * kPlanes * a.plane;
  const int blocks = a.column_tiles * a.chunks * a.geometry.taps;
  // Two input slots (one where a tile has one stage and its reader others beside it: a slot is
  // given back after the first products of the next stage), then weights, then more input slots.
  const int least = alternate && a.chunks * a.geometry.phases == 1 ? 1 : 2;
  const int weight_bytes = Kernel::kWeightBytes;
  const int room = kSharedBytes - kBarrierBytes - least * input_bytes;
  check(room >= 2 * weight_bytes, op, ": images of ", a.geometry.width,
        " columns are too wide for the algorithm");
  const int fit = std::min(room / weight_bytes, kMostWeightSlots);
  a.resident = blocks <= fit;
  check(a.resident || !alternate, op, ": the algorithm has no room for all weights, ", blocks,
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
  const int64_t grid = std::min<int64_t>(a.tiles, multiprocessors());
  device.launch(op, conv_wgmma_kernel<T, columns, parts, alternate>,
                dim3(static_cast<unsigned>(grid)), dim3(kWgmmaThreads),
                kBarrierBytes + a.input_slots * input_bytes + a.weight_slots * weight_bytes, a);
}

template <class T, int columns>
void run_mma(const Call& call) {
  ConvArguments<T> a = arguments_of<T>(call, kMmaRows, columns);
  const ConvGeometry& g = a.geometry;
  int least = g.taps;  // of a stage
  for (int i = 0; i < g.phases; ++i) least = std::min(least, g.phase[i].taps);
  a.input_slots = 1 + (kAhead + least - 1) / least;
  a.weight_slots = kAhead + 1;
  const int bytes =
      a.input_slots * kPlanes * a.plane + a.weight_slots * ConvMma<T, columns>::kWeightBytes;
  check(bytes <= kSharedBytes, op, ": images of ", g.width,
        " columns are too wide for the algorithm");
  check(a.tiles < int64_t{1} << 31, op, ": too many tiles, ", a.tiles);
  const OnDeviceOf device(call.input);
  device.launch(op, conv_mma_kernel<T, columns>, dim3(static_cast<unsigned>(a.tiles)),
                dim3(kMmaThreads), bytes, a);
}

template <class T, int kernel, int channels, int stride>
void run_stem_of(const Call& call) {
  using Kernel = StemConv<T, kernel, kernel, channels, stride>;
  const Tensor &x = call.input, &y = call.output;
  const auto up = [](int64_t n, int by) { return static_cast<int>((n + by - 1) / by); };
  const int tiles = up(y.size(1), kStemColumns);
  check_packed(call, int64_t{tiles} * Kernel::kWeightWords * 2);
  StemArguments<T> a{static_cast<const T*>(x.const_data_ptr()),
                     static_cast<const uint32_t*>(call.weights.const_data_ptr()),
                     output_of<T>(call),
                     static_cast<int>(x.size(0)),
                     static_cast<int>(x.size(2)),
                     static_cast<int>(x.size(3)),
                     static_cast<int>(y.size(2)),
                     static_cast<int>(y.size(3)),
                     call.options.padding_h,
                     call.options.padding_w,
                     up(y.size(3), kStemTile),
                     up(y.size(2), kStemTile)};
  const int64_t blocks = int64_t{a.images} * a.tiles_x * a.tiles_y;
  check(blocks < int64_t{1} << 31 && tiles < 1 << 16, op, ": too many pixels or outputs, input ",
        shape_text(x.sizes()));
  const OnDeviceOf device(x);
  device.launch(op, stem_conv_kernel<T, kernel, kernel, channels, stride>,
                dim3(static_cast<unsigned>(blocks), tiles), dim3(kStemThreads),
                Kernel::kSharedBytes, a);
}

template <class T>
void run_stem(const Call& call) {
  const ConvOptions& o = call.options;
  const bool square = o.kernel_h == o.kernel_w && o.stride_h == o.stride_w && call.groups == 1 &&
                      o.dilation_h == 1 && o.dilation_w == 1 && call.input.size(1) == 3;
  if (square && o.kernel_h == 7 && o.stride_h == 2) return run_stem_of<T, 7, 3, 2>(call);
  if (square && o.kernel_h == 3 && o.stride_h == 2) return run_stem_of<T, 3, 3, 2>(call);
  if (square && o.kernel_h == 3 && o.stride_h == 1) return run_stem_of<T, 3, 3, 1>(call);
  check(false, op, ": stem_16x16 takes 3 channels, 7x7 of stride 2 and 3x3 of stride 1 and 2");
}

template <class T>
void run(const Call& call, const std::string& algorithm) {
  struct Named {
    const char* name;
    void (*run)(const Call&);
  };
  static constexpr Named known[] = {
      {"wgmma_256x64", run_wgmma<T, 64, 2, false>},
      {"wgmma_256x128", run_wgmma<T, 128, 2, false>},
      {"wgmma_128x64", run_wgmma<T, 64, 1, false>},
      {"wgmma_128x128", run_wgmma<T, 128, 1, false>},
      {"pingpong_256x64", run_wgmma<T, 64, 4, true>},
      {"pingpong_128x64", run_wgmma<T, 64, 2, true>},
      {"pingpong_128x128", run_wgmma<T, 128, 2, true>},
      {"mma_128x64", run_mma<T, 64>},
      {"mma_128x128", run_mma<T, 128>},
      {"stem_16x16", run_stem<T>},
  };
  for (const Named& it : known) {
    if (algorithm == it.name) return it.run(call);
  }
  check(false, op, ": algorithm is unknown, got '", algorithm, "'");
}

Tensor cuda_conv(const Tensor& input, const Tensor& weights, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& shift, const std::optional<Tensor>& residual,
                 int64_t out_channels, const std::vector<int64_t>& geometry, int64_t groups,
                 const std::string& act, double negative_slope, const std::string& algorithm) {
  check(is_here(input) && input.dim() == 4, op, ": input must have 4 dimensions (N, C, H, W) on ",
        kDeviceName, ", got shape ", shape_text(input.sizes()));
  const ScalarType dtype = input.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
        ": input must be float16 or bfloat16, got ", dtype_name(dtype));
  check(is_dense(input, MemoryFormat::ChannelsLast), op, ": input must be channels_last");
  check(is_here(weights) && weights.scalar_type() == dtype && weights.is_contiguous(), op,
        ": weights must be dense, of input's dtype, on ", kDeviceName);
  check(geometry.size() == 8, op, ": geometry must have 8 numbers, got ", geometry.size());
  int numbers[8];
  for (int i = 0; i < 8; ++i) {
    const int64_t least = i == 4 || i == 5 ? 0 : 1;
    check(geometry[i] >= least && geometry[i] < 1 << 15, op, ": geometry must be kernel, stride, ",
          "padding and dilation, two numbers each, got ", geometry[i]);
    numbers[i] = static_cast<int>(geometry[i]);
  }
  const ConvOptions o{numbers[0], numbers[1], numbers[2], numbers[3],
                      numbers[4], numbers[5], numbers[6], numbers[7]};
  check(out_channels > 0 && out_channels < 1 << 24 && groups > 0 && out_channels % groups == 0 &&
            input.size(1) % groups == 0 && input.size(1) < 1 << 24,
        op, ": out_channels and input's channels must be multiples of groups, got ", out_channels,
        ", ", input.size(1), " and ", groups);
  const int64_t height = (input.size(2) + 2 * o.padding_h - o.dilation_h * (o.kernel_h - 1) - 1);
  const int64_t width = (input.size(3) + 2 * o.padding_w - o.dilation_w * (o.kernel_w - 1) - 1);
  check(height >= 0 && width >= 0 && input.size(1) > 0, op,
        ": the kernel must fit the padded image, input ", shape_text(input.sizes()));
  const std::vector<int64_t> size{input.size(0), out_channels, height / o.stride_h + 1,
                                  width / o.stride_w + 1};
  int64_t pixels = size[0] * size[2] * size[3];
  pixels = std::max(pixels, input.size(0) * input.size(2) * input.size(3));
  check(pixels < (int64_t{1} << 31) - (1 << 20), op, ": too many pixels, input ",
        shape_text(input.sizes()));
  Tensor output = torch::stable::empty({size.data(), size.size()}, dtype, std::nullopt,
                                       input.device(), std::nullopt, MemoryFormat::ChannelsLast);
  const auto vector = [&](const char* name, const std::optional<Tensor>& v) {
    if (!v) return v;
    check_vector(op, name, *v, output);
    return std::optional<Tensor>(aligned(dense(*v, MemoryFormat::Contiguous)));
  };
  Call call{aligned(input),
            aligned(weights),
            output,
            vector("scale", scale),
            vector("shift", shift),
            residual,
            o,
            static_cast<int>(groups),
            clamp_of(act, negative_slope, dtype)};
  if (residual) {
    check_like(op, "residual", *residual, output);
    call.residual = aligned(dense(*residual, MemoryFormat::ChannelsLast));
  }
  if (output.numel() == 0) return output;
  if (dtype == ScalarType::Half) {
    run<half>(call, algorithm);
  } else {
    run<bfloat16>(call, algorithm);
  }
  return output;
}

}  // namespace
}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("_cuda_conv", TORCH_BOX(&resnet_fused::cuda::cuda_conv));
}
