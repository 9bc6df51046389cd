// y = act((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] [+ residual]), and the same with
// two vectors only: y = act(x * scale[c] + shift[c] [+ residual]).
//
// Layout: [outer][channels][inner] without gaps (channel_pass.cuh). One pass: reads x [and the
// residual], writes y: 2 [3] tensors where eager PyTorch's batch norm, addition and activation move
// 2 + 3 + 2. Arithmetic in float32 (float64 for float64), rounded once. It goes through memory from
// the end, where whatever ran before wrote or read last: that may still be in the L2 cache; and
// what it writes last is where the next operator begins.
// Ioffe, Szegedy: "Batch Normalization", arXiv:1502.03167, algorithm 2.

#include "normalize_act.h"

#include <utility>
#include <vector>

#include "../common/overlap.h"
#include "activation.cuh"
#include "channel_pass.cuh"
#include "norm.cuh"

namespace resnet_fused::cuda {
namespace {

constexpr int kUnroll = 4;

// y may be x.
template <class T, int n, bool planes, Act kind, bool adds>
__global__ void __launch_bounds__(kThreads, adds || kind == Act::any ? 2 : 3)
    normalize_kernel(const T* x, const T* residual, T* y, Norm<compute_t<T>> norm, Pass pass,
                     Activation act, compute_t<T> slope) {
  using A = compute_t<T>;
  const Place<n, planes> place(pass);
  constexpr int own = Place<n, planes>::own;
  A mean[own], scale[own], bias[own];
  Raw<T, n> raw[kUnroll], other[kUnroll];
  for_units<kUnroll, n, planes, true, false>(
      pass, place,
      [&](int i, int64_t at) {
        raw[i] = load<T, n>(x + at);
        if (adds) other[i] = load_stream<T, n>(residual + at);
      },
      [&] {
        stage_channels<A, 3>(pass, place, [&](int64_t channel, A(&numbers)[3]) {
          const ChannelNorm<A> c = norm.of(channel);
          numbers[0] = c.mean, numbers[1] = c.scale, numbers[2] = c.bias;
        });
        staged<A>(pass, place, 0, mean);
        staged<A>(pass, place, 1, scale);
        staged<A>(pass, place, 2, bias);
      },
      [&](int i, int64_t at) {
        A v[n], r[n];
        widen<T, n>(raw[i], v);
        if (adds) widen<T, n>(other[i], r);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const int c = channel_of<planes>(j);
          v[j] = normalized(v[j], mean[c], scale[c], bias[c]);
          if (adds) v[j] += r[j];
        }
        activate<kind>(v, act, slope);
        store<T, n>(y + at, v);
      });
}

void run(const char* op, const Tensor& x, const OptionalTensor& residual, Tensor& output,
         MemoryFormat format, const NormVectors& vectors, Activation act, double negative_slope) {
  const OnDeviceOf device(x);
  const Extent shape = extent(x, format);
  const void* const other = pointer_to(residual);
  void* const to = output.mutable_data_ptr();
  with_access(x.scalar_type(), shape, {x.const_data_ptr(), other, to},
              [&](auto zero, auto n, auto planes) {
                using T = decltype(zero);
                using A = compute_t<T>;
                const Pass pass = make_pass(shape, n, planes, kUnroll, kStreamingBlocks);
                with_kind<n, planes>(act, [&](auto kind) {
                  const auto kernel = other ? normalize_kernel<T, n, planes, kind, true>
                                            : normalize_kernel<T, n, planes, kind, false>;
                  device.launch(op, kernel, dim3(pass.blocks()), dim3(kThreads),
                                staged_bytes<A>(pass, planes ? 1 : n, 3),
                                static_cast<const T*>(x.const_data_ptr()),
                                static_cast<const T*>(other), static_cast<T*>(to),
                                vectors.on_device<A>(), pass, act, static_cast<A>(negative_slope));
                });
              });
}

Tensor into_new(const char* op, const Tensor& input, const OptionalTensor& residual,
                const NormVectors& vectors, Activation act, double negative_slope) {
  if (residual) check_like(op, "residual", *residual, input);
  const MemoryFormat format = suggested_format(input);
  Tensor output = empty(input.sizes(), format, input.scalar_type(), input);
  if (input.numel() == 0) return output;
  const OptionalTensor r = residual ? OptionalTensor(dense(*residual, format)) : std::nullopt;
  run(op, dense(input, format), r, output, format, vectors, act, negative_slope);
  return output;
}

Tensor scale_shift_act(const Tensor& input, const Tensor& scale, const Tensor& shift,
                       const OptionalTensor& residual, const std::string& act,
                       double negative_slope) {
  constexpr const char* op = "scale_shift_act";
  const Activation activation = parse_activation(op, act);
  check_data(op, "input", input);
  return into_new(op, input, residual, NormVectors(op, input, scale, shift), activation,
                  negative_slope);
}

void finish_conv(Tensor input, const OptionalTensor& scale, const OptionalTensor& shift,
                 const OptionalTensor& residual, const std::string& act, double negative_slope) {
  constexpr const char* op = "_finish_conv_";
  const Activation activation = parse_activation(op, act);
  check_data(op, "input", input);
  if (residual) check_like(op, "residual", *residual, input);
  const NormVectors vectors(op, input, scale, shift);
  if (input.numel() == 0) return;
  const MemoryFormat format = suggested_format(input);
  check(is_dense(input, format), op, ": input must be dense to be overwritten, got shape ",
        shape_text(input.sizes()));
  const OptionalTensor r = residual ? OptionalTensor(dense(*residual, format)) : std::nullopt;
  std::vector<Span> spans{{input, true}};
  for (const OptionalTensor& t : {vectors.weight, vectors.bias}) {
    if (t) spans.push_back({*t, false});
  }
  // Number by number a residual may be the input itself.
  if (r && r->const_data_ptr() != input.const_data_ptr()) spans.push_back({*r, false});
  check_apart(op, "input and what is read beside it", std::move(spans));
  run(op, input, r, input, format, vectors, activation, negative_slope);
}

}  // namespace

Tensor normalize_act(const Tensor& input, const OptionalTensor& residual, const Tensor& mean,
                     const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                     double eps, const std::string& act, double negative_slope) {
  constexpr const char* op = "normalize_act";
  const Activation activation = parse_activation(op, act);
  check_data(op, "input", input);
  const NormVectors vectors(op, input, mean, var, weight, bias, eps);
  return into_new(op, input, residual, vectors, activation, negative_slope);
}

}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("normalize_act", TORCH_BOX(&resnet_fused::cuda::normalize_act));
  m.impl("scale_shift_act", TORCH_BOX(&resnet_fused::cuda::scale_shift_act));
  m.impl("_finish_conv_", TORCH_BOX(&resnet_fused::cuda::finish_conv));
}
