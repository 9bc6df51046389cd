// Argument checks: every message names the operator, the argument, what was expected and what came.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace resnet_fused {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// std::runtime_error reaches Python as RuntimeError; STD_TORCH_CHECK would put a C++ file name
// first.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error("resnet_fused::" + message.str());
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_text(IntHeaderOnlyArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + "]";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

// Where this library's kernels run. The dispatcher calls them as soon as one argument is there.
#ifdef __CUDACC__
constexpr const char* kDeviceName = "CUDA";
inline bool is_here(const Tensor& tensor) {
  return tensor.is_cuda();
}
inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.get_device_index() == b.get_device_index();
}
#else
constexpr const char* kDeviceName = "CPU";
inline bool is_here(const Tensor& tensor) {
  return tensor.is_cpu();
}
inline bool same_device(const Tensor&, const Tensor&) {
  return true;
}
#endif

// Whether the storage still holds every number that the strides reach: whoever frees a parameter
// for a while resizes it and leaves the tensor as it was.
inline void check_memory(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = tensor.storage_offset(), bytes = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  const int64_t needed = (last + 1) * static_cast<int64_t>(tensor.element_size());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  check(needed <= bytes, op, ": ", name, " must have a storage of ", needed,
        " bytes for its shape and strides, got ", bytes);
}

inline void check_here(const char* op, const char* name, const Tensor& tensor) {
  check(is_here(tensor), op, ": ", name, " must be a ", kDeviceName, " tensor");
  check_memory(op, name, tensor);
}

inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& input) {
  check_here(op, name, tensor);
  check(same_device(tensor, input), op, ": ", name, " must be on the device of input, ",
        input.get_device_index(), ", got ", tensor.get_device_index());
}

// The tensor whose layout the others follow: rank >= 2 with the channels in dimension 1.
inline void check_data(const char* op, const char* name, const Tensor& tensor) {
  check_here(op, name, tensor);
  check(tensor.dim() >= 2, op, ": ", name,
        " must have at least 2 dimensions (N, C, ...), got shape ", shape_text(tensor.sizes()));
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double ||
            dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        op, ": ", name, " must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
}

inline void check_like(const char* op, const char* name, const Tensor& tensor,
                       const Tensor& input) {
  check_device(op, name, tensor, input);
  check(tensor.scalar_type() == input.scalar_type(), op, ": ", name,
        " must have the dtype of input, ", dtype_name(input.scalar_type()), ", got ",
        dtype_name(tensor.scalar_type()));
  check(same_shape(tensor, input), op, ": ", name, " must have the shape of input, ",
        shape_text(input.sizes()), ", got ", shape_text(tensor.sizes()));
}

// One number per channel, in the statistics dtype: float64 beside float64 data, else float32.
inline void check_vector(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& input) {
  const ScalarType expected =
      input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_device(op, name, tensor, input);
  check(tensor.scalar_type() == expected, op, ": ", name, " must be ", dtype_name(expected),
        " beside ", dtype_name(input.scalar_type()), " input, got ",
        dtype_name(tensor.scalar_type()));
  check(tensor.dim() == 1 && tensor.size(0) == input.size(1), op, ": ", name, " must have shape [",
        input.size(1), "], one number per channel of input, got ", shape_text(tensor.sizes()));
}

}  // namespace resnet_fused
