// The max-pool behind a convolution and its batch norm in training.
//
//     forward    y = max over the window of act(bn(z)), and a byte for where in the window it was
//     backward   the gradients of the batch norm's weight and bias; z's own is computed where the
//                convolution reads it (train_conv.cpp)
//
// The activation, the largest of a network, exists for a few images at a time only. In tensors that
// cross memory: forward reads z and writes y, backward reads z twice. Eager PyTorch's batch norm,
// activation and pool read or write 6 and 8 of z's size, and indices of twice y's size.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../common/strings.h"
#include "max_pool.h"
#include "train_norm.h"

namespace resnet_fused {
namespace {

constexpr int64_t kPassBytes = int64_t(4) << 20;

std::tuple<Tensor, Tensor> train_pool(const Tensor& input, const std::vector<Tensor>& vectors,
                                      double eps, const std::string& act, double negative_slope,
                                      const std::vector<int64_t>& window) {
  constexpr const char* op = "_train_pool";
  const PoolShape shape = positions_shape(op, input, window);
  check_has_kernel(op, input);
  const ScalarType dtype = input.scalar_type();
  const Tensor z = dense(input, MemoryFormat::ChannelsLast);
  const Norm norm(op, "vectors", vectors, eps, act, negative_slope, z);
  check(static_cast<bool>(norm), op, ": vectors must be mean, var, weight and bias, got none");
  const int64_t sizes[4] = {z.size(0), z.size(1), shape.out_height, shape.out_width};
  Tensor output = pool_empty({sizes, 4}, MemoryFormat::ChannelsLast, dtype);
  Tensor positions = pool_empty({sizes, 4}, MemoryFormat::ChannelsLast, ScalarType::Byte);
  const Images from = images_of(z), to = images_of(output);
  const int64_t step = std::max<int64_t>(1, kPassBytes / from.bytes());
  const Workspace activation = from.workspace(step);
  for (int64_t first = 0; first < from.count; first += step) {
    const int64_t count = std::min(step, from.count - first);
    norm.apply(at(z.const_data_ptr(), from, first), from, count, dtype, activation.data());
    max_pool(activation.data(), at(output.mutable_data_ptr(), to, first),
             static_cast<uint8_t*>(positions.mutable_data_ptr()) + first * to.pixels * to.channels,
             shape, count, dtype);
  }
  return {output, positions};
}

std::tuple<Tensor, Tensor> train_pool_sums(const Tensor& grad, const Tensor& positions,
                                           const Tensor& input, const std::vector<Tensor>& vectors,
                                           double eps, const std::string& act,
                                           double negative_slope,
                                           const std::vector<int64_t>& window) {
  constexpr const char* op = "_train_pool_sums";
  const PoolShape shape = positions_shape(op, input, window);
  check_has_kernel(op, input);
  const ScalarType dtype = input.scalar_type();
  check_pooled(op, grad, positions, input, shape);
  const Tensor z = dense(input, MemoryFormat::ChannelsLast);
  const Tensor g = dense(grad, MemoryFormat::ChannelsLast);
  const Tensor p = dense(positions, MemoryFormat::ChannelsLast);
  const Norm norm(op, "vectors", vectors, eps, act, negative_slope, g);
  check(static_cast<bool>(norm), op, ": vectors must be mean, var, weight and bias, got none");
  // A pixel that no window chose adds nothing.
  const Images pooled = images_of(g), from = images_of(z);
  const int64_t step = std::max<int64_t>(1, kPassBytes / from.bytes());
  const Workspace found = pooled.workspace(step);
  std::vector<double> sum_grad(from.channels), sum_deviation(from.channels);
  for (int64_t first = 0; first < from.count; first += step) {
    const int64_t count = std::min(step, from.count - first);
    read_found(
        at(z.const_data_ptr(), from, first),
        static_cast<const uint8_t*>(p.const_data_ptr()) + first * pooled.pixels * pooled.channels,
        found.data(), shape, count, dtype);
    std::vector<double> part_grad(from.channels), part_deviation(from.channels);
    BackwardSums(norm.backward(at(g.const_data_ptr(), pooled, first), found.data(), nullptr),
                 pooled.extent(count), dtype, norm.act, MaskFrom::input, from.channels)
        .finish(part_grad.data(), part_deviation.data());
    for (int64_t c = 0; c < from.channels; ++c) {
      sum_grad[c] += part_grad[c];
      sum_deviation[c] += part_deviation[c] * norm.values->rstd[c];
    }
  }
  return {vector_of(sum_deviation), vector_of(sum_grad)};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_train_pool", TORCH_BOX(&resnet_fused::train_pool));
  m.impl("_train_pool_sums", TORCH_BOX(&resnet_fused::train_pool_sums));
}
