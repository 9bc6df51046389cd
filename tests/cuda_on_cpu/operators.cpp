// What tests can set, as operators: the order in which threads run, which blocks of a grid do, and
// how many multiprocessors the chip has.

#include <torch/csrc/stable/library.h>

#include <cstdlib>

#include "runtime.h"

namespace resnet_fused::cuda::on_cpu {
namespace {

void only_blocks(int64_t first, int64_t last) {
  settings.first_block = first;
  settings.last_block = last;
}

void set_multiprocessors(int64_t number) {
  settings.multiprocessors = number > 0 ? static_cast<int>(number) : kMultiprocessors;
}

}  // namespace
}  // namespace resnet_fused::cuda::on_cpu

STABLE_TORCH_LIBRARY(resnet_fused_cuda_on_cpu, m) {
  // "forward", "reverse" or "random:SEED"
  m.def("_set_order(str order) -> ()");
  // Of every grid from now on, in the order of blockIdx; all if `last` is negative.
  m.def("_only_blocks(int first, int last) -> ()");
  // The default if not positive.
  m.def("_set_multiprocessors(int number) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda_on_cpu, CompositeExplicitAutograd, m) {
  m.impl("_set_order", TORCH_BOX(&resnet_fused::cuda::on_cpu::set_order));
  m.impl("_only_blocks", TORCH_BOX(&resnet_fused::cuda::on_cpu::only_blocks));
  m.impl("_set_multiprocessors", TORCH_BOX(&resnet_fused::cuda::on_cpu::set_multiprocessors));
}
