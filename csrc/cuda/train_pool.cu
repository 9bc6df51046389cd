// Backward of max-pool(act(bn(z))) in two passes, as bn_act_backward.cu's:
//
//     sums:   z' = z where the window's largest value was      g = dy * act'(bn(z'))
//             dbias = sum(g)      dweight = sum(g * xhat(z'))
//     input:  g = sum of dy over the windows that chose a pixel, * act'(bn(z))
//             dz = weight / sqrt(var + eps) * (g - dbias / n - xhat * dweight / n)
//
// A pixel that no window chose adds nothing to the sums. Layout [N][H][W][C]. Both passes read z,
// dy and a byte for each of dy, and the second writes dz: 3 tensors of z's size, where eager
// PyTorch's pool, activation and batch norm move 10. Forward: max_pool.cu. Sums: channel_sums.cuh.

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

template <class T, int n>
__global__ void __launch_bounds__(kThreads, 2)
    pooled_input_kernel(const T* grad, const uint8_t* positions, const T* z, T* grad_input,
                        PoolShape shape, Norm<compute_t<T>> norm, const compute_t<T>* grad_weight,
                        const compute_t<T>* grad_bias, compute_t<T> count, Activation act,
                        compute_t<T> slope, Pass pass) {
  using A = compute_t<T>;
  const Place<n, false> place(pass);
  A mean[n], scale[n], bias[n], mean_grad[n], tilt[n];
  stage_channels<A, 5>(pass, place, [&](int64_t channel, A(&numbers)[5]) {
    input_numbers(norm, grad_weight, grad_bias, count, channel, numbers);
  });
  staged<A>(pass, place, 0, mean);
  staged<A>(pass, place, 1, scale);
  staged<A>(pass, place, 2, bias);
  staged<A>(pass, place, 3, mean_grad);
  staged<A>(pass, place, 4, tilt);
  const int64_t end = place.active ? pass.units : 0;
  for (int64_t unit = place.unit; unit < end; unit += place.step) {
    const int64_t offset = place.offset(pass, unit);
    const Raw<T, n> raw = load_stream<T, n>(z + offset);  // under way beside the windows
    A g[n] = {}, v[n], argument[n];
    gather<T, n>(grad, positions, shape, pixel_of(unit, shape.height, shape.width), place.channel,
                 g);
    widen<T, n>(raw, v);
#pragma unroll
    for (int j = 0; j < n; ++j) argument[j] = normalized(v[j], mean[j], scale[j], bias[j]);
    activate_backward<Act::any>(g, argument, act, slope);
#pragma unroll
    for (int j = 0; j < n; ++j)
      v[j] = scale[j] * (g[j] - mean_grad[j] - (v[j] - mean[j]) * tilt[j]);
    store<T, n>(grad_input + offset, v);
  }
}

// The arguments of both passes, checked and dense.
struct Pooled {
  Activation act;
  PoolShape shape;
  NormVectors norm;
  Tensor z, grad, positions;

  Pooled(const char* op, const Tensor& grad_output, const Tensor& places, const Tensor& input,
         const std::vector<Tensor>& vectors, double eps, const std::string& act_name,
         const std::vector<int64_t>& window)
      : act(parse_activation(op, act_name)),
        shape(positions_shape(op, input, window)),
        norm(norm_vectors(op, input, vectors, eps)) {
    check_sides(op, input, shape);
    check_pooled(op, grad_output, places, input, shape);
    check(!vectors.empty(), op, ": vectors must be mean, var, weight and bias, got none");
    z = dense(input, MemoryFormat::ChannelsLast);
    grad = dense(grad_output, MemoryFormat::ChannelsLast);
    positions = dense(places, MemoryFormat::ChannelsLast);
  }
  template <class T>
  const T* grad_data() const {
    return static_cast<const T*>(grad.const_data_ptr());
  }
  const uint8_t* positions_data() const {
    return static_cast<const uint8_t*>(positions.const_data_ptr());
  }
  template <class T>
  const T* z_data() const {
    return static_cast<const T*>(z.const_data_ptr());
  }
};

std::tuple<Tensor, Tensor> train_pool_sums(const Tensor& grad, const Tensor& positions,
                                           const Tensor& input, const std::vector<Tensor>& vectors,
                                           double eps, const std::string& act,
                                           double negative_slope,
                                           const std::vector<int64_t>& window) {
  constexpr const char* op = "_train_pool_sums";
  const OnDeviceOf device(input);
  const Pooled data(op, grad, positions, input, vectors, eps, act, window);
  if (grad.numel() == 0) return {zero_channels(input), zero_channels(input)};
  Tensor grad_weight = empty_channels(input), grad_bias = empty_channels(input);
  with_pixels(
      data.z,
      {data.z.const_data_ptr(), data.grad.const_data_ptr(), data.positions.const_data_ptr()},
      [&](auto zero, auto n) {
        using T = decltype(zero);
        using A = compute_t<T>;
        const Pass pass = make_pass(pixels_of(data.grad), n, false, 1, kReducingBlocks);
        const PartialSums partial(pass, input);
        const auto kernel = is_three_by_three(data.shape) ? pooled_sums_kernel<T, n, 3>
                                                          : pooled_sums_kernel<T, n, 0>;
        const Norm<A> norm = data.norm.on_device<A>();
        device.launch(op, kernel, dim3(pass.blocks()), dim3(kThreads), PartialSums::bytes(n),
                      data.grad_data<T>(), data.positions_data(), data.z_data<T>(), data.shape,
                      norm, data.act, static_cast<A>(negative_slope), pass, partial.data());
        partial.launch(device, op, combine_gradients_kernel<A>, norm,
                       static_cast<A*>(grad_weight.mutable_data_ptr()),
                       static_cast<A*>(grad_bias.mutable_data_ptr()));
      });
  return {grad_weight, grad_bias};
}

Tensor train_pool_input(const Tensor& grad, const Tensor& positions, const Tensor& input,
                        const std::vector<Tensor>& vectors, const Tensor& grad_weight,
                        const Tensor& grad_bias, double eps, const std::string& act,
                        double negative_slope, const std::vector<int64_t>& window, int64_t count) {
  constexpr const char* op = "_train_pool_input";
  const OnDeviceOf device(input);
  const Pooled data(op, grad, positions, input, vectors, eps, act, window);
  check(count > 0 || input.numel() == 0, op, ": count must be positive, got ", count);
  const OptionalTensor weight_sums = checked_vector(op, "grad_weight", grad_weight, input);
  const OptionalTensor bias_sums = checked_vector(op, "grad_bias", grad_bias, input);
  Tensor result = empty(input.sizes(), MemoryFormat::ChannelsLast, input.scalar_type(), input);
  if (result.numel() == 0) return result;
  void* const to = result.mutable_data_ptr();
  with_pixels(
      data.z,
      {data.z.const_data_ptr(), data.grad.const_data_ptr(), data.positions.const_data_ptr(), to},
      [&](auto zero, auto n) {
        using T = decltype(zero);
        using A = compute_t<T>;
        const Pass pass = make_pass(pixels_of(result), n, false, 1, kStreamingBlocks);
        device.launch(op, pooled_input_kernel<T, n>, dim3(pass.blocks()), dim3(kThreads),
                      staged_bytes<A>(pass, n, 5), data.grad_data<T>(), data.positions_data(),
                      data.z_data<T>(), static_cast<T*>(to), data.shape, data.norm.on_device<A>(),
                      static_cast<const A*>(pointer_to(weight_sums)),
                      static_cast<const A*>(pointer_to(bias_sums)), static_cast<A>(count), data.act,
                      static_cast<A>(negative_slope), pass);
      });
  return result;
}

}  // namespace
}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("_train_pool_sums", TORCH_BOX(&resnet_fused::cuda::train_pool_sums));
  m.impl("_train_pool_input", TORCH_BOX(&resnet_fused::cuda::train_pool_input));
}
