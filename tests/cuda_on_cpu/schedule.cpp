// Which thread of a block runs next, how threads wait for each other, and what is said when they
// cannot go on.
//
// The ready thread of the highest rank runs until it has to wait. Strict ranks, and not turns, make
// warps run far apart, which is what shows a missing barrier. A random order gives warps random
// ranks and other ones now and then. Asynchronous copies arrive as late as they can, or at random.

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace resnet_fused::cuda::on_cpu {

Block block;
Settings settings;

namespace {

constexpr int kWords = kMostThreads / 64;
constexpr int kMostVainRounds =
    10000;  // of threads that only look whether others have done something

// Threads by rank.
struct Ranks {
  uint64_t words[kWords] = {};

  void add(int rank) { words[rank / 64] |= uint64_t{1} << (rank % 64); }
  int take() {  // the first, or -1
    for (int i = 0; i < kWords; ++i) {
      if (words[i] == 0) continue;
      const int bit = __builtin_ctzll(words[i]);
      words[i] &= words[i] - 1;
      return i * 64 + bit;
    }
    return -1;
  }
};

Ranks ready, looking;  // `looking`: may run when no other can
Thread* by_rank[kMostThreads];
int vain_rounds;

bool chance(int one_in) {
  return settings.order == Order::random && block.random() % static_cast<uint32_t>(one_in) == 0;
}

void rank_threads() {
  std::vector<int> warps(block.warps);
  std::iota(warps.begin(), warps.end(), 0);
  bool backwards = settings.order == Order::reverse;
  if (settings.order == Order::random) {
    std::shuffle(warps.begin(), warps.end(), block.random);
    backwards = block.random() % 2 != 0;
  } else if (backwards) {
    std::reverse(warps.begin(), warps.end());
  }
  int rank = 0;
  for (const int warp : warps) {
    const int first = warp * kWarp, end = std::min(first + kWarp, block.size);
    for (int i = first; i < end; ++i) {
      Thread& thread = *block.threads[backwards ? first + end - 1 - i : i];
      thread.rank = rank;
      by_rank[rank++] = &thread;
    }
  }
}

void rank_again() {
  std::vector<Thread*> were_ready, were_looking;
  for (int rank; (rank = ready.take()) >= 0;) were_ready.push_back(by_rank[rank]);
  for (int rank; (rank = looking.take()) >= 0;) were_looking.push_back(by_rank[rank]);
  rank_threads();
  for (const Thread* thread : were_ready) ready.add(thread->rank);
  for (const Thread* thread : were_looking) looking.add(thread->rank);
}

std::string numbers(const uint3& at) {
  std::ostringstream text;
  text << "(" << at.x << ", " << at.y << ", " << at.z << ")";
  return text.str();
}

// Where all threads are that have not finished.
std::string deadlock() {
  std::map<std::string, std::pair<const Thread*, int>> places;
  int finished = 0;
  for (int i = 0; i < block.size; ++i) {
    const Thread& thread = *block.threads[i];
    if (thread.finished) {
      ++finished;
      continue;
    }
    std::string what = thread.waits == nullptr ? "others" : thread.waits;
    if (thread.barrier != nullptr) what += " " + state_of(*thread.barrier, thread.parity);
    auto& [first, count] = places[what + " (" + place(thread.site) + ")"];
    if (count++ == 0) first = &thread;
  }
  std::ostringstream text;
  text << "block " << numbers(blockIdx) << ": deadlock: ";
  for (const auto& [what, threads] : places) {
    text << threads.second << " threads, the first " << numbers(threads.first->index)
         << ", wait for " << what << "; ";
  }
  text << finished << " threads have finished";
  return text.str();
}

// The next to run, or nullptr: all have finished, or an error ends the block.
Thread* next() {
  if (chance(8) && copies_under_way()) deliver_one();
  for (;;) {
    if (!block.error.empty()) return nullptr;
    int rank = ready.take();
    if (rank >= 0) {
      vain_rounds = 0;
      return by_rank[rank];
    }
    if (block.alive == 0) return nullptr;
    const bool delivers = copies_under_way();
    if (delivers) deliver_one();
    rank = looking.take();
    if (rank >= 0 && vain_rounds < kMostVainRounds) {
      ready.add(rank);
      while ((rank = looking.take()) >= 0) ready.add(rank);
      rank = ready.take();
      ++vain_rounds;
      return by_rank[rank];
    }
    if (!delivers) {
      block.error = deadlock();
      return nullptr;
    }
  }
}

// Runs whoever is next; the running thread has said what it waits for.
void go_on() {
  Thread& self = *block.running;
  Thread* const other = next();
  if (other == &self) return;
  block.running = other;
  if (other == nullptr) {
    Fiber::go(self.fiber, *block.caller);
  } else {
    threadIdx = other->index;
    Fiber::go(self.fiber, other->fiber);
  }
}

[[noreturn]] void fiber_entry() {
  Thread& self = *block.running;
  Fiber::arrived(self.fiber);
  block.entry(block.kernel);
  finish_copies(self);
  finish_products(self);
  self.finished = true;
  --block.alive;
  go_on();
  __builtin_unreachable();
}

void run_block() {
  prepare_shared(shared_bytes);
  prepare_barriers();
  prepare_products();
  for (Meeting& meeting : block.named) meeting.here.clear();
  for (Meeting& meeting : block.warp) meeting.here.clear();
  block.all.here.clear();
  ready = looking = Ranks();
  vain_rounds = 0;
  rank_threads();
  for (int i = 0; i < block.size; ++i) {
    Thread& thread = *block.threads[i];
    thread.fiber.start(fiber_entry, !thread.finished);
    thread.finished = false;
    thread.waits = nullptr;
    thread.barrier = nullptr;
    start_copies(thread);
    start_products(thread);
    ready.add(thread.rank);
  }
  block.alive = block.size;
  Thread* const first = by_rank[ready.take()];
  block.running = first;
  threadIdx = first->index;
  Fiber::go(*block.caller, first->fiber);
  block.running = nullptr;
  if (block.error.empty()) finish_barriers();
  if (block.error.empty()) check_red_zones();
  if (!block.error.empty()) {
    throw std::runtime_error("cuda_on_cpu: " + std::exchange(block.error, std::string()));
  }
}

void make_threads(const dim3& size) {
  block.size = static_cast<int>(size.x * size.y * size.z);
  block.warps = (block.size + kWarp - 1) / kWarp;
  for (int i = 0; i < block.size; ++i) {
    if (i == static_cast<int>(block.threads.size())) {
      block.threads.push_back(new Thread());
      block.threads[i]->finished = true;
    }
    const uint32_t n = static_cast<uint32_t>(i);
    block.threads[i]->number = i;
    block.threads[i]->index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
  }
}

}  // namespace

void set_order(const std::string& text) {
  if (text == "forward" || text == "reverse") {
    settings.order = text == "forward" ? Order::forward : Order::reverse;
    return;
  }
  const std::string prefix = "random:";
  const std::string seed =
      text.substr(0, prefix.size()) == prefix ? text.substr(prefix.size()) : "";
  if (seed.empty() || seed.find_first_not_of("0123456789") != std::string::npos) {
    throw std::runtime_error("order must be forward, reverse or random:SEED, got '" + text + "'");
  }
  settings.order = Order::random;
  settings.seed = static_cast<uint32_t>(std::stoull(seed));
}

std::string place(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string thread_name(const Thread& thread) {
  return "block " + numbers(blockIdx) + ", thread " + numbers(thread.index);
}

void stop(const std::string& error) {
  Thread& self = *block.running;
  block.error = error;
  block.running = nullptr;
  Fiber::go(self.fiber, *block.caller);
  __builtin_unreachable();
}

void wait_for(const char* what, Site site) {
  block.running->waits = what;
  block.running->site = site;
  go_on();
}

void wake(Thread& thread) {
  ready.add(thread.rank);
}

void let_others_run(bool now) {
  Thread& self = *block.running;
  if (now) {
    looking.add(self.rank);
  } else if (chance(32)) {
    rank_again();
    ready.add(self.rank);
  } else {
    return;
  }
  self.waits = nullptr;
  go_on();
}

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
  block.running->waits = nullptr;
  go_on();
}

}  // namespace resnet_fused::cuda::on_cpu

namespace resnet_fused::cuda {

using namespace on_cpu;

const char* launch_on_cpu(dim3 grid, dim3 size, size_t bytes, void (*thread)(const void* kernel),
                          const void* kernel) {
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 ||
      grid.z > 65535 || threads == 0 || threads > kMostThreads || size.z > 64) {
    return "invalid configuration argument";
  }
  if (bytes > kMostShared) return "invalid argument";
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  Fiber caller;
  block.caller = &caller;
  block.entry = thread;
  block.kernel = kernel;
  make_threads(size);
  gridDim = grid;
  blockDim = size;
  shared_bytes = bytes;
  const int64_t all = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  const int64_t first = std::min(settings.first_block, all);
  const int64_t last = settings.last_block < 0 ? all : std::min(settings.last_block, all);
  for (int64_t i = first; i < last; ++i) {
    const int64_t n = settings.order == Order::reverse ? first + last - 1 - i : i;
    blockIdx = {static_cast<uint32_t>(n % grid.x), static_cast<uint32_t>(n / grid.x % grid.y),
                static_cast<uint32_t>(n / grid.x / grid.y)};
    block.random.seed(settings.seed * 1000003u + static_cast<uint32_t>(n));
    run_block();
  }
  return nullptr;
}

int lane_number() {
  return block.running->number % kWarp;
}

void sync_block(Site site) {
  if (join(block.all, "sync_block", site, block.size, true)) leave(block.all);
}

void sync_warp(Site site) {
  if (join(own_warp(), "sync_warp", site, warp_size(), true)) leave(own_warp());
}

void sync_some(int barrier, int threads, Site site) {
  if (barrier < 1 || barrier > 15) fail(site, "sync_some of barrier ", barrier, ", not 1 to 15");
  if (threads <= 0 || threads % kWarp != 0 || threads > block.size) {
    fail(site, "sync_some of ", threads, " threads in a block of ", block.size);
  }
  Meeting& meeting = block.named[barrier];
  if (join(meeting, "sync_some", site, threads, false)) leave(meeting);
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
