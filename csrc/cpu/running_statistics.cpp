// The running statistics of several batch norms in one call, since they are small and many:
//
//     running = (1 - momentum) running + momentum factor batch,   counter += 1
//
// Each vector belongs to one mean or variance; the factor makes a biased variance unbiased.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../common/check.h"

namespace resnet_fused {
namespace {

template <class Number>
void update(const Tensor& running, const Tensor& batch, double factor, double momentum) {
  Number* const to = static_cast<Number*>(running.mutable_data_ptr());
  const Number* const from = static_cast<const Number*>(batch.const_data_ptr());
  const Number keep = static_cast<Number>(1 - momentum), scale = static_cast<Number>(factor);
  const Number move = static_cast<Number>(momentum);
  for (int64_t c = 0; c < running.numel(); ++c) to[c] = to[c] * keep + from[c] * scale * move;
}

void update_running_statistics(const std::vector<Tensor>& running,
                               const std::vector<Tensor>& counters,
                               const std::vector<Tensor>& batch, const std::vector<double>& factors,
                               double momentum) {
  constexpr const char* op = "_update_running_statistics";
  check(running.size() == batch.size() && running.size() == factors.size(), op,
        ": running, batch and factors must be equally many, got ", running.size(), ", ",
        batch.size(), " and ", factors.size());
  for (size_t i = 0; i < running.size(); ++i) {
    const ScalarType dtype = running[i].scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
          ": running must be float32 or float64, got ", dtype_name(dtype));
    for (const Tensor* t : {&running[i], &batch[i]}) {
      check(t->is_cpu() && t->is_contiguous() && t->scalar_type() == dtype &&
                t->numel() == running[i].numel(),
            op, ": running and batch must be dense CPU vectors of one size and dtype");
    }
  }
  for (const Tensor& counter : counters) {
    check(counter.is_cpu() && counter.scalar_type() == ScalarType::Long && counter.numel() == 1, op,
          ": counters must be int64 CPU scalars");
  }
  for (size_t i = 0; i < running.size(); ++i) {
    if (running[i].scalar_type() == ScalarType::Double) {
      update<double>(running[i], batch[i], factors[i], momentum);
    } else {
      update<float>(running[i], batch[i], factors[i], momentum);
    }
  }
  for (const Tensor& counter : counters) {
    ++*static_cast<int64_t*>(counter.mutable_data_ptr());
  }
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_update_running_statistics", TORCH_BOX(&resnet_fused::update_running_statistics));
}
