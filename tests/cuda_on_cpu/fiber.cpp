#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifdef RESNET_FUSED_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "tests/cuda_on_cpu switches fibers on x86-64 only"
#endif

// Saves what a function must keep (System V ABI) on the stack, and takes the other's.
extern "C" void resnet_fused_switch(void** save, void* to);
asm(R"(
.text
.globl resnet_fused_switch
.hidden resnet_fused_switch
.type resnet_fused_switch, @function
resnet_fused_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size resnet_fused_switch, .-resnet_fused_switch
)");

namespace resnet_fused::cuda::on_cpu {
namespace {

#ifdef RESNET_FUSED_ASAN
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;

// Stacks are never given back: the threads that have them are used again by every block.
char* new_stack() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char*>(memory) + kGuardBytes;
}

}  // namespace

void Fiber::start(void (*entry)(), bool dirty) {
  if (stack_ == nullptr) {
    stack_ = new_stack();
    size_ = kStackBytes;
  }
#ifdef RESNET_FUSED_ASAN
  if (dirty) ASAN_UNPOISON_MEMORY_REGION(stack_, size_);
#else
  static_cast<void>(dirty);
#endif
  // As if entry() had been called: six registers, where to go, and no caller of it.
  auto* slots = reinterpret_cast<uintptr_t*>(stack_ + size_) - 8;
  for (int i = 0; i < 8; ++i) slots[i] = 0;
  slots[6] = reinterpret_cast<uintptr_t>(entry);
  top_ = slots;
}

void Fiber::arrived(Fiber& self) {
#ifdef RESNET_FUSED_ASAN
  __sanitizer_finish_switch_fiber(self.fake_stack_, nullptr, nullptr);
  self.fake_stack_ = nullptr;
#else
  static_cast<void>(self);
#endif
}

void Fiber::go(Fiber& from, Fiber& to) {
#ifdef RESNET_FUSED_ASAN
  if (from.stack_ == nullptr) {  // the stack that a kernel was launched from
    pthread_attr_t attributes;
    void* lowest = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &from.size_);
    pthread_attr_destroy(&attributes);
    from.stack_ = static_cast<char*>(lowest);
  }
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.size_);
#endif
  resnet_fused_switch(&from.top_, to.top_);
  arrived(from);
}

}  // namespace resnet_fused::cuda::on_cpu
