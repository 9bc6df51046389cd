// y = act(conv(x) * scale[k] + shift[k] + residual) in one kernel, NHWC, float16, bfloat16, and
// float32 as TF32.
//
// `algorithm` names the kernel that `weights` were packed for: one of conv_launch.cuh, or
// stem_16x16 for three channels (stem_conv.cuh; resnet_fused/backends/cuda_conv.py packs for it).
// What none of them takes is PyTorch's convolution and one pass (_finish_conv_).

#include <string>
#include <vector>

#include "../common/activation_name.h"
#include "../common/layout.h"
#include "conv_launch.cuh"
#include "operator.h"
#include "stem_conv.cuh"

namespace resnet_fused::cuda {
namespace {

constexpr const char* op = "_cuda_conv";

Clamp clamp_of(const std::string& name, double slope, ScalarType dtype) {
  // The numbers' bits by IEEE 754; those of 16 twice.
  struct Bits {
    uint32_t infinity, less, six;
  };
  const Bits bits = dtype == ScalarType::Half       ? Bits{0x7c007c00u, 0xfc00fc00u, 0x46004600u}
                    : dtype == ScalarType::BFloat16 ? Bits{0x7f807f80u, 0xff80ff80u, 0x40c040c0u}
                                                    : Bits{0x7f800000u, 0xff800000u, 0x40c00000u};
  const auto [infinity, less, six] = bits;
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

template <class T, int kernel, int channels, int stride>
void run_stem_of(const ConvCall& call) {
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
void run_stem(const ConvCall& call) {
  const ConvOptions& o = call.options;
  const bool square = o.kernel_h == o.kernel_w && o.stride_h == o.stride_w && call.groups == 1 &&
                      o.dilation_h == 1 && o.dilation_w == 1 && call.input.size(1) == 3;
  if (square && o.kernel_h == 7 && o.stride_h == 2) return run_stem_of<T, 7, 3, 2>(call);
  if (square && o.kernel_h == 3 && o.stride_h == 2) return run_stem_of<T, 3, 3, 2>(call);
  if (square && o.kernel_h == 3 && o.stride_h == 1) return run_stem_of<T, 3, 3, 1>(call);
  check(false, op, ": stem_16x16 takes 3 channels, 7x7 of stride 2 and 3x3 of stride 1 and 2");
}

template <class T>
void run(const ConvCall& call, const std::string& algorithm) {
  if constexpr (sizeof(T) == 2) {
    if (algorithm == "stem_16x16") return run_stem<T>(call);
  }
  find_algorithm<T, Behind::affine>(op, algorithm).run(call);
}

Tensor cuda_conv(const Tensor& input, const Tensor& weights, const OptionalTensor& scale,
                 const OptionalTensor& shift, const OptionalTensor& residual, int64_t out_channels,
                 const std::vector<int64_t>& geometry, int64_t groups, const std::string& act,
                 double negative_slope, const std::string& algorithm) {
  ConvCall call = conv_call(op, input, out_channels, geometry, groups, true);
  const ScalarType dtype = input.scalar_type();
  check(is_here(weights) && weights.scalar_type() == dtype && weights.is_contiguous(), op,
        ": weights must be dense, of input's dtype, on ", kDeviceName);
  check_device(op, "weights", weights, input);
  call.weights = aligned(weights);
  call.scale = conv_vector(op, "scale", scale, call.output);
  call.shift = conv_vector(op, "shift", shift, call.output);
  call.residual = conv_image(op, "residual", residual, call.output);
  call.clamp = clamp_of(act, negative_slope, dtype);
  if (call.output.numel() == 0) return call.output;
  switch (dtype) {
    case ScalarType::Half: run<half>(call, algorithm); break;
    case ScalarType::BFloat16: run<bfloat16>(call, algorithm); break;
    default: run<float>(call, algorithm);
  }
  return call.output;
}

}  // namespace
}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("_cuda_conv", TORCH_BOX(&resnet_fused::cuda::cuda_conv));
}
