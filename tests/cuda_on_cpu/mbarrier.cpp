// mbarriers, and the bulk copies that they count.
//
// A bulk copy arrives when no thread can go on without it, or at a random moment; copies overtake
// each other. The destination is NaN meanwhile. That a phase ends with fewer bytes than were
// copied, that more threads arrive than it counts, that copies are under way when the block ends:
// errors.

#include <unordered_map>

#include "watch.h"

namespace resnet_fused::cuda::on_cpu {
namespace {

constexpr uint64_t kMark = 0x6d62617272696572;  // what an initialised barrier holds
constexpr int kMostCount = (1 << 20) - 1;       // PTX ISA, "mbarrier object": counts and bytes

struct Barrier {
  int count = 0, missing = 0;  // arrivals: of a phase, and still to come
  int64_t bytes = 0;           // still to come
  uint64_t phase = 0;
  int initialiser = 0;
  bool announced = false;  // mbarrier_init_done has followed
  std::vector<Thread*> waiting;
};

struct BulkCopy {
  Copy copy;
  uint32_t barrier;
};

std::unordered_map<uint32_t, Barrier> barriers;  // by offset
std::vector<BulkCopy> under_way;

Barrier& known(const Mbarrier* barrier, const char* name, Site site) {
  check_shared(barrier, sizeof(Mbarrier), sizeof(Mbarrier), name, site);
  const uint32_t offset = shared_offset(barrier);
  const auto found = barriers.find(offset);
  if (found == barriers.end() || barrier->state != (kMark ^ offset)) {
    fail(site, name, ": the mbarrier at byte ", offset,
         found == barriers.end() ? " is not initialised" : " was overwritten");
  }
  watch::used(offset, site);
  return found->second;
}

// Ends the phase if nothing is missing; false if more bytes came than were expected.
bool settle(Barrier& barrier, uint32_t offset) {
  if (barrier.missing > 0) return true;
  if (barrier.bytes < 0) return false;
  if (barrier.bytes == 0) {
    ++barrier.phase;
    watch::phase_ended(offset);
    barrier.missing = barrier.count;
    for (Thread* thread : barrier.waiting) wake(*thread);
    barrier.waiting.clear();
  }
  return true;
}

void arrive_at(Mbarrier* pointer, int bytes, const char* name, Site site) {
  Barrier& barrier = known(pointer, name, site);
  if (barrier.missing == 0) {
    fail(site, name, ": more than ", barrier.count, " arrivals at the mbarrier at byte ",
         shared_offset(pointer), " in a phase");
  }
  watch::arrived(shared_offset(pointer));
  barrier.bytes += bytes;
  --barrier.missing;
  if (!settle(barrier, shared_offset(pointer))) {
    fail(site, name, ": ", -barrier.bytes, " bytes more have come to the mbarrier at byte ",
         shared_offset(pointer), " than were expected");
  }
  let_others_run(false);
}

bool has_ended(const Barrier& barrier, int parity) {
  return static_cast<int>(barrier.phase % 2) != parity;
}

}  // namespace

void prepare_barriers() {
  barriers.clear();
  under_way.clear();
}

void finish_barriers() {
  std::ostringstream text;
  text << block_name() << ": ";
  if (copies_under_way()) {
    text << "ends while a bulk_copy is under way (" << place(under_way.front().copy.site) << ")";
    block.error = text.str();
  }
  for (const auto& [offset, barrier] : barriers) {
    if (!block.error.empty() || barrier.bytes == 0) continue;
    text << "ends while the mbarrier at byte " << offset << " expects " << barrier.bytes
         << " bytes that nobody copies";
    block.error = text.str();
  }
}

bool copies_under_way() {
  return !under_way.empty();
}

void deliver_one() {
  size_t which = 0;
  if (settings.order == Order::forward) which = under_way.size() - 1;
  if (settings.order == Order::random) {
    which = block.random.below(static_cast<uint32_t>(under_way.size()));
  }
  const BulkCopy bulk = under_way[which];
  under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(which));
  arrive(bulk.copy, Granule::settled);
  watch::bulk_done(bulk.copy, bulk.barrier);
  Barrier& barrier = barriers[bulk.barrier];
  barrier.bytes -= bulk.copy.bytes;
  if (!settle(barrier, bulk.barrier)) {
    std::ostringstream text;
    text << block_name() << ": bulk_copy: " << -barrier.bytes
         << " bytes more have come to the mbarrier at byte " << bulk.barrier
         << " than were expected (" << place(bulk.copy.site) << ")";
    block.error = text.str();
  }
}

std::string state_of(const Mbarrier& pointer, int parity) {
  const uint32_t offset = shared_offset(&pointer);
  const Barrier& barrier = barriers[offset];
  std::ostringstream text;
  text << "parity " << parity << " of the mbarrier at byte " << offset << ", which lacks "
       << barrier.missing << " of " << barrier.count << " arrivals and " << barrier.bytes
       << " bytes in phase " << barrier.phase;
  return text.str();
}

}  // namespace resnet_fused::cuda::on_cpu

namespace resnet_fused::cuda {

using namespace on_cpu;

void mbarrier_init(Mbarrier* barrier, int count, Site site) {
  check_shared(barrier, sizeof(Mbarrier), sizeof(Mbarrier), "mbarrier_init", site);
  if (count < 1 || count > kMostCount) fail(site, "mbarrier_init: count is ", count);
  const uint32_t offset = shared_offset(barrier);
  Barrier& state = barriers[offset];
  if (!state.waiting.empty()) fail(site, "mbarrier_init: threads wait for it");
  state = Barrier();
  state.count = state.missing = count;
  state.initialiser = block.running->number;
  barrier->state = kMark ^ offset;
  watch::initialised(offset, site);
}

void mbarrier_init_done(Site) {
  for (auto& [offset, barrier] : barriers) {
    if (barrier.initialiser == block.running->number) barrier.announced = true;
  }
}

void mbarrier_arrive(Mbarrier* barrier, Site site) {
  arrive_at(barrier, 0, "mbarrier_arrive", site);
}

void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, Site site) {
  if (bytes < 0 || bytes > kMostCount) fail(site, "mbarrier_arrive_expect of ", bytes, " bytes");
  arrive_at(barrier, bytes, "mbarrier_arrive_expect", site);
}

void mbarrier_wait(Mbarrier* pointer, int parity, Site site) {
  if (parity != 0 && parity != 1) fail(site, "mbarrier_wait for parity ", parity);
  let_others_run(false);
  Thread& self = *block.running;
  while (!has_ended(known(pointer, "mbarrier_wait", site), parity)) {
    known(pointer, "mbarrier_wait", site).waiting.push_back(&self);
    self.barrier = pointer;
    self.parity = parity;
    wait_for("mbarrier_wait", site);
    self.barrier = nullptr;
  }
  watch::waited(shared_offset(pointer));
}

bool mbarrier_ready(Mbarrier* pointer, int parity, Site site) {
  if (parity != 0 && parity != 1) fail(site, "mbarrier_ready for parity ", parity);
  if (!has_ended(known(pointer, "mbarrier_ready", site), parity)) {
    block.running->site = site;
    // Lanes ask at different times: one hears no, the next, after others have run, yes.
    if (one_in(4)) return false;
    let_others_run(true);
    if (!has_ended(known(pointer, "mbarrier_ready", site), parity)) return false;
  }
  watch::waited(shared_offset(pointer));
  return true;
}

void bulk_copy(void* to, const void* from, int bytes, Mbarrier* barrier, Site site) {
  if (bytes <= 0 || bytes % 16 != 0) fail(site, "bulk_copy of ", bytes, " bytes");
  const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from),
                  static_cast<uint32_t>(bytes), site};
  check_shared(to, copy.bytes, 16, "bulk_copy", site);
  check_source(copy, "bulk_copy");
  if (!known(barrier, "bulk_copy", site).announced) {
    fail(site, "bulk_copy: no mbarrier_init_done has followed the mbarrier's mbarrier_init");
  }
  watch::bulk_started(copy, shared_offset(barrier));
  take_away(copy);
  under_way.push_back({copy, shared_offset(barrier)});
  let_others_run(false);
}

}  // namespace resnet_fused::cuda
