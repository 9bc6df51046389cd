// What batch norm does to a channel: (x - mean) * scale + bias.
//
// Forward and backward derive it here from the same mean and variance, so that they agree on where
// an activation has its corners.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "../common/layout.h"
#include "operator.h"

namespace resnet_fused::cuda {

using OptionalTensor = std::optional<Tensor>;

template <class A>
struct ChannelNorm {
  A mean, scale, bias, rstd;
};

// Pointers to a number for each channel; where there is none, mean is 0, 1 / sqrt(var + eps) and
// weight are 1 and bias is 0.
template <class A>
struct Norm {
  const A* mean;
  const A* var;
  const A* weight;
  const A* bias;
  A eps;

  // All is loaded before anything is used: a block waits for it once.
  DEVICE_INLINE ChannelNorm<A> of(int64_t channel) const {
    ChannelNorm<A> c{mean ? mean[channel] : A(0), weight ? weight[channel] : A(1),
                     bias ? bias[channel] : A(0), var ? var[channel] + eps : A(1)};
    c.rstd = A(1) / std::sqrt(c.rstd);
    c.scale *= c.rstd;
    return c;
  }
};

template <class A>
DEVICE_INLINE A normalized(A x, A mean, A scale, A bias) {
  return (x - mean) * scale + bias;
}

// --- on the host ----------------------------------------------------------------------------

inline OptionalTensor checked_vector(const char* op, const char* name, const OptionalTensor& vector,
                                     const Tensor& input) {
  if (!vector) return std::nullopt;
  check_vector(op, name, *vector, input);
  return dense(*vector, MemoryFormat::Contiguous);
}

inline const void* pointer_to(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// A batch norm's vectors, checked.
struct NormVectors {
  OptionalTensor mean, var, weight, bias;
  double eps;

  NormVectors(const char* op, const Tensor& input, const OptionalTensor& mean_vector,
              const OptionalTensor& var_vector, const OptionalTensor& weight_vector,
              const OptionalTensor& bias_vector, double epsilon)
      : mean(checked_vector(op, "mean", mean_vector, input)),
        var(checked_vector(op, "var", var_vector, input)),
        weight(checked_vector(op, "weight", weight_vector, input)),
        bias(checked_vector(op, "bias", bias_vector, input)),
        eps(epsilon) {}

  // An affine map without statistics.
  NormVectors(const char* op, const Tensor& input, const OptionalTensor& scale,
              const OptionalTensor& shift)
      : weight(checked_vector(op, "scale", scale, input)),
        bias(checked_vector(op, "shift", shift, input)),
        eps(0) {}

  template <class A>
  Norm<A> on_device() const {
    const auto typed = [](const OptionalTensor& t) { return static_cast<const A*>(pointer_to(t)); };
    return {typed(mean), typed(var), typed(weight), typed(bias), static_cast<A>(eps)};
  }
};

// Mean, var, weight and bias, of the last two one that is empty for none; or none at all.
inline NormVectors norm_vectors(const char* op, const Tensor& input,
                                const std::vector<Tensor>& vectors, double eps) {
  if (vectors.empty()) return NormVectors(op, input, std::nullopt, std::nullopt);
  check(vectors.size() == 4, op, ": vectors must be mean, var, weight and bias, or none, got ",
        vectors.size());
  const auto optional = [&](size_t i) {
    return vectors[i].numel() == 0 ? std::nullopt : OptionalTensor(vectors[i]);
  };
  return NormVectors(op, input, vectors[0], vectors[1], optional(2), optional(3), eps);
}

}  // namespace resnet_fused::cuda
