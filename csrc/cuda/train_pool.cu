// The gradients of a batch norm's weight and bias from that of max-pool(act(bn(z))):
//
//     z' = z where the window's largest value was      g = dy * act'(bn(z'))
//     dbias = sum(g)      dweight = sum(g * xhat(z'))
//
// A pixel that no window chose adds nothing. Layout [N][H][W][C]. Reads dy, a byte for each of it
// and z: of the size of z once and of the pool's output twice, where eager PyTorch's pool and batch
// norm write and read gradients of z's size. Forward and z's own gradient: max_pool.cu. Sums:
// channel_sums.cuh.

#include <string>
#include <tuple>
#include <vector>

#include "activation.cuh"
#include "max_pool.cuh"
#include "norm_gradients.cuh"

namespace resnet_fused::cuda {
namespace {

template <class T, int n, int size>
__global__ void __launch_bounds__(kThreads, 2)
    pooled_sums_kernel(const T* grad, const uint8_t* positions, const T* z, PoolShape shape,
                       Norm<compute_t<T>> norm, Activation act, compute_t<T> slope, Pass pass,
                       double* partial) {
  using A = compute_t<T>;
  const Place<n, false> place(pass);
  A mean[n], scale[n], bias[n], sums[n] = {}, products[n] = {};
  stage_channels<A, 3>(pass, place, [&](int64_t channel, A(&numbers)[3]) {
    const ChannelNorm<A> c = norm.of(channel);
    numbers[0] = c.mean, numbers[1] = c.scale, numbers[2] = c.bias;
  });
  staged<A>(pass, place, 0, mean);
  staged<A>(pass, place, 1, scale);
  staged<A>(pass, place, 2, bias);
  const int64_t end = place.active ? pass.units : 0;
  for (int64_t unit = place.unit; unit < end; unit += place.step) {
    const int64_t offset = place.offset(pass, unit);
    A g[n], x[n], argument[n];
    int found[n];
    widen<T, n>(load_stream<T, n>(grad + offset), g);
    read_places<n>(positions + offset, found);
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = mean[j];
    Raw<T, n> raw[kLoaded<size>];
    for_window<size>(
        shape, pixel_of(unit, shape.out_height, shape.out_width),
        [&](int i, int64_t start) { raw[i] = load<T, n>(z + start + place.channel); },
        [&](int i, int at) {
          A v[n];
          widen<T, n>(raw[i], v);
#pragma unroll
          for (int j = 0; j < n; ++j) x[j] = found[j] == at ? v[j] : x[j];
        });
#pragma unroll
    for (int j = 0; j < n; ++j) argument[j] = normalized(x[j], mean[j], scale[j], bias[j]);
    activate_backward<Act::any>(g, argument, act, slope);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      sums[j] += g[j];
      products[j] += g[j] * (x[j] - mean[j]);
    }
  }
  write_sums<A>(pass, place, sums, products, partial);
}

std::tuple<Tensor, Tensor> train_pool_sums(const Tensor& grad, const Tensor& positions,
                                           const Tensor& input, const std::vector<Tensor>& vectors,
                                           double eps, const std::string& act,
                                           double negative_slope,
                                           const std::vector<int64_t>& window) {
  constexpr const char* op = "_train_pool_sums";
  const Activation activation = parse_activation(op, act);
  const PoolShape shape = positions_shape(op, input, window);
  check_pooled(op, grad, positions, input, shape);
  const NormVectors norm = norm_vectors(op, input, vectors, eps);
  check(!vectors.empty(), op, ": vectors must be mean, var, weight and bias, got none");
  if (grad.numel() == 0) return {zero_channels(input), zero_channels(input)};
  const OnDeviceOf device(input);
  Tensor grad_weight = empty_channels(input), grad_bias = empty_channels(input);
  const Tensor z = dense(input, MemoryFormat::ChannelsLast);
  const Tensor g = dense(grad, MemoryFormat::ChannelsLast);
  const Tensor p = dense(positions, MemoryFormat::ChannelsLast);
  with_pixels(
      z, {z.const_data_ptr(), g.const_data_ptr(), p.const_data_ptr()}, [&](auto zero, auto n) {
        using T = decltype(zero);
        using A = compute_t<T>;
        const Pass pass = make_pass(pixels_of(g), n, false, 1, kReducingBlocks);
        const PartialSums partial(pass, input);
        const auto kernel =
            is_three_by_three(shape) ? pooled_sums_kernel<T, n, 3> : pooled_sums_kernel<T, n, 0>;
        device.launch(op, kernel, dim3(pass.blocks()), dim3(kThreads), PartialSums::bytes(n),
                      static_cast<const T*>(g.const_data_ptr()),
                      static_cast<const uint8_t*>(p.const_data_ptr()),
                      static_cast<const T*>(z.const_data_ptr()), shape, norm.on_device<A>(),
                      activation, static_cast<A>(negative_slope), pass, partial.data());
        partial.launch(device, op, combine_gradients_kernel<A>, norm.on_device<A>(),
                       static_cast<A*>(grad_weight.mutable_data_ptr()),
                       static_cast<A*>(grad_bias.mutable_data_ptr()));
      });
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("_train_pool_sums", TORCH_BOX(&resnet_fused::cuda::train_pool_sums));
}
