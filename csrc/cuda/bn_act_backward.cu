// The gradients of y = act(xhat * weight + bias [+ residual]), xhat = (x - mean) / sqrt(var + eps):
//
//     sums:   g = dy * act'(.)      dbias = sum(g)      dweight = sum(g * xhat)
//     input:  dx = weight / sqrt(var + eps) * (g - dbias / n - xhat * dweight / n)
//
// Layout: [outer][channels][inner] without gaps (channel_pass.cuh). Two passes: the first reads dy
// and x, the second reads them again and writes dx: 5 tensors, where eager PyTorch's batch norm and
// relu move 8. act' is computed again from x; with a residual it is read off y (or the residual is
// read, for activations that cannot be told from y), and the first pass writes g, the residual's
// gradient. The second pass goes through memory from the end, which may still be in the L2 cache.
// Sums: channel_sums.cuh.
// Ioffe, Szegedy: "Batch Normalization", arXiv:1502.03167, section 3.

#include "bn_act_backward.h"

#include "activation.cuh"
#include "norm_gradients.cuh"

namespace resnet_fused::cuda {
namespace {

// What tells the activation's argument beside x.
enum class Beside { nothing, output, residual };

// Two tensors are read, and half as many rows at once.
constexpr int kUnroll = 2;

template <class T>
struct SumsData {
  const T* grad;
  const T* x;
  const T* beside;
  T* grad_residual;  // may be null
};

template <class T, int n, bool planes, Act kind, Beside from>
__global__ void __launch_bounds__(kThreads, kind != Act::any && from == Beside::output ? 3 : 2)
    sums_kernel(SumsData<T> data, Norm<compute_t<T>> norm, Pass pass, Activation act,
                compute_t<T> slope, double* partial) {
  using A = compute_t<T>;
  const Place<n, planes> place(pass);
  constexpr int own = Place<n, planes>::own;
  constexpr bool reads_beside = from != Beside::nothing;
  // Of three tensors registers do not suffice for more, nor where activations branch.
  constexpr bool kAhead = !reads_beside && kind != Act::any;
  A mean[own], scale[own], bias[own], sums[own] = {}, products[own] = {};
  Raw<T, n> raw_grad[2 * kUnroll], raw_x[2 * kUnroll], raw_beside[2 * kUnroll];
  for_units<kUnroll, n, planes, false, kAhead>(
      pass, place,
      [&](int i, int64_t at) {
        raw_grad[i] = load_stream<T, n>(data.grad + at);
        raw_x[i] = load_stream<T, n>(data.x + at);
        if (reads_beside) raw_beside[i] = load_stream<T, n>(data.beside + at);
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
        A g[n], x[n], argument[n];
        widen<T, n>(raw_grad[i], g);
        widen<T, n>(raw_x[i], x);
        if (reads_beside) widen<T, n>(raw_beside[i], argument);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const int c = channel_of<planes>(j);
          if (from == Beside::output) continue;
          const A y = normalized(x[j], mean[c], scale[c], bias[c]);
          argument[j] = from == Beside::residual ? y + argument[j] : y;
        }
        activate_backward<kind>(g, argument, act, slope);
        if (data.grad_residual != nullptr) store<T, n>(data.grad_residual + at, g);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const int c = channel_of<planes>(j);
          sums[c] += g[j];
          products[c] += g[j] * (x[j] - mean[c]);
        }
      });
  write_sums<A>(pass, place, sums, products, partial);
}

template <class T, int n, bool planes, Act kind>
__global__ void __launch_bounds__(kThreads, kind == Act::any ? 2 : 3)
    input_kernel(const T* grad, const T* x, T* grad_input, Norm<compute_t<T>> norm,
                 const compute_t<T>* grad_weight, const compute_t<T>* grad_bias, compute_t<T> count,
                 Pass pass, Activation act, compute_t<T> slope) {
  using A = compute_t<T>;
  const Place<n, planes> place(pass);
  constexpr int own = Place<n, planes>::own;
  A mean[own], scale[own], bias[own], mean_grad[own], tilt[own];
  Raw<T, n> raw_grad[kUnroll], raw_x[kUnroll];
  for_units<kUnroll, n, planes, true, false>(
      pass, place,
      [&](int i, int64_t at) {
        raw_grad[i] = load_stream<T, n>(grad + at);
        raw_x[i] = load_stream<T, n>(x + at);
      },
      [&] {
        stage_channels<A, 5>(pass, place, [&](int64_t channel, A(&numbers)[5]) {
          input_numbers(norm, grad_weight, grad_bias, count, channel, numbers);
        });
        staged<A>(pass, place, 0, mean);
        staged<A>(pass, place, 1, scale);
        staged<A>(pass, place, 2, bias);
        staged<A>(pass, place, 3, mean_grad);
        staged<A>(pass, place, 4, tilt);
      },
      [&](int i, int64_t at) {
        A g[n], v[n], argument[n];
        widen<T, n>(raw_grad[i], g);
        widen<T, n>(raw_x[i], v);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const int c = channel_of<planes>(j);
          argument[j] = normalized(v[j], mean[c], scale[c], bias[c]);
        }
        activate_backward<kind>(g, argument, act, slope);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const int c = channel_of<planes>(j);
          v[j] = scale[c] * (g[j] - mean_grad[c] - (v[j] - mean[c]) * tilt[c]);
        }
        store<T, n>(grad_input + at, v);
      });
}

// --- launching ------------------------------------------------------------------------------

// Where the activation's argument comes from, and the tensor that tells it.
struct Mask {
  Beside from = Beside::nothing;
  OptionalTensor tensor;

  Mask(const char* op, Activation act, const std::string& name, double negative_slope,
       bool has_residual, const OptionalTensor& residual, const OptionalTensor& output) {
    if (!has_residual || act == Activation::none) return;
    const bool linear = is_piecewise_linear(act, negative_slope);
    from = linear && output.has_value() ? Beside::output : Beside::residual;
    tensor = from == Beside::output ? output : residual;
    check(tensor.has_value(), op, ": ", linear ? "output or residual" : "residual",
          " must be given for ", name, " with a residual, got None");
  }
};

// Without an activation nothing is asked.
template <Act kind, class Body>
void with_beside(Beside from, const Body& body) {
  if constexpr (kind != Act::none) {
    if (from == Beside::output) return body(std::integral_constant<Beside, Beside::output>());
    if (from == Beside::residual) return body(std::integral_constant<Beside, Beside::residual>());
  }
  body(std::integral_constant<Beside, Beside::nothing>());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_sums(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& residual,
    const OptionalTensor& output, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const std::string& act,
    double negative_slope, bool has_residual) {
  constexpr const char* op = "bn_act_backward";
  const Activation activation = parse_activation(op, act);
  check_data(op, "input", input);
  check_like(op, "grad_output", grad_output, input);
  if (residual) check_like(op, "residual", *residual, input);
  if (output) check_like(op, "output", *output, input);
  check(has_residual || !residual, op, ": residual must be None where has_residual is false");
  const Mask mask(op, activation, act, negative_slope, has_residual, residual, output);
  const NormVectors vectors(op, input, mean, var, weight, bias, eps);
  const ScalarType dtype = input.scalar_type();
  const MemoryFormat format = suggested_format(input);
  Tensor grad_residual =
      has_residual ? empty(input.sizes(), format, dtype, input) : empty_vector(0, dtype, input);
  if (input.numel() == 0) return {grad_residual, zero_channels(input), zero_channels(input)};
  const OnDeviceOf device(input);
  Tensor grad_weight = empty_channels(input), grad_bias = empty_channels(input);
  const Tensor g = dense(grad_output, format), x = dense(input, format);
  const OptionalTensor beside =
      mask.tensor ? OptionalTensor(dense(*mask.tensor, format)) : std::nullopt;
  void* const to = has_residual ? grad_residual.mutable_data_ptr() : nullptr;
  const Extent shape = extent(x, format);
  with_access(dtype, shape, {g.const_data_ptr(), x.const_data_ptr(), pointer_to(beside), to},
              [&](auto zero, auto n, auto planes) {
                using T = decltype(zero);
                using A = compute_t<T>;
                const Pass pass = make_pass(shape, n, planes, kUnroll, kReducingBlocks);
                const PartialSums partial(pass, input);
                const Norm<A> norm = vectors.on_device<A>();
                with_kind<n, planes>(activation, [&](auto kind) {
                  with_beside<kind>(mask.from, [&](auto from) {
                    const SumsData<T> data{static_cast<const T*>(g.const_data_ptr()),
                                           static_cast<const T*>(x.const_data_ptr()),
                                           static_cast<const T*>(pointer_to(beside)),
                                           static_cast<T*>(to)};
                    device.launch(op, sums_kernel<T, n, planes, kind, from>, dim3(pass.blocks()),
                                  dim3(kThreads), PartialSums::bytes(planes ? 1 : n), data, norm,
                                  pass, activation, static_cast<A>(negative_slope), partial.data());
                  });
                });
                partial.launch(device, op, combine_gradients_kernel<A>, norm,
                               static_cast<A*>(grad_weight.mutable_data_ptr()),
                               static_cast<A*>(grad_bias.mutable_data_ptr()));
              });
  return {grad_residual, grad_weight, grad_bias};
}

Tensor bn_act_backward_input(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                             const Tensor& var, const OptionalTensor& weight,
                             const OptionalTensor& bias, const Tensor& grad_weight,
                             const Tensor& grad_bias, double eps, const std::string& act,
                             double negative_slope, int64_t count) {
  constexpr const char* op = "bn_act_backward_input";
  const Activation activation = parse_activation(op, act);
  check_data(op, "input", input);
  check_like(op, "grad_output", grad_output, input);
  check(count > 0 || input.numel() == 0, op, ": count must be positive, got ", count);
  const NormVectors vectors(op, input, mean, var, weight, bias, eps);
  const OptionalTensor weight_sums = checked_vector(op, "grad_weight", grad_weight, input);
  const OptionalTensor bias_sums = checked_vector(op, "grad_bias", grad_bias, input);
  const MemoryFormat format = suggested_format(input);
  Tensor result = empty(input.sizes(), format, input.scalar_type(), input);
  if (input.numel() == 0) return result;
  const OnDeviceOf device(input);
  const Tensor g = dense(grad_output, format), x = dense(input, format);
  void* const to = result.mutable_data_ptr();
  const Extent shape = extent(x, format);
  with_access(x.scalar_type(), shape, {g.const_data_ptr(), x.const_data_ptr(), to},
              [&](auto zero, auto n, auto planes) {
                using T = decltype(zero);
                using A = compute_t<T>;
                const Pass pass = make_pass(shape, n, planes, kUnroll, kStreamingBlocks);
                with_kind<n, planes>(activation, [&](auto kind) {
                  device.launch(op, input_kernel<T, n, planes, kind>, dim3(pass.blocks()),
                                dim3(kThreads), staged_bytes<A>(pass, planes ? 1 : n, 5),
                                static_cast<const T*>(g.const_data_ptr()),
                                static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(to),
                                vectors.on_device<A>(),
                                static_cast<const A*>(pointer_to(weight_sums)),
                                static_cast<const A*>(pointer_to(bias_sums)), static_cast<A>(count),
                                pass, activation, static_cast<A>(negative_slope));
                });
              });
  return result;
}

}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("bn_act_backward_sums", TORCH_BOX(&resnet_fused::cuda::bn_act_backward_sums));
  m.impl("bn_act_backward_input", TORCH_BOX(&resnet_fused::cuda::bn_act_backward_input));
}
