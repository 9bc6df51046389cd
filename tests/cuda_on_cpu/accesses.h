// An access to memory by the code of a kernel, as callbacks.cpp hears of it.
#pragma once

#include "hardware_on_cpu.h"

namespace resnet_fused::cuda::on_cpu {

// A place that is an address in the code; place() finds its line.
inline Site site_of(const void* code) {
  return {static_cast<const char*>(code), -1};
}

namespace watch {

void access(const void* pointer, uint32_t bytes, bool writes, Site site);

}  // namespace watch
}  // namespace resnet_fused::cuda::on_cpu
