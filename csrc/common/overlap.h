// What an operator writes must not lie over what it reads, or over what else it writes: the result
// would depend on the order in which threads come along.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"

namespace resnet_fused {

// The bytes of a dense tensor.
struct Span {
  uintptr_t begin, end;
  bool written;

  Span(const Tensor& dense, bool is_written)
      : begin(reinterpret_cast<uintptr_t>(dense.const_data_ptr())),
        end(begin + static_cast<uintptr_t>(dense.numel()) * dense.element_size()),
        written(is_written) {}
};

// `names` says which arguments these are.
inline void check_apart(const char* op, const char* names, std::vector<Span> spans) {
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  uintptr_t written = 0, any = 0;  // where those before end
  for (const Span& span : spans) {
    if (span.begin == span.end) continue;
    check(span.begin >= (span.written ? any : written), op, ": ", names,
          " must not overlap in memory");
    any = std::max(any, span.end);
    if (span.written) written = std::max(written, span.end);
  }
}

}  // namespace resnet_fused
