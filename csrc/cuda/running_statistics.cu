// The running statistics of several batch norms in one launch, since they are small and many:
//
//     running = (1 - momentum) running + momentum factor batch,   counter += 1
//
// Each vector belongs to one mean or variance; the factor makes a biased variance unbiased. Running
// statistics may have any dtype: what is blended is float32 (float64 if one of the two is), rounded
// once. Eager PyTorch makes five launches for each vector of a bfloat16 model. Pointers travel as
// the kernel's parameters, of which CUDA takes 4096 bytes.

#include <algorithm>
#include <utility>
#include <vector>

#include "../common/layout.h"
#include "../common/overlap.h"
#include "numbers.cuh"
#include "operator.h"

namespace resnet_fused::cuda {
namespace {

constexpr const char* op = "_update_running_statistics";
constexpr int kMost = 64;  // vectors, and counters, of a launch
constexpr int kThreads = 256;

struct Vectors {
  void* running[kMost];
  const void* batch[kMost];
  double factor[kMost];
  int64_t* counters[kMost];
  int64_t length[kMost];
  ScalarType dtype[kMost];  // of running
  bool is_double[kMost];    // batch
  int count, counted;
};
static_assert(sizeof(Vectors) <= 4000);

template <class A>
DEVICE_INLINE A read(const void* from, ScalarType dtype, int64_t i) {
  switch (dtype) {
    case ScalarType::Float: return static_cast<const float*>(from)[i];
    case ScalarType::Double: return static_cast<A>(static_cast<const double*>(from)[i]);
    case ScalarType::BFloat16: return to_float(static_cast<const bfloat16*>(from)[i]);
    default: return to_float(static_cast<const half*>(from)[i]);
  }
}

template <class A>
DEVICE_INLINE void write(void* to, ScalarType dtype, int64_t i, A value) {
  switch (dtype) {
    case ScalarType::Float: static_cast<float*>(to)[i] = static_cast<float>(value); return;
    case ScalarType::Double: static_cast<double*>(to)[i] = value; return;
    case ScalarType::BFloat16:
      static_cast<bfloat16*>(to)[i] = rounded<bfloat16>(static_cast<float>(value));
      return;
    default: static_cast<half*>(to)[i] = rounded<half>(static_cast<float>(value));
  }
}

template <class A>
DEVICE_INLINE void blend(const Vectors& vectors, int v, int64_t i, double momentum) {
  const A keep = static_cast<A>(1 - momentum), move = static_cast<A>(momentum);
  const A scale = static_cast<A>(vectors.factor[v]);
  const ScalarType from = vectors.is_double[v] ? ScalarType::Double : ScalarType::Float;
  const A now = read<A>(vectors.running[v], vectors.dtype[v], i);
  const A batch = read<A>(vectors.batch[v], from, i);
  write<A>(vectors.running[v], vectors.dtype[v], i, now * keep + batch * scale * move);
}

__global__ void __launch_bounds__(kThreads, 2) update_kernel(Vectors vectors, double momentum) {
  const int v = static_cast<int>(blockIdx.y);
  if (v == vectors.count) {
    const int i = static_cast<int>(threadIdx.x);
    if (blockIdx.x == 0 && i < vectors.counted) ++*vectors.counters[i];
    return;
  }
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= vectors.length[v]) return;
  if (vectors.is_double[v] || vectors.dtype[v] == ScalarType::Double) {
    blend<double>(vectors, v, i, momentum);
  } else {
    blend<float>(vectors, v, i, momentum);
  }
}

bool is_statistics_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double;
}

// Returns the batch's vectors without gaps.
std::vector<Tensor> check_arguments(const std::vector<Tensor>& running,
                                    const std::vector<Tensor>& counters,
                                    const std::vector<Tensor>& batch,
                                    const std::vector<double>& factors) {
  check(running.size() == batch.size() && running.size() == factors.size(), op,
        ": running, batch and factors must be equally many, got ", running.size(), ", ",
        batch.size(), " and ", factors.size());
  const Tensor* const first = running.empty() ? nullptr : &running[0];
  std::vector<Tensor> dense_batch;
  std::vector<Span> spans;
  for (size_t i = 0; i < running.size(); ++i) {
    const ScalarType dtype = running[i].scalar_type();
    check(is_statistics_dtype(dtype) || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
          op, ": running must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
    check(is_statistics_dtype(batch[i].scalar_type()), op,
          ": batch must be float32 or float64, got ", dtype_name(batch[i].scalar_type()));
    check_device(op, "running", running[i], *first);
    check_device(op, "batch", batch[i], *first);
    check(running[i].is_contiguous(), op, ": running must be dense, got shape ",
          shape_text(running[i].sizes()));
    check(same_shape(running[i], batch[i]), op, ": batch must have the shape of running, ",
          shape_text(running[i].sizes()), ", got ", shape_text(batch[i].sizes()));
    dense_batch.push_back(dense(batch[i], MemoryFormat::Contiguous));
    spans.push_back({running[i], true});
    spans.push_back({dense_batch.back(), false});
  }
  for (const Tensor& counter : counters) {
    check_device(op, "counters", counter, first ? *first : counters[0]);
    check(counter.scalar_type() == ScalarType::Long && counter.numel() == 1, op,
          ": counters must be int64 scalars, got ", dtype_name(counter.scalar_type()), " ",
          shape_text(counter.sizes()));
    spans.push_back({counter, true});
  }
  check_apart(op, "running, counters and batch", std::move(spans));
  return dense_batch;
}

void update_running_statistics(const std::vector<Tensor>& running,
                               const std::vector<Tensor>& counters,
                               const std::vector<Tensor>& batch, const std::vector<double>& factors,
                               double momentum) {
  const std::vector<Tensor> from = check_arguments(running, counters, batch, factors);
  if (running.empty() && counters.empty()) return;
  const OnDeviceOf device(running.empty() ? counters[0] : running[0]);
  const size_t all = std::max(running.size(), counters.size());
  for (size_t begin = 0; begin < all; begin += kMost) {
    Vectors vectors{};
    int64_t longest = 1;
    for (size_t i = begin; i < std::min(running.size(), begin + kMost); ++i) {
      const int v = vectors.count++;
      vectors.running[v] = running[i].mutable_data_ptr();
      vectors.batch[v] = from[i].const_data_ptr();
      vectors.factor[v] = factors[i];
      vectors.length[v] = running[i].numel();
      vectors.dtype[v] = running[i].scalar_type();
      vectors.is_double[v] = from[i].scalar_type() == ScalarType::Double;
      longest = std::max(longest, vectors.length[v]);
    }
    for (size_t i = begin; i < std::min(counters.size(), begin + kMost); ++i)
      vectors.counters[vectors.counted++] = static_cast<int64_t*>(counters[i].mutable_data_ptr());
    const dim3 grid(static_cast<unsigned>((longest + kThreads - 1) / kThreads),
                    static_cast<unsigned>(vectors.count + 1));
    device.launch(op, update_kernel, grid, dim3(kThreads), 0, vectors, momentum);
  }
}

}  // namespace
}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("_update_running_statistics", TORCH_BOX(&resnet_fused::cuda::update_running_statistics));
}
