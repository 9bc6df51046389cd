// cp.async: a thread's copies to shared memory. What is copied is read and written when the thread
// waits for the copy's group; until then the destination is NaN. Whoever copies and does not wait,
// or waits for a copy that is in no group yet, is told where.

#include <algorithm>

#include "watch.h"

namespace resnet_fused::cuda::on_cpu {

void start_copies(Thread& thread) {
  thread.copies.copies.clear();
  thread.copies.ends.clear();
  thread.copies.done_copies = thread.copies.done_groups = 0;
  thread.unfenced.clear();
}

void finish_copies(Thread& thread) {
  const CopyGroups& groups = thread.copies;
  if (groups.done_copies < groups.copies.size()) {
    fail(groups.copies[groups.done_copies].site, "finishes without waiting for a cp_async_16");
  }
}

}  // namespace resnet_fused::cuda::on_cpu

namespace resnet_fused::cuda {

using namespace on_cpu;

void cp_async_16(void* to, const void* from, bool valid, Site site) {
  check_shared(to, 16, 16, "cp_async_16", site);
  check_aligned(from, 16, "cp_async_16", site);
  const Copy copy{static_cast<unsigned char*>(to),
                  valid ? static_cast<const unsigned char*>(from) : nullptr, 16, site};
  if (valid) check_source(copy, "cp_async_16");
  watch::copy_started(copy);
  take_away(copy);
  block.running->copies.copies.push_back(copy);
}

void cp_async_commit(Site) {
  CopyGroups& groups = block.running->copies;
  groups.ends.push_back(groups.copies.size());
  let_others_run(false);
}

void cp_async_wait_for(int younger, Site) {
  let_others_run(false);
  Thread& self = *block.running;
  CopyGroups& groups = self.copies;
  const auto left = static_cast<size_t>(younger);
  while (groups.ends.size() > groups.done_groups + left) {
    const size_t end = groups.ends[groups.done_groups++];
    for (; groups.done_copies < end; ++groups.done_copies) {
      const Copy& copy = groups.copies[groups.done_copies];
      arrive(copy, Granule::unfenced);
      watch::copy_done(copy);
      self.unfenced.push_back(shared_offset(copy.to) / kGranule);
    }
  }
  if (groups.done_copies == groups.copies.size() && groups.done_groups == groups.ends.size()) {
    groups.copies.clear();
    groups.ends.clear();
    groups.done_copies = groups.done_groups = 0;
  }
}

void fence_async(Site) {
  Thread& self = *block.running;
  for (const uint32_t granule : self.unfenced) {
    if (granules[granule] == Granule::unfenced) granules[granule] = Granule::settled;
  }
  self.unfenced.clear();
  watch::fenced();
}

}  // namespace resnet_fused::cuda
