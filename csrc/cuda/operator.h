// What every operator of this library does around its kernels: device, stream, errors,
// registration.
//
// The tests compile the same files for the CPU (tests/cuda_on_cpu): there the operators belong to
// another namespace, and CPU tensors are their data.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/check.h"
#include "../common/strings.h"
#include "hardware.cuh"

#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define RESNET_FUSED_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m)
#else
#define RESNET_FUSED_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda_on_cpu, CPU, m)
#endif

namespace resnet_fused::cuda {

// While it lives, the tensor's device is the current one; launches go into its current stream.
class OnDeviceOf {
 public:
#ifdef __CUDACC__
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<Stream>(stream);
  }
#else
  explicit OnDeviceOf(const Tensor&) : stream_() {}
#endif

  // Launches; raises what CUDA has to say against it.
  template <class... Parameters, class... Arguments>
  void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              size_t shared_bytes, Arguments... arguments) const {
    const char* error = cuda::launch(kernel, grid, block, shared_bytes, stream_, arguments...);
    check(error == nullptr, op, ": CUDA could not start a kernel: ", error ? error : "");
  }

 private:
#ifdef __CUDACC__
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_;
};

}  // namespace resnet_fused::cuda
