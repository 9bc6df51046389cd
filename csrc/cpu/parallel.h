#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace resnet_fused {

// body(begin, end) for parts of [begin, end), on torch's threads. An exception of a part's is
// thrown again here once all have ended.
#if !defined(__SANITIZE_THREAD__)

using torch::stable::parallel_for;

// Units a thread takes at least, so that it has as many elements as at::internal::GRAIN_SIZE.
inline int64_t grain(int64_t unit_size) {
  constexpr int64_t kGrainSize = 32768;
  return unit_size >= kGrainSize ? 1 : (kGrainSize + unit_size - 1) / unit_size;
}

#else

// ThreadSanitizer sees neither OpenMP's start of a region nor its end, as libgomp and torch are
// compiled without it: here it is told of both, and of nothing between two parts. Not even the body
// may be read before.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const Body& body) {
  struct Region {
    const Body& body;
    char end;
    ~Region() { __tsan_acquire(&end); }
  } region{body, 0};
  struct Part {
    Region& region;
    ~Part() { __tsan_release(&region.end); }
  };
  __tsan_release(&region);
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(
      begin, end, grain_size,
      [](int64_t first, int64_t last, void* context) {
        __tsan_acquire(context);
        const Part part{*static_cast<Region*>(context)};
        part.region.body(first, last);
      },
      &region));
}

// The smallest work is shared out: races of a large one show in it.
inline int64_t grain(int64_t) {
  return 1;
}

#endif

}  // namespace resnet_fused
