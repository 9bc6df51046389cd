// Mean and biased variance of every channel over all other dimensions.
//
//     d = x - origin[c]       mean = origin + sum(d) / n       var = sum(d^2) / n - (sum(d) / n)^2
//
// The origin lies among the channel's values, the same for all threads: so nothing cancels, however
// large the mean beside the deviation, and sums of parts are simply added. It is made of sixteen
// values from all over the tensor: of four the inner two, and of four such means the inner two. So
// it is some third of a deviation from the mean, and a few outliers among the values do no harm.
//
// Layout: [outer][channels][inner] without gaps (channel_pass.cuh). Reads x once, as eager
// PyTorch's statistics do; two launches, of which the second adds the blocks' sums
// (channel_sums.cuh). Chan, Golub, LeVeque: "Algorithms for Computing the Sample Variance" (1983),
// shifted data.

#include "batch_statistics.h"

#include "channel_sums.cuh"

namespace resnet_fused::cuda {
namespace {

constexpr int kUnroll = 4;

template <class A>
DEVICE_INLINE A lesser(A a, A b) {
  return a < b ? a : b;
}
template <class A>
DEVICE_INLINE A greater(A a, A b) {
  return a < b ? b : a;
}

template <class A>
DEVICE_INLINE A middle(const A (&v)[4]) {
  const A low = greater(lesser(v[0], v[1]), lesser(v[2], v[3]));
  const A high = lesser(greater(v[0], v[1]), greater(v[2], v[3]));
  return low * A(0.5) + high * A(0.5);
}

// With no more bits than x: differences from it are not all rounded the same way.
template <class T>
DEVICE_INLINE compute_t<T> origin_of(const T* x, const Extent& extent, int64_t channel) {
  using A = compute_t<T>;
  const int64_t last = extent.outer * extent.inner - 1, step = last / 15, rest = last % 15;
  A v[16], middles[4];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int64_t at = step * i + rest * i / 15, image = quotient(at, extent.inner);
    const int64_t inside = at - image * extent.inner;
    v[i] = to_float(x[(image * extent.channels + channel) * extent.inner + inside]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const A four[4] = {v[i], v[i + 4], v[i + 8], v[i + 12]};
    middles[i] = middle(four);
  }
  const A origin = to_float(narrowed<T>(middle(middles)));
  return origin - origin == A(0) ? origin : A(0);  // not where it is NaN or infinite
}

// `origins` are of all channels.
template <class T, int n, bool planes>
__global__ void __launch_bounds__(kThreads, 2)
    statistics_kernel(const T* x, Extent extent, Pass pass, double* partial,
                      compute_t<T>* origins) {
  using A = compute_t<T>;
  const Place<n, planes> place(pass);
  constexpr int own = Place<n, planes>::own;
  A origin[own], sums[own] = {}, squares[own] = {};
  Raw<T, n> raw[2 * kUnroll];
  for_units<kUnroll, n, planes, false, true>(
      pass, place, [&](int i, int64_t at) { raw[i] = load_stream<T, n>(x + at); },
      [&] {
        stage_channels<A, 1>(pass, place, [&](int64_t channel, A(&numbers)[1]) {
          numbers[0] = origin_of(x, extent, channel);
          if (static_cast<int>(blockIdx.x) < pass.slabs) origins[channel] = numbers[0];
        });
        staged<A>(pass, place, 0, origin);
      },
      [&](int i, int64_t) {
        A v[n];
        widen<T, n>(raw[i], v);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          constexpr auto mine = channel_of<planes>;
          const A d = v[j] - origin[mine(j)];
          sums[mine(j)] += d;
          squares[mine(j)] += d * d;
        }
      });
  write_sums<A>(pass, place, sums, squares, partial);
}

// `mean` is the origins at first.
template <class A>
__global__ void combine_statistics_kernel(const double* partial, int chunks, int64_t channels,
                                          int64_t count, A* mean, A* var) {
  const int64_t channel = combined_channel();
  const A origin = channel < channels ? mean[channel] : A(0);  // under way beside the sums
  double sum, square;
  if (!combine_sums(partial, chunks, channels, sum, square)) return;
  const double rest = sum / static_cast<double>(count);
  const double spread = square / static_cast<double>(count) - rest * rest;
  mean[channel] = static_cast<A>(origin + rest);
  var[channel] = static_cast<A>(spread < 0 ? 0 : spread);
}

}  // namespace

std::tuple<Tensor, Tensor> batch_statistics(const Tensor& input) {
  constexpr const char* op = "batch_statistics";
  check_data(op, "input", input);
  if (input.numel() == 0) return {zero_channels(input), zero_channels(input)};
  const OnDeviceOf device(input);
  const MemoryFormat format = suggested_format(input);
  const Tensor x = dense(input, format);
  const Extent shape = extent(x, format);
  Tensor mean = empty_channels(input), var = empty_channels(input);
  with_access(x.scalar_type(), shape, {x.const_data_ptr()}, [&](auto zero, auto n, auto planes) {
    using T = decltype(zero);
    using A = compute_t<T>;
    const Pass pass = make_pass(shape, n, planes, kUnroll, kReducingBlocks);
    const PartialSums sums(pass, input);
    A* const means = static_cast<A*>(mean.mutable_data_ptr());
    device.launch(op, statistics_kernel<T, n, planes>, dim3(pass.blocks()), dim3(kThreads),
                  PartialSums::bytes(planes ? 1 : n), static_cast<const T*>(x.const_data_ptr()),
                  shape, pass, sums.data(), means);
    sums.launch(device, op, combine_statistics_kernel<A>, shape.outer * shape.inner, means,
                static_cast<A*>(var.mutable_data_ptr()));
  });
  return {mean, var};
}

}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("batch_statistics", TORCH_BOX(&resnet_fused::cuda::batch_statistics));
}
