// Two operators over the library's own parallel_for: one with a race that ThreadSanitizer has to
// report, one whose threads share nothing but what the region's start and end order.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../csrc/cpu/parallel.h"

namespace {

int64_t racy(int64_t count) {
  int64_t sum = 0;
  resnet_fused::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { sum += end - begin; });
  return sum;
}

int64_t ordered(int64_t count) {
  std::vector<int64_t> parts(static_cast<size_t>(count));
  for (int64_t round = 0; round < 100; ++round) {
    resnet_fused::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) parts[static_cast<size_t>((i + round) % count)] += 1;
    });
  }
  int64_t sum = 0;
  for (const int64_t part : parts) sum += part;
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY(planted_race, m) {
  m.def("racy(int count) -> int");
  m.def("ordered(int count) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(planted_race, CompositeExplicitAutograd, m) {
  m.impl("racy", TORCH_BOX(&racy));
  m.impl("ordered", TORCH_BOX(&ordered));
}
