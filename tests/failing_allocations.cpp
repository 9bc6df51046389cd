// Preloaded, makes one allocation of a library fail, or every one from there on.
//
// What counts is who calls: the library under test for operator new and mmap, also where its
// templates were compiled into it, and torch's allocator of tensors for posix_memalign. Everything
// else is given what it asks for. Memory that the library maps is counted.
#include <malloc.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

struct Code {
  std::atomic<uintptr_t> begin{0}, end{0};
  bool has(const void* address) const {
    const auto place = reinterpret_cast<uintptr_t>(address);
    return place >= begin && place < end;
  }
};
Code code[2];  // the library's, and that of torch's allocator
std::atomic<int64_t> seen{0}, first{0}, mapped{0};
std::atomic<bool> is_armed{false}, goes_on{false};

bool fails(const void* caller, const Code& whose) {
  if (!is_armed || !whose.has(caller)) return false;
  const int64_t number = ++seen;
  return goes_on ? number >= first : number == first;
}

void* allocate(size_t bytes, size_t alignment, const void* caller) {
  if (fails(caller, code[0])) return nullptr;
  return memalign(alignment, bytes == 0 ? 1 : bytes);
}

void* allocate_or_throw(size_t bytes, size_t alignment, const void* caller) {
  void* const memory = allocate(bytes, alignment, caller);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

constexpr size_t kPlain = alignof(std::max_align_t);

}  // namespace

#define CALLER __builtin_return_address(0)

extern "C" {

void watch_code(int which, uintptr_t begin, uintptr_t end) {
  code[which].begin = begin, code[which].end = end;
}

// The `number`th allocation fails from now on, and with `all` those after it.
void arm(int64_t number, bool all) {
  seen = 0, first = number, goes_on = all, is_armed = true;
}

// How many allocations there were since.
int64_t disarm() {
  is_armed = false;
  return seen;
}

int64_t mapped_bytes() {
  return mapped;
}

void* mmap(void* address, size_t bytes, int protection, int flags, int file, off_t offset) {
  if (fails(CALLER, code[0])) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  const long result = syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
  if (result != -1 && code[0].has(CALLER)) mapped += static_cast<int64_t>(bytes);
  return reinterpret_cast<void*>(result);
}

int munmap(void* address, size_t bytes) {
  if (code[0].has(CALLER)) mapped -= static_cast<int64_t>(bytes);
  return static_cast<int>(syscall(SYS_munmap, address, bytes));
}

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  if (fails(CALLER, code[1])) return ENOMEM;
  *memory = memalign(alignment, bytes);
  return *memory == nullptr ? ENOMEM : 0;
}

}  // extern "C"

void* operator new(size_t bytes) {
  return allocate_or_throw(bytes, kPlain, CALLER);
}
void* operator new[](size_t bytes) {
  return allocate_or_throw(bytes, kPlain, CALLER);
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes, kPlain, CALLER);
}
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes, kPlain, CALLER);
}
void* operator new(size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<size_t>(alignment), CALLER);
}
void* operator new[](size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<size_t>(alignment), CALLER);
}
