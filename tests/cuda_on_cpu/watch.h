// What the runtime tells the watcher of memory accesses (watch.cpp). Without it these are nothing.
#pragma once

#include "runtime.h"

namespace resnet_fused::cuda::on_cpu::watch {

#ifdef RESNET_FUSED_WATCH
constexpr bool kOn = true;
#define WATCHED(declaration) declaration;
#else
constexpr bool kOn = false;
#define WATCHED(declaration) \
  inline declaration {}
#endif

WATCHED(void start_grid())
WATCHED(void start_block())
// All who met know what each of them has done.
WATCHED(void met(const std::vector<Thread*>&))
// Who arrives at an mbarrier tells those who wait for the end of the phase.
WATCHED(void initialised(uint32_t, Site))
WATCHED(void used(uint32_t, Site))
WATCHED(void arrived(uint32_t))
WATCHED(void phase_ended(uint32_t))
WATCHED(void waited(uint32_t))
// A thread's copy, cp.async.
WATCHED(void copy_started(const Copy&))
WATCHED(void copy_done(const Copy&))
// A bulk copy that counts at an mbarrier.
WATCHED(void bulk_started(const Copy&, uint32_t))
WATCHED(void bulk_done(const Copy&, uint32_t))
WATCHED(void fenced())
WATCHED(void read_by_ldmatrix(uint32_t, uint32_t, Site))
// A warpgroup's products: what is read until it is waited for; by each of 128 threads.
WATCHED(void product_checked(uint32_t, uint32_t, Site))
WATCHED(void product_started(uint32_t, uint32_t, Site))
WATCHED(void product_done(uint32_t, uint32_t))
WATCHED(void group_done())
WATCHED(void group_waited())

#undef WATCHED

}  // namespace resnet_fused::cuda::on_cpu::watch
