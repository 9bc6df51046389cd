// What g++'s -fsanitize=undefined calls, for kernels: an error of the launch that names the line,
// where libubsan would print or end the process. Hence it is always on, also where a misaligned
// access would be the end of the process otherwise.

#include <cstdio>
#include <cstdlib>

#include "runtime.h"

namespace {

// libubsan's ubsan_handlers.h: all data that the handlers are given begin like this.
struct Location {
  const char* file;
  uint32_t line, column;
};

using namespace resnet_fused::cuda;

void undefined(const Location* at, const char* what) {
  const Site site{at->file == nullptr ? "?" : at->file, static_cast<int>(at->line)};
  if (on_cpu::block.running != nullptr) on_cpu::fail(site, what);
  std::fprintf(stderr, "cuda_on_cpu: outside of a kernel: %s (%s)\n", what,
               on_cpu::place(site).c_str());
  std::abort();
}

}  // namespace

#pragma GCC visibility push(default)

extern "C" {

struct TypeMismatch {
  Location at;
  const void* type;
  unsigned char log_alignment, kind;
};

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t) {
  undefined(&data->at, "an access by a misaligned pointer");
}
void __ubsan_handle_out_of_bounds(Location* at, uintptr_t) {
  undefined(at, "an index outside of its array");
}
void __ubsan_handle_shift_out_of_bounds(Location* at, uintptr_t, uintptr_t) {
  undefined(at, "a shift by too much or of a negative number");
}
void __ubsan_handle_divrem_overflow(Location* at, uintptr_t, uintptr_t) {
  undefined(at, "a division by zero, or its overflow");
}
void __ubsan_handle_add_overflow(Location* at, uintptr_t, uintptr_t) {
  undefined(at, "a sum overflows");
}
void __ubsan_handle_sub_overflow(Location* at, uintptr_t, uintptr_t) {
  undefined(at, "a difference overflows");
}
void __ubsan_handle_mul_overflow(Location* at, uintptr_t, uintptr_t) {
  undefined(at, "a product overflows");
}
void __ubsan_handle_negate_overflow(Location* at, uintptr_t) {
  undefined(at, "a negation overflows");
}

}  // extern "C"

#pragma GCC visibility pop
