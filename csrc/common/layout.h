// What order the elements of a tensor lie in. Every kernel of the library sees a dense array
// [outer][channels][inner]: channels_last is [N*H*W][C][1], contiguous is [N][C][H*W].
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace resnet_fused {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

struct Extent {
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

// Dimensions from the fastest to the slowest.
inline std::vector<int64_t> memory_order(MemoryFormat format, int64_t rank) {
  std::vector<int64_t> order;
  const bool channels_last = format != MemoryFormat::Contiguous && rank > 1;
  if (channels_last) order.push_back(1);
  for (int64_t d = rank - 1; d >= 0; --d) {
    if (d != 1 || !channels_last) order.push_back(d);
  }
  return order;
}

inline std::vector<int64_t> dense_strides(IntHeaderOnlyArrayRef sizes, MemoryFormat format) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (const int64_t d : memory_order(format, static_cast<int64_t>(sizes.size()))) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return strides;
}

// c10::TensorImpl's suggest_memory_format, which the stable ABI does not export.
inline MemoryFormat suggested_format(const Tensor& tensor) {
  const int64_t rank = tensor.dim();
  if (rank != 4 && rank != 5) return MemoryFormat::Contiguous;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const MemoryFormat format = rank == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
  if (strides[1] == 0) return MemoryFormat::Contiguous;
  int64_t least = 0;
  for (const int64_t d : memory_order(format, rank)) {
    if (sizes[d] == 0 || strides[d] < least) return MemoryFormat::Contiguous;
    if (d == 0 && least == strides[1]) return MemoryFormat::Contiguous;  // N111 and NCHW with C = 1
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return format;
}

inline bool is_dense(const Tensor& tensor, MemoryFormat format) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const std::vector<int64_t> expected = dense_strides(sizes, format);
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] != expected[d]) return false;
  }
  return true;
}

// Every element of its memory once, in whatever order of dimensions.
inline bool has_no_gaps(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t step = 1;
  for (const size_t d : order) {
    if (strides[d] != step) return false;
    step *= sizes[d];
  }
  return true;
}

// The tensor itself where it already lies in `format`, else a copy that does.
inline Tensor dense(const Tensor& tensor, MemoryFormat format) {
  if (tensor.numel() == 0 || is_dense(tensor, format)) return tensor;
  return torch::stable::contiguous(tensor, format);
}

inline Extent extent(const Tensor& tensor, MemoryFormat format) {
  const int64_t channels = tensor.size(1);
  if (format != MemoryFormat::Contiguous) return {tensor.numel() / channels, channels, 1};
  return {tensor.size(0), channels, tensor.numel() / (tensor.size(0) * channels)};
}

}  // namespace resnet_fused
