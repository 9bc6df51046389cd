// Batches a few images at a time, and the batch norms on both sides of a convolution in training.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bn_act_backward.h"
#include "channel_vectors.h"
#include "memory_pool.h"
#include "normalize_act.h"
#include "workspace.h"

namespace resnet_fused {

// Images [*, H, W, C] and how their rows of pixels are handed to the kernels for batch norm.
struct Images {
  int64_t count, pixels, channels, element;

  int64_t bytes() const { return pixels * channels * element; }  // of one
  Workspace workspace(int64_t images) const {
    return Workspace(static_cast<size_t>(images * bytes() + 3) / sizeof(float));
  }
  Extent extent(int64_t images) const {
    Extent one = folded({pixels, channels, 1});
    one.outer *= images;
    return one;
  }
};

inline Images images_of(const Tensor& tensor) {
  return {tensor.size(0), tensor.size(2) * tensor.size(3), tensor.size(1),
          static_cast<int64_t>(element_size(tensor.scalar_type()))};
}

inline const char* at(const void* data, const Images& images, int64_t image) {
  return static_cast<const char*>(data) + image * images.bytes();
}
inline char* at(void* data, const Images& images, int64_t image) {
  return static_cast<char*>(data) + image * images.bytes();
}

// A batch norm with the batch's statistics, and the activation behind it; `vectors` are mean, var,
// weight and bias, of which the last two may be empty, and the gradients of the last two where
// there are to be some; or there is none at all.
struct Norm {
  std::optional<Normalization<float>> values;
  Activation act = Activation::none;
  double negative_slope = 0;

  Norm(const char* op, const char* name, const std::vector<Tensor>& vectors, double eps,
       const std::string& act_name, double slope, const Tensor& data, size_t gradients = 0)
      : act(parse_activation(op, act_name)), negative_slope(slope) {
    if (vectors.empty()) return;
    check(vectors.size() == 4 + gradients, op, ": ", name,
          " must be empty or mean, var, weight, bias", gradients > 0 ? " and two gradients" : "",
          ", got ", vectors.size(), " tensors");
    const auto optional = [&](size_t i) {
      return vectors[i].numel() == 0 ? std::optional<Tensor>() : std::optional<Tensor>(vectors[i]);
    };
    const VectorArgument<float> mean(op, name, vectors[0], data), var(op, name, vectors[1], data);
    const VectorArgument<float> weight(op, name, optional(2), data),
        bias(op, name, optional(3), data);
    values.emplace(mean.data(), var.data(), weight, bias, eps, data.size(1),
                   images_of(data).extent(1));
  }
  explicit operator bool() const { return values.has_value(); }

  void apply(const void* x, const Images& images, int64_t count, ScalarType dtype, void* y) const {
    normalize_act({x, nullptr, y, images.extent(count), values->mean.data(), values->scale.data(),
                   values->bias.data(), negative_slope},
                  dtype, act);
  }
  BnActBackward backward(const void* grad, const void* x, void* result) const {
    return {grad,
            x,
            grad,
            result,
            nullptr,
            values->mean.data(),
            values->scale.data(),
            values->bias.data(),
            negative_slope};
  }
};

inline Tensor vector_of(const std::vector<double>& values) {
  const int64_t size = static_cast<int64_t>(values.size());
  Tensor result = pool_empty({&size, 1}, MemoryFormat::Contiguous, ScalarType::Float);
  std::copy(values.begin(), values.end(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

}  // namespace resnet_fused
