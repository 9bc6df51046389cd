// Whether this library's kernels can run on a GPU: asked of CUDA before they are chosen, as a
// launch that cannot work says so when it is too late. No kernel of an operator is here.
#ifdef __CUDACC__
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cuda_runtime.h>

#include "../common/check.h"

namespace resnet_fused::cuda {
namespace {

__global__ void nothing() {}

// The compute capability, as 90 for 9.0, that this library's code for the device was compiled for;
// that of its PTX where the driver compiles it.
int64_t architecture(int64_t device) {
  check(device >= 0 && device <= INT16_MAX,
        "_cuda_architecture: device must be a GPU's number, got ", device);
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, nothing);
  cudaGetLastError();  // it is told here, not by the next launch
  check(status == cudaSuccess, "_cuda_architecture: ", cudaGetErrorString(status));
  return attributes.ptxVersion;
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("_cuda_architecture(int device) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("_cuda_architecture", TORCH_BOX(&resnet_fused::cuda::architecture));
}
#endif
