// The largest |x|, by comparing bits without the sign: NaN > Inf > finite, so both are seen.
#pragma once

#include <cstdint>

#include "../common/check.h"

namespace resnet_fused {

// Bits of the largest magnitude among n elements of a 2, 4 or 8 byte floating type.
using MaxBitsKernel = uint64_t (*)(const void* data, int64_t begin, int64_t end);

}  // namespace resnet_fused
