// Max-pooling of channels_last images, of a tensor or of what batch norm and an activation make of
// it:
//
//     y[n,oh,ow,c] = max over the window of x, or of act(x * scale + shift); NaN wins
//
// Layout [N][H][W][C]. A thread owns the 16 bytes of one output pixel and reads its window. Reads x
// once from memory (neighbours share the rest in the caches), writes y, and in training a byte for
// each output, its place in the window, where eager PyTorch writes an int64 index of twice the
// output's size. Of a network's stem the activation, its largest tensor, is never written.
//
// Backward reads gradients and places and writes the gradient of x once: every pixel adds up the
// windows that chose it, in a fixed order. Eager PyTorch scatters, with atomics.

#include <string>
#include <tuple>
#include <vector>

#include "activation.cuh"
#include "max_pool.cuh"
#include "norm.cuh"

namespace resnet_fused::cuda {
namespace {

template <class T, int n, int size, bool places, bool norms, Act kind>
__global__ void __launch_bounds__(kThreads, 2)
    max_pool_kernel(const T* x, T* y, uint8_t* positions, PoolShape shape, Norm<compute_t<T>> norm,
                    Activation act, compute_t<T> slope, Pass pass) {
  using A = compute_t<T>;
  const Place<n, false> place(pass);
  A mean[n], scale[n], bias[n];
  if constexpr (norms) {
    stage_channels<A, 3>(pass, place, [&](int64_t channel, A(&numbers)[3]) {
      const ChannelNorm<A> c = norm.of(channel);
      numbers[0] = c.mean, numbers[1] = c.scale, numbers[2] = c.bias;
    });
    staged<A>(pass, place, 0, mean);
    staged<A>(pass, place, 1, scale);
    staged<A>(pass, place, 2, bias);
  }
  if (!place.active) return;
  for (int64_t unit = place.unit; unit < pass.units; unit += place.step) {
    const Pixel pixel = pixel_of(unit, shape.out_height, shape.out_width);
    A best[n];
    int found[n];
    bool any = false;
#pragma unroll
    for (int j = 0; j < n; ++j) best[j] = A(-INFINITY), found[j] = 0;
    Raw<T, n> raw[kLoaded<size>];
    for_window<size>(
        shape, pixel,
        [&](int i, int64_t offset) { raw[i] = load<T, n>(x + offset + place.channel); },
        [&](int i, int at) {
          A v[n];
          widen<T, n>(raw[i], v);
          if constexpr (norms) {
#pragma unroll
            for (int j = 0; j < n; ++j) v[j] = normalized(v[j], mean[j], scale[j], bias[j]);
            activate<kind>(v, act, slope);
#pragma unroll
            for (int j = 0; j < n; ++j) v[j] = to_float(narrowed<T>(v[j]));
          }
#pragma unroll
          for (int j = 0; j < n; ++j) {
            // Where none is larger than -inf the first pixel wins.
            const bool wins = v[j] > best[j] || v[j] != v[j] || !any;
            best[j] = wins ? v[j] : best[j];
            found[j] = wins ? at : found[j];
          }
          any = true;
        });
    store<T, n>(y + place.offset(pass, unit), best);
    if constexpr (places) write_places<n>(positions + place.offset(pass, unit), found);
  }
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads, 2)
    max_unpool_kernel(const T* grad, const uint8_t* positions, T* grad_input, PoolShape shape,
                      Pass pass) {
  using A = compute_t<T>;
  const Place<n, false> place(pass);
  if (!place.active) return;
  for (int64_t unit = place.unit; unit < pass.units; unit += place.step) {
    const Pixel pixel = pixel_of(unit, shape.height, shape.width);
    A sums[n] = {};
    gather<T, n>(grad, positions, shape, pixel, place.channel, sums);
    store<T, n>(grad_input + place.offset(pass, unit), sums);
  }
}

// --- launching ------------------------------------------------------------------------------

template <bool places, bool norms>
void pool(const char* op, const Tensor& x, const Tensor& output, uint8_t* positions,
          const PoolShape& shape, const NormVectors& vectors, Activation act,
          double negative_slope) {
  const OnDeviceOf device(x);
  const void* const from = x.const_data_ptr();
  void* const to = output.mutable_data_ptr();
  with_pixels(x, {from, to, positions}, [&](auto zero, auto n) {
    using T = decltype(zero);
    using A = compute_t<T>;
    const Pass pass = make_pass(pixels_of(output), n, false, 1, kStreamingBlocks);
    // What residual networks have: three by three pixels, and relu.
    constexpr Act usual = norms ? Act::relu : Act::none;
    const bool is_usual =
        is_three_by_three(shape) && act == (norms ? Activation::relu : Activation::none);
    const auto kernel = is_usual ? max_pool_kernel<T, n, 3, places, norms, usual>
                                 : max_pool_kernel<T, n, 0, places, norms, Act::any>;
    device.launch(op, kernel, dim3(pass.blocks()), dim3(kThreads), staged_bytes<A>(pass, n, 3),
                  static_cast<const T*>(from), static_cast<T*>(to), positions, shape,
                  vectors.on_device<A>(), act, static_cast<A>(negative_slope), pass);
  });
}

Tensor empty_output(const Tensor& input, const PoolShape& shape, ScalarType dtype) {
  const int64_t sizes[4] = {input.size(0), shape.channels, shape.out_height, shape.out_width};
  return empty({sizes, 4}, MemoryFormat::ChannelsLast, dtype, input);
}

Tensor max_pool2d(const Tensor& input, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation) {
  constexpr const char* op = "_max_pool2d";
  const PoolShape shape =
      pool_shape(op, input, pool_window(op, kernel_size, stride, padding, dilation));
  check_sides(op, input, shape);
  Tensor output = empty_output(input, shape, input.scalar_type());
  if (output.numel() == 0) return output;
  pool<false, false>(op, dense(input, MemoryFormat::ChannelsLast), output, nullptr, shape,
                     NormVectors(op, input, std::nullopt, std::nullopt), Activation::none, 0);
  return output;
}

std::tuple<Tensor, Tensor> train_pool(const Tensor& input, const std::vector<Tensor>& vectors,
                                      double eps, const std::string& act, double negative_slope,
                                      const std::vector<int64_t>& window) {
  constexpr const char* op = "_train_pool";
  const Activation activation = parse_activation(op, act);
  const PoolShape shape = positions_shape(op, input, window);
  check_sides(op, input, shape);
  const NormVectors norm = norm_vectors(op, input, vectors, eps);
  check(!vectors.empty() || activation == Activation::none, op,
        ": vectors must be mean, var, weight and bias beside an activation, got none");
  Tensor output = empty_output(input, shape, input.scalar_type());
  Tensor positions = empty_output(input, shape, ScalarType::Byte);
  if (output.numel() == 0) return {output, positions};
  const Tensor x = dense(input, MemoryFormat::ChannelsLast);
  const auto body = vectors.empty() ? pool<true, false> : pool<true, true>;
  body(op, x, output, static_cast<uint8_t*>(positions.mutable_data_ptr()), shape, norm, activation,
       negative_slope);
  return {output, positions};
}

Tensor max_unpool(const Tensor& grad, const Tensor& positions, const Tensor& input,
                  const std::vector<int64_t>& window) {
  constexpr const char* op = "_max_unpool";
  const PoolShape shape = positions_shape(op, input, window);
  check_sides(op, input, shape);
  check_pooled(op, grad, positions, input, shape);
  Tensor result = empty(input.sizes(), MemoryFormat::ChannelsLast, input.scalar_type(), input);
  if (result.numel() == 0) return result;
  const OnDeviceOf device(input);
  const Tensor g = dense(grad, MemoryFormat::ChannelsLast);
  const Tensor p = dense(positions, MemoryFormat::ChannelsLast);
  void* const to = result.mutable_data_ptr();
  with_pixels(result, {g.const_data_ptr(), p.const_data_ptr(), to}, [&](auto zero, auto n) {
    using T = decltype(zero);
    const Pass pass = make_pass(pixels_of(result), n, false, 1, kStreamingBlocks);
    device.launch(op, max_unpool_kernel<T, n>, dim3(pass.blocks()), dim3(kThreads), 0,
                  static_cast<const T*>(g.const_data_ptr()),
                  static_cast<const uint8_t*>(p.const_data_ptr()), static_cast<T*>(to), shape,
                  pass);
  });
  return result;
}

}  // namespace
}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("_max_pool2d", TORCH_BOX(&resnet_fused::cuda::max_pool2d));
  m.impl("_train_pool", TORCH_BOX(&resnet_fused::cuda::train_pool));
  m.impl("_max_unpool", TORCH_BOX(&resnet_fused::cuda::max_unpool));
}
