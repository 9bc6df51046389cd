// Operators over memory_pool.h. Internal to this library, so defined here and not in ops/schema.py.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "memory_pool.h"
#include "parallel.h"

namespace resnet_fused {
namespace {

template <class Body>
void for_byte_ranges(int64_t bytes, const Body& body) {
  constexpr int64_t kPiece = 128 * 1024;
  parallel_for(0, (bytes + kPiece - 1) / kPiece, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, last = end * kPiece < bytes ? end * kPiece : bytes;
    body(first, static_cast<size_t>(last - first));
  });
}

Tensor pool_zeros(const std::vector<int64_t>& size, ScalarType dtype) {
  const IntHeaderOnlyArrayRef sizes(size.data(), size.size());
  check(size.size() == 4, "_pool_zeros: size must have 4 numbers (N, C, H, W), got ",
        shape_text(sizes));
  for (const int64_t n : size)
    check(n >= 0, "_pool_zeros: size must not be negative, got ", shape_text(sizes));
  Tensor zeros = pool_empty(sizes, MemoryFormat::ChannelsLast, dtype);
  char* data = static_cast<char*>(zeros.mutable_data_ptr());
  for_byte_ranges(zeros.numel() * static_cast<int64_t>(element_size(dtype)),
                  [&](int64_t begin, size_t bytes) { std::memset(data + begin, 0, bytes); });
  return zeros;
}

Tensor pool_clone(const Tensor& input) {
  check_here("_pool_clone", "input", input);
  const MemoryFormat format = suggested_format(input);
  const bool keeps_strides = has_no_gaps(input);
  const Tensor source = keeps_strides ? input : dense(input, format);
  Tensor copy = keeps_strides
                    ? pool_empty_strided(input.sizes(), input.strides(), input.scalar_type())
                    : pool_empty(input.sizes(), format, input.scalar_type());
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(copy.mutable_data_ptr());
  for_byte_ranges(
      source.numel() * static_cast<int64_t>(source.element_size()),
      [&](int64_t begin, size_t bytes) { std::memcpy(to + begin, from + begin, bytes); });
  return copy;
}

int64_t idle_bytes() {
  return static_cast<int64_t>(pool_idle_bytes());
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("_pool_zeros(int[4] size, ScalarType dtype) -> Tensor");  // channels_last
  m.def("_pool_clone(Tensor input) -> Tensor");
  m.def("_pool_release() -> ()");
  m.def("_pool_idle_bytes() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_pool_clone", TORCH_BOX(&resnet_fused::pool_clone));
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("_pool_zeros", TORCH_BOX(&resnet_fused::pool_zeros));
  m.impl("_pool_release", TORCH_BOX(&resnet_fused::pool_release));
  m.impl("_pool_idle_bytes", TORCH_BOX(&resnet_fused::idle_bytes));
}
