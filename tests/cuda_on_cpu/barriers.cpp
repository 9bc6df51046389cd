// Where threads of a block meet: barriers and shuffles.

#include "watch.h"

namespace resnet_fused::cuda::on_cpu {

bool join(Meeting& meeting, const char* name, Site site, int expected, bool same_site) {
  Thread& self = *block.running;
  if (meeting.here.empty()) {
    meeting.name = name;
    meeting.site = site;
    meeting.expected = expected;
  } else {
    const Thread& first = *meeting.here.front();
    if (meeting.name != name || (same_site && (meeting.site.line != site.line ||
                                               std::string(meeting.site.file) != site.file))) {
      fail(site, name, " meets ", meeting.name, " (", place(meeting.site), ") of thread ",
           numbers(first.index));
    }
    if (meeting.expected != expected) {
      fail(site, name, " for ", expected, " threads meets one for ", meeting.expected, " (",
           place(meeting.site), ") of thread ", numbers(first.index));
    }
  }
  meeting.here.push_back(&self);
  if (static_cast<int>(meeting.here.size()) == expected) return true;
  wait_for(name, site);
  return false;
}

void leave(Meeting& meeting) {
  for (Thread* thread : meeting.here) wake(*thread);
  meeting.here.clear();
  wait_for("its turn", meeting.site);
}

}  // namespace resnet_fused::cuda::on_cpu

namespace resnet_fused::cuda {

using namespace on_cpu;

namespace {

// A barrier that orders memory.
void meet(Meeting& meeting, const char* name, Site site, int expected, bool same_site) {
  if (!join(meeting, name, site, expected, same_site)) return;
  watch::met(meeting.here);
  leave(meeting);
}

}  // namespace

int lane_number() {
  return block.running->number % kWarp;
}

void sync_block(Site site) {
  meet(block.all, "sync_block", site, block.size, true);
}

void sync_warp(Site site) {
  meet(own_warp(), "sync_warp", site, warp_size(), true);
}

void sync_some(int barrier, int threads, Site site) {
  if (barrier < 1 || barrier > 15) fail(site, "sync_some of barrier ", barrier, ", not 1 to 15");
  if (threads <= 0 || threads % kWarp != 0 || threads > block.size) {
    fail(site, "sync_some of ", threads, " threads in a block of ", block.size);
  }
  meet(block.named[barrier], "sync_some", site, threads, false);
}

namespace {

struct Exchange {
  uint64_t value;
  int from;
  uint64_t* result;
};
Exchange exchanges[kMostThreads];

}  // namespace

uint64_t shuffled(uint64_t bits, int lane, const char* name, Site site) {
  if (lane < 0 || lane >= warp_size())
    fail(site, name, " from lane ", lane, ", which is not there");
  uint64_t result = 0;
  exchanges[block.running->number] = {bits, lane, &result};
  Meeting& warp = own_warp();
  if (join(warp, name, site, warp_size(), true)) {
    Exchange* const lanes = exchanges + block.running->number / kWarp * kWarp;
    for (int i = 0; i < warp_size(); ++i) *lanes[i].result = lanes[lanes[i].from].value;
    leave(warp);
  }
  return result;
}

}  // namespace resnet_fused::cuda
