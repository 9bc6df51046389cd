// Sees every access that kernels make to memory: they are compiled with -fsanitize=thread, whose
// calls end here and not in its library (callbacks.cpp). Whatever the order in which threads run,
// it is an error, with both lines,
//
//   - to read or write shared memory that another thread writes, or to write what another one
//     reads, with no barrier between that tells the one of the other,
//   - to touch what an asynchronous copy writes before its wait, or to write what a wgmma reads,
//   - to read shared memory that nobody has written,
//   - for wgmma to read, or for a bulk copy to write, what a thread wrote and did not fence_async
//     before the barrier,
//   - to read or write global memory that another thread of the grid has written.
//
// Each thread has a vector of clocks: how far it knows all others; barriers join them. Each byte
// has its last writer with the writer's clock, and the last reader of each warp. (Flanagan, Freund:
// "FastTrack", PLDI 2009.) mbarriers and warpgroups have clocks like threads: for bulk copies and
// for wgmma. Not seen: another lane's earlier read of the same byte by the same warp; reads of
// global memory before a write of another thread; memcpy of more than a few bytes.

#ifdef RESNET_FUSED_WATCH

#include "watch.h"

#include <algorithm>
#include <array>
#include <unordered_map>

#include "accesses.h"

namespace resnet_fused::cuda::on_cpu::watch {
namespace {

constexpr int kMostBarriers = 64, kWarpgroups = kMostThreads / kWarpgroup;
constexpr int kReaders = kMostThreads / kWarp + kWarpgroups;
constexpr uint32_t kPending = UINT32_MAX >> 5;  // later than all clocks: not waited for

using Clocks = std::vector<uint32_t>;

struct Cell {
  uint32_t age;      // of the block that used it last: otherwise it is empty
  int32_t writer;    // -1: nobody
  uint32_t written;  // the writer's clock
  uint64_t readers;  // which of `reads` are there
  Site write, read;
  uint32_t reads[kReaders];  // clock << 5 | lane, by warp, then by warpgroup for wgmma
};

Cell cells[kMostShared];
uint32_t age;
int width, first_barrier, first_warpgroup;
std::vector<Clocks> clocks, fences;  // of threads
struct Messages {
  int agent;
  Clocks arrived, ended, arrived_fences, ended_fences;
};
std::unordered_map<uint32_t, Messages> messages;  // of mbarriers, by offset
std::vector<uint32_t> agents;                     // the own clocks of mbarriers and warpgroups

int self() {
  return block.running->number;
}

void join(Clocks& to, const Clocks& from) {
  for (int i = 0; i < width; ++i) to[i] = std::max(to[i], from[i]);
}

Cell& cell(uint32_t offset) {
  Cell& it = cells[offset];
  if (it.age != age) {
    it.age = age;
    it.writer = -1;
    it.readers = 0;
  }
  return it;
}

bool knows(int thread, int writer, uint32_t clock) {
  return writer == thread ? clock != kPending : clocks[thread][writer] >= clock;
}

std::string name_of(int writer) {
  if (writer < block.size) return "thread " + std::to_string(writer);
  return writer < first_warpgroup ? "a bulk_copy" : "a wgmma";
}

[[noreturn]] void conflict(uint32_t offset, const char* verb, Site here, int other, uint32_t clock,
                           const char* other_verb, Site there) {
  fail(here, verb, " byte ", offset, " of shared memory, which ", name_of(other),
       clock == kPending ? " still " : " ", other_verb, " (", place(there),
       clock == kPending ? "): it was not waited for" : ") with no barrier between");
}

void check_write(const Cell& it, uint32_t offset, const char* verb, Site site) {
  const int me = self();
  if (it.writer >= 0 && !knows(me, it.writer, it.written)) {
    conflict(offset, verb, site, it.writer, it.written, "writes", it.write);
  }
  for (uint64_t left = it.readers; left != 0; left &= left - 1) {
    const int group = __builtin_ctzll(left);
    const uint32_t clock = it.reads[group] >> 5;
    const int reader = group < kMostThreads / kWarp
                           ? group * kWarp + static_cast<int>(it.reads[group] % kWarp)
                           : first_warpgroup + group - kMostThreads / kWarp;
    if (!knows(me, reader, clock)) conflict(offset, verb, site, reader, clock, "reads", it.read);
  }
}

void check_read(const Cell& it, uint32_t offset, Site site) {
  if (it.writer < 0) {
    fail(site, "reads byte ", offset, " of shared memory, which nobody has written");
  }
  if (!knows(self(), it.writer, it.written)) {
    conflict(offset, "reads", site, it.writer, it.written, "writes", it.write);
  }
}

void written(Cell& it, int writer, uint32_t clock, Site site) {
  it.writer = writer;
  it.written = clock;
  it.write = site;
  it.readers = 0;
}

void read_by(Cell& it, int group, uint32_t clock, int lane, Site site) {
  it.readers |= uint64_t{1} << group;
  it.reads[group] = clock << 5 | static_cast<uint32_t>(lane);
  it.read = site;
}

Messages& messages_of(uint32_t barrier) {
  const auto [found, is_new] = messages.try_emplace(barrier);
  if (is_new) {
    if (messages.size() > kMostBarriers) stop("more mbarriers than the watcher has clocks for");
    const Clocks none(width, 0);
    found->second = {first_barrier + static_cast<int>(messages.size()) - 1, none, none, none, none};
  }
  return found->second;
}

void tick(int thread) {
  ++clocks[thread][thread];
}

int own_warpgroup() {
  return self() / kWarpgroup;
}

// The writer of each byte of global memory, since the grid started; in pieces of 16 bytes.
struct Writer {
  const char* code = nullptr;  // nullptr: nobody
  uint32_t block, clock;
  int thread;
};
std::unordered_map<uintptr_t, std::array<Writer, 16>> global_writers;

void access_global(uintptr_t address, uint32_t bytes, bool writes, Site site) {
  const int me = self();
  const uint32_t own_block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  for (uintptr_t at = address; at < address + bytes;) {
    const uintptr_t end = std::min(address + bytes, (at / 16 + 1) * 16);
    const auto found = global_writers.find(at / 16);
    if (found == global_writers.end() && !writes) {
      at = end;
      continue;
    }
    auto& piece = found == global_writers.end() ? global_writers[at / 16] : found->second;
    for (; at < end; ++at) {
      Writer& by = piece[at % 16];
      if (by.code != nullptr && (by.block != own_block || !knows(me, by.thread, by.clock))) {
        fail(site, writes ? "writes" : "reads", " global memory that thread ", by.thread,
             " of block ", by.block, " writes (", place(site_of(by.code)), ")");
      }
      if (writes) by = {site.file, own_block, clocks[me][me], me};
    }
  }
}

}  // namespace

void access(const void* pointer, uint32_t bytes, bool writes, Site site) {
  if (block.running == nullptr || block.running->fiber.owns(pointer)) return;
  const auto* const address = static_cast<const unsigned char*>(pointer);
  const unsigned char* const shared = shared_memory();
  if (address < shared || address >= shared + kMostShared) {
    access_global(reinterpret_cast<uintptr_t>(pointer), bytes, writes, site);
    return;
  }
  const uint32_t offset = shared_offset(pointer);
  if (offset + bytes > shared_bytes) {
    fail(site, writes ? "writes" : "reads", " byte ", offset, " of ", shared_bytes,
         " bytes of shared memory");
  }
  const int me = self();
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Cell& it = cell(i);
    if (writes) {
      check_write(it, i, "writes", site);
      written(it, me, clocks[me][me], site);
    } else {
      check_read(it, i, site);
      read_by(it, me / kWarp, clocks[me][me], me % kWarp, site);
    }
  }
}

void start_grid() {
  global_writers.clear();
}

void start_block() {
  ++age;
  first_barrier = block.size;
  first_warpgroup = first_barrier + kMostBarriers;
  width = first_warpgroup + kWarpgroups;
  clocks.assign(static_cast<size_t>(block.size), Clocks(width, 0));
  fences = clocks;
  for (int i = 0; i < block.size; ++i) clocks[i][i] = 1;
  messages.clear();
  agents.assign(kMostBarriers + kWarpgroups, 0);
}

void met(const std::vector<Thread*>& threads) {
  Clocks all(width, 0), all_fences(width, 0);
  for (const Thread* thread : threads) {
    join(all, clocks[thread->number]);
    join(all_fences, fences[thread->number]);
  }
  for (const Thread* thread : threads) {
    clocks[thread->number] = all;
    fences[thread->number] = all_fences;
    tick(thread->number);
  }
}

void initialised(uint32_t barrier, Site site) {
  access(shared_memory() + barrier, sizeof(Mbarrier), true, site);
}

void used(uint32_t barrier, Site site) {
  access(shared_memory() + barrier, sizeof(Mbarrier), false, site);
}

void arrived(uint32_t barrier) {
  Messages& it = messages_of(barrier);
  join(it.arrived, clocks[self()]);
  join(it.arrived_fences, fences[self()]);
  tick(self());
}

void phase_ended(uint32_t barrier) {
  Messages& it = messages_of(barrier);
  join(it.ended, it.arrived);
  join(it.ended_fences, it.arrived_fences);
}

void waited(uint32_t barrier) {
  const Messages& it = messages_of(barrier);
  join(clocks[self()], it.ended);
  join(fences[self()], it.ended_fences);
}

void copy_started(const Copy& copy) {
  const uint32_t start = shared_offset(copy.to);
  for (uint32_t i = start; i < start + copy.bytes; ++i) {
    Cell& it = cell(i);
    check_write(it, i, "copies to", copy.site);
    written(it, self(), kPending, copy.site);
  }
}

void copy_done(const Copy& copy) {
  const uint32_t start = shared_offset(copy.to);
  for (uint32_t i = start; i < start + copy.bytes; ++i) cell(i).written = clocks[self()][self()];
}

namespace {

// What is done by asynchronous hardware with a byte that a thread wrote.
void check_fence(const Cell& it, uint32_t offset, const char* verb, Site site) {
  if (it.writer < 0 || it.writer >= first_barrier) return;
  if (fences[self()][it.writer] >= it.written) return;
  fail(site, verb, " byte ", offset, " of shared memory, which ", name_of(it.writer), " wrote (",
       place(it.write), ") with no fence_async and barrier after it");
}

}  // namespace

void bulk_started(const Copy& copy, uint32_t barrier) {
  const uint32_t start = shared_offset(copy.to);
  const int agent = messages_of(barrier).agent;
  for (uint32_t i = start; i < start + copy.bytes; ++i) {
    Cell& it = cell(i);
    check_write(it, i, "copies to", copy.site);
    check_fence(it, i, "bulk_copy to", copy.site);
    written(it, agent, kPending, copy.site);
  }
}

void bulk_done(const Copy& copy, uint32_t barrier) {
  Messages& it = messages_of(barrier);
  const uint32_t clock = ++agents[it.agent - first_barrier];
  it.arrived[it.agent] = clock;
  const uint32_t start = shared_offset(copy.to);
  for (uint32_t i = start; i < start + copy.bytes; ++i) cell(i).written = clock;
}

void fenced() {
  fences[self()][self()] = clocks[self()][self()];
  tick(self());
}

void read_by_ldmatrix(uint32_t offset, uint32_t bytes, Site site) {
  access(shared_memory() + offset, bytes, false, site);
}

void product_checked(uint32_t offset, uint32_t bytes, Site site) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    const Cell& it = cell(i);
    check_read(it, i, site);
    check_fence(it, i, "wgmma reads", site);
  }
}

void product_started(uint32_t offset, uint32_t bytes, Site site) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    read_by(cell(i), kMostThreads / kWarp + own_warpgroup(), kPending, 0, site);
  }
}

void product_done(uint32_t offset, uint32_t bytes) {
  const uint32_t clock = agents[kMostBarriers + own_warpgroup()] + 1;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Cell& it = cell(i);
    read_by(it, kMostThreads / kWarp + own_warpgroup(), clock, 0, it.read);
  }
}

void group_done() {
  ++agents[kMostBarriers + own_warpgroup()];
}

void group_waited() {
  clocks[self()][first_warpgroup + own_warpgroup()] = agents[kMostBarriers + own_warpgroup()];
}

}  // namespace resnet_fused::cuda::on_cpu::watch

#endif
