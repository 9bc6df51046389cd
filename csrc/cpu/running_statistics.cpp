// The running statistics of several batch norms in one call, since they are small and many:
//
//     running = (1 - momentum) running + momentum factor batch,   counter += 1
//
// Each vector belongs to one mean or variance; the factor makes a biased variance unbiased.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "../common/layout.h"
#include "../common/overlap.h"

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
  std::vector<Tensor> from;
  std::vector<Span> spans;
  for (size_t i = 0; i < running.size(); ++i) {
    const ScalarType dtype = running[i].scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
          ": running must be float32 or float64, got ", dtype_name(dtype));
    check_here(op, "running", running[i]);
    check_here(op, "batch", batch[i]);
    check(running[i].is_contiguous(), op, ": running must be dense, got shape ",
          shape_text(running[i].sizes()));
    check(batch[i].scalar_type() == dtype && same_shape(batch[i], running[i]), op,
          ": batch must be like running, ", dtype_name(dtype), " ", shape_text(running[i].sizes()),
          ", got ", dtype_name(batch[i].scalar_type()), " ", shape_text(batch[i].sizes()));
    from.push_back(dense(batch[i], MemoryFormat::Contiguous));
    spans.push_back({running[i], true});
    spans.push_back({from.back(), false});
  }
  for (const Tensor& counter : counters) {
    check_here(op, "counters", counter);
    check(counter.scalar_type() == ScalarType::Long && counter.numel() == 1, op,
          ": counters must be int64 scalars, got ", dtype_name(counter.scalar_type()), " ",
          shape_text(counter.sizes()));
    spans.push_back({counter, true});
  }
  check_apart(op, "running, counters and batch", std::move(spans));
  for (size_t i = 0; i < running.size(); ++i) {
    if (running[i].scalar_type() == ScalarType::Double) {
      update<double>(running[i], from[i], factors[i], momentum);
    } else {
      update<float>(running[i], from[i], factors[i], momentum);
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
