// Fibers: a stack each, and a switch from one to another that takes some nanoseconds (swapcontext
// of the C library takes thirty times as long: it calls the kernel for the signal mask).
#pragma once

#include <cstddef>

namespace resnet_fused::cuda::on_cpu {

class Fiber {
 public:
  Fiber() = default;  // whoever switches away from it first
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to it calls entry(), which never returns. `dirty`: it was left in the middle.
  void start(void (*entry)(), bool dirty);

  // What entry() does first, and what happens around a switch: AddressSanitizer follows.
  static void arrived(Fiber& self);
  static void go(Fiber& from, Fiber& to);

  bool owns(const void* pointer) const {
    const auto* const at = static_cast<const char*>(pointer);
    return at >= stack_ && at < stack_ + size_;
  }

 private:
  char* stack_ = nullptr;
  size_t size_ = 0;
  void* top_ = nullptr;
  void* fake_stack_ = nullptr;
};

}  // namespace resnet_fused::cuda::on_cpu
