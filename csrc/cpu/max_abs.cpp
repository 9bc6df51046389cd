// max |x| of a tensor, one read at memory speed. Eager's x.abs().max() reads twice and writes once.

#include "max_abs.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "../common/layout.h"
#include "isa.h"
#include "parallel.h"

#define KERNEL_HEADER "max_abs_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

double value_of(uint64_t bits, ScalarType dtype) {
  if (dtype == ScalarType::Double) return baseline::bits_as<double>(bits);
  if (dtype == ScalarType::Float) return baseline::bits_as<float>(static_cast<uint32_t>(bits));
  float value;
  if (dtype == ScalarType::BFloat16) {
    const bf16 from{static_cast<uint16_t>(bits)};
    baseline::widen(&from, &value, 1);
  } else {
    const f16 from{static_cast<uint16_t>(bits)};
    baseline::widen(&from, &value, 1);
  }
  return value;
}

double max_abs(const Tensor& input) {
  check_here("_max_abs", "input", input);
  const ScalarType dtype = input.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double ||
            dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        "_max_abs: input must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  if (input.numel() == 0) return 0;
  const Tensor x = has_no_gaps(input) ? input : dense(input, suggested_format(input));
  const void* data = x.const_data_ptr();
  const auto kernel = RESNET_FUSED_CALL(max_bits_kernel, dtype);
  std::atomic<uint64_t> result{0};
  parallel_for(0, x.numel(), grain(1), [&](int64_t begin, int64_t end) {
    const uint64_t mine = kernel(data, begin, end);
    uint64_t seen = result.load();
    while (seen < mine && !result.compare_exchange_weak(seen, mine)) {
    }
  });
  return value_of(result.load(), dtype);
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("_max_abs(Tensor input) -> float");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_max_abs", TORCH_BOX(&resnet_fused::max_abs));
}
