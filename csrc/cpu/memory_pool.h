// Large output tensors from memory that is kept and used again.
//
// glibc returns blocks above 32 MiB to the kernel on every free, so each large output costs a page
// fault per 4 KiB again: 12 to 25 % of a ResNet-50 forward at batch 16. Here blocks of 1 MiB and
// more are kept when their tensor dies (at most RESNET_FUSED_POOL_BYTES of them, default 512 MiB, 0
// = off) and lie on huge pages where Linux grants them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>

#include "../common/check.h"
#include "../common/layout.h"

namespace resnet_fused {

// An uninitialised dense CPU tensor; from the pool if it has 1 MiB or more.
Tensor pool_empty(IntHeaderOnlyArrayRef sizes, MemoryFormat format, ScalarType dtype);

// The same with any strides that leave no gaps.
Tensor pool_empty_strided(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                          ScalarType dtype);

size_t element_size(ScalarType dtype);
void pool_release();  // gives all idle blocks back to the system
size_t pool_idle_bytes();

}  // namespace resnet_fused
