// What g++'s -fsanitize=thread calls for every access to memory; its own library is not linked.

#ifdef RESNET_FUSED_WATCH

#include "accesses.h"

namespace {

using resnet_fused::cuda::on_cpu::site_of;
using resnet_fused::cuda::on_cpu::watch::access;

}  // namespace

#pragma GCC visibility push(default)

extern "C" {

#define ACCESS(name, bytes, writes)                                       \
  void name(void* pointer) {                                              \
    access(pointer, bytes, writes, site_of(__builtin_return_address(0))); \
  }

ACCESS(__tsan_read1, 1, false)
ACCESS(__tsan_read2, 2, false)
ACCESS(__tsan_read4, 4, false)
ACCESS(__tsan_read8, 8, false)
ACCESS(__tsan_read16, 16, false)
ACCESS(__tsan_write1, 1, true)
ACCESS(__tsan_write2, 2, true)
ACCESS(__tsan_write4, 4, true)
ACCESS(__tsan_write8, 8, true)
ACCESS(__tsan_write16, 16, true)
ACCESS(__tsan_unaligned_read2, 2, false)
ACCESS(__tsan_unaligned_read4, 4, false)
ACCESS(__tsan_unaligned_read8, 8, false)
ACCESS(__tsan_unaligned_read16, 16, false)
ACCESS(__tsan_unaligned_write2, 2, true)
ACCESS(__tsan_unaligned_write4, 4, true)
ACCESS(__tsan_unaligned_write8, 8, true)
ACCESS(__tsan_unaligned_write16, 16, true)

void __tsan_read_range(void* pointer, size_t bytes) {
  access(pointer, static_cast<uint32_t>(bytes), false, site_of(__builtin_return_address(0)));
}
void __tsan_write_range(void* pointer, size_t bytes) {
  access(pointer, static_cast<uint32_t>(bytes), true, site_of(__builtin_return_address(0)));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Reference counts of the code around kernels.
#define ATOMICS(bits, type)                                               \
  type __tsan_atomic##bits##_fetch_add(volatile type* at, type by, int) { \
    return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST);                  \
  }                                                                       \
  type __tsan_atomic##bits##_fetch_sub(volatile type* at, type by, int) { \
    return __atomic_fetch_sub(at, by, __ATOMIC_SEQ_CST);                  \
  }                                                                       \
  type __tsan_atomic##bits##_load(const volatile type* at, int) {         \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                         \
  }                                                                       \
  void __tsan_atomic##bits##_store(volatile type* at, type value, int) {  \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                        \
  }

ATOMICS(8, char)
ATOMICS(32, int)
ATOMICS(64, long)

}  // extern "C"

#pragma GCC visibility pop

#endif
